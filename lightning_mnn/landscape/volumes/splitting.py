"""Multilevel splitting: probabilities of rare events of random weights W ~ N(0, I).

An event {score(W) ≥ level} that is too rare for direct draws is reached through nested events of rising levels. The
particles that reach a level replace those that do not. Then moves spread them; the moves leave N(0, I), restricted to
scores at or above that level, invariant. The product of the fractions that reach each level estimates the probability.

A pilot run chooses the levels and the sizes of the moves; the runs of the estimate are independent of it. Given levels
and moves, the estimate of a run is exactly unbiased, for any number of particles and any speed of mixing (Del Moral,
Feynman–Kac Formulae, 2004, §7.4.2), with or without ties between scores. Too few particles only increase its variance,
which the spread of the runs shows. If a run chose the levels from its own particles, it would be biased.

Shapes: R runs, P particles, N samples, d0 inputs, d1 hidden units; W is (d1, d0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.intervals import Estimate, Proportion
from lightning_mnn.landscape.labels import wrong
from lightning_mnn.landscape.pattern import ActivationPattern
from lightning_mnn.landscape.regions.region import khatri_rao
from lightning_mnn.landscape.volumes.region_census import MAX_NODES, Case, DataSet
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import sent
from lightning_mnn.utilities.validation import ArgumentError, positive_integer

Score = Callable[[Tensor], Tensor]

_SURVIVOR_FRACTION = 0.25  # fraction of the pilot's particles that reach the next level

_ACCEPTED_FRACTION = 0.3  # target fraction of accepted moves for the pilot

_MAX_STALLED_SETS = 5  # sets of moves without a particle above the level, after which the pilot gives up

_ENTRIES_PER_BATCH = 2_000_000  # entries of the matrices decomposed in one batch

# Strengths of ridge regressions, relative to the mean diagonal of GᵀG: powers of ten, and their number.
_RIDGE_POWERS = (-8, 1, 19)

_MAX_LEAD = 1 - 1e-6


@dataclass(frozen=True)
class RareEvent(Estimate):
    """The probability of {score(W) ≥ level}, W ~ N(0, I), by multilevel splitting.

    Attributes:
        levels: levels of the particles, ending with the given one.
        evaluations: number of weights whose score was computed, including those of the pilot.
        log_runs: natural logarithm of each run's own estimate, (R,) on the CPU; −inf if no particle reached a level.
        population: weights in the event, (R', P, d1, d0) on the CPU, for the R' runs that reached it, in the order of
            the finite `log_runs`. They are distributed as W given the event, except for copies that are still equal.
    """

    levels: tuple[float, ...]
    evaluations: int
    log_runs: Tensor
    population: Tensor


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


def rare_event(
    score: Score,
    shape: tuple[int, int],
    level: float,
    *,
    particles: int = 1000,
    runs: int = 10,
    steps: int = 5,
    seed: int = 0,
) -> RareEvent:
    """Estimate P(score(W) ≥ level) for W ~ N(0, I) by multilevel splitting, on the CPU.

    Each run's estimate is unbiased for any score. A score that leads better to the event gives a smaller variance
    between runs, and so a narrower interval. The estimate needs (R + 1) P (1 + 2 · steps · number of levels) scores,
    with about one level for each factor of four in the probability.

    Args:
        score: maps weights, float64 (B, d1, d0) on the CPU, to their scores, (B,), on any device; scores may be
            discrete, and −inf.
        shape: (d1, d0).
        level: the smallest score of the event.
        particles: P, of each run.
        runs: R, at least 2; the interval comes from their spread.
        steps: number of times that every particle makes its two moves at each level.
        seed: seed of the draws.

    Returns:
        The estimate. If no run reached the event, its value is 0 and its upper limit comes from the last level reached.

    Raises:
        ValueError: a number is out of its range, or scores are NaN or of another shape.

    >>> result = rare_event(lambda w: w[:, 0, 0], (1, 1), level=5.0, particles=200)
    >>> result.low < 2.8665e-7 < result.high  # of a standard normal variable
    True
    """
    counts = {"shape[0]": shape[0], "shape[1]": shape[1], "particles": particles, "runs": runs, "steps": steps}
    for name, value in counts.items():
        positive_integer(name, value)
    if runs < 2:
        raise ArgumentError("runs", runs, "must be at least 2", "an interval comes from their spread")
    if not math.isfinite(level):
        raise ValueError(f"level must be finite, got {level}")
    pilot = _Population(score, (1, particles, *shape), generator(seed, "splitting pilot"))
    plan = _plan(pilot, level, steps)
    population = _Population(score, (runs, particles, *shape), generator(seed, "splitting runs"))
    log_runs = before = torch.zeros(runs, dtype=torch.float64)
    for threshold, size in plan.items():
        before, log_runs = log_runs, log_runs.clone()
        log_runs[before.isfinite()] += population.climb(threshold).log()
        if not bool(log_runs.isfinite().any()):
            break
        for _ in range(steps):
            population.move(threshold, size)
    if len(plan) == 1:
        estimate = _direct(round(float(log_runs.exp().sum()) * particles), runs * particles)
    else:
        estimate = _thinned(before, log_runs)
    return RareEvent(
        **vars(estimate),
        levels=tuple(plan),
        evaluations=pilot.evaluations + population.evaluations,
        log_runs=log_runs,
        population=population.weights,
    )


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
        estimates.append(_thinned(residual.log_runs, log_runs))
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
    return lambda weights: -(weights @ sent(directions, weights.device).T).amax(1).amin(1)


def suboptimal_score(
    inputs: Tensor, targets: Tensor, negative_slope: float = 0.0, *, threshold: float | None = None
) -> Score:
    """A score of at least k exactly where the region's least-squares residual misclassifies k samples or more.

    It is that number plus a fraction that leads from k to k + 1. For the ReLU the fraction measures how close one more
    sample is to activating no unit, because such a sample is not fitted. For other slopes it measures how little
    regularisation makes a ridge regression misclassify one more sample. It is computed on the CPU.

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
    if negative_slope == 0:
        lead = _smallest_activation(inputs, preactivations, wrongs.long())
    else:
        lead = _ridge_lead(gram, targets, threshold, wrongs.long())
    return wrongs + lead.clamp(max=_MAX_LEAD)


def _smallest_activation(inputs: Tensor, preactivations: Tensor, skipped: Tensor) -> Tensor:
    """How close one more sample than the `skipped` ones, (B,), is to activating no unit: from 0 to 1, (B,).

    It is Φ(−max_i w_i·x_n/‖x_n‖) of the next sample, for pre-activations (B, N, d1).
    """
    lengths = inputs.norm(dim=1)
    largest = preactivations.amax(2) / torch.where(lengths > 0, lengths, 1.0)
    lead: Tensor = torch.special.ndtr(-_ranked(largest, skipped))
    return lead


def _ridge_lead(gram: Tensor, targets: Tensor, threshold: float, skipped: Tensor) -> Tensor:
    """How little regularisation makes a ridge regression misclassify one more sample than the `skipped` ones, (B,).

    The strengths λ are on a logarithmic scale, relative to the mean diagonal of GᵀG, (B, N, N). The result is 1 for the
    smallest strength, and 0 for the largest or if no strength does.
    """
    strengths = torch.logspace(*_RIDGE_POWERS, dtype=gram.dtype)
    values, vectors = torch.linalg.eigh(gram)
    shares = strengths / (values.clamp(min=0)[..., None] + strengths)
    residuals = vectors @ ((vectors.mT @ targets)[..., None] * shares)  # (B, N, number of strengths)
    margins = (targets[:, None] - residuals - threshold) * (targets - threshold)[:, None]
    margins = _ranked(margins.mT, skipped[:, None].expand(-1, len(strengths)))
    # The first change of sign, by linear interpolation between the strengths.
    after = (margins <= 0).double().argmax(1, keepdim=True).clamp(min=1)
    low, high = (margins.gather(1, index)[:, 0] for index in (after - 1, after))
    part = torch.where(high <= 0, low / (low - high), torch.inf).clamp(0, 1)
    position = torch.where((margins <= 0).any(1), after[:, 0] - 1 + part, len(strengths) - 1)
    return 1 - position / (len(strengths) - 1)


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


class _Population:
    """Particles of several runs, at or above a level that rises."""

    def __init__(self, score: Score, shape: tuple[int, int, int, int], draw: torch.Generator) -> None:
        self.score, self.random, self.evaluations = score, draw, 0
        self.weights = self._normal(shape)
        self.scores = self._scored(self.weights)

    def climb(self, level: float) -> Tensor:
        """Replace the particles below a level by copies of those that reach it, as evenly as possible.

        Runs without a particle that reaches it are dropped.

        Returns:
            The fraction of each run's particles that reached it, (R,).
        """
        reached = self.scores >= level
        counts, particles = reached.sum(1), reached.shape[1]
        alive = counts > 0
        # In a random order, because the first ones may get one more copy.
        keys = torch.rand(reached.shape, generator=self.random) + (~reached)
        parents = keys.argsort(1).gather(1, torch.arange(particles) % counts.clamp(min=1)[:, None])[alive]
        rows = torch.arange(len(parents))[:, None]
        self.weights, self.scores = self.weights[alive][rows, parents], self.scores[alive][rows, parents]
        return counts / particles

    def move(self, level: float, size: float) -> float:
        """Move every particle twice: first all of its units, then one unit by a larger step.

        A move is to √(1−s²) W + s ξ, ξ ~ N(0, I), and is rejected if that lies below the level. Such moves are
        reversible with respect to N(0, I), and with the rejections to its restriction (preconditioned Crank–Nicolson).

        Args:
            level: level of the particles.
            size: s of the move of all units, at most 1; that of one unit is √d1 times as large, at most 1.

        Returns:
            The fraction of accepted moves of all units.
        """
        width, rows = self.weights.shape[2], self.scores.shape
        share = self._try(self._moved(size), level)
        unit = torch.randint(width, rows, generator=self.random)
        chosen = (torch.arange(width) == unit[..., None])[..., None]
        self._try(torch.where(chosen, self._moved(min(1.0, size * math.sqrt(width))), self.weights), level)
        return share

    def _try(self, moved: Tensor, level: float) -> float:
        scores = self._scored(moved)
        accepted = scores >= level
        self.weights = torch.where(accepted[..., None, None], moved, self.weights)
        self.scores = torch.where(accepted, scores, self.scores)
        return float(accepted.double().mean())

    def _moved(self, size: float) -> Tensor:
        return math.sqrt(1 - size**2) * self.weights + size * self._normal(self.weights.shape)

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def _scored(self, weights: Tensor) -> Tensor:
        runs, particles = weights.shape[:2]
        self.evaluations += runs * particles
        scores = self.score(weights.flatten(0, 1)).cpu()
        if scores.shape != (runs * particles,) or bool(scores.isnan().any()):
            raise ValueError(
                f"score must map weights of shape {(runs * particles, *weights.shape[2:])} to {runs * particles} "
                f"numbers, got shape {tuple(scores.shape)} with {int(scores.isnan().sum())} NaN"
            )
        return scores.double().reshape(runs, particles)


def _plan(pilot: _Population, level: float, steps: int) -> dict[float, float]:
    """Levels up to the given one, and the size s of the moves at each, from a pilot run."""
    plan: dict[float, float] = {}
    current, size, stalled = -math.inf, 1.0, 0
    while current < level:
        reached = _next_level(pilot.scores.flatten(), current)
        if reached is None and stalled < _MAX_STALLED_SETS:
            stalled += 1
        else:
            current, stalled = level if reached is None else min(reached, level), 0
            if not pilot.climb(current).all():
                return plan | {current: size}
        for _ in range(steps):
            share = pilot.move(current, size)
            size = min(1.0, size * math.exp(share - _ACCEPTED_FRACTION))
        plan[current] = size
    return plan


def _next_level(scores: Tensor, current: float) -> float | None:
    """The score that a fixed fraction of particles reach, or the next one above the current level; None if none is."""
    quantile = float(scores.sort().values[-math.ceil(_SURVIVOR_FRACTION * len(scores))])
    above = scores[scores > current]
    return quantile if quantile > current else float(above.min()) if len(above) else None


def _direct(hits: int, trials: int) -> Estimate:
    """A probability from independent draws."""
    share = Proportion.of(hits, trials)
    return Estimate(*(math.log(part) if part else -math.inf for part in (share.value, share.low, share.high)))


def _thinned(before: Tensor, log_runs: Tensor) -> Estimate:
    """A probability from `log_runs`; if all are −inf, its upper limit from the values `before` the last step.

    In that case each run is one observation of a failure, because its particles may be equal.
    """
    if bool(log_runs.isfinite().any()):
        return Estimate.of_runs(log_runs)
    runs = int(before.isfinite().sum())
    upper = Estimate.of_runs(before).log_high + math.log(Proportion.of(0, runs).high) if runs else 0.0
    return Estimate(-math.inf, -math.inf, upper)
