"""Gaussian measure of polyhedral cones, in logarithms and with a standard error.

Shapes: K cones, N constraints, d dimensions.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError
from scipy.stats import t as student

from lightning_mnn.landscape.annealing import (
    PILOT_LENGTH,
    Centred,
    analytic_centre,
    centre,
    log_inner_ellipsoid,
    log_measures,
    schedule,
)
from lightning_mnn.landscape.gordan import alternatives
from lightning_mnn.seeding import generator as seeded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_EMPTY = 64 * _EPS  # ‖λᵀB‖ ≤ this · Σ λ with λ ≥ 0 shows that no w has B w > 0 beyond rounding
_THIN = 1e-11  # smallest margin at the centre from which float64 still knows where the walls are
_FLOOR = 1e-9  # error of a closed form at least: what the rounding of the normals alone may do to it
_SURE = 1e-3  # relative rounding error from which a closed form is worse than sampling
_SMALL = 1e-3  # area of a spherical polygon below which its angles do not tell it well
_NEAR = 0.5  # cosine of the angle from the middle of a small polygon to its corners
_DENSE = 2048  # constraints whose products with each other are formed at once
_IGNORED = 1e-6  # change of the log from which nearly orthogonal groups are not called so
_CLEAR = 1e-8  # smallest eigenvalue of a Gram matrix, of the largest, that is certainly not zero
_HULL = 5  # dimension up to which the redundant constraints cost less to find than to carry
_WIDE = 3  # constraints a dimension from which looking for the redundant ones pays
_ISLANDS = 32  # independent populations; their spread is the standard error
_CHAINS = 4  # Markov chains of each
_LENGTH = 8  # fewest states of a chain
_PREDICTED = 0.0009  # states of a chain for a standard error of 1, over the square of the schedule's steps, as a rule
_GROWTH = 8  # how many times as long as a pilot the next one is at most
_AIM = 0.85  # of the target, for its standard error is known to an eighth after the pilot, and again at the end
# Constraint values that are worked on at once: what a cache likes, and what keeps a GPU busy, 128 MiB an array.
_CHUNK = {"cpu": 2**18, "cuda": 2**24}
_QUANTILE = float(student.ppf(0.975, _ISLANDS - 1)) / 1.96  # few islands: their spread is itself uncertain


@dataclass(frozen=True)
class LogEstimate:
    """An estimate of a logarithm.

    Attributes:
        value: natural logarithm; a float, with leading axes a tensor on the CPU.
        standard_error: of the value, in nats: value ± 1.96 of it covers 95 %. A closed form has its rounding error.
    """

    value: float | Tensor
    standard_error: float | Tensor


def log_cone_measure(
    normals: Tensor | ArrayLike,
    interior_point: Tensor | ArrayLike | None = None,
    *,
    target_standard_error: float = 0.1,
    max_samples: int = 2**20,
    seed: int = 0,
) -> LogEstimate:
    """Log of the Gaussian measure of a cone: log P(b_n·w > 0 for all n), w ~ N(0, I).

    The cone is taken apart first: orthogonal groups of constraints are independent, and directions that no constraint
    sees do not matter. A group of rank 1, 2 or 3 (a half-space, an arc, a spherical polygon) has a closed form. Up to
    rank 5 redundant constraints are dropped, by a convex hull. The rest goes to annealed sampling from the analytic
    centre (see :mod:`~lightning_mnn.landscape.annealing`) on 32 independent islands, whose estimates of the measure are
    unbiased and whose spread gives the standard error. Pilots set the number of samples before, so that the intervals
    cover what they say: nothing stops when the error happens to be small.

    Cost: a sample is one sweep, N·d multiplications of about 1 ns each on a processor core (2 to 3 ns below some
    hundred constraints, where small arrays cost more than their arithmetic). Random cones take about
    4,000 √d + 3 d^1.3/s² samples to a standard error of s (N = 8 d, d = 10 to 80), and at fixed d samples grow as N^⅓:
    the time grows about as d^2.4/s² with N in proportion, and as N^1.3 at fixed d, however thin the cone. At equal
    error, nested domains with elliptical slice sampling and Gaussian cooling from a small ball cost 8 and 12 times as
    much on an orthant in 20 dimensions, 20 and 35 times in 50, and more than 100 times on a random cone of N = 200,
    d = 20 (``make bench ARGS="volumes"``).

    Args:
        normals: b_n, (..., N, d), of any lengths; CPU or GPU.
        interior_point: a point of each open cone, (..., d); None looks for one by non-negative least squares.
        target_standard_error: in nats. The samples are as many as lead to 85 % of it by the pilot: one in some ten
            estimates ends a little above it, and all do where ``max_samples`` end first.
        max_samples: most samples of a group of constraints, but that two pilots and a short estimate, some 2,000
            samples for each of about 3 √d steps, are always made.
        seed: of the random numbers.

    Returns:
        The estimate; with leading axes, tensors of their shape, on the CPU.

    Raises:
        ValueError: an argument is out of range, not finite or of the wrong shape, a normal is zero, the cone is empty,
            or the interior point is not in it.
        ArithmeticError: the cone is too thin for float64.

    >>> estimate = log_cone_measure(torch.eye(3))  # an orthant
    >>> round(math.exp(estimate.value), 6)
    0.125
    >>> estimate = log_cone_measure(torch.eye(5) + 1.0)
    >>> estimate.standard_error < 0.1
    True
    """
    _check_numbers(target_standard_error, max_samples)
    unit = _unit_normals(normals)
    leading = unit.shape[:-2]
    points = None if interior_point is None else _interior_points(interior_point, unit)
    unit = unit.flatten(0, -3) if leading else unit[None]
    interiors = [None] * len(unit) if points is None else list(points.reshape(-1, unit.shape[-1]).cpu().numpy())
    cones = zip(unit.cpu().numpy(), interiors, strict=True)
    parts = [_take_apart(b, u, k if leading else None) for k, (b, u) in enumerate(cones)]
    values = np.array([part.value for part in parts])
    squares = np.array([part.standard_error**2 for part in parts])
    groups = [(k, group) for k, part in enumerate(parts) for group in part.groups]
    device = unit.device if unit.device.type in _CHUNK else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(seeded(seed, "cone").initial_seed())
    for chunk in _chunks(groups, device):
        owners = [k for k, _ in chunk]
        targets = np.array([target_standard_error / math.sqrt(len(parts[k].groups)) for k in owners])
        with _one_thread():
            found, errors = _sample([group for _, group in chunk], targets, max_samples, generator)
        np.add.at(values, owners, found)
        np.add.at(squares, owners, errors**2)
    if not leading:
        return LogEstimate(float(values[0]), math.sqrt(squares[0]))
    value, error = (torch.from_numpy(part).reshape(leading) for part in (values, np.sqrt(squares)))
    return LogEstimate(value, error)


def predicted_samples(dim: int, standard_error: float) -> float:
    """About how many samples one cone takes: 4,000 √d at least, and 3 d^1.3/s² for a standard error of s nats.

    Measured on cells of 4 d to 8 d Gaussian normals, d = 10 … 80, s = 0.03 … 1, to within a factor of 2.

    >>> predicted_samples(40, 0.5) < predicted_samples(40, 0.1)
    True
    """
    return 4000 * math.sqrt(dim) + 3 * math.pow(dim, 1.3) / standard_error**2


def log_ellipsoid_volume(normals: Tensor, interior_point: Tensor) -> Tensor:
    """Log volume of the Dikin ellipsoid of a cone at its analytic centre c, the ball |y| ≤ 1 of w = c + R⁻ᵀ y.

    It lies in the cone and has nearly its shape, so that it tells how cones of one size compare, for the cost of a few
    matrix products: of trained networks' cones it explains all but a nat of the differences of several.

    Args:
        normals: b_n, (..., N, d).
        interior_point: a point of each open cone, (..., d).

    Returns:
        Natural logarithms, (...).

    >>> square = torch.eye(2, dtype=torch.float64)  # c = (1, 1), and the ellipse has half-axes 1/√2
    >>> round(float(log_ellipsoid_volume(square, torch.ones(2)).exp() / math.pi), 3)
    0.5
    """
    unit = _unit_normals(normals)
    points = _interior_points(interior_point, unit)
    with _one_thread():
        found = log_inner_ellipsoid(unit.reshape(-1, *unit.shape[-2:]), points.reshape(-1, unit.shape[-1]))
    return found.reshape(unit.shape[:-2])


@dataclass(frozen=True)
class _Group:
    """Constraints that are left to sampling: unit normals (n, r) of rank r, and a point of their cone (r,)."""

    normals: Array
    interior: Array


@dataclass(frozen=True)
class _Parts:
    """A cone taken apart: the logs of what has a closed form, their rounding error, and the rest."""

    value: float
    standard_error: float
    groups: tuple[_Group, ...]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: the steps are too short to be shared, and threads that wait for each other stall."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_numbers(target_standard_error: float, max_samples: int) -> None:
    if not target_standard_error > 0:
        raise ValueError(f"target_standard_error must be positive, got {target_standard_error}")
    least = _ISLANDS * _CHAINS * _LENGTH
    if max_samples < least:
        raise ValueError(f"max_samples must be at least {least}, got {max_samples}")


def _unit_normals(normals: Tensor | ArrayLike) -> Tensor:
    rows = _tensor(normals)
    rows = (rows.cpu() if rows.device.type not in _CHUNK else rows).to(torch.float64)
    if rows.ndim < 2 or 0 in rows.shape:
        raise ValueError(f"normals must have shape (..., N, d) with N and d at least 1, got {tuple(rows.shape)}")
    if not bool(rows.isfinite().all()):
        raise ValueError("normals must be finite: they hold NaN or infinite entries")
    largest = rows.abs().amax(-1, keepdim=True)  # or the squares of small entries would vanish
    if not bool((largest > 0).all()):
        where = (largest[..., 0] == 0).nonzero()[0].tolist()
        raise ValueError(f"normals must not be zero, row {where} is: a sample x_n = 0 constrains nothing, leave it out")
    rows = rows / largest
    return torch.nn.functional.normalize(rows, dim=-1)


def _interior_points(interior_point: Tensor | ArrayLike, unit: Tensor) -> Tensor:
    points = _tensor(interior_point).to(unit)
    shape = (*unit.shape[:-2], unit.shape[-1])
    if points.shape != shape:
        raise ValueError(f"interior_point must have shape {shape} to go with the normals, got {tuple(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError("interior_point must be finite: it holds NaN or infinite entries")
    largest = points.abs().amax(-1, keepdim=True)
    return points / torch.where(largest > 0, largest, 1.0)


def _tensor(values: Tensor | ArrayLike) -> Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    return torch.from_numpy(np.array(values, dtype=np.float64))  # not by way of torch's float32


def _take_apart(unit: Array, point: Array | None, index: int | None) -> _Parts:
    """Split a cone into independent groups of constraints, and settle those with a closed form."""
    interior = _found_interior(unit, index) if point is None else _checked_interior(unit, point, index)
    labels, error = _orthogonal_groups(unit, interior)
    value, groups = 0.0, []
    for label in range(int(labels.max()) + 1):
        group = _reduced(unit[labels == label], interior)
        if group.normals.shape[1] <= _HULL:
            group = _Group(group.normals[_facets(group)], group.interior)
        closed = _closed_form(group)
        if closed is None:
            groups.append(group)
        else:
            value, error = value + closed[0], error + closed[1]
    return _Parts(value, error, tuple(groups))


def _found_interior(unit: Array, index: int | None) -> Array:
    cone = "the cone" if index is None else f"cone {index}"
    for point, multipliers in alternatives(unit):
        if (unit @ point > (len(point) + 4) * _EPS * np.linalg.norm(point)).all():
            return point
        total = multipliers.sum()
        if total > 0 and np.linalg.norm(multipliers @ unit) <= _EMPTY * total:
            raise ValueError(f"normals: {cone} is empty, no w has a positive product with all of them")
    raise ArithmeticError(f"{cone} is too thin for float64 to tell whether it is empty: give an interior_point")


def _checked_interior(unit: Array, point: Array, index: int | None) -> Array:
    products = unit @ point
    n = int(products.argmin())
    if not products[n] > (len(point) + 4) * _EPS * np.linalg.norm(point):
        cone = "the cone" if index is None else f"cone {index}"
        sine = products[n] / (np.linalg.norm(point) or 1)
        raise ValueError(f"interior_point is not inside {cone}: b·w/(‖b‖‖w‖) = {sine:.1e} for constraint {n}")
    return point


def _orthogonal_groups(unit: Array, interior: Array) -> tuple[NDArray[np.integer], float]:
    """Labels (N,) of groups that are orthogonal to each other, and how much calling them so may change the log."""
    sines = unit @ interior / np.linalg.norm(interior)
    noise, ignored, count = 4 * unit.shape[1] * _EPS, 0.0, 0
    labels = np.full(len(unit), -1)
    gram = unit @ unit.T if len(unit) <= _DENSE else None  # beyond, a row at a time
    while (labels < 0).any():
        queue = [int(labels.argmin())]
        labels[queue] = count
        while queue and (labels < 0).any():
            n = queue.pop()
            others = np.flatnonzero(labels < 0)
            products = np.abs(unit @ unit[n] if gram is None else gram[n])[others]
            tied = products > noise
            labels[others[tied]] = count
            queue += others[tied].tolist()
            # 2/π of a product at an orthant; in thin cones a small turn of a wall is a large part of them.
            ignored += float((products[~tied] / sines[others[~tied]]).sum() / sines[n]) / math.pi
        count += 1
    if count > 1 and ignored > _IGNORED:
        return np.zeros(len(unit), dtype=np.int64), 0.0
    return labels, ignored if count > 1 else 0.0


def _reduced(normals: Array, interior: Array) -> _Group:
    """Constraints and point in coordinates of the constraints' own span."""
    if len(normals) >= normals.shape[1]:
        squares = np.linalg.eigvalsh(normals.T @ normals)
        if squares[0] > _CLEAR * squares[-1]:  # of full rank for certain, and for less than the singular values cost
            return _Group(normals, interior)
    _, values, basis = np.linalg.svd(normals, full_matrices=False)
    rank = int((values > normals.shape[1] * _EPS * values[0]).sum())
    reduced, inner = normals @ basis[:rank].T, basis[:rank] @ interior
    products = normals @ interior
    if rank == normals.shape[1] or (np.abs(reduced @ inner - products) > _SURE * products).any():
        return _Group(normals, interior)  # what looks like rounding holds the point in a thin cone
    return _Group(reduced / np.linalg.norm(reduced, axis=1, keepdims=True), inner)


