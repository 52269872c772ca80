"""input_regions: the linear regions of a network on a plane of inputs, exactly.

Each region is a convex polygon on which the network is affine. The first layer's kinks are lines; they cut the window.
Within each part the next layer's kinks are lines again, and cut it further. The kinks of a layer bend, but do not end,
where they meet those of an earlier one, so that the polygons fit together, corner to corner.

Shapes: R regions, U hidden units, K outputs, d0 inputs, C corners; an affine function of the coordinates c is
(constant, slope along c₁, slope along c₂).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from torch import nn

from lightning_mnn.landscape import tolerances
from lightning_mnn.utilities.compat.torch_internals import as_evaluated
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.validation import ArgumentError, positive_integer, real_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

_AFFINE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Flatten, nn.Unflatten),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.Identity, nn.Dropout),
)
_SAME_CORNER = 1e-9  # distance, relative to the window, of corners of two polygons that are one


@dataclass(frozen=True)
class InputRegions:
    """The linear regions of a network in a window of a plane of inputs.

    Attributes:
        polygons: the corners of each region in coordinates of the plane, in their order around it, R times (C, 2).
        active: whether each hidden unit is active in each region, (R, U), layer by layer.
        outputs: the network's outputs on each region as affine functions of the coordinates, (R, K, 3).
        kinks: the ends of the segments of each layer's kinks, by the place of the activation: (number, 2, 2).
        num_vertices: number of corners, each once.
        num_edges: number of sides between corners, each once. num_vertices − num_edges + R = 1 (Euler).
        ranges: the window.
    """

    polygons: tuple[Array, ...]
    active: NDArray[np.bool_]
    outputs: Array
    kinks: dict[str, Array]
    num_vertices: int
    num_edges: int
    ranges: tuple[tuple[float, float], tuple[float, float]]

    def areas(self) -> Array:
        """The area of each region, (R,).

        >>> absolute = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
        >>> input_regions(absolute, ranges=[(-1, 1), (-1, 1)]).areas().sum().round(9)
        np.float64(4.0)
        """
        rolled = [np.roll(polygon, -1, 0) for polygon in self.polygons]
        pairs = zip(self.polygons, rolled, strict=True)
        return np.array([0.5 * abs(np.sum(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])) for a, b in pairs])

    def decision_boundary(self, threshold: float = 0.5) -> Array:
        """The ends of the segments where the decision changes, (number, 2, 2).

        With one output, where it is the threshold; with several, where the two largest are equal.
        """
        found = []
        for polygon, outputs in zip(self.polygons, self.outputs, strict=True):
            if len(outputs) == 1:
                found += _zeros(polygon, outputs[0] - np.array([threshold, 0, 0]))
                continue
            for i in range(len(outputs)):
                for j in range(i):
                    for segment in _zeros(polygon, outputs[i] - outputs[j]):
                        part = _where_positive(segment, outputs[i] - np.delete(outputs, [i, j], axis=0))
                        found += [] if part is None else [part]
        return np.array(found).reshape(-1, 2, 2)


def input_regions(
    module: nn.Sequential,
    directions: Tensor | None = None,
    *,
    center: Tensor | None = None,
    ranges: Sequence[tuple[float, float]] = ((-1.0, 1.0), (-1.0, 1.0)),
    max_regions: int = 100_000,
) -> InputRegions:
    """The linear regions of a network on the plane x + c₁ u₁ + c₂ u₂ of inputs, in a window of c.

    Exact up to rounding, in float64 on the CPU: a kink that passes a corner of a polygon within 1e-12 of the size of
    its pre-activation does not cut it. One layer of h units in general position has Σ_{j ≤ 2} C(h, j) regions in a
    window that contains all crossings of its kinks (T. Zaslavsky, Facing up to arrangements, 1975).

    Args:
        module: layers that are affine in eval mode, ``nn.ReLU`` and ``nn.LeakyReLU``.
        directions: u, (2, d0) or (2, …) in the shape of an input; None: the two inputs of a network with d0 = 2.
        center: x, (d0,); None: zero.
        ranges: smallest and largest c₁ and c₂.
        max_regions: number of regions from which they are refused.

    Raises:
        ArgumentError: a layer of another kind, sizes that do not fit, or more regions.

    >>> lines = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> _ = lines[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    >>> _ = lines[0].bias.data.copy_(torch.tensor([0.0, 0.0, 0.5]))
    >>> found = input_regions(lines)
    >>> len(found.polygons), found.num_vertices - found.num_edges + len(found.polygons)
    (7, 1)
    """
    positive_integer("max_regions", max_regions)
    window = _window(ranges)
    layers = _layers(module)
    plane = _plane(layers, directions, center)
    (low, high), (bottom, top) = window
    polygons = [np.array([[low, bottom], [high, bottom], [high, top], [low, top]])]
    active: list[list[NDArray[np.bool_]]] = [[]]
    values = plane[None]  # of the layer's inputs on each polygon, (R, 3, …)
    kinks: dict[str, Array] = {}
    with torch.no_grad():
        for place, layer in enumerate(layers):
            if isinstance(layer, _AFFINE):
                values = _through(layer, values)
                continue
            functions = values.flatten(2).numpy()
            segments: list[Array] = []
            parts = [_cut(polygon, f, segments) for polygon, f in zip(polygons, functions, strict=True)]
            owners = [r for r, pieces in enumerate(parts) for _ in pieces]
            polygons = [piece for pieces in parts for piece in pieces]
            if len(polygons) > max_regions:
                raise ArgumentError("max_regions", max_regions, f"is less than the {len(polygons)} regions")
            middles = np.stack([np.append(1.0, polygon.mean(0)) for polygon in polygons])
            on = np.einsum("rc,rcu->ru", middles, functions[owners]) > 0
            active = [[*active[r], row] for r, row in zip(owners, on, strict=True)]
            slope = layer.negative_slope if isinstance(layer, nn.LeakyReLU) else 0.0
            factors = torch.from_numpy(np.where(on, 1.0, slope)).view(len(on), 1, *values.shape[2:])
            values = values[owners] * factors
            kinks[str(place)] = np.array(segments).reshape(-1, 2, 2)
    outputs = values.flatten(2).transpose(1, 2).contiguous().numpy()
    units = np.array([np.concatenate([np.zeros(0, bool), *rows]) for rows in active])
    vertices, edges = _complex(polygons, max(high - low, top - bottom))
    return InputRegions(tuple(polygons), units, outputs, kinks, vertices, edges, window)


def _window(ranges: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], tuple[float, float]]:
    if len(ranges) != 2:
        raise ArgumentError("ranges", ranges, "must be two pairs, one for each direction")
    lows = [real_number(f"ranges[{i}][0]", pair[0]) for i, pair in enumerate(ranges)]
    highs = [real_number(f"ranges[{i}][1]", pair[1], above=lows[i]) for i, pair in enumerate(ranges)]
    return (lows[0], highs[0]), (lows[1], highs[1])


def _layers(module: nn.Sequential) -> list[nn.Module]:
    """The layers in eval mode, float64 on the CPU."""
    if not isinstance(module, nn.Sequential):
        raise ArgumentError("module", type(module).__name__, "must be an nn.Sequential")
    twin = copy.deepcopy(as_evaluated(module)).to("cpu", torch.float64)
    layers = [part for part in twin.modules() if not isinstance(part, nn.Sequential)]
    for layer in layers:
        if not isinstance(layer, (*_AFFINE, nn.ReLU, nn.LeakyReLU)):
            remedy = "use layers that are affine in eval mode, nn.ReLU and nn.LeakyReLU"
            raise ArgumentError("module", type(layer).__name__, "has a layer whose kinks are not cut exactly", remedy)
    return layers


def _plane(layers: Sequence[nn.Module], directions: Tensor | None, center: Tensor | None) -> Tensor:
    """The inputs as affine functions of the coordinates, (3, …)."""
    if directions is None:
        size = getattr(layers[0], "in_features", None) if layers else None
        if size != 2:
            problem = "must be given for a network that does not start with an nn.Linear of two inputs"
            raise ArgumentError("directions", None, problem, "give two directions in the space of inputs")
        directions = torch.eye(2)
    if len(directions) != 2:
        raise ArgumentError("directions", tuple(directions.shape), "must be two, in the shape of an input")
    moves = directions.detach().to("cpu", torch.float64)
    start = torch.zeros_like(moves[0]) if center is None else center.detach().to("cpu", torch.float64)
    if start.shape != moves[0].shape:
        raise ArgumentError("center", tuple(start.shape), f"must have the shape {tuple(moves[0].shape)}")
    return torch.cat([start[None], moves])


def _through(layer: nn.Module, values: Tensor) -> Tensor:
    """Affine functions (R, 3, …) through an affine layer: the constant with its bias, the slopes without."""
    regions = len(values)
    images = layer(values.flatten(0, 1))
    bias = layer(torch.zeros_like(values[:1, 0]))
    images = images.view(regions, 3, *images.shape[1:])
    return torch.cat([images[:, :1], images[:, 1:] - bias], dim=1)


def _cut(polygon: Array, functions: Array, segments: list[Array]) -> list[Array]:
    """The parts into which affine functions (3, h) cut a convex polygon where they are zero; the cuts are appended."""
    safe_point()
    values = _values(polygon, functions)
    parts = [polygon]
    for unit in ((values.min(0) < 0) & (values.max(0) > 0)).nonzero()[0]:
        function, further = functions[:, unit], []
        scale = np.abs(values[:, unit]).max()
        for part in parts:
            sides = _values(part, function[:, None], scale)[:, 0]
            if sides.min() >= 0 or sides.max() <= 0:
                further.append(part)
                continue
            positive, negative, cut = _halves(part, sides)
            further += [positive, negative]
            segments.append(cut)
        parts = further
    return parts


def _values(polygon: Array, functions: Array, scale: float | None = None) -> Array:
    """Affine functions (3, h) at the corners, (C, h), with zeros for what is zero up to rounding."""
    values = functions[0] + polygon @ functions[1:]
    sizes = np.abs(functions[0]) + np.abs(polygon) @ np.abs(functions[1:]) if scale is None else scale
    return np.where(np.abs(values) <= tolerances.MAX_ZERO_RATIO * sizes, 0.0, values)


def _halves(polygon: Array, sides: Array) -> tuple[Array, Array, Array]:
    """The positive and the negative part of a convex polygon, and the two ends of the cut."""
    positive, negative, cut = [], [], []
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        here, side, following = polygon[i], sides[i], sides[j]
        if side >= 0:
            positive.append(here)
        if side <= 0:
            negative.append(here)
        if side == 0:
            cut.append(here)
        if side * following < 0:
            crossing = here + side / (side - following) * (polygon[j] - here)
            for corners in (positive, negative, cut):
                corners.append(crossing)
    return np.array(positive), np.array(negative), np.array(cut[:2])


def _zeros(polygon: Array, function: Array) -> list[Array]:
    """The segment (2, 2) on which an affine function (3,) is zero within a convex polygon; none or one."""
    sides = _values(polygon, function[:, None])[:, 0]
    if sides.min() >= 0 or sides.max() <= 0:
        return []
    return [_halves(polygon, sides)[2]]


def _where_positive(segment: Array, functions: Array) -> Array | None:
    """The part of a segment where all affine functions (n, 3) are positive; None if there is none."""
    low, high = 0.0, 1.0
    for first, last in zip(*(functions[:, 0] + end @ functions[:, 1:].T for end in segment), strict=True):
        if max(first, last) <= 0:
            return None
        if first < 0:
            low = max(low, first / (first - last))
        elif last < 0:
            high = min(high, first / (first - last))
    return segment[0] + np.array([[low], [high]]) * (segment[1] - segment[0]) if low < high else None


def _complex(polygons: Sequence[Array], size: float) -> tuple[int, int]:
    """The number of corners and of sides of all polygons, each once."""
    corners = np.concatenate(polygons)
    pairs: Any = KDTree(corners).query_pairs(_SAME_CORNER * size, output_type="ndarray")
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(corners), len(corners)))
    count, names = connected_components(graph, directed=False)
    ends = np.split(names, np.cumsum([len(polygon) for polygon in polygons])[:-1])
    sides = np.concatenate([np.stack([one, np.roll(one, -1)], 1) for one in ends])
    sides = np.sort(sides[sides[:, 0] != sides[:, 1]], axis=1)
    return int(count), len(np.unique(sides, axis=0))
