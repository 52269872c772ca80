"""landscape_slice: the loss on a line or a plane through given weights, with the kinks there.

Shapes: k directions (1 or 2), P parameters, N samples, G points of an axis, T points of a trajectory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.slices.directions import flat_point
from lightning_mnn.landscape.slices.kink_lines import KinkPasses, SliceKinks, trace_kinks
from lightning_mnn.landscape.slices.losses import MEMORY_BUDGET, PointLosses
from lightning_mnn.utilities.seeding import generator as seeded
from lightning_mnn.utilities.transfer import fetched
from lightning_mnn.utilities.validation import ArgumentError, positive_integer, real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from lightning_mnn.landscape.minima.models.equations.layers import LossName
    from lightning_mnn.landscape.slices.directions import Point
    from lightning_mnn.verdicts import Kind

_MARGIN = 0.25  # of the range that a trajectory needs, on each side
_SMALLEST_SIDE = 0.4  # of the other side: a trajectory along one axis still gets a plane


@dataclass(frozen=True)
class LandscapeSlice:
    """The loss on a line (k = 1) or a plane (k = 2) of weight space.

    Attributes:
        axes: the coordinates of the grid along each direction, k times (G,); the centre is at 0.
        losses: the loss at each point of the grid, (G,) or (G, G), the first direction first.
        center_loss: the loss at the centre.
        directions: (k, P).
        kinks: where the kinks of each layer cross the slice.
        region: whether each point of the grid is in the centre's region: no unit has another piece there, for any of
            the samples, but for units on their kink at the centre.
        samples: the samples whose kinks were looked at, in ascending order.
        trajectory: coordinates of the given points, those of the nearest points of the slice, (T, k).
        off_slice: distances of the given points from the slice, relative to those from the centre, (T,).
        kind: that of the centre's certificate, as it was given.
    """

    axes: tuple[Tensor, ...]
    losses: Tensor
    center_loss: float
    directions: Tensor
    kinks: tuple[SliceKinks, ...]
    region: Tensor
    samples: Tensor
    trajectory: Tensor
    off_slice: Tensor
    kind: Kind | None

    def kink_radius(self, count: int) -> float:
        """Distance, in coordinates, within which ``count`` of the traced kinks pass the centre; infinite for fewer.

        Kinks through the centre do not count, as those of a minimum on kinks.
        """
        distances = [_distances(kinks.ends) for kinks in self.kinks]
        found = torch.cat([*distances, self.axes[0].new_zeros(0)])
        size = max(abs(number) for axis in self.axes for number in fetched(axis[0], axis[-1]))
        found = found[found > tolerances.MAX_ZERO_RATIO * size].sort().values
        return float(found[count - 1]) if len(found) >= count else math.inf


def landscape_slice(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    directions: Tensor | Sequence[Point],
    *,
    center: Point | None = None,
    loss: LossName | Callable[[Tensor, Tensor], Tensor] = "squared_error",
    weight_decay: float = 0.0,
    trajectory: Sequence[Point] = (),
    ranges: Sequence[tuple[float, float]] | None = None,
    resolution: int = 51,
    kink_samples: int = 512,
    kink_pairs: int = 2000,
    kind: Kind | None = None,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
) -> LandscapeSlice:
    """The loss on the line or plane θ + Σ_j c_j d_j through weights θ, and the kinks that cross it.

    The directions may be the move to another point (their difference),
    :func:`~lightning_mnn.landscape.principal_directions` of a trajectory,
    :func:`~lightning_mnn.landscape.random_directions` or :func:`~lightning_mnn.landscape.curvature_directions`. They
    are used as they are: with orthonormal ones, distances in the plane are distances in weight space.

    The losses are those of all samples in eval mode, in the module's precision, many points at a time. Kinks of the
    first layer are exact straight lines. Those of later layers are roots on a line; in a plane they are interpolated
    between the points of the grid (see :class:`SliceKinks`), which takes one pass for each point.

    Args:
        module: the network. Kinks are those that a :class:`~lightning_mnn.landscape.KinkTrace` finds, with the samples
            on the first axis.
        inputs: (N, …).
        targets: y, as for :func:`~lightning_mnn.landscape.certify_model`.
        directions: one or two directions, flat (P,) or by name.
        center: θ; None: the module's own parameters.
        loss: the mean over samples of ``squared_error`` (summed over outputs), ``cross_entropy`` or ``logistic``; or a
            function of outputs and targets that returns the mean over its samples.
        weight_decay: wd of ½ wd ‖θ‖².
        trajectory: points to be projected onto the slice, the start first.
        ranges: smallest and largest coordinate along each direction; None: around the centre and the trajectory, or
            from −1 to 1.
        resolution: G, the number of points along each direction; the centre itself need not be one.
        kink_samples: number of samples whose kinks are looked at; of more, random ones.
        kink_pairs: number of pairs of sample and unit of each layer whose kinks are traced; of more, random ones.
        kind: that of the centre's certificate, which is handed on.
        seed: of these choices.
        memory_budget: bytes for the numbers of a pass.

    Raises:
        ArgumentError: an argument is out of its range, or does not fit the network.

    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.ReLU())
    >>> _ = torch.nn.init.constant_(net[0].weight, 2.0)
    >>> found = landscape_slice(net, torch.ones(1, 1), torch.full((1,), 2.0), [torch.ones(1)], ranges=[(-4, 2)])
    >>> found.center_loss, float(found.losses[0]), found.kinks[0].ends.flatten()
    (0.0, 4.0, tensor([-2.]))
    """
    resolution = whole_number("resolution", resolution, at_least=2)
    positive_integer("kink_samples", kink_samples)
    positive_integer("kink_pairs", kink_pairs)
    real_number("weight_decay", weight_decay, at_least=0)
    moves = _checked(module, directions)
    origin = flat_point(module, center, "center")
    losses = PointLosses(module, inputs, targets, loss, weight_decay=weight_decay, memory_budget=memory_budget)
    passed, off = _project(module, trajectory, origin, moves)
    sides = (
        _ranges(passed, len(moves)) if ranges is None else [_range(ranges, i, len(moves)) for i in range(len(moves))]
    )
    axes = tuple(torch.linspace(low, high, resolution, dtype=origin.dtype).to(origin.device) for low, high in sides)
    grid = torch.cartesian_prod(*axes).reshape(-1, len(moves))
    values = losses(origin, grid, moves).view([resolution] * len(moves))
    rows = torch.arange(len(inputs), device=origin.device)
    if len(inputs) > kink_samples:
        drawn = torch.randperm(len(inputs), generator=seeded(seed, "kink samples"))[:kink_samples]
        rows = drawn.sort().values.to(origin.device)
    kinks, region = trace_kinks(KinkPasses(losses, origin, moves, rows), axes, kink_pairs, seed)
    (center_loss,) = fetched(losses(origin, torch.zeros_like(grid[:1]), moves))
    return LandscapeSlice(axes, values, center_loss, moves, kinks, region, rows, passed, off, kind)


def _distances(ends: Tensor) -> Tensor:
    """Distances of the centre from segments (M, 2, 2), or from positions (M, 1, 1): (M,)."""
    start, along = ends[:, 0], ends[:, -1] - ends[:, 0]
    squares = along.square().sum(1)
    share = -(start * along).sum(1) / torch.where(squares > 0, squares, 1.0)
    nearest = start + share.clamp(0, 1)[:, None] * along
    return nearest.square().sum(1).sqrt()


def _checked(module: nn.Module, directions: Tensor | Sequence[Point]) -> Tensor:
    if len(directions) not in (1, 2):
        raise ArgumentError("directions", f"{len(directions)} directions", "must be one or two")
    moves = torch.stack([flat_point(module, move, f"directions[{i}]") for i, move in enumerate(directions)])
    sizes = torch.linalg.svdvals(moves)
    smallest, largest = fetched(sizes[-1], sizes[0])
    if not smallest > largest * len(moves[0]) * torch.finfo(moves.dtype).eps:
        raise ArgumentError(
            "directions", f"singular values {smallest:.2g} and {largest:.2g}", "must be independent and not zero"
        )
    return moves


def _project(module: nn.Module, points: Sequence[Point], origin: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (T, k) of the points of the slice that are nearest to given ones, and the relative distances (T,)."""
    if not points:
        return moves.new_zeros(0, len(moves)), moves.new_zeros(0)
    away = torch.stack([flat_point(module, point, f"trajectory[{i}]") for i, point in enumerate(points)]) - origin
    coordinates = torch.linalg.lstsq(moves.T, away.T).solution.T
    lengths = away.norm(dim=1)
    off = (away - coordinates @ moves).norm(dim=1)
    return coordinates, torch.where(lengths > 0, off / torch.where(lengths > 0, lengths, 1.0), 0.0)


def _ranges(passed: Tensor, count: int) -> list[tuple[float, float]]:
    """Around the centre and the trajectory, with a margin."""
    if not len(passed):
        return [(-1.0, 1.0)] * count
    with_center = torch.cat([passed, torch.zeros_like(passed[:1])])
    numbers = fetched(*with_center.amin(0), *with_center.amax(0))
    lows, highs = numbers[:count], numbers[count:]
    longest = max(high - low for low, high in zip(lows, highs, strict=True)) or 2.0
    found = []
    for low, high in zip(lows, highs, strict=True):
        more = max(0.0, _SMALLEST_SIDE * longest - (high - low)) / 2 + _MARGIN * max(
            high - low, _SMALLEST_SIDE * longest
        )
        found.append((low - more, high + more))
    return found


def _range(ranges: Sequence[tuple[float, float]], i: int, count: int) -> tuple[float, float]:
    if len(ranges) != count:
        raise ArgumentError("ranges", ranges, f"must be {count} pairs, one for each direction")
    low = real_number(f"ranges[{i}][0]", ranges[i][0])
    return low, real_number(f"ranges[{i}][1]", ranges[i][1], above=low)
