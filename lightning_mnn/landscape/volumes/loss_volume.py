"""Volumes of {L ≤ L(w*) + ε} around a point as a function of ε; their slope in log ε is the learning coefficient.

The volume is V(ε) = P(L(w) ≤ L(w*) + ε) for w ~ N(w*, I/γ). It is sampled by multilevel splitting: levels fall, the
particles that are below a level replace the others, and moves spread them that leave the normal distribution,
restricted to losses below the level, invariant. All states of the moves count (waste-free; Dau and Chopin 2022, arXiv
2011.02328). A pilot chooses levels and directions; given these, each run is exactly unbiased for any speed of mixing.

Shapes: R runs, M particles of each, T states of each particle at a level, K levels, P parameters; points are (C, P).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from scipy import stats

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.intervals import Estimate
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import sent
from lightning_mnn.utilities.validation import ArgumentError, positive_integer, real_number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Losses = Callable[[Tensor], Tensor]

_SURVIVORS = 0.2  # share of the pilot's states below the next level
_PILOT_PARTICLES = 256
_MAX_DENSE = 256  # parameters up to which the directions of moves have a whole covariance
_SHRINKS = 10  # tries of a move along a line; each rejected point shortens the line
_SCALES = 2.0  # decades of the logarithms of scaling factors


@dataclass(frozen=True)
class LossVolume:
    """Sampled volumes V(ε) = P(L(w) ≤ L(w*) + ε), w ~ N(w*, I/γ); see :func:`loss_volume`.

    Attributes:
        levels: ε, falling, (K,).
        log_volumes: natural logarithms of V, (K,); −inf where no run has a point below a level.
        log_lows: logarithms of the lower ends of their 95 % intervals, (K,).
        log_highs: logarithms of the upper ends, (K,).
        slopes: (log V_k − log V_{k+1}) / (log ε_k − log ε_{k+1}), (K − 1,); they tend to the learning coefficient.
        slope_errors: their standard errors, such that ± 1.96 of them covers 95 %, (K − 1,).
        localisation: γ.
        lowest: the smallest L(w) − L(w*) that was met; negative if w* is no minimum of the neighbourhood.
        evaluations: number of points whose loss was computed, with the pilot.
    """

    levels: tuple[float, ...]
    log_volumes: tuple[float, ...]
    log_lows: tuple[float, ...]
    log_highs: tuple[float, ...]
    slopes: tuple[float, ...]
    slope_errors: tuple[float, ...]
    localisation: float
    lowest: float
    evaluations: int


def loss_volume(
    loss: Losses,
    point: Tensor,
    levels: Sequence[float],
    *,
    localisation: float = 1.0,
    runs: int = 16,
    particles: int = 32,
    steps: int = 32,
    seed: int = 0,
) -> LossVolume:
    """Volumes V(ε) of the points near w* whose loss is at most ε above L(w*), with 95 % intervals, and their slopes.

    V(ε) = P(L(w) ≤ L(w*) + ε) for w ~ N(w*, I/γ). For ε → 0 it tends to c ε^λ (log 1/ε)^(m − 1), with the local
    learning coefficient λ and its multiplicity m. No gradients are needed, so kinks do no harm. Particles that mix
    badly make the runs differ, and the intervals wide: the mean over the runs is unbiased.

    Cost: about 6 R M T losses of single points for each factor of 5 in V, all R M particles in one call.

    Args:
        loss: L of points (C, P), (C,); the loss of a point depends on this point only.
        point: w*, (P,).
        levels: ε, positive and different.
        localisation: γ.
        runs: number R of independent runs, whose spread is the error.
        particles: number M of particles of each run.
        steps: number T of states of each particle at a level.
        seed: of everything that is drawn.

    Raises:
        ArgumentError: an argument is out of range, or the loss has the wrong shape or is NaN at w*.

    >>> found = loss_volume(lambda w: w.square().sum(1), torch.zeros(2, dtype=torch.float64), [1e-2, 1e-4])
    >>> exact = [math.log(-math.expm1(-level / 2)) for level in found.levels]  # of an exponential distribution
    >>> all(low < truth < high for low, truth, high in zip(found.log_lows, exact, found.log_highs))
    True
    >>> abs(found.slopes[0] - 1) < 0.1
    True
    """
    wanted = _checked_levels(levels)
    for name, number in (("runs", runs), ("particles", particles), ("steps", steps)):
        positive_integer(name, number)
    if runs < 2:
        raise ArgumentError("runs", runs, "must be at least 2", "an interval comes from their spread")
    target = _Sublevels(loss, point.detach(), real_number("localisation", localisation, above=0))
    plan = _plan(target, wanted, steps, generator(seed, "loss volume pilot"))
    logs = _log_runs(target, plan, runs, particles, steps, generator(seed, "loss volume"))
    kept = torch.stack([log for log, stage in zip(logs, plan, strict=True) if stage.is_wanted]).cpu()
    estimates = [_estimate(row) for row in kept]
    slopes = [_slope(*pair) for pair in zip(kept, kept[1:], wanted, wanted[1:], strict=False)]
    return LossVolume(
        tuple(wanted),
        tuple(one.log_value for one in estimates),
        tuple(one.log_low for one in estimates),
        tuple(one.log_high for one in estimates),
        tuple(slope for slope, _ in slopes),
        tuple(error for _, error in slopes),
        target.localisation,
        float(target.lowest),
        target.evaluations,
    )


@dataclass(frozen=True)
class LogBounds:
    """Rigorous bounds of the logarithm of a volume, up to rounding.

    Attributes:
        low: lower bounds, (K,).
        high: upper bounds, (K,); for ε → 0 both are equal.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]