def _facets(group: _Group) -> NDArray[np.integer]:
    """Indices of the constraints that are not redundant, (n,); of three dimensions, in their order around the cone.

    With b_n·u = 1 for an interior point u, the constraints that matter are the vertices of the convex hull of the b_n,
    which lie in a hyperplane.
    """
    num, rank = group.normals.shape
    everything = np.arange(num)
    if rank == 1:
        return everything[:1]
    if rank > 3 and num < _WIDE * rank:
        return everything
    centre_point = analytic_centre(torch.from_numpy(group.normals)[None], torch.from_numpy(group.interior)[None])[
        0
    ].numpy()
    margins = group.normals @ centre_point
    if not (margins > 0).all():
        raise ArithmeticError("a cone is too thin for float64: its centre cannot be found")
    dual = group.normals / margins[:, None]
    plane = np.linalg.svd(centre_point[None])[2][1:]  # across the interior point
    flat = (dual - dual.mean(0)) @ plane.T
    if rank == 2:
        return np.array([flat.argmin(), flat.argmax()])
    try:
        return np.asarray(ConvexHull(flat / np.abs(flat).max(0)).vertices, dtype=np.int64)
    except QhullError:  # flat up to rounding
        return everything


def _closed_form(group: _Group) -> tuple[float, float] | None:
    """Log measure and rounding error of a half-space, an arc or a spherical polygon; None otherwise."""
    rank = group.normals.shape[1]
    if rank == 1:
        return -math.log(2), _EPS  # exact but for the last digit
    if rank == 2:
        first, second = group.normals
        angle = math.atan2(abs(first[0] * second[1] - first[1] * second[0]), -float(first @ second))
        return math.log(angle / (2 * math.pi)), _FLOOR + 16 * _EPS / angle
    return _polygon(group) if rank == 3 else None


