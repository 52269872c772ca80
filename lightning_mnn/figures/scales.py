"""Axes and colours for the values of a column of a sweep's table, whether numbers or names."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from lightning_mnn.figures.style import COLORS, literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

Row = dict[str, Any]

MAX_NAMED_VALUES = 8  # values that an axis or a legend names one by one
MIN_LOG_RATIO = 30  # ratio of the largest to the smallest value from which on an axis is logarithmic
REPETITION = "seed"  # its values are a sample and have no order


@dataclass(frozen=True)
class Scale:
    """An axis of swept values: the key, its values in order, their names and places, and the kind of axis."""

    key: str
    values: tuple[str, ...]
    names: tuple[str, ...]
    places: tuple[float, ...]
    kind: str = "categories"

    def index(self, row: Row) -> int:
        """The index of a row's value."""
        return self.values.index(identity(row.get(self.key))) if self.key else 0


def scale_of(rows: Sequence[Row], key: str) -> Scale:
    """The layout of a key's values: numbers by their size, everything else side by side in the order of the command."""
    numbers, values = numbers_of(rows, key), distinct(rows, key) if key else {"": ""}
    if numbers is not None and len(numbers) > 1:
        names = _names([values[value] for value in numbers])
        return Scale(key, tuple(numbers), names, tuple(numbers.values()), _spacing(list(numbers.values())))
    return Scale(key, tuple(values), _names(list(values.values())), tuple(map(float, range(len(values)))))


def _spacing(values: Sequence[float]) -> str:
    """The kind of axis that spaces increasing values most evenly; with zero, "symlog" from its smallest positive value.

    >>> _spacing([1, 2, 3]), _spacing([1e-3, 1e-2, 1e-1]), _spacing([0.0, 0.01, 0.1]), _spacing([-1, 0, 1])
    ('linear', 'log', 'symlog', 'linear')
    """
    positive = [value for value in values if value > 0]
    if values[0] < 0 or len(positive) < 2:
        return "linear"

    def unevenness(places: Sequence[float]) -> float:
        gaps = [b - a for a, b in pairwise(places)]
        return float(np.std(gaps) / np.mean(gaps))

    even = len(positive) == 2 and positive[1] / positive[0] < 10
    if even or (len(positive) > 2 and unevenness(positive) <= unevenness([math.log(value) for value in positive])):
        return "linear"
    return "log" if len(positive) == len(values) else "symlog"


def colors_of(scale: Scale) -> list[str]:
    """A colour for each value; many numbers get a continuous colour map."""
    count = len(scale.values)
    if scale.kind != "categories" and count > len(COLORS):
        return [to_hex(colormaps["viridis"](0.9 * place / (count - 1))) for place in range(count)]
    return [COLORS[place % len(COLORS)] for place in range(count)]


def draw_places(ax: Axes, x: Scale) -> bool:
    """Set up the axis of the swept values.

    Returns:
        Whether the values are categories side by side, so that there is space for dots beside each other.
    """
    if x.kind == "categories":
        name_places(ax, x.places, x.names)
        ax.set_xlim(-0.6, len(x.places) - 0.4)
        return True
    if x.kind == "symlog":
        least = min(value for value in x.places if value > 0)
        ax.set_xscale("symlog", linthresh=least, linscale=0.5)
    else:
        ax.set_xscale(x.kind)
    if len(x.places) <= MAX_NAMED_VALUES:
        ax.set_xticks(x.places, list(map(literal, x.names)))
        ax.xaxis.set_minor_locator(NullLocator())
    elif x.kind == "log":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.08)
    return False


def name_places(ax: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Label places on an axis: all, or every second, third, … if there are many; long names are slanted."""
    every = math.ceil(len(names) / 16)
    labels = [name if len(name) <= 16 else name[:15] + "…" for name in names[::every]]
    slanted: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(
        list(places)[::every],
        list(map(literal, labels)),
        **(slanted if max(map(len, labels)) * len(labels) > 45 else {}),
    )


def identity(value: Any) -> str:
    """A text that is the same for equal values, and different for others."""
    return json.dumps(value)


def distinct(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """The distinct values of a key in the order of the rows, keyed by their identity."""
    values = (row.get(key) for row in rows)
    return {identity(value): value for value in values}


def _names(values: Sequence[Any]) -> tuple[str, ...]:
    """Names of swept values in the figure; values whose short names would be equal are written in full.

    >>> _names([1.0, 1.00000001, 0.5]), _names(["null", None]), _names([0.1, 0.2])
    (('1.0', '1.00000001', '0.5'), ('"null"', 'null'), ('0.1', '0.2'))
    """
    shared = Counter(map(label_of, values))
    return tuple(label_of(value) if shared[label_of(value)] == 1 else identity(value) for value in values)


def label_of(value: Any) -> str:
    """The short name of a swept value.

    >>> label_of(0.001), label_of([20, 30]), label_of([20]), label_of(None), label_of(True)
    ('0.001', '20, 30', '20', 'null', 'true')
    """
    if isinstance(value, list):
        return ", ".join(map(label_of, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def number_in(value: Any) -> float | None:
    """A swept value, or the item of a list of one, as a number; None if it is not a finite number.

    >>> number_in([20]), number_in(float("inf")), number_in("20")
    (20.0, None, None)
    """
    if isinstance(value, list) and len(value) == 1:
        return number_in(value[0])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def numbers_of(rows: Sequence[Row], key: str) -> dict[str, float] | None:
    """A key's values in increasing order, keyed by identity; None if one is not a number or the key has no order."""
    if not key or key == REPETITION:
        return None
    found = {value: number_in(given) for value, given in distinct(rows, key).items()}
    numbers = {value: number for value, number in found.items() if number is not None}
    return dict(sorted(numbers.items(), key=lambda pair: pair[1])) if len(numbers) == len(found) else None