def closed_form_log_volume(
    levels: Sequence[float],
    curvatures: Sequence[float],
    kink_slopes: Sequence[float] = (),
    *,
    localisation: float = 1.0,
) -> LogBounds:
    """Bounds of log V(ε) for the loss Σ_j a_j |x_j| + ½ Σ_i h_i y_i², x and y orthogonal coordinates of w − w*.

    Every minimum with simple kinks is of this form to leading order; other directions are flat. Without the normal
    density the volume of {loss ≤ ε} in the κ + r directions is ε^λ Π(2/a_j) Π√(2π/h_i) / Γ(λ + 1), λ = κ + r/2. The
    density of w ~ N(w*, I/γ) is (γ/2π)^((κ + r)/2) times a factor between exp(−γ ρ²/2) and 1, where ρ is the largest
    distance in the set.

    Args:
        levels: ε, positive and different; the bounds are in their falling order.
        curvatures: h_i, the positive eigenvalues of the Hessian, (r,).
        kink_slopes: a_j, (κ,); of a kink with slopes a⁺ and a⁻ to its sides, their harmonic mean 2/(1/a⁺ + 1/a⁻).
        localisation: γ.

    Raises:
        ArgumentError: an argument is not positive, or there is no direction.

    >>> bounds = closed_form_log_volume([1e-4], [2.0, 2.0])
    >>> bounds.low[0] < math.log(-math.expm1(-0.5e-4)) < bounds.high[0]
    True
    """
    for name, values in (("curvatures", curvatures), ("kink_slopes", kink_slopes)):
        for value in values:
            real_number(name, value, above=0)
    count = len(curvatures) + len(kink_slopes)
    if not count:
        raise ArgumentError("curvatures", curvatures, "must have a direction in which the loss rises", "add one")
    gamma = real_number("localisation", localisation, above=0)
    coefficient = len(kink_slopes) + len(curvatures) / 2
    log_factor = count / 2 * math.log(gamma / (2 * math.pi)) - math.lgamma(coefficient + 1)
    log_factor += sum(math.log(2 / slope) for slope in kink_slopes)
    log_factor += sum(math.log(2 * math.pi / curvature) / 2 for curvature in curvatures)
    wanted = _checked_levels(levels)
    highs = [log_factor + coefficient * math.log(level) for level in wanted]
    radii = [max([*(2 * e / h for h in curvatures), *((e / a) ** 2 for a in kink_slopes)]) for e in wanted]
    lows = [high - gamma * squared / 2 for high, squared in zip(highs, radii, strict=True)]
    return LogBounds(tuple(lows), tuple(min(high, 0.0) for high in highs))


class TwoLayerMinimum(Protocol):
    """What a certificate of a two-layer network tells of its minimum."""

    @property
    def is_minimum(self) -> bool: ...  # noqa: D102

    @property
    def hidden_weights(self) -> Tensor: ...  # noqa: D102

    @property
    def output_weights(self) -> Tensor: ...  # noqa: D102

    @property
    def hidden_bias(self) -> Tensor | None: ...  # noqa: D102

    @property
    def output_bias(self) -> Tensor | None: ...  # noqa: D102

    @property
    def kink_directions(self) -> int | None: ...  # noqa: D102

    @property
    def positive_directions(self) -> int | None: ...  # noqa: D102