def _polygon(group: _Group) -> tuple[float, float] | None:
    """The same of a spherical polygon, whose sides are in order: the triangles from an interior point to its sides."""
    sides = group.normals
    corners = np.cross(sides, np.roll(sides, -1, axis=0))
    lengths = np.linalg.norm(corners, axis=1)
    if lengths.min() == 0:
        return None
    corners /= lengths[:, None]
    corners *= np.sign((sides @ corners.T).sum(0))[:, None]
    noise = 64 * _EPS / lengths.min()  # of a corner
    if not (sides @ corners.T > -noise).all():  # the hull was not one
        return None
    following = np.roll(sides, -1, axis=0)
    turns = np.arctan2(lengths, (sides * following).sum(1))  # at the corners; what they lack of 2π is the area
    area = float(2 * math.pi - turns.sum())
    if area > _SMALL:
        error = _FLOOR + 32 * _EPS * len(sides) / area
    else:
        area, farthest = _small_area(corners)
        error = _FLOOR + noise * (len(sides) / math.sqrt(area) + farthest / area) if area > 0 else math.inf
    return (math.log(area / (4 * math.pi)), error) if error < _SURE else None


def _small_area(corners: Array) -> tuple[float, float]:
    """Area of a small spherical polygon, whose digits an excess of angles would lose, and its radius."""
    middle = corners.sum(0) / np.linalg.norm(corners.sum(0))
    if (corners @ middle < _NEAR).any():  # long and thin: the sides' great circles are not known from their ends
        return 0.0, math.inf
    following = np.roll(corners, -1, axis=0)
    volumes = np.abs(np.cross(corners, following) @ middle)
    bases = 1 + (corners * following).sum(1) + corners @ middle + following @ middle
    return float(2 * np.arctan2(volumes, bases).sum()), float(np.linalg.norm(corners - middle, axis=1).max())


