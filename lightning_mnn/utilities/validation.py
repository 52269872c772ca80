"""Checks of arguments, shared by several parts of the package."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch


class ArgumentError(ValueError):
    """An argument has a value that cannot be used.

    Attributes:
        name: of the argument; an entry of a dictionary is written as ``optimizer.lr``.
        value: the value that was given.
        problem: what is wrong, or what is needed, as a phrase that follows the name.
        remedy: what to do, if the problem does not already state it.

    >>> print(ArgumentError("width", -1, "must be positive", "choose width=1 or more"))
    width must be positive, got -1: choose width=1 or more
    """

    def __init__(self, name: str, value: Any, problem: str, remedy: str = "") -> None:
        super().__init__(f"{name} {problem}, got {value!r}{': ' * bool(remedy)}{remedy}")
        self.name = name
        self.value = value
        self.problem = problem
        self.remedy = remedy

    @override
    def __reduce__(self) -> tuple[Any, ...]:  # so that it can be sent to another process
        return type(self), (self.name, self.value, self.problem, self.remedy)


class MisfitError(TypeError, ValueError):
    """An argument does not match the module or the data that it is used with."""


def positive_integer(name: str, value: Any) -> int:
    """The value as an int.

    Raises:
        ArgumentError: it is not a whole number of at least 1, or it is True.

    >>> positive_integer("width", 3)
    3
    >>> positive_integer("width", True)
    Traceback (most recent call last):
    lightning_mnn.utilities.validation.ArgumentError: width must be at least 1 and a whole number, got True
    """
    return whole_number(name, value, at_least=1)


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """The value as an int.

    Raises:
        ArgumentError: it is not a whole number of at least ``at_least``, or it is a bool.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ArgumentError(name, value, f"must be at least {at_least} and a whole number")
    return int(value)


def seed_number(name: str, value: Any) -> int:
    """A seed as an int.

    Raises:
        ArgumentError: it is not a whole number, or it is negative.

    >>> seed_number("seed", -1)
    Traceback (most recent call last):
    lightning_mnn.utilities.validation.ArgumentError: seed must not be negative, got -1: give a whole number, such as 0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentError(name, value, "must be a whole number", "give one, such as 0")
    if value < 0:
        raise ArgumentError(name, value, "must not be negative", "give a whole number, such as 0")
    return int(value)


def real_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    remedy: str = "",
) -> float:
    """The value as a float.

    Args:
        name: of the argument.
        value: of the argument.
        above: exclusive lower bound.
        at_least: inclusive lower bound.
        below: exclusive upper bound.
        at_most: inclusive upper bound.
        remedy: what the user should do, for the error message.

    Raises:
        ArgumentError: it is not a finite real number within the bounds, or it is a bool.

    >>> real_number("hold", 1.5, at_least=0, below=1)
    Traceback (most recent call last):
    lightning_mnn.utilities.validation.ArgumentError: hold must be a number, at least 0 and below 1, got 1.5
    """
    if is_real_number(value) and above < value < below and at_least <= value <= at_most:
        return float(value)
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    limits = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound))
    raise ArgumentError(name, value, f"must be a number{', ' * bool(limits)}{limits}", remedy)


def is_real_number(value: Any) -> bool:
    """Whether the value is a finite real number and not a bool."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """The value, after a check that it is one of the choices.

    Raises:
        ArgumentError: the value is none of the choices.

    >>> one_of("labels", "a", ("zero_one", None))
    Traceback (most recent call last):
    lightning_mnn.utilities.validation.ArgumentError: labels must be one of zero_one, null, got 'a'
    """
    known = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in known):
        names = ", ".join("null" if choice is None else str(choice) for choice in known)
        raise ArgumentError(name, value, f"must be one of {names}")
    return value


def truth_value(name: str, value: Any) -> bool:
    """The value, after a check that it is a bool.

    Raises:
        ArgumentError: the value is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ArgumentError(name, value, "must be true or false")
    return value


def check_memory(needed: float, what: str, sizes: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Check that there is enough memory: allocating too much can kill the process without a message.

    Args:
        needed: bytes that are needed at least.
        what: the object that needs them, in words.
        sizes: the arguments that determine the size; the error names the largest one.
        device: where the memory is; None: on the CPU, free swap space included.

    Raises:
        ArgumentError: less memory is free.

    >>> check_memory(1e18, "the weights", {"replicas": 10**15, "hidden_dims": [4]})
    Traceback (most recent call last):
    lightning_mnn.utilities.validation.ArgumentError: replicas needs 931,322,575 GiB for the weights, and ...
    """
    import torch  # noqa: PLC0415 (slow; the command's --help needs the rest of this module alone)

    from lightning_mnn.utilities.resources import free_memory, free_swap  # noqa: PLC0415

    free = free_memory(torch.device("cpu")) + free_swap() if device is None else free_memory(device)
    if needed > free:
        name = max(sizes, key=lambda size: max(sizes[size]) if isinstance(sizes[size], Sequence) else sizes[size])
        problem = f"needs {_gibibytes(needed)} for {what}, and {_gibibytes(free)} are free"
        raise ArgumentError(name, sizes[name], problem, "choose a smaller value, or a machine with more memory")


def _gibibytes(amount: float) -> str:
    return f"{amount / 2**30:,.0f} GiB" if amount >= 10 * 2**30 else f"{amount / 2**30:.1f} GiB"


def dtype_named(name: str) -> torch.dtype:
    """The dtype "float32" or "float64".

    Raises:
        ArgumentError: the name is another one.

    >>> dtype_named("float64")
    torch.float64
    """
    import torch  # noqa: PLC0415 (slow; the command's --help needs the rest of this module alone)

    dtypes = {"float32": torch.float32, "float64": torch.float64}
    return dtypes[one_of("dtype", name, dtypes)]