def minimum_log_volume(
    certificate: TwoLayerMinimum,
    inputs: Tensor,
    targets: Tensor,
    levels: Sequence[float],
    negative_slope: float = 0.0,
    *,
    localisation: float = 1.0,
) -> tuple[float, ...]:
    """The log V(ε) of :func:`loss_volume` for a certified two-layer minimum without biases, to leading order.

    The loss is ‖ŷ − y‖²/N, and w are its hidden and output weights. The curvatures are those on the face of the kinks,
    2/N times the squared singular values of the outputs' derivative there. A kink's slopes are the one-sided
    derivatives along the move that leaves this kink only. With them :func:`closed_form_log_volume` has the volume. It
    is exact in the limits of ε → 0 and γ → ∞: the derivatives change with the weights, and V by a factor 1 + O(1/√γ).

    Args:
        certificate: of a minimum whose directions were counted.
        inputs: x_n, (N, d0).
        targets: y_n, (N,).
        levels: ε, positive and different; the result is in their falling order.
        negative_slope: ρ.
        localisation: γ.

    Raises:
        ArgumentError: the certificate is not of a minimum, has biases, or its kinks are not independent.
    """
    if not certificate.is_minimum or certificate.positive_directions is None:
        raise ArgumentError("certificate", certificate, "is not of a minimum with counted directions", "polish first")
    if certificate.hidden_bias is not None or certificate.output_bias is not None:
        raise ArgumentError("certificate", certificate, "has biases", "append a column of ones to the inputs instead")
    hidden, output = certificate.hidden_weights.double(), certificate.output_weights.double()
    x, y = inputs.to(hidden), targets.to(hidden)
    count, width = len(x), len(output)
    u = x @ hidden.T
    scale = x.norm(dim=1)[:, None] * hidden.norm(dim=1)
    on_kink = u.abs() <= tolerances.MAX_KINK_ROUNDINGS * x.shape[1] * tolerances.FLOAT64_EPS * scale
    gates = torch.where(u > 0, 1.0, negative_slope).to(u) * ~on_kink
    by_hidden = (gates * output)[:, :, None] * x[:, None, :]
    jacobian = torch.cat([by_hidden.flatten(1), gates * u], 1)
    errors = (gates * u) @ output - y
    normals = torch.zeros(int(on_kink.sum()), jacobian.shape[1], dtype=u.dtype, device=u.device)
    samples, units = on_kink.nonzero(as_tuple=True)
    blocks = normals[:, : hidden.numel()].view(len(normals), width, x.shape[1])
    blocks[torch.arange(len(normals), device=u.device), units] = x[samples]
    if len(normals) != certificate.kink_directions:
        raise ArgumentError("certificate", certificate.kink_directions, "has kinks that depend on one another", "")
    _, sizes, right = torch.linalg.svd(normals)
    face = jacobian @ right[len(normals) :].T
    curvatures = 2 / count * torch.linalg.svdvals(face)[: certificate.positive_directions].square()
    smooth = (2 / count * errors @ jacobian) @ torch.linalg.pinv(normals)
    bends = 2 / count * errors[samples] * output[units]
    rising, falling = smooth + bends, -(smooth + negative_slope * bends)
    slopes = 2 / (1 / rising + 1 / falling)
    if len(normals):  # the kinks' pre-activations as coordinates: unit volumes differ by the product of these sizes
        slopes = slopes * (sizes.log().sum() / len(normals)).exp()
    bounds = closed_form_log_volume(levels, curvatures.tolist(), slopes.tolist(), localisation=localisation)
    return bounds.high


def _checked_levels(levels: Sequence[float]) -> list[float]:
    wanted = sorted((real_number("levels", level, above=0) for level in levels), reverse=True)
    if not wanted or len(set(wanted)) < len(wanted):
        raise ArgumentError("levels", levels, "must be at least one, and all different", "such as [1e-2, 1e-4, 1e-6]")
    return wanted


def _estimate(log_runs: Tensor) -> Estimate:
    if bool(log_runs.isfinite().any()):
        return Estimate.of_runs(log_runs)
    return Estimate(-math.inf, -math.inf, 0.0)


