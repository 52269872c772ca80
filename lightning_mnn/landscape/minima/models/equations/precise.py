"""The equations of a stationary point on a face, and the growth off its kinks, in double-double.

The same numbers as those of ``derivatives``, by a forward and a backward pass written out, with errors of some
operations · ``UNIT`` times the absolute evaluation. The model is the one whose floats are exact numbers: parameters,
inputs, targets, slopes of activations, penalties, and mean and scale of batch normalisation.

Shapes: N samples, K outputs, P free parameters, κ active kinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from lightning_mnn.landscape.minima.models.equations import double_double as dd
from lightning_mnn.landscape.minima.models.equations.double_double import Pair
from lightning_mnn.landscape.minima.models.equations.face import Pieces
from lightning_mnn.landscape.minima.models.equations.layers import Affine, Average, Bends, Flatten, Largest, Scale

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.face import Face, Model
    from lightning_mnn.landscape.minima.models.equations.layers import Loss

    Backward = Callable[[Pair], Pair]


@dataclass(frozen=True)
class Precise:
    """The equations at a point, computed in double-double and rounded to doubles.

    Attributes:
        gradient: a + Zᵀλ, (P,).
        switching: z, (κ,).
        growth: b + Lᵀλ − |λ|, (κ,).
        misfit: f − y, (N, K).
        inputs: the input of each activation and max-pooling, by the number of the operation.
        unit: the relative error of one operation.
    """

    gradient: Tensor
    switching: Tensor
    growth: Tensor
    misfit: Tensor
    inputs: dict[int, Tensor]
    unit: float

    def rounding(self, model: Model) -> float:
        """γ of all of them (see the module ``face``), with the rounding of their absolute evaluations."""
        return 4 * model.operations * self.unit


def precise_equations(face: Face, theta: Tensor, multipliers: Tensor) -> Precise:
    """The equations at free parameters and multipliers."""
    walk = _Walk(face, theta, multipliers)
    outputs = walk.forward()
    misfit = dd.add(outputs, Pair.of(-face.model.loss.targets))
    walk.backward(_slopes(face.model.loss, outputs, misfit))
    penalty = dd.two_product(face.model.weights_of_penalty[face.free], theta)
    gradient = dd.add(walk.gradient().map(lambda t: t[face.free]), penalty)
    none = theta.new_zeros(0)
    switching, growth = (torch.cat([*parts, none]) for parts in (walk.switching, reversed(walk.growth)))
    unit = dd.UNIT if face.model.loss.name == "squared_error" else dd.EXP_UNIT
    return Precise(gradient.hi, switching, growth, misfit.hi, walk.inputs, unit)


def _slopes(loss: Loss, f: Pair, misfit: Pair) -> Pair:
    """The derivative of the mean loss in the outputs, (N, K)."""
    match loss.name:
        case "squared_error":
            slopes = misfit.map(lambda t: 2 * t)
        case "cross_entropy":
            place = f.hi.argmax(1, keepdim=True)
            largest = f.map(lambda t: t.gather(1, place))
            powers = dd.exponential(_not_positive(dd.add(f, -largest)))
            share = dd.divide(powers, dd.total(powers, 1).map(lambda t: t[:, None]))
            sums = dd.total(Pair.of(loss.targets), 1).map(lambda t: t[:, None])
            slopes = dd.add(dd.multiply(share, sums), Pair.of(-loss.targets))
        case _:
            power = dd.exponential(-abs(f))  # 1/(1 + e^−f), or e^f/(1 + e^f)
            ones = Pair.of(torch.ones_like(f.hi))
            above = f.hi >= 0
            top = Pair(torch.where(above, 1.0, power.hi), power.lo.masked_fill(above, 0.0))
            slopes = dd.add(dd.divide(top, dd.add(ones, power)), Pair.of(-loss.targets))
    return dd.divide(slopes, Pair.of(torch.full_like(f.hi, float(len(f.hi)))))


def _not_positive(x: Pair) -> Pair:
    return Pair(x.hi.clamp(max=0.0), x.lo.masked_fill(x.hi > 0, 0.0))


class _Walk:
    """Forward, backward, and what is collected on the way."""

    def __init__(self, face: Face, theta: Tensor, multipliers: Tensor) -> None:
        self.face, self.multipliers = face, multipliers
        self.parameters = face.model.parameters(face.whole(theta))
        self.trained = set(face.model.trained)
        self.inputs: dict[int, Tensor] = {}
        self.switching: list[Tensor] = []
        self.growth: list[Tensor] = []
        self.gradients: dict[str, Pair] = {}
        self._back: list[Backward] = []
        self._used = 0

    def forward(self) -> Pair:
        h = Pair.of(self.face.model.inputs)
        for number, (op, piece) in enumerate(zip(self.face.model.layers.operations, self.face.pieces, strict=True)):
            if piece is not None:
                self.inputs[number] = h.hi
            match op:
                case Bends():
                    assert isinstance(piece, Pieces)  # noqa: S101 (what activations have)
                    h, back = self._bend(op, piece, h)
                case Largest():
                    assert isinstance(piece, torch.Tensor)  # noqa: S101 (what max-pooling has)
                    h, back = _gathered(h, piece)
                case Affine():
                    h, back = self._convolution(op, h) if op.groups else self._linear(op, h)
                case Scale():
                    h, back = self._scale(op, h)
                case Average():
                    h, back = _average(op, h)
                case Flatten():
                    shape = h.hi.shape
                    h = h.map(lambda t: t.flatten(1))
                    back = _reshaping(shape)
            self._back.append(back)
        return h

    def backward(self, slope: Pair) -> None:
        for back in reversed(self._back):
            slope = back(slope)

    def gradient(self) -> Pair:
        """Of all trained parameters, without the penalty."""
        like = self.face.model.layers.parameters
        parts = [self.gradients.get(name, Pair.of(torch.zeros_like(like[name]))) for name in self.face.model.trained]
        return Pair(torch.cat([p.hi.flatten() for p in parts]), torch.cat([p.lo.flatten() for p in parts]))

    def _linear(self, op: Affine, h: Pair) -> tuple[Pair, Backward]:
        weight = self.parameters[op.weight]
        result = self._shifted(dd.matmul(h, weight.T), op.bias)

        def back(slope: Pair) -> Pair:
            if op.weight in self.trained:
                self.gradients[op.weight] = dd.matmul(slope.map(lambda t: t.T), h)
            if op.bias in self.trained:
                self.gradients[op.bias] = dd.total(slope, 0)
            return dd.matmul(slope, weight)

        return result, back

    def _shifted(self, h: Pair, bias: str | None) -> Pair:
        if bias is None:
            return h
        return dd.add(h, Pair.of(self.parameters[bias].expand(h.hi.shape)))

    def _convolution(self, op: Affine, h: Pair) -> tuple[Pair, Backward]:
        """As a linear map of patches, (N·places, numbers of a patch) for each group."""
        weight, channels = self.parameters[op.weight], h.hi.shape[1]
        places, shape = _patches(op, h.hi.shape, weight)  # places of (N·positions, channels, kernel) in [0 | h]
        padded = h.map(lambda t: torch.cat([t.new_zeros(1), t.flatten()]))
        patches = padded.map(lambda t: t[places])
        own, outputs = channels // op.groups, len(weight) // op.groups
        rows = weight.flatten(1)

        def of_group(t: Tensor, group: int) -> Tensor:
            return t[:, group * own : (group + 1) * own].flatten(1)

        def weights(group: int) -> Tensor:
            return rows[group * outputs : (group + 1) * outputs]

        parts = [
            dd.matmul(patches.map(lambda t: of_group(t, g)), weights(g).T)  # noqa: B023 (called at once)
            for g in range(op.groups)
        ]
        flat = self._shifted(Pair(torch.cat([p.hi for p in parts], 1), torch.cat([p.lo for p in parts], 1)), op.bias)
        count = len(h.hi)

        def unfolded(t: Tensor) -> Tensor:
            return t.reshape(count, -1, t.shape[1]).transpose(1, 2).reshape(shape)

        def back(slope: Pair) -> Pair:
            slope = slope.map(lambda t: t.flatten(2).transpose(1, 2).reshape(-1, t.shape[1]))
            if op.bias in self.trained:
                self.gradients[op.bias] = dd.total(slope, 0)
            of_weight, of_patches = [], []
            for g in range(op.groups):
                of_outputs = slope.map(lambda t: t[:, g * outputs : (g + 1) * outputs])  # noqa: B023
                if op.weight in self.trained:
                    patch = patches.map(lambda t: of_group(t, g))  # noqa: B023
                    of_weight.append(dd.matmul(of_outputs.map(lambda t: t.T), patch))
                of_patches.append(dd.matmul(of_outputs, weights(g)).map(lambda t: t.reshape(len(t), own, -1)))
            if of_weight:
                self.gradients[op.weight] = Pair(
                    torch.cat([p.hi for p in of_weight]), torch.cat([p.lo for p in of_weight])
                ).map(lambda t: t.reshape(weight.shape))
            whole = Pair(torch.cat([p.hi for p in of_patches], 1), torch.cat([p.lo for p in of_patches], 1))
            inside = places.flatten() > 0
            values = whole.map(lambda t: t.flatten()[inside])
            return _scattered(values, places.flatten()[inside] - 1, h.hi.numel()).map(lambda t: t.reshape(h.hi.shape))

        return flat.map(unfolded), back

    def _scale(self, op: Scale, h: Pair) -> tuple[Pair, Backward]:
        axes = (1, -1, *[1] * (h.hi.ndim - 2))
        centred = dd.add(h, Pair.of(-op.mean.reshape(axes).expand(h.hi.shape)))
        scaled = dd.multiply(centred, op.scale.reshape(axes))
        weight = None if op.weight is None else self.parameters[op.weight].reshape(axes)
        result = scaled if weight is None else dd.multiply(scaled, weight)
        if op.bias is not None:
            result = dd.add(result, Pair.of(self.parameters[op.bias].reshape(axes).expand(h.hi.shape)))

        def of_channels(x: Pair) -> Pair:
            return dd.total(x.map(lambda t: t.transpose(0, 1).flatten(1)), 1)

        def back(slope: Pair) -> Pair:
            if op.bias in self.trained:
                self.gradients[op.bias] = of_channels(slope)
            if op.weight in self.trained:
                self.gradients[op.weight] = of_channels(dd.multiply(slope, scaled))
            if weight is not None:
                slope = dd.multiply(slope, weight)
            return dd.multiply(slope, op.scale.reshape(axes))

        return result, back

    def _bend(self, op: Bends, piece: Pieces, h: Pair) -> tuple[Pair, Backward]:
        """Off kinks slope · z + offset; on them the value there, with the mean slope for z − place."""
        on, flat = piece.kinks, h.map(torch.Tensor.flatten)
        count = len(piece.heads)
        own = slice(self._used, self._used + count)
        self._used += count
        at = torch.tensor(op.kinks, dtype=torch.float64)
        kink = (piece.place[:, None] == at).double().argmax(1)
        slopes = torch.tensor(op.slopes, dtype=torch.float64)
        mean = dd.two_sum(slopes[kink + 1], slopes[kink]).map(lambda t: t / 2)
        half = dd.two_sum(slopes[kink + 1], -slopes[kink]).map(lambda t: t / 2)
        value = torch.tensor(op.values, dtype=torch.float64)[kink]
        z = dd.add(flat.map(lambda t: t[on]), Pair.of(-piece.place))
        self.switching.append(z.hi[piece.heads])
        slope = Pair.of(piece.slope.flatten())
        slope = Pair(slope.hi.index_copy(0, on, mean.hi), slope.lo.index_copy(0, on, mean.lo))
        result = dd.add(dd.multiply(flat, slope), Pair.of(piece.offset.flatten()))
        at_kinks = dd.add(dd.multiply(z, mean), Pair.of(value))
        result = Pair(result.hi.index_copy(0, on, at_kinks.hi), result.lo.index_copy(0, on, at_kinks.lo))
        shape, multipliers = h.hi.shape, self.multipliers[own]

        def back(up: Pair) -> Pair:
            up = up.map(torch.Tensor.flatten)
            at_on = dd.multiply(half, up.map(lambda t: t[on]))
            of_variables = _scattered(at_on, piece.groups, count)
            self.growth.append(dd.add(of_variables, Pair.of(-multipliers.abs())).hi)
            down, heads = dd.multiply(up, slope), on[piece.heads]
            switched = dd.add(down.map(lambda t: t[heads]), Pair.of(multipliers))
            down = Pair(down.hi.index_copy(0, heads, switched.hi), down.lo.index_copy(0, heads, switched.lo))
            return down.map(lambda t: t.reshape(shape))

        return result.map(lambda t: t.reshape(shape)), back


def _reshaping(shape: torch.Size) -> Backward:
    return lambda slope: slope.map(lambda t: t.reshape(shape))


def _gathered(h: Pair, winners: Tensor) -> tuple[Pair, Backward]:
    """The numbers at some places of the flat tensor."""

    def back(slope: Pair) -> Pair:
        return _scattered(slope, winners, h.hi.numel()).map(lambda t: t.reshape(h.hi.shape))

    return h.map(lambda t: t.flatten()[winners]), back


def _scattered(x: Pair, places: Tensor, size: int) -> Pair:
    """The sum of the numbers that go to each of some places, (size,)."""
    flat, values = places.flatten(), x.map(torch.Tensor.flatten)
    order = flat.argsort(stable=True)
    if not len(flat):
        return Pair.of(x.hi.new_zeros(size))
    counts = torch.bincount(flat, minlength=size)
    first = counts.cumsum(0) - counts
    steps = torch.arange(int(counts.max()))
    index = (first[:, None] + steps).clamp(max=len(flat) - 1)
    inside = steps < counts[:, None]
    chosen = values.map(lambda t: torch.where(inside, t[order][index], 0.0))
    return dd.total(chosen, 1)


def _average(op: Average, h: Pair) -> tuple[Pair, Backward]:
    """Means over windows, whose weights are 1/n."""
    shape = h.hi.shape
    places = h.hi[0, 0].numel()
    weights = op.apply(torch.eye(places, dtype=torch.float64).reshape(places, 1, *shape[2:]))
    after = (*shape[:2], *weights.shape[2:])
    weights = weights.reshape(places, -1)
    present = weights != 0
    counts = torch.where(present, (1 / weights.where(present, torch.tensor(1.0).double())).round(), 1.0)
    ones = Pair.of(present.double())
    matrix = dd.divide(ones, Pair.of(counts))

    def back(slope: Pair) -> Pair:
        found = dd.matmul(slope.map(lambda t: t.flatten(2).flatten(0, 1)), matrix.map(lambda t: t.T))
        return found.map(lambda t: t.reshape(shape))

    return dd.matmul(h.map(lambda t: t.flatten(2).flatten(0, 1)), matrix).map(lambda t: t.reshape(after)), back


def _patches(op: Affine, shape: torch.Size, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Places of each patch in [0 | h.flatten()], (N·positions, channels, kernel), and the shape of the result."""
    count, channels, *sizes = shape
    numbers = torch.arange(1, 1 + count * channels * _product(sizes)).double().reshape(shape)
    kernel = list(weight.shape[2:])
    options = op.apply.keywords  # type: ignore[attr-defined]  # a partial function
    if len(sizes) == 1:
        numbers, kernel, sizes = numbers.unsqueeze(2), [1, *kernel], [1, *sizes]
    stride, dilation = (_two(options[name], len(shape) - 2, 1) for name in ("stride", "dilation"))
    padding = options["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        before = [t // 2 for t in total]
        after = [t - b for t, b in zip(total, before, strict=True)]
    else:
        before = after = _two(padding, len(shape) - 2, 0)
    padded = functional.pad(numbers, (before[1], after[1], before[0], after[0]))
    unfold = nn.Unfold((kernel[0], kernel[1]), dilation=(dilation[0], dilation[1]), stride=(stride[0], stride[1]))
    found = unfold(padded).long()  # (N, channels · kernel, positions)
    places = found.transpose(1, 2).reshape(-1, channels, kernel[0] * kernel[1])
    extent = [
        (n + b + a - d * (k - 1) - 1) // s + 1
        for n, b, a, d, k, s in zip(sizes, before, after, dilation, kernel, stride, strict=True)
    ]
    return places, (count, len(weight), *(extent[1:] if len(shape) == 3 else extent))


def _two(value: int | tuple[int, ...], axes: int, extra: int) -> list[int]:
    """An option for two axes; ``extra`` for the first where there is one."""
    values = [value] * axes if isinstance(value, int) else list(value)
    return [extra, *values] if axes == 1 else values


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
