"""Multilevel splitting: probabilities of rare events of random weights W ~ N(0, I).

An event {score(W) ≥ level} that is too rare for direct draws is reached through nested events of rising levels. The
particles that reach a level replace those that do not. Then moves spread them; the moves leave N(0, I), restricted to
scores at or above that level, invariant. The product of the fractions that reach each level estimates the probability.

A pilot run chooses the levels and the sizes of the moves; the runs of the estimate are independent of it. Given levels
and moves, the estimate of a run is exactly unbiased, for any number of particles and any speed of mixing (Del Moral,
Feynman–Kac Formulae, 2004, §7.4.2), with or without ties between scores. Too few particles only increase its variance,
which the spread of the runs shows. If a run chose the levels from its own particles, it would be biased.

Shapes: R runs, P particles; W is of any shape, such as (d1, d0) for one layer or (D,) for all weights of a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mnn.landscape.intervals import Estimate, Proportion
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import sent, widest_dtype
from lightning_mnn.utilities.validation import ArgumentError, positive_integer

Score = Callable[[Tensor], Tensor]

_SURVIVOR_FRACTION = 0.25  # fraction of the pilot's particles that reach the next level

_ACCEPTED_FRACTION = 0.3  # target fraction of accepted moves for the pilot

_MAX_STALLED_SETS = 5  # sets of moves without a particle above the level, after which the pilot gives up


@dataclass(frozen=True)
class RareEvent(Estimate):
    """The probability of {score(W) ≥ level}, W ~ N(0, I), by multilevel splitting.

    Attributes:
        levels: levels of the particles, ending with the given one.
        evaluations: number of weights whose score was computed, including those of the pilot.
        log_runs: natural logarithm of each run's own estimate, (R,) on the CPU; −inf if no particle reached a level.
        population: weights in the event, (R', P, *shape) on the CPU, for the R' runs that reached it, in the order of
            the finite `log_runs`. They are distributed as W given the event, except for copies that are still equal.
    """

    levels: tuple[float, ...]
    evaluations: int
    log_runs: Tensor
    population: Tensor


class Stage(NamedTuple):
    """The particles of all runs at a level, after their moves.

    For a function f of the weights, exp(log_runs) times the mean of f over a run's particles (0 for a run without any)
    is an unbiased estimate of E[f(W); score(W) ≥ level].

    Attributes:
        level: −inf for the independent draws at the start.
        log_runs: natural logarithm of each run's estimate of the probability of the level, (R,) on the CPU.
        weights: particles of the runs that reached the level, (R', P, *shape), in the order of the finite `log_runs`.
        scores: their scores, (R', P).
        evaluations: number of weights whose score was computed so far, including those of the pilot.
    """

    level: float
    log_runs: Tensor
    weights: Tensor
    scores: Tensor
    evaluations: int


def rare_event(
    score: Score,
    shape: tuple[int, ...],
    level: float,
    *,
    particles: int = 1000,
    runs: int = 10,
    steps: int = 5,
    seed: int = 0,
    blocks: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> RareEvent:
    """Estimate P(score(W) ≥ level) for W ~ N(0, I) by multilevel splitting.

    Each run's estimate is unbiased for any score. A score that leads better to the event gives a smaller variance
    between runs, and so a narrower interval. The estimate needs (R + 1) P (1 + 2 · steps · number of levels) scores,
    with about one level for each factor of four in the probability.

    Args:
        score: maps weights (B, *shape) to their scores, (B,), on any device; scores may be discrete, and −inf.
        shape: of the weights: (d1, d0) for one layer, (D,) for all weights of a network as one vector.
        level: the smallest score of the event.
        particles: P, of each run.
        runs: R, at least 2; the interval comes from their spread.
        steps: number of times that every particle makes its two moves at each level: of all weights, and of one block.
        seed: seed of the draws, which are the same on any device.
        blocks: the sets of weights that a particle may move alone, bool (number of blocks, *shape), such as the weights
            of each unit or layer; None: the entries of the first axis.
        device: where the weights are. They are float64, except on devices that lack it.

    Returns:
        The estimate. If no run reached the event, its value is 0 and its upper limit comes from the last level reached.

    Raises:
        ValueError: a number is out of its range, a block is empty or of another shape, or scores are NaN or of another
            shape.

    >>> result = rare_event(lambda w: w[:, 0, 0], (1, 1), level=5.0, particles=200)
    >>> result.low < 2.8665e-7 < result.high  # of a standard normal variable
    True
    """
    options = {"particles": particles, "runs": runs, "steps": steps, "seed": seed}
    levels, log_runs = [], []
    for stage in splitting_stages(score, shape, level, **options, blocks=blocks, device=device, population=Population):
        levels.append(stage.level)
        log_runs.append(stage.log_runs)
    return RareEvent(
        **vars(estimate_of_levels(log_runs, particles)),
        levels=tuple(levels[1:]),
        evaluations=stage.evaluations,
        log_runs=stage.log_runs,
        population=stage.weights.cpu(),
    )


def splitting_stages(
    score: Score,
    shape: tuple[int, ...],
    level: float,
    *,
    particles: int,
    runs: int,
    steps: int,
    seed: int,
    blocks: Tensor | None = None,
    device: torch.device | str = "cpu",
    population: type[Population] | None = None,
) -> Iterator[Stage]:
    """The particles of :func:`rare_event` at the start and at each of its levels, for estimates of more than one event.

    The last stage is that of `level`, or the first that no run reached. The arguments are those of :func:`rare_event`,
    and the kind of population, which says how particles move.

    Raises:
        ValueError: as :func:`rare_event`.
    """
    counts = {f"shape[{axis}]": size for axis, size in enumerate(shape)}
    for name, value in {**counts, "particles": particles, "runs": runs, "steps": steps}.items():
        positive_integer(name, value)
    if not shape:
        raise ValueError("shape must have at least one axis, got (): give (1,) for a single number")
    if runs < 2:
        raise ArgumentError("runs", runs, "must be at least 2", "an interval comes from their spread")
    if not math.isfinite(level):
        raise ValueError(f"level must be finite, got {level}")
    moves = _Blocks.of(blocks, shape, torch.device(device))
    kind = Population if population is None else population
    pilot = kind(score, (1, particles, *shape), moves, steps, generator(seed, "splitting pilot"))
    plan = _plan(pilot, level)
    main = kind(score, (runs, particles, *shape), moves, steps, generator(seed, "splitting runs"))
    log_runs = torch.zeros(runs, dtype=torch.float64)

    def stage(at: float) -> Stage:
        return Stage(at, log_runs, main.weights, main.scores, pilot.evaluations + main.evaluations)

    yield stage(-math.inf)
    for threshold, size in plan.items():
        log_runs = log_runs.clone()
        log_runs[log_runs.isfinite()] += main.climb(threshold).log()
        if bool(log_runs.isfinite().any()):
            main.spread(threshold, size)
        yield stage(threshold)
        if not bool(log_runs.isfinite().any()):
            return


class _Blocks(NamedTuple):
    """The weights that may move alone.

    Attributes:
        masks: bool (number of blocks, *shape), or of a shape that broadcasts to it.
        factors: size of a block's move relative to that of all weights, (number of blocks, 1, …).
    """

    masks: Tensor
    factors: Tensor

    @classmethod
    def of(cls, masks: Tensor | None, shape: tuple[int, ...], device: torch.device) -> _Blocks:
        if masks is None:
            masks = torch.eye(shape[0], dtype=torch.bool)
            masks = masks.reshape(shape[0], shape[0], *(1 for _ in shape[1:]))
        elif masks.dtype is not torch.bool or masks.shape[1:] != shape or len(masks) == 0:
            raise ValueError(
                f"blocks must be bool of shape (number of blocks, {', '.join(map(str, shape))}), got {masks.dtype} of "
                f"shape {tuple(masks.shape)}"
            )
        elif not bool(masks.flatten(1).any(1).all()):
            raise ValueError("blocks must each contain a weight, got an empty one: leave it out")
        shares = masks.flatten(1).double().mean(1).reshape(-1, *(1 for _ in shape))
        return cls(masks.to(device), (1 / shares).sqrt().to(device, widest_dtype(device)))


class Population:
    """Particles of several runs, at or above a level that rises."""

    def __init__(
        self, score: Score, shape: tuple[int, ...], blocks: _Blocks, steps: int, draw: torch.Generator
    ) -> None:
        self.score, self.blocks, self.steps, self.random, self.evaluations = score, blocks, steps, draw, 0
        self.device = blocks.masks.device
        self._nan = torch.zeros((), dtype=torch.int64, device=self.device)
        self.weights = self._normal(shape)
        self.scores = self._scored(self.weights)
        self.check()

    def check(self) -> None:
        """Refuse scores that are NaN. This waits for the device."""
        if number := int(self._nan):
            raise ValueError(
                f"score must map weights of shape {self._shape(self.weights)} to {self.scores.numel()} numbers, got "
                f"shape ({self.scores.numel()},) with {number} NaN"
            )

    def climb(self, level: float) -> Tensor:
        """Replace the particles below a level by copies of those that reach it, as evenly as possible.

        Runs without a particle that reaches it are dropped.

        Returns:
            The fraction of each run's particles that reached it, (R,) on the CPU.
        """
        self.check()
        reached = self.scores >= level
        counts, particles = reached.sum(1), reached.shape[1]
        alive = counts > 0
        # In a random order, because the first ones may get one more copy.
        keys = sent(torch.rand(reached.shape, generator=self.random), self.device) + (~reached)
        order = torch.arange(particles, device=self.device) % counts.clamp(min=1)[:, None]
        parents = keys.argsort(1).gather(1, order)[alive]
        rows = torch.arange(len(parents), device=self.device)[:, None]
        self.weights, self.scores = self.weights[alive][rows, parents], self.scores[alive][rows, parents]
        return counts.cpu() / particles

    def spread(self, level: float, size: float) -> None:
        """Move all particles at a level."""
        for _ in range(self.steps):
            self.move(level, size)

    def tune(self, level: float, size: float) -> float:
        """Move all particles at a level, and return a size of the moves that suits it."""
        for _ in range(self.steps):
            size = min(1.0, size * math.exp(float(self.move(level, size)) - _ACCEPTED_FRACTION))
        return size

    def move(self, level: float, size: float) -> Tensor:
        """Move every particle twice: first all of its weights, then one random block by a larger step.

        A move is to √(1−s²) W + s ξ, ξ ~ N(0, I), and is rejected if that lies below the level. Such moves are
        reversible with respect to N(0, I), and with the rejections to its restriction (preconditioned Crank–Nicolson).

        Args:
            level: level of the particles.
            size: s of the move of all D weights, at most 1; for a block of D' weights it is √(D/D') times as large, at
                most 1.

        Returns:
            The fraction of accepted moves of all weights, ().
        """
        share = self._try(self._moved(size), level)
        drawn = torch.randint(len(self.blocks.masks), self.scores.shape, generator=self.random)
        block = sent(drawn, self.device)
        sizes = (size * self.blocks.factors[block]).clamp(max=1.0)
        self._try(torch.where(self.blocks.masks[block], self._moved(sizes), self.weights), level)
        return share

    def _try(self, moved: Tensor, level: float) -> Tensor:
        scores = self._scored(moved)
        accepted = scores >= level
        self.weights = torch.where(
            accepted.reshape(*accepted.shape, *(1 for _ in moved.shape[2:])), moved, self.weights
        )
        self.scores = torch.where(accepted, scores, self.scores)
        return accepted.to(scores.dtype).mean()

    def _moved(self, size: float | Tensor) -> Tensor:
        kept = (1 - size**2).sqrt() if isinstance(size, Tensor) else math.sqrt(1 - size**2)
        return kept * self.weights + size * self._normal(self.weights.shape)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=self.random, dtype=torch.float64)
        return sent(drawn.to(widest_dtype(self.device)), self.device)

    def _scored(self, weights: Tensor) -> Tensor:
        runs, particles = weights.shape[:2]
        self.evaluations += runs * particles
        scores = self.score(weights.flatten(0, 1))
        if scores.shape != (runs * particles,):
            raise ValueError(
                f"score must map weights of shape {self._shape(weights)} to {runs * particles} numbers, got shape "
                f"{tuple(scores.shape)} with {int(scores.isnan().sum())} NaN"
            )
        scores = scores.to(self.device, widest_dtype(self.device)).reshape(runs, particles)
        self._nan += scores.isnan().sum()
        return scores

    @staticmethod
    def _shape(weights: Tensor) -> tuple[int, ...]:
        return (weights.shape[0] * weights.shape[1], *weights.shape[2:])


def _plan(pilot: Population, level: float) -> dict[float, float]:
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
        size = pilot.tune(current, size)
        plan[current] = size
    return plan


def _next_level(scores: Tensor, current: float) -> float | None:
    """The score that a fixed fraction of particles reach, or the next one above the current level; None if none is."""
    quantile = float(scores.sort().values[-math.ceil(_SURVIVOR_FRACTION * len(scores))])
    above = scores[scores > current]
    return quantile if quantile > current else float(above.min()) if len(above) else None


def estimate_of_levels(log_runs: Sequence[Tensor], particles: int) -> Estimate:
    """The probability of the last level, from the `log_runs` of all stages, each (R,), with P particles in a run.

    With a single level the draws are independent, and their interval is exact.
    """
    if len(log_runs) > 2:
        return estimate_of_runs(log_runs[-2], log_runs[-1])
    return _direct(round(float(log_runs[-1].exp().sum()) * particles), len(log_runs[-1]) * particles)


def _direct(hits: int, trials: int) -> Estimate:
    """A probability from independent draws."""
    share = Proportion.of(hits, trials)
    return Estimate(*(math.log(part) if part else -math.inf for part in (share.value, share.low, share.high)))


def estimate_of_runs(before: Tensor, log_runs: Tensor) -> Estimate:
    """A probability from logarithms of runs, (R,); if all are −inf, its upper limit from those `before` the last step.

    In that case each run is one observation of a failure, because its particles may be equal.
    """
    if bool(log_runs.isfinite().any()):
        return Estimate.of_runs(log_runs)
    runs = int(before.isfinite().sum())
    upper = Estimate.of_runs(before).log_high + math.log(Proportion.of(0, runs).high) if runs else 0.0
    return Estimate(-math.inf, -math.inf, upper)