def _slope(logs: Tensor, following: Tensor, level: float, next_level: float) -> tuple[float, float]:
    """The slope between two levels and its standard error, by the jackknife over the runs."""
    width, runs = math.log(level / next_level), len(logs)
    slope = float(logs.logsumexp(0) - following.logsumexp(0)) / width
    leave = [torch.cat([torch.arange(k), torch.arange(k + 1, runs)]) for k in range(runs)]
    parts = torch.stack([logs[some].logsumexp(0) - following[some].logsumexp(0) for some in leave]) / width
    factor = float(stats.t.ppf(0.975, runs - 1) / stats.norm.ppf(0.975))
    error = factor * (runs - 1) / math.sqrt(runs) * float(parts.std())
    return slope, error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class _Stage:
    """A level ε, whether it was asked for, and the root of the covariance of directions of moves at this level."""

    level: float
    is_wanted: bool
    root: Tensor


class _Sublevels:
    """The loss above L(w*), and moves within its sublevel sets."""

    def __init__(self, loss: Losses, point: Tensor, localisation: float) -> None:
        self.point, self.localisation, self.evaluations = point, localisation, 0
        self._loss = loss
        self._base = torch.zeros_like(point[0])
        self._base = self(point[None])[0]
        if not math.isfinite(float(self._base)):
            raise ArgumentError("loss", float(self._base), "must be finite at the point", "give another point")
        self.lowest = torch.zeros_like(self._base)

    def __call__(self, points: Tensor) -> Tensor:
        """L − L(w*) at points (C, P), (C,); NaN counts as infinite."""
        with torch.no_grad():
            values = self._loss(points)
        if values.shape != points.shape[:1]:
            shape = tuple(values.shape)
            raise ArgumentError("loss", shape, f"must give {len(points)} numbers for as many points", "one for each")
        self.evaluations += len(points)
        return (values - self._base).nan_to_num(nan=math.inf, posinf=math.inf)

    def draw(self, count: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points of the normal distribution, (C, P), and their losses."""
        noise = _normal((count, len(self.point)), self.point, stream)
        points = self.point + noise / math.sqrt(self.localisation)
        losses = self(points)
        self.lowest = torch.minimum(self.lowest, losses.min())
        return points, losses

    def move(
        self, points: Tensor, losses: Tensor, level: float, root: Tensor, stream: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Move points (C, P) below a level: along a random line, and by scaling some coordinates of w − w*."""
        points, losses = self._along_lines(points, losses, level, root, stream)
        points, losses = self._scaled(points, losses, level, stream)
        self.lowest = torch.minimum(self.lowest, losses.min())
        return points, losses

    def _along_lines(
        self, points: Tensor, losses: Tensor, level: float, root: Tensor, stream: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Slice sampling of the normal density on a line, which shrinks to the point at each loss above the level.

        A point whose tries all fail stays: the tries of a move and of the one back are equally likely.
        """
        noise = _normal(points.shape, self.point, stream)
        directions = noise @ root.T if root.ndim > 1 else noise * root
        offsets = points - self.point
        a = self.localisation * directions.square().sum(1)
        b = self.localisation * (offsets * directions).sum(1)
        reach = (b.square() - 2 * a * _uniform(a, stream).log()).sqrt()
        low, high = (-b - reach) / a, (-b + reach) / a
        done = torch.zeros_like(a, dtype=torch.bool)
        for _ in range(_SHRINKS):
            place = torch.lerp(low, high, _uniform(a, stream))
            there = points + place[:, None] * directions
            values = self(there)
            accepted = ~done & (values <= level)
            points = torch.where(accepted[:, None], there, points)
            losses = torch.where(accepted, values, losses)
            done = done | accepted
            low, high = torch.where(place < 0, place, low), torch.where(place > 0, place, high)
        return points, losses

    def _scaled(self, points: Tensor, losses: Tensor, level: float, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scale successive coordinates (on a ring) by a random factor, by Metropolis' rule."""
        offsets = points - self.point
        size, one = offsets.shape[1], offsets[:, :1]
        places = torch.arange(size, device=offsets.device)
        first, last = ((_uniform(one, stream) * size).floor() for _ in range(2))
        within = torch.where(first <= last, (places >= first) & (places <= last), ~((places > last) & (places < first)))
        logs = _normal(one.shape, self.point, stream) * 2 * 10 ** (-_SCALES * _uniform(one, stream))
        moved = torch.where(within, logs.exp(), 1.0) * offsets
        values = self(self.point + moved)
        gain = self.localisation / 2 * (offsets.square().sum(1) - moved.square().sum(1))
        gain = gain + (within.sum(1, keepdim=True) * logs)[:, 0]
        accepted = (values <= level) & (_uniform(gain, stream).log() < gain)
        return torch.where(accepted[:, None], self.point + moved, points), torch.where(accepted, values, losses)


def _plan(target: _Sublevels, wanted: Sequence[float], steps: int, stream: torch.Generator) -> list[_Stage]:
    """Levels down to the last one wanted, each with the directions of its moves, from a pilot."""
    stages: list[_Stage] = []
    points, losses = target.draw(_PILOT_PARTICLES * steps, stream)
    left = list(wanted)
    while left:
        safe_point()
        level = max(float(losses.quantile(_SURVIVORS)), left[0])
        if stages and level >= stages[-1].level:  # losses do not fall any more
            level = left[0]
        alive = points[losses <= level]
        root = _root(alive - alive.mean(0)) if len(alive) > 1 else stages[-1].root if stages else _root(points)
        stages.append(_Stage(level, level == left[0], root))
        left = left[1:] if level == left[0] else left
        if not len(alive) or not left:
            break
        chosen = torch.randint(len(alive), (_PILOT_PARTICLES,), generator=stream)
        chosen = sent(chosen, points.device)
        points, losses = _states(target, (alive[chosen], losses[losses <= level][chosen]), stages[-1], steps, stream)
    return stages + [_Stage(level, is_wanted=True, root=stages[-1].root) for level in left]


def _root(offsets: Tensor) -> Tensor:
    """The root of the covariance of offsets (n, P): a triangular matrix, or a diagonal for many parameters."""
    count, size = offsets.shape
    squares = offsets.square().mean(0)
    if size <= min(_MAX_DENSE, count / 4):  # a blend with the diagonal would spoil the directions of thin sets
        root, failed = torch.linalg.cholesky_ex(offsets.T @ offsets / count)
        if not int(failed):
            return cast("Tensor", root)
    return (squares + 1e-12 * squares.max() + 1e-300).sqrt()


def _log_runs(
    target: _Sublevels, plan: Sequence[_Stage], runs: int, particles: int, steps: int, stream: torch.Generator
) -> list[Tensor]:
    """Logarithms of the runs' unbiased estimates at each level, (R,); −inf after a run has no point left."""
    points, losses = target.draw(runs * particles * steps, stream)
    total, found = torch.zeros_like(losses[:runs]), []
    for stage in plan:
        safe_point()
        points, losses = points.reshape(runs, particles * steps, -1), losses.reshape(runs, particles * steps)
        alive = losses <= stage.level
        total = total + alive.to(losses).mean(1).log()
        found.append(total)
        if stage is plan[-1]:
            break
        # A random order with the points below the level first, repeated as evenly as possible.
        order = (_uniform(losses, stream) + 2 * ~alive).argsort(1)
        places = torch.arange(particles, device=losses.device) % alive.sum(1, keepdim=True).clamp(min=1)
        chosen = order.gather(1, places)
        points = points.gather(1, chosen[..., None].expand(-1, -1, points.shape[2])).flatten(0, 1)
        losses = losses.gather(1, chosen).flatten()
        points, losses = _states(target, (points, losses), stage, steps, stream)
    return found


def _states(
    target: _Sublevels, places: tuple[Tensor, Tensor], stage: _Stage, steps: int, stream: torch.Generator
) -> tuple[Tensor, Tensor]:
    """All states of moves from points (C, P), the first included, (C T, P), and their losses; ordered by runs."""
    every = [places]
    for _ in range(steps - 1):
        safe_point()
        every.append(target.move(*every[-1], stage.level, stage.root, stream))
    points, losses = (torch.stack(parts, 1) for parts in zip(*every, strict=True))
    return points.flatten(0, 1), losses.flatten()


def _normal(shape: Sequence[int], like: Tensor, stream: torch.Generator) -> Tensor:
    return sent(torch.randn(tuple(shape), dtype=like.dtype, generator=stream), like.device)


def _uniform(like: Tensor, stream: torch.Generator) -> Tensor:
    return sent(torch.rand(like.shape, dtype=like.dtype, generator=stream), like.device)
