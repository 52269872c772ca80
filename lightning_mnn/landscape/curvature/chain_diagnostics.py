"""Diagnostics of Markov chains: split R-hat, effective sample size, and standard errors from the chains' means.

Shapes: C chains, S steps; traces are (C, S).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from scipy import stats

if TYPE_CHECKING:
    from torch import Tensor


def split_r_hat(traces: Tensor) -> float:
    """R-hat of the chains' halves: √(variance of all / mean variance within); near 1 if chains agree and do not drift.

    Gelman et al., Bayesian Data Analysis (2013), section 11.4. Infinite for chains that stand still at different
    values, and for ones with less than four steps; 1 for chains that are all equal to one number.

    >>> split_r_hat(torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))) < 1.01
    True
    """
    halves = _halves(traces)
    if halves.shape[1] < 2:
        return math.inf
    steps = halves.shape[1]
    within, between = float(halves.var(1).mean()), float(halves.mean(1).var())
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt((steps - 1) / steps + between / within)


def effective_samples(traces: Tensor) -> float:
    """Number of independent samples whose mean has the variance of the chains' mean.

    C S / (1 + 2 Σ ρ_t) with autocorrelations of all halves of chains together, summed up to the first negative sum of
    two neighbours (Geyer 1992). Zero for chains that stand still.

    >>> noise = torch.randn(8, 2000, generator=torch.Generator().manual_seed(0))
    >>> 12_000 < effective_samples(noise) < 20_000
    True
    >>> slow = torch.stack([noise[:, k : k + 1900] for k in range(20)]).mean(0)  # each value is in 20 means
    >>> 500 < effective_samples(slow) < 1200
    True
    """
    halves = _halves(traces)
    steps = halves.shape[1]
    if steps < 2:
        return 0.0
    centred = halves - halves.mean(1, keepdim=True)
    within = float(halves.var(1).mean())
    total = within * (steps - 1) / steps + float(halves.mean(1).var())
    if not within > 0 or not math.isfinite(total):
        return 0.0
    spectrum = torch.fft.rfft(centred, n=2 * steps)
    covariances = torch.fft.irfft(spectrum.abs().square(), n=2 * steps)[:, :steps].mean(0) / steps
    correlations = 1 - (within * (steps - 1) / steps - covariances) / total
    pairs = correlations[: steps // 2 * 2].reshape(-1, 2).sum(1)
    negative = (pairs < 0).nonzero()
    last = int(negative[0]) if len(negative) else len(pairs)
    pairs = torch.cummin(pairs[:last], 0).values
    time = max(-1 + 2 * float(pairs.sum()), 1 / math.log10(max(halves.numel(), 10)))
    return halves.numel() / time


def error_of_mean(values: Tensor) -> float:
    """Standard error of the mean of independent values (C,), such that ± 1.96 of it covers 95 %, few chains included.

    Infinite for less than two values.
    """
    count = len(values)
    if count < 2:
        return math.inf
    factor = float(stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975))
    return factor * float(values.std()) / math.sqrt(count)


def drift(traces: Tensor) -> float:
    """Change of the mean from the first to the last third of the chains, in its standard errors.

    All chains begin at one point, so a slow approach to their distribution moves them together.
    """
    third = traces.shape[1] // 3
    if third < 1:
        return math.inf
    change = traces[:, -third:].mean(1) - traces[:, :third].mean(1)
    mean, error = float(change.mean()), error_of_mean(change)
    return abs(mean) / error if error > 0 else (0.0 if mean == 0 else math.inf)


def _halves(traces: Tensor) -> Tensor:
    """Both halves of each chain, (2 C, S // 2)."""
    half = traces.shape[1] // 2
    return torch.cat([traces[:, :half], traces[:, traces.shape[1] - half :]]).double()
