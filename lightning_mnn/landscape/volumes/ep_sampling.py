"""Sampling that starts at the normal distributions of expectation propagation (EP), for the cones of one layer's units.

Coordinates y of a cone are relative to its EP approximation q: q is N(0, I), and y is turned so that the normal density
of w = μ + G y is a product over its coordinates, exp(−½ Σ λ_j y_j² − h·y − ½|μ|²). The walls become 1 + a_n·y > 0.

Annealed importance sampling (Neal 2001) moves independent particles from N(0, I/κ²), cut off by the cone, to the normal
density in the cone, along precisions (1−β)κ² + βλ_j and slopes βh_j. In each step, one coordinate after the other
changes from the old to the new β: the weight of a particle is multiplied by the ratio of the two integrals over its
chord, and the coordinate is drawn from the new density on it. This weight does not depend on the drawn coordinate, so
that it has a tenth of the variance that energies at the points have. After each step all particles move along their
rays from the apex. The mean weight is an unbiased estimate of the measure; the particles are independent, so that their
spread gives its standard error.

Walls that are more than five standard deviations of q away are left out of the moves: a particle that ends behind one
of them has weight zero, so that the estimate remains unbiased.

Shapes: K cones, N constraints, d dimensions, M particles of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import t as student

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.intervals import SampleCount, Stop
from lightning_mnn.landscape.volumes.annealing import move_along_rays
from lightning_mnn.landscape.volumes.expectation_propagation import Approximation, approximate, distinct_constraints
from lightning_mnn.utilities.interruption import safe_point

if TYPE_CHECKING:
    from torch import Tensor

TARGET_FRACTION = 0.85  # the number of samples is set in advance from the pilot, which knows the variance to 1/8
MIN_PARTICLES = 16  # of each cone
MIN_STEPS = 16  # of a particle

MAX_CLOSED_DIM = 3  # dimension up to which every cone has a closed form
_FAR_DEVIATIONS = 5.0  # distance of a wall, in standard deviations of q, from which the moves leave it out
_START_PROBABILITY = 0.25  # probability of the cone under the start: less of it takes more draws, more of it more steps
_START_DRAWS = 2048  # fewest draws of the start
_SPREAD_DRAWS = 256  # draws that determine κ
_PILOT_CONES, _PILOT_PARTICLES = 16, 8
_PILOT_SPREAD = 0.25  # standard deviation of the log-weights of one step of the pilot
_FIRST_STEP = 0.04
_WEIGHT_VARIANCE = 0.5  # variance of the log-weights at the end; far larger ones have heavy tails
_CORRELATION = 2.0  # variance of log-weights, in units of that of independent steps
_STEPS_PER_REFRESH = 4  # steps in float32 until distances from the walls are computed again
_LANES = 32  # numbers of walls are multiples of it, for vector instructions
_MAX_CHORD = 1e3  # length of a chord to each side, in standard deviations of q
_MAX_ENTRIES = 2**25  # distances of one cone's particles, and coordinates of its draws
_ENTRIES_PER_CHUNK = {"cpu": 2**20, "cuda": 2**26}  # distances in one chunk


def predicted_samples(dim: int, standard_error: float) -> float:
    """Approximate number of samples (particles times steps, and the start) for one cone.

    Measured on cones of trained networks of 8 d and 20 d constraints, d = 40 and 100, to within a factor of 2.

    >>> predicted_samples(40, 0.5) < predicted_samples(40, 0.1)
    True
    """
    steps = max(MIN_STEPS, 0.06 * math.pow(dim, 1.85))
    particles = max(MIN_PARTICLES, 0.78 / (TARGET_FRACTION * standard_error) ** 2)
    return 256 + steps * particles


@dataclass(frozen=True)
class SharedCones:
    """Cones of one layer's units, {w : σ_n x_n·w > 0 ∀n}, and their EP approximations.

    Attributes:
        directions: x_n/‖x_n‖, one of each set of parallel inputs, in coordinates of their span, (N, d).
        sides: σ_n of each cone, (K, N).
        found: the approximations.
        closed: whether the measures have a closed form: the inputs span at most three dimensions, or are orthogonal.
    """

    directions: Tensor
    sides: Tensor
    found: Approximation
    closed: bool

    @classmethod
    def of(cls, inputs: Tensor, sides: Tensor) -> SharedCones:
        """Approximate the cones of inputs (N, d0), none of them zero, and signs (K, N); on the CPU or a GPU of CUDA."""
        if inputs.device.type not in _ENTRIES_PER_CHUNK:
            inputs, sides = inputs.cpu(), sides.cpu()
        scaled = inputs.double() / inputs.abs().amax(-1, keepdim=True)
        directions = torch.nn.functional.normalize(scaled, dim=-1)
        distinct = distinct_constraints(directions)
        directions, sides = directions[distinct], sides.double()[:, distinct]
        num, dim = directions.shape
        closed = min(num, dim) <= MAX_CLOSED_DIM
        if 0 < num < dim:
            directions = directions @ torch.linalg.qr(directions.T).Q
        if not closed and num <= dim:
            products = directions @ directions.T
            closed = bool((products - torch.eye(num).to(products)).abs().max() <= 4 * dim * tolerances.FLOAT64_EPS)
        return cls(directions, sides, approximate(directions, sides), closed)

    @property
    def valid(self) -> Tensor:
        """Whether EP succeeded, bool (K,)."""
        return self.found.valid

    @property
    def approximations(self) -> Tensor:
        """Log measures by EP, (K,); NaN where it failed."""
        return torch.where(self.found.valid, self.found.log_measures, math.nan)

    def sample(
        self, cones: Tensor, standard_error: float, max_samples: int, seed: int, count: SampleCount
    ) -> tuple[Tensor, Tensor]:
        """Log measures (m,) of some cones by sampling, and their standard errors, on the CPU (see :func:`sample`)."""
        cones = cones.to(self.directions.device)
        stream = torch.Generator(self.directions.device).manual_seed(seed)
        values, variances, particles = sample(
            self.found[cones],
            self.directions,
            self.sides[cones],
            standard_error=standard_error,
            max_samples=max_samples,
            generator=stream,
            count=count,
        )
        factor = float(student.ppf(0.975, particles - 1)) / 1.96  # the spread of few particles is itself uncertain
        return values.cpu(), factor * variances.sqrt().cpu()


def sample(
    approximation: Approximation,
    directions: Tensor,
    sides: Tensor,
    *,
    standard_error: float,
    max_samples: int,
    generator: torch.Generator,
    count: SampleCount,
) -> tuple[Tensor, Tensor, int]:
    """Log measures of cones by sampling from their EP approximations.

    Args:
        approximation: of K cones, all of them valid.
        directions: x_n/‖x_n‖, (N, d), float64.
        sides: σ_n of each cone, (K, N).
        standard_error: target for each log measure. The number of samples is set in advance for it, by a pilot.
        max_samples: largest number of samples (particles times steps) of a cone.
        generator: generator of the random numbers, on the device of the others.
        count: counts the samples.

    Returns:
        Log measures (K,); their variances (K,), NaN where no particle reached the cone; the number of particles.
    """
    steps, variance = _schedule(_Cones.of(approximation[:_PILOT_CONES], directions, sides[:_PILOT_CONES]), generator)
    if not variance < math.inf:
        nothing = torch.full_like(approximation.log_measures, math.nan)
        return nothing, nothing, MIN_PARTICLES
    num_steps = max(MIN_STEPS, math.ceil(variance / _WEIGHT_VARIANCE))
    target = (TARGET_FRACTION * standard_error) ** 2
    particles = math.ceil(1.2 * math.expm1(variance / num_steps) / target)
    limit = min(max_samples // num_steps, _MAX_ENTRIES // _near(approximation))
    stopped = Stop.TARGET if particles <= limit else Stop.LIMIT
    particles = max(MIN_PARTICLES, min(particles, limit))
    draws = max(math.ceil(10 * (1 / _START_PROBABILITY - 1) / target), 8 * particles)
    draws = max(_START_DRAWS, min(draws, _MAX_ENTRIES // directions.shape[1]))
    count.add(len(sides) * particles * num_steps, stopped)
    betas = _spaced(steps, num_steps)
    size = max(1, _ENTRIES_PER_CHUNK[directions.device.type] // (particles * _near(approximation)))
    found = []
    for first in range(0, len(sides), size):
        some = slice(first, first + size)
        cones = _Cones.of(approximation[some], directions, sides[some])
        found.append(_estimate(cones, betas, particles, draws, generator))
    values, variances = (torch.cat(part) for part in zip(*found, strict=True))
    return values, variances, particles


def _near(approximation: Approximation) -> int:
    """Largest number of walls of a cone that the moves respect, a multiple of the lanes."""
    near = approximation.margins < _FAR_DEVIATIONS * approximation.deviations
    return -(-max(1, int(near.sum(-1).max())) // _LANES) * _LANES


@dataclass(frozen=True)
class _Cones:
    """Cones in the coordinates of their EP approximations.

    Attributes:
        walls: a_n of the near walls, (K, N', d); zero rows are no walls.
        curvatures: λ, (K, d).
        slopes: h, (K, d).
        log_scale: log |det G| − ½|μ|², (K,).
        means: μ, (K, d).
        maps: G, (K, d, d).
        directions: (N, d).
        sides: (K, N).
    """

    walls: Tensor
    curvatures: Tensor
    slopes: Tensor
    log_scale: Tensor
    means: Tensor
    maps: Tensor
    directions: Tensor
    sides: Tensor

    @classmethod
    def of(cls, approximation: Approximation, directions: Tensor, sides: Tensor) -> _Cones:
        means, factors = approximation.means, approximation.factors
        identity = torch.eye(means.shape[-1]).to(means).expand_as(factors)
        to_point = torch.linalg.solve_triangular(factors.mT, identity, upper=True)
        _, sizes, basis = torch.linalg.svd(to_point)
        maps = to_point @ basis.mT
        distances = approximation.margins / approximation.deviations
        count = min(_near(approximation), distances.shape[-1])
        nearest, where = distances.topk(count, dim=-1, largest=False)
        factor = sides.gather(1, where) / approximation.margins.gather(1, where) * (nearest < _FAR_DEVIATIONS)
        walls = factor[..., None] * (directions[where] @ maps)
        return cls(
            walls=torch.nn.functional.pad(walls, (0, 0, 0, -count % _LANES)),
            curvatures=sizes.square(),
            slopes=(maps.mT @ means[..., None])[..., 0],
            log_scale=sizes.log().sum(-1) - means.square().sum(-1) / 2,
            means=means,
            maps=maps,
            directions=directions,
            sides=sides,
        )

    def contain(self, points: Tensor) -> Tensor:
        """Whether points (d, K, M) satisfy all constraints, bool (K, M)."""
        weights = self.means[:, None] + points.permute(1, 2, 0) @ self.maps.mT
        return torch.stack(
            [((w @ self.directions.T) * s > 0).all(-1) for w, s in zip(weights, self.sides, strict=True)]
        )


@dataclass(frozen=True)
class _Start:
    """Independent points of N(0, I/κ²) in the near walls of each cone.

    Attributes:
        spread: κ, (K,).
        points: (d, K, M).
        log_measure: log of the integral over the near walls of exp(−½ κ²|y|²)/(2π)^(d/2), (K,).
        variance: relative variance of the estimate of that integral, (K,).
    """

    spread: Tensor
    points: Tensor
    log_measure: Tensor
    variance: Tensor

    @classmethod
    def of(cls, cones: _Cones, particles: int, draws: int, generator: torch.Generator) -> _Start:
        dim = cones.walls.shape[-1]
        spreads, points, measures, variances = [], [], [], []
        for walls in cones.walls.to(torch.float32):
            safe_point()
            depths = -(_normals((_SPREAD_DRAWS, dim), generator) @ walls.T).amin(-1)
            spread = depths.quantile(_START_PROBABILITY).clamp(min=0.5)
            tried = _normals((draws, dim), generator) / spread
            inside = tried[(tried @ walls.T).amin(-1) > -1]
            share = len(inside) / draws
            if not len(inside):
                inside, share = torch.zeros_like(tried[:1]), math.nan
            chosen = torch.arange(particles, device=walls.device) % len(inside)  # they are in random order
            spreads.append(spread.double())
            points.append(inside[chosen].double())
            measures.append(math.log(share) - dim * math.log(float(spread)))
            variances.append((1 - share) / (share * draws))
        numbers = torch.tensor([measures, variances], dtype=torch.float64, device=cones.walls.device)
        return cls(torch.stack(spreads), torch.stack(points).permute(2, 0, 1).contiguous(), *numbers)


class _Particles:
    """Particles of K cones, and their weights.

    Args:
        cones: the cones.
        start: where the particles start.
        generator: of the random numbers.

    Attributes:
        points: y, (d, K, M).
        log_weights: (K, M).
    """

    def __init__(self, cones: _Cones, start: _Start, generator: torch.Generator) -> None:
        self.points = start.points.clone()
        self.log_weights = torch.zeros_like(self.points[0])
        self._cones, self._generator = cones, generator
        self._walls = cones.walls.to(torch.float32)
        self._columns = self._walls.permute(2, 0, 1)[:, :, None].contiguous()
        self._one = torch.ones((), dtype=torch.float64, device=self._walls.device)
        self._distances = self._ratios = torch.empty(0)
        self._apex = -(cones.slopes / cones.curvatures).mT[..., None]
        self._first = start.spread.square()[:, None]
        self._density = self._density_at(0.0)
        self._steps = 0

    def _density_at(self, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Square roots of the precisions (d, K, 1), means (d, K, 1), and log of the normalisers (K, 1) at β."""
        precisions = ((1 - beta) * self._first + beta * self._cones.curvatures).mT[..., None]
        slopes = beta * self._cones.slopes.mT[..., None]
        normalisers = (slopes.square() / precisions - precisions.log()).sum(0) / 2
        return precisions.sqrt(), -slopes / precisions, normalisers

    def advance(self, beta: float) -> Tensor:
        """Move to β, and return the increments of the log-weights, (K, M)."""
        safe_point()
        if self._steps % _STEPS_PER_REFRESH == 0:
            distances = self.points.permute(1, 2, 0).to(torch.float32) @ self._walls.mT
            self._distances = distances.add_(1).clamp_(min=tolerances.MIN_PARTICLE_DISTANCE)
            self._ratios = torch.empty_like(self._distances) if not self._steps else self._ratios
        self._steps += 1
        old, self._density = self._density, self._density_at(beta)
        roots, means, (before, after) = (torch.stack(pair) for pair in zip(old, self._density, strict=True))
        increments: Tensor = after - before + self._sweep(roots, means)
        precisions = roots[1].square()
        forces = -means[1] * precisions
        move_along_rays(self.points, self._distances, self._apex, precisions, forces, self._generator)
        self.log_weights += increments
        return increments

    def _sweep(self, roots: Tensor, means: Tensor) -> Tensor:
        """Draw each coordinate in turn from the new density on its chord; the log ratios of the integrals, (K, M).

        Args:
            roots: square roots of the old and the new precisions, (2, d, K, 1).
            means: old and new means, (2, d, K, 1).
        """
        product = torch.ones_like(self.points[0])
        ends = torch.empty((2, *product.shape), dtype=torch.float32, device=product.device)
        left, right = ends
        shares = torch.rand(self.points.shape, dtype=product.dtype, device=product.device, generator=self._generator)
        halved = (roots * math.sqrt(0.5)).movedim(0, 1)[:, :, None]
        last = (means[1], roots[1].reciprocal())
        parts = (self.points, self._columns, means.movedim(0, 1)[:, :, None], halved, *last, shares)
        # Few operations on small tensors: their number determines the time.
        for point, column, mean, root, new_mean, deviation, share in zip(
            *(part.unbind() for part in parts), strict=True
        ):
            torch.div(column, self._distances, out=self._ratios)
            torch.amax(self._ratios, -1, out=left)
            torch.amin(self._ratios, -1, out=right)
            left.clamp_(min=1 / _MAX_CHORD)
            right.clamp_(max=-1 / _MAX_CHORD)
            chords = ends.double().reciprocal_().neg_()
            scores = (chords + point).sub(mean).mul_(root)  # (old and new, left and right, K, M), over √2
            # Seen from the side on which most of the chord lies, both tails are small numbers without cancellation.
            signs = torch.copysign(self._one, scores.sum(1, keepdim=True))
            tails = torch.special.erfc(scores.mul_(signs))
            first, second = tails.unbind(1)
            old, new = second.sub_(first).unbind()
            product.mul_(new / old)
            drawn = torch.special.ndtri(torch.addcmul(first[1], share, new).mul_(0.5)).mul_(signs[1, 0])
            move = torch.addcmul(new_mean - point, drawn, deviation, value=-1)
            move = torch.clamp(move, *chords.mul_(1 - tolerances.CHORD_END_FRACTION_FLOAT32))
            point.add_(move)
            self._distances.addcmul_(move.to(torch.float32)[..., None], column)
        ratios: Tensor = product.abs_().log_()
        return ratios


def _schedule(cones: _Cones, generator: torch.Generator) -> tuple[list[tuple[float, float]], float]:
    """Pairs of β and the sum of log-weights' spreads up to it; the variance of log-weights times the steps, or NaN."""
    start = _Start.of(cones, _PILOT_PARTICLES, _START_DRAWS // 4, generator)
    particles = _Particles(cones, start, generator)
    steps, step = [(0.0, 0.0)], _FIRST_STEP
    while steps[-1][0] < 1:
        beta = min(1.0, steps[-1][0] + step)
        spread = float(particles.advance(beta).var(-1).mean().sqrt())
        if not spread < math.inf or len(steps) > 10_000:
            return [(0.0, 0.0), (1.0, 1.0)], math.nan
        steps.append((beta, steps[-1][1] + spread))
        step *= min(2.0, max(0.4, _PILOT_SPREAD / max(spread, 1e-6)))
    length, weights = steps[-1][1], particles.log_weights
    return steps, _CORRELATION * max(length**2, float(weights.var(-1).mean()) * (len(steps) - 1))


def _spaced(steps: list[tuple[float, float]], count: int) -> list[float]:
    """β_1 … β_T = 1 with equal spreads of the log-weights of all steps."""
    betas, sums = (torch.tensor(part, dtype=torch.float64) for part in zip(*steps, strict=True))
    wanted = torch.linspace(0, float(sums[-1]), count + 1, dtype=torch.float64)[1:-1]
    after = torch.searchsorted(sums, wanted).clamp(1, len(sums) - 1)
    share = (wanted - sums[after - 1]) / (sums[after] - sums[after - 1]).clamp(min=1e-300)
    return [*torch.lerp(betas[after - 1], betas[after], share.clamp(0, 1)).tolist(), 1.0]


def _estimate(
    cones: _Cones, betas: list[float], num_particles: int, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Log measures (K,) and their variances (K,)."""
    start = _Start.of(cones, num_particles, draws, generator)
    particles = _Particles(cones, start, generator)
    for beta in betas:
        particles.advance(beta)
    logs = torch.where(cones.contain(particles.points), particles.log_weights, -math.inf)
    largest = logs.amax(-1, keepdim=True)
    weights = (logs - largest).exp()
    means = weights.mean(-1)
    variances = weights.var(-1) / means.square() / num_particles + start.variance
    values = cones.log_scale + start.log_measure + largest[:, 0] + means.log()
    return values + variances / 2, variances  # the mean is unbiased, its logarithm is not


def _normals(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=generator.device, generator=generator)
