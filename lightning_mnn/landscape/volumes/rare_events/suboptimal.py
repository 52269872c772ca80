"""Sub-optimal regions by multilevel splitting: V(L_ε) where direct draws find no such region.

Shapes: N samples, d0 inputs, d1 hidden units; W is (d1, d0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.labels import wrong
from lightning_mnn.landscape.pattern import ActivationPattern
from lightning_mnn.landscape.regions.region import khatri_rao
from lightning_mnn.landscape.volumes.rare_events.splitting import RareEvent, Score, estimate_of_runs, rare_event
from lightning_mnn.landscape.volumes.region_census import MAX_NODES, Case, DataSet
from lightning_mnn.utilities.transfer import sent
from lightning_mnn.utilities.validation import positive_integer

if TYPE_CHECKING:
    from lightning_mnn.landscape.volumes.intervals import Estimate

_ENTRIES_PER_BATCH = 2_000_000  # entries of the matrices decomposed in one batch

_SMALLEST_EIGENVALUES = 2  # that lead to a deficient rank; measured to be better than one, at N = 12

_DIGITS = 16  # of a float64: smaller eigenvalues are rounding

_MAX_LEAD = 1 - 1e-6


@dataclass(frozen=True)
class RareCensus:
    """Volumes of unions of sub-optimal regions, too small for direct draws.

    Attributes:
        suboptimal_residual: P(the region's least-squares residual misclassifies more than a fraction ε). This is
            necessary for L_ε, and Theorem 6 uses only this. Its `population` are weights in such regions.
        suboptimal_minimum: V(L_ε): of regions that also contain a differentiable local minimum.
        undecided: fraction of the classified regions for which the search for a minimum did not decide. The interval of
            `suboptimal_minimum` covers the cases that none or all of them contain one.
    """

    suboptimal_residual: RareEvent
    suboptimal_minimum: Estimate
    undecided: float


def rare_census(
    inputs: Tensor,
    targets: Tensor,
    width: int,
    negative_slope: float = 0.0,
    *,
    threshold: float | None = None,
    epsilon: float = 0.0,
    particles: int = 1000,
    runs: int = 10,
    steps: int = 5,
    regions: int = 20,
    seed: int = 0,
    max_nodes: int = MAX_NODES,
) -> RareCensus:
    """Estimate V(L_ε) and its necessary condition by multilevel splitting, where direct draws find no such region.

    V(L_ε) is the probability of a sub-optimal residual times the fraction of the regions at the end of each run that
    contain a minimum. This is also unbiased, and its interval comes from the spread of the runs' products.

    Args:
        inputs: X, (N, d0).
        targets: y, (N,), two labels.
        width: d1.
        negative_slope: ρ.
        threshold: decision threshold of the classification error; None infers it from the labels.
        epsilon: ε, the classification error (a fraction) above which a region is sub-optimal.
        particles: P, of each run.
        runs: R, at least 2.
        steps: number of times that every particle makes its two moves at each level.
        regions: number of particles of each run whose regions are searched for a minimum.
        seed: seed of the draws.
        max_nodes: largest number of branches of a region's search for a minimum; above it the region is undecided.

    Raises:
        ValueError: as :func:`rare_event` and :func:`~lightning_mnn.landscape.volumes.region_census.census`.

    >>> found = rare_census(torch.eye(2), torch.tensor([1.0, -1.0]), width=3, particles=50, runs=4, steps=2)
    >>> found.suboptimal_residual.low < 1 - (1 - 1 / 8) ** 2 < found.suboptimal_residual.high
    True
    """
    data = DataSet.of(inputs, targets, threshold)
    case = Case(data, width, negative_slope, epsilon=epsilon, seed=seed, max_nodes=max_nodes)
    regions = min(positive_integer("regions", regions), particles)
    score = suboptimal_score(data.inputs, data.targets, negative_slope, threshold=data.threshold)
    shape, level = (width, data.inputs.shape[1]), fewest_wrong(len(data.targets), epsilon)
    residual = rare_event(score, shape, level, particles=particles, runs=runs, steps=steps, seed=seed)
    verdicts = [[case.outcome_at(weights, data).exists for weights in run[:regions]] for run in residual.population]
    found = torch.tensor([[exists is True for exists in run] for run in verdicts]).reshape(-1, regions)
    possible = torch.tensor([[exists is not False for exists in run] for run in verdicts]).reshape(-1, regions)
    alive = residual.log_runs.isfinite()
    estimates = []
    for marks in (found, possible):
        log_runs = residual.log_runs.clone()
        log_runs[alive] += marks.double().mean(1).log()
        estimates.append(estimate_of_runs(residual.log_runs, log_runs))
    lowest, largest = estimates
    highest = min(max(largest.log_high, lowest.log_high), residual.log_high)
    minimum = replace(lowest, log_low=min(lowest.log_low, highest), log_high=highest)
    return RareCensus(residual, minimum, float((possible & ~found).double().mean()) if verdicts else 0.0)


def unactivated_score(inputs: Tensor) -> Score:
    """A score that is at least 0 exactly where some sample activates no unit: max_n −max_i w_i·x_n/‖x_n‖.

    For the ReLU such a sample is a zero column of A∘X. With orthogonal inputs the probability that there is one is
    1 − (1 − 2^−d1)^N. It is computed on the device of the weights.

    Args:
        inputs: X, (N, d0), on any device.

    >>> unactivated_score(torch.eye(2))(torch.tensor([[[3.0, -4.0]]], dtype=torch.float64))
    tensor([4.], dtype=torch.float64)
    """
    directions = torch.nn.functional.normalize(inputs.detach().double(), dim=1).cpu()
    return lambda weights: -(weights @ sent(directions, weights.device).to(weights.dtype).T).amax(1).amin(1)


def suboptimal_score(
    inputs: Tensor, targets: Tensor, negative_slope: float = 0.0, *, threshold: float | None = None
) -> Score:
    """A score of at least k exactly where the region's least-squares residual misclassifies k samples or more.

    It is that number plus a fraction that leads from k to k + 1. For the ReLU the fraction measures how close one more
    sample is to activating no unit, because such a sample is not fitted. For other slopes it measures how
    close GᵀG of the region is to a deficient rank, by its two smallest eigenvalues. It is computed on the CPU.

    For other slopes the events below some 1e-7 keep intervals of two to three nats, with thousands of particles. They
    need many samples with nearly the same pattern, which few of the moves from other patterns reach. Tried without
    more success: the strength of a ridge regression that misclassifies one more sample (intervals three times as wide
    at N = 12), one eigenvalue more than there are errors, and a regression on smoothed patterns (half of the runs die).

    Args:
        inputs: X, (N, d0), on any device.
        targets: y, (N,), two labels.
        negative_slope: ρ.
        threshold: decision threshold of the classification error; None infers it from the labels.

    Raises:
        ValueError: shapes are wrong, values are NaN, or the targets have no classification error.

    >>> score = suboptimal_score(torch.eye(2), torch.tensor([1.0, -1.0]))
    >>> score(-torch.ones(1, 3, 2, dtype=torch.float64)).floor()  # no unit is active
    tensor([2.], dtype=torch.float64)
    """
    data = DataSet.of(inputs, targets, threshold)

    def score(weights: Tensor) -> Tensor:
        batch = max(1, _ENTRIES_PER_BATCH // (len(data.inputs) * max(len(data.inputs), weights[0].numel())))
        weights = weights.cpu()
        return torch.cat([_score_regions(data, negative_slope, part) for part in torch.split(weights, batch)])

    return score


def fewest_wrong(num_samples: int, epsilon: float) -> int:
    """The smallest number of samples above a fraction ε of all N.

    >>> fewest_wrong(20, 0.0), fewest_wrong(20, 0.1)
    (1, 3)
    """
    return next(number for number in range(1, num_samples + 1) if number / num_samples > epsilon)


def _score_regions(data: DataSet, negative_slope: float, weights: Tensor) -> Tensor:
    """Scores (B,) of :func:`suboptimal_score` for weights (B, d1, d0)."""
    inputs, targets, threshold = data
    preactivations = inputs @ weights.mT
    slopes = ActivationPattern.from_preactivations(preactivations).slopes(negative_slope)
    gram = (slopes @ slopes.mT) * (inputs @ inputs.T)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    gram = gram / torch.where(scale > 0, scale, 1.0)[:, None, None]
    # If GᵀG less a small multiple of the identity has a Cholesky factor, all eigenvalues are larger, and e* = 0.
    _, failed = torch.linalg.cholesky_ex(
        gram - tolerances.MIN_DEFINITE_EIGENVALUE_RATIO * torch.eye(len(inputs), dtype=gram.dtype)
    )
    doubtful = failed > 0
    wrongs = wrong(targets, targets, threshold).sum().double().repeat(len(weights))
    wrongs[doubtful] = _count_wrong(khatri_rao(slopes[doubtful], inputs), targets, threshold)
    lead = _smallest_activation(inputs, preactivations, wrongs.long()) if negative_slope == 0 else _spectral_lead(gram)
    return wrongs + lead.clamp(max=_MAX_LEAD)


def _smallest_activation(inputs: Tensor, preactivations: Tensor, skipped: Tensor) -> Tensor:
    """How close one more sample than the `skipped` ones, (B,), is to activating no unit: from 0 to 1, (B,).

    It is Φ(−max_i w_i·x_n/‖x_n‖) of the next sample, for pre-activations (B, N, d1).
    """
    lengths = inputs.norm(dim=1)
    largest = preactivations.amax(2) / torch.where(lengths > 0, lengths, 1.0)
    lead: Tensor = torch.special.ndtr(-_ranked(largest, skipped))
    return lead


def _spectral_lead(gram: Tensor) -> Tensor:
    """How close GᵀG is to a rank of N − 2, from 0 to 1, (B,), for GᵀG with a mean diagonal of 1, (B, N, N).

    It is the mean of −log10 of the two smallest eigenvalues, up to rounding, as a fraction of the digits of a float.
    """
    values = torch.linalg.eigvalsh(gram)[:, :_SMALLEST_EIGENVALUES].clamp(min=10.0**-_DIGITS)
    lead: Tensor = (-values.log10().mean(1) / _DIGITS).clamp(min=0.0)
    return lead


def _ranked(values: Tensor, rank: Tensor) -> Tensor:
    """The value of a given rank along the last axis, from 0 for the smallest; the largest value for higher ranks."""
    last = values.shape[-1] - 1
    return values.sort(-1).values.gather(-1, rank.clamp(max=last)[..., None])[..., 0]


def _count_wrong(features: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Number of samples that the least-squares fit misclassifies, float64 (B,), for matrices (A∘X)ᵀ, (B, N, d0·d1).

    Singular values count as zero by the rule of :func:`~lightning_mnn.landscape.regions.existence.find_minimum`.
    """
    left, values, _ = torch.linalg.svd(features, full_matrices=False)
    limit = max(features.shape[1:]) * torch.finfo(features.dtype).eps * values.amax(1, keepdim=True)
    left = left * (values > limit)[:, None]
    predictions = (left @ (left.mT @ targets[:, None]))[..., 0]
    return wrong(predictions, targets, threshold).sum(1).double()
