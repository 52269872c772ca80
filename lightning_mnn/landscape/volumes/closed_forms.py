"""Split cones into orthogonal groups of constraints, and compute the measures that have a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.regions.gordan import alternatives
from lightning_mnn.landscape.volumes.annealing import (
    analytic_centre,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


_MAX_GRAM_ROWS = 2048  # largest number of constraints whose Gram matrix is formed

_MAX_HULL_DIM = 5  # dimension up to which removing redundant constraints saves time

_MIN_HULL_RATIO = 3  # constraints per dimension from which removing redundant ones saves time


@dataclass(frozen=True)
class ConeGroup:
    """Constraints for sampling: unit normals (n, r) of rank r, and a point of their cone (r,)."""

    normals: Array
    interior: Array


@dataclass(frozen=True)
class _Parts:
    """A split cone: the sum of the logs in closed form, its rounding error, and the remaining groups."""

    value: float
    standard_error: float
    groups: tuple[ConeGroup, ...]


def take_apart(unit: Array, point: Array | None, index: int | None) -> _Parts:
    """Split a cone into independent groups of constraints, and compute the measures of those with a closed form."""
    interior = _found_interior(unit, index) if point is None else _checked_interior(unit, point, index)
    labels, error = _orthogonal_groups(unit, interior)
    value, groups = 0.0, []
    for label in range(int(labels.max()) + 1):
        group = _reduced(unit[labels == label], interior)
        if group.normals.shape[1] <= _MAX_HULL_DIM:
            group = ConeGroup(group.normals[_facets(group)], group.interior)
        closed = _closed_form(group)
        if closed is None:
            groups.append(group)
        else:
            value, error = value + closed[0], error + closed[1]
    return _Parts(value, error, tuple(groups))


def _found_interior(unit: Array, index: int | None) -> Array:
    cone = "the cone" if index is None else f"cone {index}"
    for point, multipliers in alternatives(unit):
        if (unit @ point > (len(point) + 4) * tolerances.FLOAT64_EPS * np.linalg.norm(point)).all():
            return point
        total = multipliers.sum()
        if total > 0 and np.linalg.norm(multipliers @ unit) <= tolerances.MAX_EMPTY_CONE_ERROR * total:
            raise ValueError(f"normals: {cone} is empty, no w has a positive product with all of them")
    raise ArithmeticError(f"{cone} is too thin for float64 to decide whether it is empty: give an interior_point")


def _checked_interior(unit: Array, point: Array, index: int | None) -> Array:
    products = unit @ point
    n = int(products.argmin())
    if not products[n] > (len(point) + 4) * tolerances.FLOAT64_EPS * np.linalg.norm(point):
        cone = "the cone" if index is None else f"cone {index}"
        sine = products[n] / (np.linalg.norm(point) or 1)
        raise ValueError(f"interior_point is not inside {cone}: b·w/(‖b‖‖w‖) = {sine:.1e} for constraint {n}")
    return point


def _orthogonal_groups(unit: Array, interior: Array) -> tuple[NDArray[np.integer], float]:
    """Labels (N,) of groups that are orthogonal to each other, and a bound on the change of the log by that."""
    sines = unit @ interior / np.linalg.norm(interior)
    noise, ignored, count = 4 * unit.shape[1] * tolerances.FLOAT64_EPS, 0.0, 0
    labels = np.full(len(unit), -1)
    gram = unit @ unit.T if len(unit) <= _MAX_GRAM_ROWS else None  # for more, one row at a time
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
            # 2/π of a product for an orthant; in a thin cone a small rotation of a wall changes more of the measure.
            ignored += float((products[~tied] / sines[others[~tied]]).sum() / sines[n]) / math.pi
        count += 1
    if count > 1 and ignored > tolerances.MAX_IGNORED_LOG_CHANGE:
        return np.zeros(len(unit), dtype=np.int64), 0.0
    return labels, ignored if count > 1 else 0.0


def _reduced(normals: Array, interior: Array) -> ConeGroup:
    """Constraints and point in coordinates of the span of the constraints."""
    if len(normals) >= normals.shape[1]:
        squares = np.linalg.eigvalsh(normals.T @ normals)
        if squares[0] > tolerances.MIN_FULL_RANK_EIGENVALUE_RATIO * squares[-1]:  # cheaper than singular values
            return ConeGroup(normals, interior)
    _, values, basis = np.linalg.svd(normals, full_matrices=False)
    rank = int((values > normals.shape[1] * tolerances.FLOAT64_EPS * values[0]).sum())
    reduced, inner = normals @ basis[:rank].T, basis[:rank] @ interior
    products = normals @ interior
    if (
        rank == normals.shape[1]
        or (np.abs(reduced @ inner - products) > tolerances.MAX_CLOSED_FORM_ERROR * products).any()
    ):
        return ConeGroup(normals, interior)  # a thin cone: the dropped directions matter for the point
    return ConeGroup(reduced / np.linalg.norm(reduced, axis=1, keepdims=True), inner)


def _facets(group: ConeGroup) -> NDArray[np.integer]:
    """Indices of the constraints that are not redundant, (n,); in three dimensions, in their order around the cone.

    If the b_n are scaled to b_n·u = 1 for an interior point u, they lie in a hyperplane, and the constraints that are
    not redundant are the vertices of their convex hull.
    """
    num, rank = group.normals.shape
    everything = np.arange(num)
    if rank == 1:
        return everything[:1]
    if rank > 3 and num < _MIN_HULL_RATIO * rank:
        return everything
    centre_point = analytic_centre(torch.from_numpy(group.normals)[None], torch.from_numpy(group.interior)[None])[
        0
    ].numpy()
    margins = group.normals @ centre_point
    if not (margins > 0).all():
        raise ArithmeticError("a cone is too thin for float64: its centre cannot be found")
    dual = group.normals / margins[:, None]
    plane = np.linalg.svd(centre_point[None])[2][1:]  # orthogonal to the interior point
    flat = (dual - dual.mean(0)) @ plane.T
    if rank == 2:
        return np.array([flat.argmin(), flat.argmax()])
    try:
        return np.asarray(ConvexHull(flat / np.abs(flat).max(0)).vertices, dtype=np.int64)
    except QhullError:  # flat up to rounding
        return everything


def _closed_form(group: ConeGroup) -> tuple[float, float] | None:
    """Log measure and rounding error of a half-space, an arc or a spherical polygon; None otherwise."""
    rank = group.normals.shape[1]
    if rank == 1:
        return -math.log(2), tolerances.FLOAT64_EPS  # exact up to the last digit
    if rank == 2:
        first, second = group.normals
        angle = math.atan2(abs(first[0] * second[1] - first[1] * second[0]), -float(first @ second))
        return math.log(angle / (2 * math.pi)), tolerances.MIN_LOG_ERROR + 16 * tolerances.FLOAT64_EPS / angle
    return _polygon(group) if rank == 3 else None


def _polygon(group: ConeGroup) -> tuple[float, float] | None:
    """The same for a spherical polygon with its sides in order; None if rounding errors are too large."""
    sides = group.normals
    corners = np.cross(sides, np.roll(sides, -1, axis=0))
    lengths = np.linalg.norm(corners, axis=1)
    if lengths.min() == 0:
        return None
    corners /= lengths[:, None]
    corners *= np.sign((sides @ corners.T).sum(0))[:, None]
    noise = 64 * tolerances.FLOAT64_EPS / lengths.min()  # of a corner
    if not (sides @ corners.T > -noise).all():  # the hull is wrong
        return None
    following = np.roll(sides, -1, axis=0)
    turns = np.arctan2(lengths, (sides * following).sum(1))  # at the corners; 2π less their sum is the area
    area = float(2 * math.pi - turns.sum())
    if area > tolerances.MAX_SMALL_AREA:
        error = tolerances.MIN_LOG_ERROR + 32 * tolerances.FLOAT64_EPS * len(sides) / area
    else:
        area, farthest = _small_area(corners)
        error = (
            tolerances.MIN_LOG_ERROR + noise * (len(sides) / math.sqrt(area) + farthest / area)
            if area > 0
            else math.inf
        )
    return (math.log(area / (4 * math.pi)), error) if error < tolerances.MAX_CLOSED_FORM_ERROR else None


def _small_area(corners: Array) -> tuple[float, float]:
    """Area of a small spherical polygon, where the excess of angles would lose digits, and its radius.

    The area is the sum of the triangles from the middle to the sides.
    """
    middle = corners.sum(0) / np.linalg.norm(corners.sum(0))
    if (corners @ middle < tolerances.MIN_CORNER_COSINE).any():  # long and thin: the corners do not determine the sides
        return 0.0, math.inf
    following = np.roll(corners, -1, axis=0)
    volumes = np.abs(np.cross(corners, following) @ middle)
    bases = 1 + (corners * following).sum(1) + corners @ middle + following @ middle
    return float(2 * np.arctan2(volumes, bases).sum()), float(np.linalg.norm(corners - middle, axis=1).max())
