"""Estimates with their confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TYPE_CHECKING

from scipy import stats

from lightning_mnn.landscape import tolerances

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]


class Stop(StrEnum):
    """Why no more samples were taken; of several estimates together, the last in this order.

    Attributes:
        CLOSED_FORM: none were needed.
        APPROXIMATED: none were asked for: the value is an approximation without an error bar.
        TARGET: a pilot found that so many reach the target of the standard error.
        LIMIT: the largest number that is allowed is less than that.
    """

    CLOSED_FORM = auto()
    APPROXIMATED = auto()
    TARGET = auto()
    LIMIT = auto()


@dataclass
class SampleCount:
    """Counts the samples of an estimate while it is computed.

    Attributes:
        samples: number of them, pilots included.
        stopped: why there are no more.

    >>> count = SampleCount()
    >>> count.add(100, Stop.LIMIT)
    >>> count.add(50, Stop.TARGET)
    >>> count.samples, str(count.stopped)
    (150, 'limit')
    """

    samples: int = 0
    stopped: Stop = Stop.CLOSED_FORM

    def add(self, samples: int, stopped: Stop) -> None:
        """Add a part of the estimate."""
        self.samples += samples
        self.stopped = max(self.stopped, stopped, key=list(Stop).index)


@dataclass(frozen=True)
class LogEstimate:
    """An estimate of a logarithm.

    Attributes:
        value: natural logarithm; a float, with leading axes a tensor on the CPU.
        standard_error: of the value, in nats: value ± 1.96 standard errors covers 95 %. For a closed form, its rounding
            error.
        samples: number of samples, pilots included; with leading axes, of all together. A sample is a point after all
            of its coordinates moved once.
        stopped: why there are no more; with leading axes, for the worst of them.
    """

    value: float | Tensor
    standard_error: float | Tensor
    samples: int
    stopped: Stop


@dataclass(frozen=True)
class Proportion:
    """A probability from the hits among independent trials, with its 95 % confidence interval (Clopper and Pearson).

    Attributes:
        hits: number of hits.
        trials: number of all trials.
        low: lower end of the interval, with undecided trials counted as misses; 0 if there are no hits.
        high: upper end of the interval, with undecided trials counted as hits; 1 if all are hits.

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
        """The proportion of `hits` among `trials`, with some other trials `undecided`.

        Raises:
            ValueError: there are no trials, or hits and undecided are more than the trials.
        """
        possible = hits + undecided
        if trials < 1 or not 0 <= hits <= possible <= trials:
            raise ValueError(f"hits ({hits}) and undecided ({undecided}) must be among at least 1 trials, got {trials}")
        tail = (1 - confidence) / 2
        low = float(stats.beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
        high = float(stats.beta.ppf(1 - tail, possible + 1, trials - possible)) if possible < trials else 1.0
        return cls(hits, trials, low, high)

    @property
    def value(self) -> float:
        """The fraction of hits."""
        return self.hits / self.trials


@dataclass(frozen=True)
class Estimate:
    """A probability from independent runs, in natural logarithms.

    Attributes:
        log_value: log of the mean over the runs, which is unbiased; −inf if the event occurred in no run.
        log_low: log of the lower end of the 95 % confidence interval.
        log_high: log of its upper end.
    """

    log_value: float
    log_low: float
    log_high: float

    @classmethod
    def of_runs(cls, log_runs: Tensor) -> Estimate:
        """A probability from the logarithms of unbiased estimates of independent runs, (R,), with at least one finite.

        The interval is Cox's for the mean of a lognormal variable, with quantiles of Student's t (Olsson 2005, J. Stat.
        Educ. 13(1)), because products of many fractions are close to lognormal. If some runs did not reach the event,
        the interval is the product of two intervals of 97.5 %: that of the fraction of runs that did, and that of their
        mean. If all runs are equal, they count as trials that are all hits.
        """
        logs = log_runs[log_runs.isfinite()].numpy()
        log_value = float(log_runs.logsumexp(0)) - math.log(len(log_runs))
        if len(logs) == 1:
            return cls(log_value, -math.inf, 0.0)
        variance = float(logs.var(ddof=1))
        if len(logs) == len(log_runs) and variance == 0:
            log_lower = math.log(Proportion.of(len(logs), len(logs)).low)
            return cls(log_value, log_value + log_lower, min(log_value - log_lower, 0.0))
        confidence, log_low, log_high = tolerances.INTERVAL_CONFIDENCE, 0.0, 0.0
        if len(logs) < len(log_runs):
            alive = Proportion.of(len(logs), len(log_runs), confidence=tolerances.JOINT_INTERVAL_CONFIDENCE)
            confidence = tolerances.JOINT_INTERVAL_CONFIDENCE
            log_low, log_high = math.log(alive.low), math.log(alive.high)
        centre = float(logs.mean()) + variance / 2
        spread = math.sqrt(variance / len(logs) + variance**2 / (2 * (len(logs) - 1)))
        spread *= float(stats.t.ppf((1 + confidence) / 2, len(logs) - 1))
        return cls(
            log_value, min(centre - spread + log_low, log_value), min(max(centre + spread + log_high, log_value), 0.0)
        )

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
        """Standard error of `log_value`, so that ± 1.96 of it covers the interval; infinite if the lower end is 0."""
        if self.log_low == -math.inf:
            return math.inf
        return max(self.log_high - self.log_value, self.log_value - self.log_low) / float(stats.norm.ppf(0.975))
