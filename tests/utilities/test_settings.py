"""Groups of settings, and the single arguments that they replaced."""

import inspect
from dataclasses import dataclass

import pytest

from lightning_mnn.utilities.settings import accepts_fields_of, settings_or_defaults
from lightning_mnn.utilities.validation import ArgumentError, positive_integer


@dataclass(frozen=True)
class Moves:
    number: int = 3
    sizes: tuple[float, ...] | None = None

    def __post_init__(self):
        positive_integer("number", self.number)


@accepts_fields_of(moves=Moves)
class Walk:
    def __init__(self, start: float = 0.0, *, moves: Moves | None = None) -> None:
        self.start, self.moves = start, settings_or_defaults("moves", moves, Moves)


class Longer(Walk):
    def __init__(self, **options):
        super().__init__(**options)


def test_a_group_needs_no_single_argument():
    assert Walk(2.0, moves=Moves(5)).moves == Moves(5)
    assert Walk().moves == Walk(number=None, sizes=None).moves == Moves()


@pytest.mark.parametrize("kind", [Walk, Longer])
def test_a_single_argument_warns_and_changes_its_group(kind):
    with pytest.warns(DeprecationWarning, match=r"Walk\(number=…\) is now Walk\(moves=Moves\(number=…\)\)"):
        assert kind(number=7, moves=Moves(5, (1.0,))).moves == Moves(7, (1.0,))


@pytest.mark.filterwarnings("ignore:Walk:DeprecationWarning")
def test_wrong_values_are_named():
    with pytest.raises(ArgumentError, match="number must be at least 1 and a whole number, got 0"):
        Walk(number=0)
    for options in ({"moves": 3}, {"moves": 3, "number": 2}):
        with pytest.raises(ArgumentError, match=r"moves must be a Moves, got 3: give Moves\(…\), or leave it out"):
            Walk(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'numbers'"):
        Walk(numbers=2)


def test_the_signature_has_both():
    assert list(inspect.signature(Walk).parameters) == ["start", "moves", "number", "sizes"]