def _chunks(groups: list[tuple[int, _Group]], device: torch.device) -> list[list[tuple[int, _Group]]]:
    """Groups of one rank and of nearly one size, as many as fit together."""
    chunks: list[list[tuple[int, _Group]]] = []
    for item in sorted(groups, key=lambda item: item[1].normals.shape[::-1]):
        num, rank = item[1].normals.shape
        together = chunks[-1] if chunks and chunks[-1][0][1].normals.shape[1] == rank else []
        if together and (len(together) + 1) * num * _ISLANDS * _CHAINS <= _CHUNK[device.type]:
            together.append(item)
        else:
            chunks.append([item])
    return chunks


def _sample(groups: list[_Group], targets: Array, max_samples: int, generator: torch.Generator) -> tuple[Array, Array]:
    """Log measures and standard errors of groups of one rank, (K,), by annealed sampling."""
    most, rank = len(groups[-1].normals), groups[0].normals.shape[1]
    normals = np.zeros((len(groups), most, rank))
    for padded, group in zip(normals, groups, strict=True):
        padded[: len(group.normals)] = group.normals
    interior = np.stack([group.interior for group in groups])
    try:
        return _sample_padded(normals, interior, targets, max_samples, generator)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # it is public, but for torch's stubs
        raise ArithmeticError(f"a cone is too thin for float64: {error}") from None


