"""When a callback acts: a plain function of the step or epoch, the same on any machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_mnn.utilities.validation import (
    one_of,
    positive_integer,
    real_number,
)

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Schedule:
    """Counts of epochs or steps at which to act: every k-th, or each time the count has grown by a factor.

    Attributes:
        every: linear: act at k, 2k, 3k, …
        growth: logarithmic: act at ⌈growth⁰⌉, ⌈growth¹⌉, ⌈growth²⌉, … (2 gives 1, 2, 4, 8, …).
        unit: "epoch" or "step" (optimiser steps).

    Raises:
        ValueError: not exactly one of ``every`` and ``growth``, a value out of range, or an unknown unit.

    >>> [n for n in range(1, 20) if Schedule(every=5).due(n)]
    [5, 10, 15]
    >>> [n for n in range(1, 20) if Schedule(growth=2.0).due(n)]
    [1, 2, 4, 8, 16]
    """

    every: int | None = None
    growth: float | None = None
    unit: str = "epoch"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if (self.every is None) == (self.growth is None):
            raise ValueError(f"give one of every= and growth=, got every={self.every} and growth={self.growth}")
        if self.every is not None:
            positive_integer("every", self.every)
        if self.growth is not None:
            real_number("growth", self.growth, above=1)
        one_of("unit", self.unit, ("epoch", "step"))

    def due(self, count: int) -> bool:
        """Whether to act when ``count`` epochs or steps are done."""
        if count < 1:
            return False
        if self.every is not None:
            return count % self.every == 0
        assert self.growth is not None  # noqa: S101 (for the type checker)
        nearest = math.floor(math.log(count) / math.log(self.growth))
        return any(math.ceil(self.growth**power - _ROUNDING) == count for power in (nearest - 1, nearest, nearest + 1))

    def until_due(self, done: int) -> int:
        """Number of epochs or steps, when ``done`` of them are done, until the next at which to act.

        >>> Schedule(every=5).until_due(3), Schedule(growth=2.0).until_due(8)
        (2, 8)
        """
        if self.every is not None:
            return self.every - done % self.every
        assert self.growth is not None  # noqa: S101 (for the type checker)
        power = math.floor(math.log(max(done, 1)) / math.log(self.growth))
        while (count := math.ceil(self.growth**power - _ROUNDING)) <= done:
            power += 1
        return count - done
