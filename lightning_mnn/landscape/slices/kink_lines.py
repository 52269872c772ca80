"""The kinks of a network on a line or a plane of weight space.

A *pair* is a sample and a unit of a layer; its kink is where the unit changes its piece for that sample. In the first
layer the pre-activation is affine in the weights, so its kink on a plane is a straight line, known exactly from three
points. In later layers it is found between grid points: on a line as a root, in a plane by marching triangles, whose
corners are linear interpolations.

Shapes: k directions (1 or 2), N samples, M pairs, G points of a grid, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.kinks.tracing import KinkTrace
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.seeding import generator as seeded
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_mnn.landscape.kinks.tracing import Kink
    from lightning_mnn.landscape.slices.losses import PointLosses

_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NUMBERS_AT_ONCE = 2**23
_TIED = -1  # in place of a piece
_ROOT_STEPS = 16  # of the Illinois method: it gains two thirds of its digits with each step


@dataclass(frozen=True)
class SliceKinks:
    """Where a layer's kinks cross a slice.

    Attributes:
        layer: name of the layer, as in a :class:`~lightning_mnn.landscape.KinkTrace`.
        exact: whether the kinks are straight lines by construction, known up to rounding. Otherwise those in a plane
            are interpolated within cells of the grid, so that kinks within one cell can be missed; those on a line are
            roots.
        ends: in a plane the ends of segments, (M, 2, 2), in coordinates of the slice; on a line positions (M, 1, 1).
        samples: the sample of each, (M,).
        units: the unit of each, by its place among the numbers of one sample, (M,).
        traced: number of pairs that were traced.
        pairs: number of all pairs of the layer and the samples that were looked at.
    """

    layer: str
    exact: bool
    ends: Tensor
    samples: Tensor
    units: Tensor
    traced: int
    pairs: int


def _read(kink: Kink) -> tuple[Tensor, Tensor]:
    """Pieces and distances of a call, flat; the piece is −1 where the largest of several numbers is not unique.

    Such ties, as of a window of max-pooling that contains zeros only, end at kinks of an earlier layer.
    """
    pieces, distances = kink.pieces().flatten(), kink.distance().flatten()
    if kink.active_pieces is None:
        pieces = torch.where(distances > 0, pieces.to(torch.int32), _TIED)
    return pieces, distances


class KinkPasses:
    """Forward passes at points of a slice that return what each unit is on.

    Args:
        losses: the module.
        origin: the centre, (P,).
        directions: (k, P).
        rows: the samples, (N,).
    """

    def __init__(self, losses: PointLosses, origin: Tensor, directions: Tensor, rows: Tensor) -> None:
        self.rows = rows
        self._losses, self._origin, self._directions = losses, origin, directions
        self._inputs = losses.inputs[rows]
        self.exact: dict[str, bool] = {}  # the layers that depend on the weights
        self.pieces: dict[str, Tensor] = {}  # of all pairs at the centre, (M,)
        self.clear: dict[str, Tensor] = {}  # whether a pair is off its kink at the centre
        parameters = {name: part.requires_grad_() for name, part in losses.parameters(origin.clone()).items()}
        with torch.enable_grad(), full_precision(), KinkTrace(losses.module, self._read_layer):
            functional_call(losses.module, parameters, (self._inputs,))

    def _read_layer(self, kink: Kink) -> None:
        if not kink.depends_on_weights or kink.num_pieces < 2:
            return
        pieces, distances = _read(kink)
        if len(pieces) % len(self._inputs):
            problem = f"must have the samples on the first axis of the input of {kink.name}"
            raise ArgumentError("module", tuple(kink.input.shape), problem, "slices are of networks of that form only")
        given = kink.source_input
        fixed = isinstance(given, torch.Tensor) and not given.requires_grad
        self.exact[kink.name] = kink.num_pieces == 2 and fixed and type(kink.source) in _AFFINE
        root_mean_square = kink.input.square().mean().sqrt()
        spacing = tolerances.MAX_KINK_SPACINGS * torch.finfo(kink.input.dtype).eps
        self.pieces[kink.name], self.clear[kink.name] = pieces, distances > spacing * root_mean_square

    @property
    def layers(self) -> list[str]:
        """Layers whose kinks move with the weights."""
        return list(self.exact)

    def at(self, coordinates: Tensor, row: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Pieces and distances to the nearest kink of all pairs (M,) of each layer, at a point (k,).

        Args:
            coordinates: the point.
            row: only of this one of the samples.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def read(kink: Kink) -> None:
            if kink.name in self.exact:
                found[kink.name] = _read(kink)

        inputs = self._inputs if row is None else self._inputs[row : row + 1]
        theta = self._origin + coordinates @ self._directions
        with torch.no_grad(), full_precision(), KinkTrace(self._losses.module, read):
            functional_call(self._losses.module, self._losses.parameters(theta), (inputs,))
        return found

    def owners(self, pairs: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """The samples and the units of pairs."""
        units = len(self.pieces[layer]) // len(self._inputs)
        return self.rows[pairs // units], pairs % units


def trace_kinks(
    passes: KinkPasses, axes: Sequence[Tensor], max_pairs: int, seed: int = 0
) -> tuple[tuple[SliceKinks, ...], Tensor]:
    """The kinks of each layer on a slice, and the region of the centre.

    Args:
        passes: the network on the slice.
        axes: k increasing coordinates each.
        max_pairs: number of pairs of a layer that are traced; of more, those whose kink is at the centre come first,
            then those that are seen to change their piece, in random order.
        seed: of that order.

    Returns:
        The kinks, and whether no pair has another piece than at the centre, for each point of the grid, bool (G1, …).
        Pairs on their kink at the centre do not count.
    """
    windows = _Windows(passes, axes)
    chosen = {name: windows.choose(name, max_pairs, seed) for name in passes.layers}
    found, bent = [], [name for name in passes.layers if not passes.exact[name]]
    region = windows.region_of_lines() if not bent else None
    sampled: dict[str, tuple[Tensor, Tensor]] = {}
    if bent:
        sampled, region = _sample(passes, axes, {name: chosen[name] for name in bent})
    for name in passes.layers:
        pairs = chosen[name]
        if passes.exact[name]:
            ends, places = windows.lines(name, pairs)
        else:
            pieces, distances = sampled[name]
            if len(axes) == 1:
                ends, places = _roots(passes, name, pairs, axes[0], pieces, distances)
            else:
                ends, places = _segments(axes, pieces, distances)
        samples, units = passes.owners(pairs[places], name)
        found.append(SliceKinks(name, passes.exact[name], ends, samples, units, len(pairs), len(passes.pieces[name])))
    if region is None:
        region = torch.ones([len(axis) for axis in axes], dtype=torch.bool, device=passes.rows.device)
    return tuple(found), region


class _Windows:
    """All pairs at some points of the window: its corners, the middles of its sides, and its middle."""

    def __init__(self, passes: KinkPasses, axes: Sequence[Tensor]) -> None:
        self._passes, self._axes = passes, axes
        marks = [torch.stack([axis[0], (axis[0] + axis[-1]) / 2, axis[-1]]) for axis in axes]
        points = torch.cartesian_prod(*marks).reshape(-1, len(axes))  # the last axis changes first
        read = [passes.at(point) for point in points] if passes.layers else []
        self._pieces = {name: torch.stack([one[name][0] for one in read]) for name in passes.layers}
        self._corners: dict[str, Tensor] = {}  # signed distances, (corners, M), of exact layers
        corners = (0, 2) if len(axes) == 1 else (0, 6, 8, 2)  # around the window: (0, 0), (1, 0), (1, 1), (0, 1)
        for name, exact in passes.exact.items():
            if exact:
                distances = torch.stack([read[i][name][1] for i in corners])
                self._corners[name] = torch.where(self._pieces[name][list(corners)] > 0, distances, -distances)

    def choose(self, name: str, count: int, seed: int) -> Tensor:
        """The pairs of a layer that are traced, in ascending order."""
        pieces = self._pieces[name]
        size = pieces.shape[1]
        if size <= count:
            return torch.arange(size, device=pieces.device)
        changes = (pieces != pieces[0]).any(0) | (pieces[0] != self._passes.pieces[name])
        drawn = torch.rand(size, generator=seeded(seed, "pairs", name), dtype=torch.float64).to(pieces.device)
        priority = drawn + changes + 2 * ~self._passes.clear[name]
        return priority.topk(count).indices.sort().values

    def lines(self, name: str, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The straight kinks within the window: their ends, (M, k, k), and which of the pairs they belong to."""
        values = self._corners[name][:, pairs]
        if len(self._axes) == 1:
            places = ((values[0] > 0) != (values[1] > 0)).nonzero()[:, 0]
            one, other = values[:, places]
            low, high = self._axes[0][0], self._axes[0][-1]
            return (low + one / (one - other) * (high - low))[:, None, None], places
        first, second = ([axis[0], axis[-1]] for axis in self._axes)
        order = ((0, 0), (1, 0), (1, 1), (0, 1))
        corners = torch.stack([torch.stack([first[i], second[j]]) for i, j in order])
        nexts = values.roll(-1, 0)
        crossed = (values > 0) != (nexts > 0)  # none or two of the four sides, as the function is affine
        share = (values / (values - nexts))[..., None]
        points = corners[:, None] + share * (corners.roll(-1, 0) - corners)[:, None]
        places = (crossed.sum(0) == 2).nonzero()[:, 0]
        sides = crossed[:, places].to(torch.uint8).sort(dim=0, descending=True, stable=True).indices[:2]
        return points[sides, places].transpose(0, 1), places

    def region_of_lines(self) -> Tensor:
        """Whether no straight kink is between the centre and a point of the grid, bool (G1, …)."""
        shares = [(axis - axis[0]) / (axis[-1] - axis[0]) for axis in self._axes]
        grid = torch.cartesian_prod(*shares).reshape(-1, len(shares))
        inside = torch.ones(len(grid), dtype=torch.bool, device=grid.device)
        for name, values in self._corners.items():
            clear = self._passes.clear[name]
            active = self._passes.pieces[name] > 0
            slopes = torch.stack([values[1] - values[0], *([values[3] - values[0]] if len(shares) > 1 else [])])
            chunk = max(1, _NUMBERS_AT_ONCE // len(active))
            same = [
                (((values[0] + points @ slopes > 0) == active) | ~clear).all(1) for points in torch.split(grid, chunk)
            ]
            inside &= torch.cat(same)
        return inside.view([len(axis) for axis in self._axes])


def _sample(
    passes: KinkPasses, axes: Sequence[Tensor], chosen: dict[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Pieces and distances (G1, …, M) of the chosen pairs of layers on the grid; and the region of the centre."""
    shape = [len(axis) for axis in axes]
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in chosen}
    inside = []
    for point in torch.cartesian_prod(*axes).reshape(-1, len(axes)):
        safe_point()
        read = passes.at(point)
        same = [
            ((now == passes.pieces[name]) | (now == _TIED) | ~passes.clear[name]).all()
            for name, (now, _) in read.items()
        ]
        inside.append(torch.stack(same).all())
        for name, pairs in chosen.items():
            for values, new in zip(found[name], read[name], strict=True):
                values.append(new[pairs])
    stacked = {
        name: (torch.stack(pieces).view(*shape, -1), torch.stack(distances).view(*shape, -1))
        for name, (pieces, distances) in found.items()
    }
    return stacked, torch.stack(inside).view(shape)


def _roots(
    passes: KinkPasses, name: str, pairs: Tensor, axis: Tensor, pieces: Tensor, distances: Tensor
) -> tuple[Tensor, Tensor]:
    """The kinks between grid points of a line: their positions (M, 1, 1), and which of the pairs they belong to.

    The root of the distance, negative off the piece of the left end, by the Illinois method: regula falsi in which the
    value of an end that stays is halved.
    """
    untied = (pieces[:-1] != _TIED) & (pieces[1:] != _TIED)
    left, places = ((pieces[:-1] != pieces[1:]) & untied).nonzero(as_tuple=True)
    a, b = axis[left], axis[left + 1]
    value_a, value_b = distances[left, places], -distances[left + 1, places]
    piece = pieces[left, places]
    units = len(passes.pieces[name]) // len(passes.rows)
    wanted = pairs[places]
    rows, columns = (wanted // units).tolist(), (wanted % units).tolist()
    moved_a = torch.zeros_like(a, dtype=torch.bool)
    moved_b = moved_a.clone()
    middle = (a + b) / 2
    for _ in range(_ROOT_STEPS if rows else 0):
        width = value_a - value_b
        middle = torch.where(width > 0, a + (b - a) * value_a / torch.where(width > 0, width, 1.0), b)
        read = []
        for row, column, t in zip(rows, columns, middle, strict=True):
            safe_point()
            now, distance = passes.at(t[None], row)[name]
            read.append(torch.stack([now[column].to(distance), distance[column]]))
        now, value = torch.stack(read).unbind(1)
        is_left = now == piece
        value_b = torch.where(is_left, torch.where(moved_a, value_b / 2, value_b), -value)
        value_a = torch.where(is_left, value, torch.where(moved_b, value_a / 2, value_a))
        a, b = torch.where(is_left, middle, a), torch.where(is_left, b, middle)
        moved_a, moved_b = is_left, ~is_left
    return middle[:, None, None], places


def _segments(axes: Sequence[Tensor], pieces: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """The kinks in triangles of a grid: the ends of segments (M, 2, 2), and which of the pairs they belong to.

    On a side between two pieces the kink is where the distances, which are linear near it, meet. A triangle with three
    pieces has three segments, which meet in the middle.
    """
    ends, owners = [], []
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    rows, columns = grid.shape[0] - 1, grid.shape[1] - 1
    for corners in (((0, 0), (1, 0), (1, 1)), ((0, 0), (1, 1), (0, 1))):
        views = [(slice(i, i + rows), slice(j, j + columns)) for i, j in corners]
        at_corners = torch.stack([pieces[view] for view in views])
        changed = (at_corners != at_corners[0]).any(0) & (at_corners != _TIED).all(0)
        row, column, pair = changed.nonzero(as_tuple=True)
        p = at_corners[:, row, column, pair]
        d = torch.stack([distances[view][row, column, pair] for view in views])
        where = torch.stack([grid[view][row, column] for view in views])
        crossed = p != p.roll(-1, 0)
        total = d + d.roll(-1, 0)
        share = torch.where(total > 0, d / torch.where(total > 0, total, 1.0), 0.5)
        points = where + share[..., None] * (where.roll(-1, 0) - where)
        two = crossed.sum(0) == 2
        sides = crossed.to(torch.uint8).sort(dim=0, descending=True, stable=True).indices[:2]
        every = torch.arange(len(pair), device=pair.device)
        ends.append(points[sides, every].transpose(0, 1)[two])
        owners.append(pair[two])
        middles = points.mean(0)
        ends += [torch.stack([point, middles], dim=1)[~two] for point in points]
        owners += [pair[~two]] * 3
    return torch.cat(ends), torch.cat(owners)