def _sample_padded(
    normals: Array, interior: Array, targets: Array, max_samples: int, generator: torch.Generator
) -> tuple[Array, Array]:
    """The same of unit normals (K, N, d), rows of zeros after those of smaller groups, and points (K, d)."""
    on_device = (torch.from_numpy(part).to(generator.device) for part in (normals, interior))
    cones = centre(next(on_device), next(on_device), generator)
    thinnest = float(cones.margins.min())
    if not thinnest >= _THIN:  # nor is NaN
        raise ArithmeticError(f"a cone is too thin for float64: at its centre the smallest margin is {thinnest:.1e}")
    steps = schedule(cones, generator)
    lengths = _lengths(
        cones, steps, targets, max_samples // (_ISLANDS * _CHAINS * len(steps)) - PILOT_LENGTH, generator
    )
    values, errors = np.empty(len(normals)), np.empty(len(normals))
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        values[alike], errors[alike] = _one_round(cones, steps, alike, int(length), generator)
    if not np.isfinite(values + errors).all():
        raise ArithmeticError("a cone is too thin for float64: its estimate is not finite")
    return values, errors


def _lengths(cones: Centred, steps: Tensor, targets: Array, most: int, generator: torch.Generator) -> NDArray[np.int64]:
    """How long the chains of each cone are to be, (K,), by pilots whose samples are used for nothing else.

    An estimate that ends when its own standard error is small enough ends early where that is too small by chance, and
    its intervals cover too little: the length is set first. A short pilot exaggerates it, so it counts within a factor
    of 2 of what cones take as a rule; where it says far more than that, longer pilots follow, and have the say.

    Args:
        cones: K cones.
        steps: β_1 … β_T, (T, K).
        targets: standard errors, (K,).
        most: states of a chain that are left.
        generator: of the random numbers.
    """
    rule = _PREDICTED * len(steps) ** 2 / targets**2
    lengths, pending = np.zeros(len(targets)), np.arange(len(targets))
    pilot = max(PILOT_LENGTH, int(min(rule.max(), most) / 4))
    least, largest = rule / 2, rule * 2
    while True:
        _, errors = _one_round(cones, steps, pending, pilot, generator)
        most -= pilot
        needed = np.nan_to_num(pilot * (errors / (_AIM * targets[pending])) ** 2, nan=np.inf)
        lengths[pending] = np.clip(needed, least[pending], largest[pending])
        pending, needed = pending[needed > 2 * largest[pending]], needed[needed > 2 * largest[pending]]
        largest[pending] = np.inf
        following = int(min(needed.max(initial=0.0), most) / _GROWTH)
        if following <= pilot:
            break
        pilot = min(following, _GROWTH * pilot)
    most = max(most, _LENGTH)
    octaves = np.log2(np.clip(lengths, _LENGTH, most) / _LENGTH)
    few = _LENGTH * 2 ** (np.ceil(8 * octaves) / 8) if len(targets) > 1 else np.clip(lengths, _LENGTH, most)
    chosen: NDArray[np.int64] = np.minimum(np.ceil(few), most).astype(np.int64)
    return chosen


def _one_round(
    cones: Centred, steps: Tensor, pending: NDArray[np.int_], length: int, generator: torch.Generator
) -> tuple[Array, Array]:
    """Log of the mean over the islands, and its standard error, (K',)."""
    some = torch.from_numpy(pending).to(steps.device)
    logs = log_measures(cones[some], steps[:, some], _ISLANDS, _CHAINS, length, generator).cpu().numpy()
    largest = logs.max(1, keepdims=True)
    ratios = np.exp(logs - largest)
    means = ratios.mean(1)
    relative, spread = ratios.std(1, ddof=1) / means / math.sqrt(_ISLANDS), logs.std(1, ddof=1)
    values = largest[:, 0] + np.log(means) + relative**2 / 2  # the mean is unbiased, its logarithm is not
    # Where the spread is large the mean rests on the largest few: a normal law of the logs is a second opinion.
    second = logs.mean(1) + spread**2 / 2
    error = np.hypot(np.maximum(relative, spread / math.sqrt(_ISLANDS)), np.minimum(spread, 1) * (values - second))
    return values, _QUANTILE * error
