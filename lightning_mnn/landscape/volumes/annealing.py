"""Annealed sampling of polyhedral cones, used by :func:`~lightning_mnn.landscape.volumes.cone.log_cone_measure`.

Coordinates of a cone C = {w : b_n·w > 0} are relative to its analytic centre c, which maximises
Σ log b_n·w − N|w|²/(2d). With the Hessian H = R Rᵀ there, w = c + R⁻ᵀ V y turns the constraints into 1 + a_n·y > 0 with
|a_n| ≤ 1, also for thin cones. V makes the normal density of w a product over the coordinates of y:
exp(−½ Σ λ_j y_j² − h·y − ½|c|²).

The Gaussian measure of C is the last of a chain of integrals over C, from β = 0 to 1, of the exponential of
−(1−β) ½κ²|y|² − β (½ Σ λ_j y_j² + h·y + ½|c|²). The first is a normal distribution that lies in C with a probability of
about ¾. An island is a population that follows this chain by waste-free sequential Monte Carlo (Dau & Chopin 2022,
arXiv 2011.02328). At each step it is weighted and resampled to a few particles; each of these starts a Markov chain,
and all states of the chains form the next population. The product of the mean weights is an unbiased estimate of the
measure, for any mixing of the chains; bad mixing shows as a spread of the islands.

A Markov chain alternates two moves that are almost never rejected: a slice-sampling move of each coordinate in turn, by
its conditional density on the exact chord of C, and one of the distance from the apex, by the density along the ray.

Shapes: K cones, N constraints, d dimensions, I islands, M particles of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_mnn.landscape import tolerances
from lightning_mnn.utilities.interruption import safe_point

_MAX_NEWTON_STEPS = 100
_PILOT_PARTICLES = 128  # particles that determine the start and the schedule
PILOT_STATES = 4  # states of the pilot's chains
_START_PROBABILITY = 0.75  # probability of C under the first distribution
_LOG_WEIGHT_SPREAD = 0.6  # standard deviation of the log-weights of one step of the chain
_MIN_POSITIVE = 1e-300


@dataclass(frozen=True)
class Centred:
    """Cones in coordinates relative to their analytic centres.

    Attributes:
        walls: a_n, (K, N, d); zero rows are no constraints.
        curvatures: λ, (K, d).
        apex: the point y of w = 0, −h/λ, (K, d).
        offset: ½|c|², (K,).
        log_scale: log |det ∂w/∂y|, (K,).
        margins: smallest b_n·c / (|b_n||c|), (K,).
        spread: κ of the first distribution, (K,).
    """

    walls: Tensor
    curvatures: Tensor
    apex: Tensor
    offset: Tensor
    log_scale: Tensor
    margins: Tensor
    spread: Tensor

    def __getitem__(self, cones: Tensor) -> Centred:
        """Some of the cones."""
        return Centred(**{item.name: getattr(self, item.name)[cones] for item in fields(self)})

    @property
    def slopes(self) -> Tensor:
        """h, (K, d)."""
        return -self.curvatures * self.apex

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.walls.shape[-1]


def analytic_centre(normals: Tensor, interior: Tensor) -> Tensor:
    """The maximiser c of Σ log b_n·w − N|w|²/(2d) in a cone, (K, d), by Newton's method with a line search.

    Args:
        normals: b_n, (K, N, d); zero rows are no constraints.
        interior: a point of each open cone, (K, d).
    """
    point: Tensor = interior / interior.norm(dim=-1, keepdim=True) * math.sqrt(normals.shape[-1])
    for _ in range(_MAX_NEWTON_STEPS):
        safe_point()
        _, scaled, weight = _barrier(normals, point)
        gradient = weight * point - scaled.sum(-2)
        factor = _hessian_factor(scaled, weight)
        step = -torch.cholesky_solve(gradient[..., None], factor)[..., 0]
        decrement = -(gradient * step).sum(-1, keepdim=True)
        moving = decrement >= tolerances.MAX_CENTRE_DECREMENT
        if not bool(moving.any()):
            break
        length = _line_search(scaled, point, step, weight, decrement)
        point = torch.where(moving, point + length * step, point)
    return point


def centre(normals: Tensor, interior: Tensor, generator: torch.Generator) -> Centred:
    """Cones {w : b_n·w > 0} from unit normals (K, N, d; zero rows are no constraints) and a point of each, (K, d)."""
    point = analytic_centre(normals, interior)
    margins, scaled, weight = _barrier(normals, point)
    factor = _hessian_factor(scaled, weight)
    identity = torch.eye(normals.shape[-1], dtype=normals.dtype, device=normals.device).expand_as(factor)
    to_point = torch.linalg.solve_triangular(factor.mT, identity, upper=True)
    # A thin cone has directions of 1e-10 of the size of others: an eigendecomposition would lose their squares.
    _, sizes, basis = torch.linalg.svd(to_point)
    walls = scaled @ (to_point @ basis.mT)
    start = _normals((len(normals), _PILOT_PARTICLES, normals.shape[-1]), generator)
    return Centred(
        walls=walls,
        curvatures=sizes.square(),
        apex=-(basis @ (factor.mT @ point[..., None]))[..., 0],
        offset=point.square().sum(-1) / 2,
        log_scale=-factor.diagonal(dim1=-2, dim2=-1).log().sum(-1),
        margins=torch.where((normals != 0).any(-1), margins, torch.inf).amin(-1) / point.norm(dim=-1),
        spread=-(start @ walls.mT).amin(-1).quantile(1 - _START_PROBABILITY, dim=-1).clamp(max=-1.0),
    )


def schedule(cones: Centred, generator: torch.Generator) -> Tensor:
    """Steps β_1 < … < β_T = 1 of each cone, (T, K): log-weights have a standard deviation of 0.6 or less, and no tails.

    A pilot population determines them, so that they are independent of the islands' estimates. Cones with fewer steps
    repeat β = 1.

    Raises:
        ArithmeticError: β does not increase because of rounding.
    """
    population, log_weights = _start(cones, 1, _PILOT_PARTICLES, generator)
    beta = torch.zeros_like(cones.offset)
    steps: list[Tensor] = []
    while not steps or bool((beta < 1).any()):
        particles = _resample(population, log_weights, _PILOT_PARTICLES, generator)
        population = _run_chains(cones, particles, beta, PILOT_STATES, generator)[..., -_PILOT_PARTICLES:]
        energies = _energies(cones, population)
        step = torch.minimum(
            _LOG_WEIGHT_SPREAD / energies.std(-1)[..., 0].clamp(min=_MIN_POSITIVE), _tail_step(cones, population, beta)
        )
        following = (beta + step).clamp(max=1.0)
        if not bool(((following > beta) | (beta == 1)).all()):  # false for NaN too
            raise ArithmeticError("a cone is too thin for float64: its chain of integrals does not end")
        log_weights = -(following - beta)[:, None, None] * energies
        steps.append(following)
        beta = following
    return torch.stack(steps)


def log_measures(
    cones: Centred, steps: Tensor, islands: int, chains: int, length: int, generator: torch.Generator
) -> Tensor:
    """Logs of unbiased estimates of the Gaussian measure of each cone, one for each island, (K, I).

    Args:
        cones: K cones.
        steps: β_1 … β_T, (T, K).
        islands: independent populations I.
        chains: Markov chains of each island.
        length: states of each chain, including its start; a population has M = chains · length particles.
        generator: generator of the random numbers, on the cones' device.
    """
    population, log_weights = _start(cones, islands, chains * length, generator)
    total = (cones.log_scale - cones.dim * cones.spread.log())[:, None] + _log_mean(log_weights)
    beta = torch.zeros_like(cones.offset)
    for following in steps:
        particles = _resample(population, log_weights, chains, generator)
        population = _run_chains(cones, particles, beta, length, generator)
        log_weights = -(following - beta)[:, None, None] * _energies(cones, population)
        total = total + _log_mean(log_weights)
        beta = following
    return total


def _start(cones: Centred, islands: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points of the first distribution, (d, K, I, M), and their log-weights (K, I, M): 0 in the cone, −∞ outside."""
    shape = (cones.dim, len(cones.walls), islands, size)
    population = _normals(shape, generator) / cones.spread[:, None, None]
    # In blocks, because the distances of all particles may not fit into memory.
    blocks = torch.split(population, max(1, _PILOT_PARTICLES // islands), dim=-1)
    inside = torch.cat(
        [(_distances(cones, block.flatten(2)) > 0).all(-1).view(block.shape[1:]) for block in blocks], -1
    )
    return population, torch.where(inside, 0.0, -torch.inf).to(population)


def _resample(population: Tensor, log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Particles (d, K, I, count) from systematic resampling of each island by its weights."""
    sums = torch.softmax(log_weights, -1).cumsum(-1)
    grid = torch.arange(count, dtype=sums.dtype, device=sums.device)
    shift = torch.rand((*sums.shape[:-1], 1), dtype=sums.dtype, device=sums.device, generator=generator)
    chosen = torch.searchsorted(sums, (grid + shift) / count * sums[..., -1:], right=True)
    chosen = chosen.clamp(max=sums.shape[-1] - 1)
    return population.gather(-1, chosen.expand(len(population), *chosen.shape))


def _run_chains(cones: Centred, particles: Tensor, beta: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """States of the Markov chains from particles (d, K, I, chains), with the starts first, (d, K, I, M)."""
    points = particles.flatten(2)
    distances = _distances(cones, points).clamp_(min=_MIN_POSITIVE)
    columns = cones.walls.mT.contiguous()
    precisions = ((1 - beta)[:, None] * cones.spread[:, None] ** 2 + beta[:, None] * cones.curvatures).mT[..., None]
    forces = (beta[:, None] * cones.slopes).mT[..., None]
    apex = cones.apex.mT[..., None]
    states = [particles]
    for _ in range(length - 1):
        safe_point()
        _move_coordinates(points, distances, columns, precisions, -forces / precisions, generator)
        move_along_rays(points, distances, apex, precisions, forces, generator)
        states.append(points.clone().view_as(particles))
    return torch.cat(states, dim=-1)


def _move_coordinates(
    points: Tensor, distances: Tensor, columns: Tensor, precisions: Tensor, means: Tensor, generator: torch.Generator
) -> None:
    """One sweep of slice sampling along the coordinates, in place.

    Args:
        points: (d, K, P).
        distances: 1 + a_n·y, (K, P, N).
        columns: coordinates of the a_n, (K, d, N).
        precisions: of the normal density, (d, K, 1).
        means: of the normal density, (d, K, 1).
        generator: of the random numbers.
    """
    slack = 2 * torch.empty_like(points).exponential_(generator=generator) / precisions
    share = torch.rand(points.shape, dtype=points.dtype, device=points.device, generator=generator)
    share = tolerances.CHORD_END_FRACTION + (1 - 2 * tolerances.CHORD_END_FRACTION) * share
    for j in range(len(points)):
        column = columns[:, j, None, :]
        ratios = column / distances
        offset = means[j] - points[j]
        reach = (offset.square() + slack[j]).sqrt_()
        left = torch.maximum(-1 / ratios.amax(-1).clamp_(min=_MIN_POSITIVE), offset - reach)
        right = torch.minimum(-1 / ratios.amin(-1).clamp_(max=-_MIN_POSITIVE), offset + reach)
        move = torch.lerp(left, right, share[j])
        points[j] += move
        distances.addcmul_(move[..., None], column)


def move_along_rays(
    points: Tensor, distances: Tensor, apex: Tensor, precisions: Tensor, forces: Tensor, generator: torch.Generator
) -> None:
    """One slice-sampling move y ↦ apex + r (y − apex) of every particle, in place (shapes as in _move_coordinates).

    The density of r > 0 is r^(d−1) exp(−½ a r² − b r). Its logarithm is concave, so Newton's method approaches the ends
    of a slice from outside. A remaining error only makes the interval too wide; moves to points off the slice are
    rejected.
    """
    rays = points - apex
    power = len(points) - 1
    a = (precisions * rays.square()).sum(0)
    b = ((precisions * apex + forces) * rays).sum(0)

    def log_density(r: Tensor) -> Tensor:
        return power * r.log() - a / 2 * r.square() - b * r

    mode = (-b + (b.square() + 4 * a * power).sqrt()) / (2 * a)
    level = log_density(torch.ones_like(a)) - torch.empty_like(a).exponential_(generator=generator)
    depth = 2 * (log_density(mode) - level)
    right = mode + (depth / a).sqrt()
    left = mode - (depth / (a + power / mode.square())).sqrt()
    left = torch.maximum(left, ((level - b.clamp(max=0).square() / (2 * a)) / power).exp())
    for _ in range(4):
        left, right = (r - (log_density(r) - level) / (power / r - a * r - b) for r in (left, right))
    factor = torch.lerp(left, right, torch.rand(a.shape, dtype=a.dtype, device=a.device, generator=generator))
    factor = torch.where(log_density(factor) >= level, factor, 1.0)
    torch.add(apex, factor * rays, out=points)
    distances *= factor[..., None].to(distances.dtype)


def _tail_step(cones: Centred, population: Tensor, beta: Tensor) -> Tensor:
    """Largest step in β, (K,), that reduces the precision along the ray of any point by at most a third."""
    rays = (population - cones.apex.mT[..., None, None]).square()
    first = cones.spread[:, None] ** 2 * rays.sum(0)[:, 0]
    last = (cones.curvatures.mT[..., None] * rays[:, :, 0]).sum(0)
    now = torch.lerp(first, last, beta[:, None])
    return torch.where(first > last, tolerances.MAX_PRECISION_LOSS * now / (first - last), torch.inf).amin(-1)


def _energies(cones: Centred, population: Tensor) -> Tensor:
    """−d log density / dβ of the chain of integrals, (K, I, M), for points (d, K, I, M)."""
    quadratic = (cones.curvatures - cones.spread[:, None] ** 2).mT[..., None, None] / 2
    linear = cones.slopes.mT[..., None, None]
    return ((quadratic * population + linear) * population).sum(0) + cones.offset[:, None, None]


def _distances(cones: Centred, points: Tensor) -> Tensor:
    """1 + a_n·y, (K, P, N), for points (d, K, P)."""
    return points.permute(1, 2, 0) @ cones.walls.mT + 1


def _barrier(normals: Tensor, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """b_n·w, (K, N), with 1 for rows of zeros; b_n/(b_n·w), (K, N, d); and the weight N/d of the quadratic, (K, 1)."""
    used = (normals != 0).any(-1)
    margins = torch.where(used, (normals @ point[..., None])[..., 0], 1.0)
    return margins, normals / margins[..., None], used.sum(-1, keepdim=True) / normals.shape[-1]


def _hessian_factor(scaled: Tensor, weight: Tensor) -> Tensor:
    """Lower triangular R of the Hessian Σ b_n b_nᵀ/(b_n·w)² + weight = R Rᵀ, from rows b_n/(b_n·w)."""
    identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(scaled.mT @ scaled + weight[..., None] * identity)
    if bool(failed.any()):  # a thin cone: float64 loses the squares, so factor without them
        ridge = (weight.sqrt()[..., None] * identity).expand(len(scaled), -1, -1)
        factor = torch.linalg.qr(torch.cat([scaled, ridge], dim=-2), mode="r").R.mT
        factor = factor * factor.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return factor


def _line_search(scaled: Tensor, point: Tensor, step: Tensor, weight: Tensor, decrement: Tensor) -> Tensor:
    """Length of a Newton step that stays in the cone and nearly minimises the barrier on its line, (K, 1)."""
    rates = (scaled @ step[..., None])[..., 0]
    farthest = 0.99 / (-rates).amax(-1, keepdim=True).clamp(min=_MIN_POSITIVE)
    linear, curvature = ((step * other).sum(-1, keepdim=True) for other in (point, step))
    length = 1 / (1 + decrement.clamp(min=0).sqrt())
    for _ in range(8):
        slopes = rates / (1 + length * rates)
        first = weight * (linear + length * curvature) - slopes.sum(-1, keepdim=True)
        second = (weight * curvature + slopes.square().sum(-1, keepdim=True)).clamp(min=_MIN_POSITIVE)
        length = torch.clamp(length - first / second, min=length / 10, max=(length + farthest) / 2)
    return length


def _log_mean(log_values: Tensor) -> Tensor:
    return torch.logsumexp(log_values, -1) - math.log(log_values.shape[-1])


def _normals(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=generator.device, generator=generator)
