"""Which pieces a model uses at a point, which kinks are active, and what does not depend on the parameters.

A value is *constant* if it does not depend on the parameters nearby, as the zero of a unit whose inputs are all zero. A
constant pre-activation is no kink. A parameter is *inert* if nothing depends on it nearby, as the weights of a unit
that is never active.

Shapes: N samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.face import Face, Model, Pieces, apply_linear, gamma, kink_groups
from lightning_mnn.landscape.minima.models.equations.layers import (
    Affine,
    Average,
    Bends,
    Flatten,
    Largest,
    Operation,
    Scale,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

Active = dict[int, "Tensor"]  # for each activation: the kink (0, 1, …) on which a unit is active, or −1; (N, …)


@dataclass(frozen=True)
class Unit:
    """The pre-activations of one activation.

    Attributes:
        values: z, (N, …).
        scale: Σ |w||h| + |b| of each, (N, …).
        varies: whether it depends on the parameters, (N, …).
        distances: |z − kink|, (N, …, number of kinks); on an active kink that of the float.
        classes: a number for each sample, equal where all pre-activations are the same functions nearby, (N,); without
            active kinks all are different.
    """

    values: Tensor
    scale: Tensor
    varies: Tensor
    distances: Tensor
    classes: Tensor

    def nearest(self) -> tuple[Tensor, Tensor]:
        """The nearest kink of each, and |z − kink| relative to its scale, infinite where z does not vary; (N, …).

        The scale is at least the mean over samples: where all inputs of a unit are zero, it is not its bias.
        """
        scale = self.scale.maximum(self.scale.mean(0, keepdim=True)).clamp(min=1e-300)
        ratio, kink = (self.distances / scale[..., None]).min(-1)
        return ratio.masked_fill(~self.varies, torch.inf), kink


@dataclass(frozen=True)
class Reading:
    """A face and what it was read from.

    Attributes:
        face: the face.
        units: the pre-activations, by the number of their activation.
        gaps: the smallest difference between the largest number and another one in windows of max-pooling, for each
            sample, (N,), by the number of the operation.
        ties: number of windows of max-pooling whose largest number is in doubt.
        inert: number of trained parameters on which nothing depends.
        inert_units: units all of whose incoming weights are such parameters, as "0.weight[3]".
    """

    face: Face
    units: dict[int, Unit]
    gaps: dict[int, Tensor]
    ties: int
    inert: int
    inert_units: tuple[str, ...]


def read_face(model: Model, vector: Tensor, active: Active | None = None) -> Reading:
    """The face of a point, on which the given kinks are active."""
    reader = _Reader(model, vector, active or {})
    for number, op in enumerate(model.layers.operations):
        reader.step(number, op)
    face = Face(model, tuple(reader.pieces), torch.arange(len(vector)), vector)
    keep = (_influence(face) > 0) | (model.weights_of_penalty > 0)
    face = replace(face, free=keep.nonzero()[:, 0])
    return Reading(face, reader.units, reader.gaps, reader.ties, int((~keep).sum()), tuple(_inert_units(model, ~keep)))


def _inert_units(model: Model, inert: Tensor) -> Iterator[str]:
    """The rows of weights that are inert."""
    masks = model.parameters(inert)
    for op in model.layers.operations:
        if isinstance(op, Affine) and op.weight in model.trained:
            for unit in masks[op.weight].flatten(1).all(1).nonzero()[:, 0].tolist():
                yield f"{op.weight}[{unit}]"


def _influence(face: Face) -> Tensor:
    """A number for each trained parameter that is zero only if it is inert: the number of ways to the results."""

    def present(t: Tensor) -> Tensor:
        return (t != 0).double()

    pieces = tuple(
        p._replace(slope=present(p.slope), offset=present(p.offset), half=present(p.half), place=present(p.place))
        if isinstance(p, Pieces)
        else p
        for p in face.pieces
    )
    # A unit on an active kink has an influence whatever its mean slope, and pads of −1 mark no unit.
    pieces = tuple(
        p._replace(slope=p.slope.flatten().index_fill(0, p.kinks, 1.0).reshape(p.slope.shape))
        if isinstance(p, Pieces)
        else p
        for p in pieces
    )
    model = replace(face.model, inputs=present(face.model.inputs))
    ones = torch.ones_like(face.base)
    ways = Face(model, pieces, face.free, ones)

    def total(theta: Tensor) -> Tensor:
        outputs, switching = ways.evaluate(theta, theta.new_zeros(ways.num_kinks), absolute=True)
        return outputs.sum() + switching.sum()

    found: Tensor = torch.func.grad(total)(ones)
    return found


class _Reader:
    """The forward pass that finds pieces, constants and scales."""

    def __init__(self, model: Model, vector: Tensor, active: Active) -> None:
        self.model, self.active = model, active
        self.parameters = model.parameters(vector)
        self.h = self.scale = model.inputs
        self.scale = self.h.abs()
        self.varies = torch.zeros_like(self.h, dtype=torch.bool)
        self.floor = torch.zeros_like(self.varies)  # values of max(z, 0) on its kink, which nearby are not smaller
        self.pieces: list[Pieces | Tensor | None] = []
        self.units: dict[int, Unit] = {}
        # Without active kinks each sample may be a class of its own.
        self.classes = torch.arange(len(self.h)) if not active else _numbered(row.numpy().tobytes() for row in self.h)
        self.gaps: dict[int, Tensor] = {}
        self.ties = 0

    def step(self, number: int, op: Operation) -> None:
        match op:
            case Bends():
                self.pieces.append(self._bend(number, op))
            case Largest():
                self.pieces.append(self._pool(number, op))
            case _:
                self._linear(op)
                self.pieces.append(None)

    def _linear(self, op: Operation) -> None:
        trained = set(self.model.trained)
        sizes = {name: value.abs() for name, value in self.parameters.items()}
        varies = self.varies
        match op:
            case Affine():
                weight = self.parameters[op.weight]
                sources = varies | (self.h != 0) if op.weight in trained else varies
                varies = op.apply(sources.double(), torch.ones_like(weight), None) > 0.5
                if op.bias in trained:
                    varies = torch.ones_like(varies)
            case Scale():
                if {op.weight, op.bias} & trained:
                    varies = torch.ones_like(varies)
            case Average():
                varies = op.apply(varies.double()) > 0
            case Flatten():
                varies = varies.flatten(1)
        self.scale = apply_linear(op, self.scale, sizes, absolute=True)
        self.h = apply_linear(op, self.h, self.parameters)
        self.varies, self.floor = varies, torch.zeros_like(varies)

    def _bend(self, number: int, op: Bends) -> Pieces:
        z, kinks, slopes = (
            self.h,
            torch.tensor(op.kinks, dtype=torch.float64),
            torch.tensor(op.slopes, dtype=torch.float64),
        )
        distances = (z[..., None] - kinks).abs()
        self.units[number] = Unit(z, self.scale, self.varies, distances, self.classes)
        on = self.active.get(number, torch.full(z.shape, -1)).where(self.varies, torch.tensor(-1))
        if bool((on >= 0).any()):  # with one all whose z are the same function
            shared = torch.full((int(self.classes.max()) + 1, on[0].numel()), -1)
            index = self.classes[:, None].expand(-1, on[0].numel())
            on = shared.scatter_reduce(0, index, on.flatten(1), "amax")[self.classes].reshape(on.shape)
        piece = (z[..., None] > kinks).sum(-1)
        is_on, kink = on >= 0, on.clamp(min=0)
        half = (slopes[1:] - slopes[:-1])[kink] / 2
        mean = (slopes[1:] + slopes[:-1])[kink] / 2
        at = kinks[kink]
        at_value = torch.tensor(op.values, dtype=torch.float64)[kink]
        slope = torch.where(is_on, mean, slopes[piece])
        offset = torch.where(is_on, at_value - mean * at, torch.tensor(op.offsets, dtype=torch.float64)[piece])
        places = is_on.flatten().nonzero()[:, 0]
        self.h = torch.where(is_on, at_value, slope * z + offset)
        self.varies = self.varies & (is_on | (slope != 0))
        self.floor = is_on & (slopes[kink] == 0) & (half > 0)
        self.scale = self.h.abs()
        groups = kink_groups(places, self.classes, slope[0].numel())
        self._divide(slope, offset)
        return Pieces(slope, offset, places, half.flatten()[places], at.flatten()[places], *groups)

    def _divide(self, *pieces: Tensor) -> None:
        """Classes of samples whose values are the same functions: the same constants, or pieces of the same ones."""
        if not self.active:
            return
        varies = self.varies.flatten(1).any(1).tolist()
        rows = torch.cat([self.h.flatten(1), *(piece.double().flatten(1) for piece in pieces)], dim=1)
        width = self.h[0].numel()
        self.classes = _numbered(
            (own, row[width:].numpy().tobytes()) if moves else row[:width].numpy().tobytes()
            for own, row, moves in zip(self.classes.tolist(), rows, varies, strict=True)
        )

    def _pool(self, number: int, op: Largest) -> Tensor:
        windows, shape = op.windows(self.h, -torch.inf)
        inputs_of_sample = self.h[0].numel()
        places = op.windows(torch.arange(self.h.numel()).double().reshape(self.h.shape), -1.0)[0].long()
        varies, floor = (op.windows(mask.double(), 0.0)[0] > 0 for mask in (self.varies, self.floor))
        scale = op.windows(self.scale, 0.0)[0].amax(2, keepdim=True)
        largest = windows.amax(2, keepdim=True)
        tied = windows >= largest - tolerances.MAX_POOLING_TIE_RATIO * scale
        # Of equal numbers that which varies is taken; one constant is as good as another.
        first = (tied.double() + (tied & varies).double()).argmax(2, keepdim=True)
        varying = (tied & varies).sum(2, keepdim=True)
        constant = (tied & ~varies).any(2, keepdim=True)
        equal = ((windows == largest) | ~tied | varies).all(2, keepdim=True)
        clear = (varying == 0) | ((varying == 1) & (~constant | floor.gather(2, first)))
        self.ties += int((~(clear & equal)).sum())
        others = torch.where(tied, -torch.inf, windows)
        # Nothing moves in a window of constants.
        moving = varies.any(2)
        gaps = torch.where(moving, (largest - others.amax(2, keepdim=True))[:, :, 0], torch.inf)
        self.gaps[number] = gaps.flatten(1).amin(1)
        winners = places.gather(2, first)[:, :, 0].reshape(shape)
        self.h, self.scale = self.h.flatten()[winners], self.scale.flatten()[winners]
        self.varies, self.floor = self.varies.flatten()[winners], torch.zeros_like(winners, dtype=torch.bool)
        first_of_sample = torch.arange(len(winners)).reshape(-1, *[1] * (winners.ndim - 1)) * inputs_of_sample
        self._divide(winners - first_of_sample)
        return winners


def _numbered(keys: Iterable[object]) -> Tensor:
    """A number for each key, equal for equal keys."""
    numbers: dict[object, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def true_outputs(model: Model, vector: Tensor) -> Tensor:
    """The outputs of the model itself, whatever the pieces, (N, K)."""
    parameters, h = model.parameters(vector), model.inputs
    for op in model.layers.operations:
        match op:
            case Bends():
                piece = (h[..., None] > torch.tensor(op.kinks, dtype=torch.float64)).sum(-1)
                slopes, offsets = (torch.tensor(values, dtype=torch.float64) for values in (op.slopes, op.offsets))
                h = slopes[piece] * h + offsets[piece]
            case Largest():
                windows, shape = op.windows(h, -torch.inf)
                h = windows.amax(2).reshape(shape)
            case _:
                h = apply_linear(op, h, parameters)
    return h


def objective_at(model: Model, vector: Tensor) -> float:
    """The objective at a point."""
    return float(model.loss(true_outputs(model, vector)) + _penalty(model, vector))


def true_loss(model: Model, vector: Tensor) -> tuple[float, float]:
    """The objective at a point, and a bound on its rounding error."""
    value = objective_at(model, vector)
    face = read_face(model, vector).face
    at = face.whole(vector[face.free].abs(), absolute=True)
    outputs = face.evaluate(at[face.free], at.new_zeros(0), absolute=True)[0]
    # Twice, since a number within rounding of a kink may be on its other side.
    error = 2 * model.rounding * model.loss.absolute_value(outputs)
    error += 2 * gamma(len(vector) + 8) * float(_penalty(model, at))
    return value, error


def _penalty(model: Model, vector: Tensor) -> Tensor:
    return 0.5 * (model.weights_of_penalty * vector.square()).sum()


def active_sets(reading: Reading, largest: float, count: int) -> list[Active]:
    """Sets of kinks that may be active: those below the widest gaps in |z − kink| relative to its scale.

    Args:
        reading: the pieces at the point, without active kinks.
        largest: the largest relative |z − kink| of an active kink.
        count: number of sets.
    """
    numbers, places, kinks, ratios = [], [], [], []
    for index, unit in reading.units.items():
        ratio, kink = unit.nearest()
        near = (ratio <= largest).flatten().nonzero()[:, 0]
        numbers.append(torch.full_like(near, index))
        places.append(near)
        kinks.append(kink.flatten()[near])
        ratios.append(ratio.flatten()[near])
    if not ratios or not sum(map(len, ratios)):
        return [{}]
    number, place, kink, ratio = (torch.cat(parts) for parts in (numbers, places, kinks, ratios))
    order = ratio.argsort()
    number, place, kink, ratio = number[order], place[order], kink[order], ratio[order].clamp(min=1e-16)
    edges = torch.cat([ratio.new_tensor([1e-10]), ratio, ratio.new_tensor([max(largest, 1e-300)])])
    gaps = edges[1:] / edges[:-1]
    sets = []
    for size in gaps.argsort(descending=True)[:count].tolist():
        active = {name: torch.full(unit.values.shape, -1) for name, unit in reading.units.items()}
        for n, p, k in zip(number[:size], place[:size], kink[:size], strict=True):
            active[int(n)].view(-1)[p] = k
        sets.append(active)
    return sets
