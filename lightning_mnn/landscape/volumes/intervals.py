"""Estimates with their confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy import stats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class LogEstimate:
    """An estimate of a logarithm.

    Attributes:
        value: natural logarithm; a float, with leading axes a tensor on the CPU.
        standard_error: of the value, in nats: value ± 1.96 of it covers 95 %. A closed form has its rounding error.
    """

    value: float | Tensor
    standard_error: float | Tensor


@dataclass(frozen=True)
class Proportion:
    """A probability, by the hits among independent trials, with its 95 % confidence interval (Clopper and Pearson).

    Attributes:
        hits: trials that hit.
        trials: all of them.
        low: 0 where nothing hit.
        high: 1 where all hit. It counts the trials that were not decided as hits, as `low` counts them as misses.

    >>> Proportion.of(0, 100).high < 0.037
    True
    >>> Proportion.of(3, 10).value
    0.3
    """

    hits: int
    trials: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, trials: int, undecided: int = 0, *, confidence: float = 0.95) -> Proportion:
        """The proportion of `hits` among `trials`, of which others are `undecided`.

        Raises:
            ValueError: no trials, or more hits than trials.
        """
        most = hits + undecided
        if trials < 1 or not 0 <= hits <= most <= trials:
            raise ValueError(f"hits ({hits}) and undecided ({undecided}) must be among at least 1 trials, got {trials}")
        tail = (1 - confidence) / 2
        low = float(stats.beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
        high = float(stats.beta.ppf(1 - tail, most + 1, trials - most)) if most < trials else 1.0
        return cls(hits, trials, low, high)

    @property
    def value(self) -> float:
        """The share of hits."""
        return self.hits / self.trials


@dataclass(frozen=True)
class Estimate:
    """A probability by independent runs, in natural logarithms.

    Attributes:
        log_value: of the mean over the runs, which is unbiased; −inf where no run met the event.
        log_low: of the lower end of the 95 % confidence interval.
        log_high: of its upper end.
    """

    log_value: float
    log_low: float
    log_high: float

    @property
    def value(self) -> float:
        """The probability itself, which may underflow."""
        return math.exp(self.log_value)

    @property
    def low(self) -> float:
        """Lower end of the 95 % confidence interval of the probability."""
        return math.exp(self.log_low)

    @property
    def high(self) -> float:
        """Upper end of the 95 % confidence interval of the probability."""
        return math.exp(self.log_high)

    @property
    def standard_error(self) -> float:
        """That of `log_value` whose ± 1.96 covers the interval; infinite where its lower end is 0."""
        if self.log_low == -math.inf:
            return math.inf
        return max(self.log_high - self.log_value, self.log_value - self.log_low) / float(stats.norm.ppf(0.975))
