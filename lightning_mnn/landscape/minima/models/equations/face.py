"""The objective on one face of its pieces: a smooth function of the parameters and of the active kinks' |z|.

Each kinked unit on its piece is slope · z + offset; on an active kink it is the mean of both sides plus half of their
difference times an independent variable s, which stands for |z|. So the loss φ, and each switching value z (the
pre-activation minus the place of its kink), are smooth in (θ, s). On the face of the active kinks z = 0 and s = 0.

Rounding: with fixed pieces the outputs, and their derivatives, are sums of products of parameters and inputs. Each term
has a relative error of at most γ = k u/(1 − k u), where k is the number of operations on its way and u the unit
roundoff, in whatever order the sums are computed. So an error is at most γ times the same expression with absolute
values everywhere: this is the *absolute* evaluation of a face.

Shapes: N samples, K outputs, P free parameters, κ active kinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.layers import (
    Affine,
    Average,
    Bends,
    Flatten,
    Largest,
    Layers,
    Scale,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.layers import Loss

_SAMPLES_AT_ONCE = 8  # whose outputs are differentiated together
_POWER_STEPS = 6
_CHUNK_NUMBERS = 2**24  # numbers of one batch of directional derivatives


@dataclass(frozen=True)
class Model:
    """A module, its training set and its objective.

    Attributes:
        layers: the module.
        inputs: X, float64 (N, …).
        loss: the loss with its targets.
        penalties: wd of ½ wd θ² of each parameter of the module, by name.
        trained: names of the parameters that are trained.
    """

    layers: Layers
    inputs: Tensor
    loss: Loss
    penalties: dict[str, float]
    trained: tuple[str, ...]

    @cached_property
    def weights_of_penalty(self) -> Tensor:
        """The wd of each number in θ, (all,)."""
        sizes = ((name, self.layers.parameters[name].numel()) for name in self.trained)
        return torch.cat([torch.full((size,), self.penalties[name], dtype=torch.float64) for name, size in sizes])

    def vector(self, parameters: dict[str, Tensor]) -> Tensor:
        """The trained parameters as one vector."""
        return torch.cat([parameters[name].flatten() for name in self.trained])

    def parameters(self, vector: Tensor) -> dict[str, Tensor]:
        """All parameters by name, of a vector of the trained ones."""
        result, start = dict(self.layers.parameters), 0
        for name in self.trained:
            like = self.layers.parameters[name]
            result[name] = vector[start : start + like.numel()].reshape(like.shape)
            start += like.numel()
        return result

    @cached_property
    def operations(self) -> int:
        """Number of operations on the way of a term of first derivatives, or of switching values (see the module).

        A term goes through one sum of each layer forwards and one backwards, one over outputs, and one over samples and
        places.
        """
        count, places = 16 + self.loss.targets.shape[1], 1
        size = self.inputs[0].numel()  # an upper bound on the places of a convolution, with its padding
        for op in self.layers.operations:
            match op:
                case Affine():
                    weight = self.layers.parameters[op.weight]
                    count += weight[0].numel() + weight.numel() // weight.shape[1] + 6
                    places = max(places, 4 * size if op.groups else 1)
                case Average():
                    count += 2 * size
                case _:
                    count += 6
        return count + 2 * len(self.inputs) * places

    @property
    def rounding(self) -> float:
        """γ of first derivatives and switching values."""
        return gamma(self.operations)

    @property
    def second_rounding(self) -> float:
        """γ of second derivatives, whose terms go through each sum twice."""
        return 3 * self.rounding


def gamma(count: int) -> float:
    """The relative error of a product or sum of terms, of the same sign, by so many operations."""
    error = count * tolerances.UNIT_ROUNDOFF
    return error / (1 - error)


class Pieces(NamedTuple):
    """The pieces of one activation: slope · z + offset, and half · s on active kinks.

    Attributes:
        slope: (N, …).
        offset: (N, …).
        kinks: places of the active kinks in the flat tensor.
        half: half the difference of the slopes of each.
        place: the kink of each.
        groups: the number of its variable s for each: kinks whose z are the same function have one together.
        heads: for each variable one of its kinks, a place in ``kinks``, (κ of this activation,).
    """

    slope: Tensor
    offset: Tensor
    kinks: Tensor
    half: Tensor
    place: Tensor
    groups: Tensor
    heads: Tensor


def kink_groups(places: Tensor, classes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The groups and heads of the kinks of an activation, see :class:`Pieces`.

    Args:
        places: places in the flat tensor of pre-activations.
        classes: a number for each sample, equal for samples whose pre-activations are the same functions, (N,).
        size: pre-activations of one sample.
    """
    keys, groups = torch.unique(classes[places // size] * size + places % size, return_inverse=True)
    heads = torch.full_like(keys, len(places)).scatter_reduce(0, groups, torch.arange(len(places)), "amin")
    return groups, heads


@dataclass(frozen=True)
class Face:
    """A choice of pieces and active kinks for every unit and sample.

    Attributes:
        model: the model.
        pieces: of each operation: the pieces of an activation, the winners of max-pooling (places in the flat tensor,
            with the shape of the result), None elsewhere.
        free: places of the free parameters in the vector of the trained ones, (P,).
        base: the vector of the trained parameters, of which the others keep their values.
    """

    model: Model
    pieces: tuple[Pieces | Tensor | None, ...]
    free: Tensor
    base: Tensor

    @cached_property
    def num_kinks(self) -> int:
        """κ."""
        return sum(len(p.heads) for p in self.pieces if isinstance(p, Pieces))

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Numbers of one sample that enter each operation."""
        found: dict[int, int] = {}
        with torch.no_grad():
            self.evaluate(
                self.base[self.free],
                self.base.new_zeros(self.num_kinks),
                visit=lambda number, h: found.update({number: h[0].numel()}),
            )
        return found

    @cached_property
    def members(self) -> tuple[Tensor, Tensor]:
        """The sample of each active kink, and the number of its variable."""
        rows, numbers, first = [], [], 0
        for piece in self.pieces:
            if isinstance(piece, Pieces):
                rows.append(piece.kinks // piece.slope[0].numel())
                numbers.append(piece.groups + first)
                first += len(piece.heads)
        none = torch.zeros(0, dtype=torch.long)
        return torch.cat([*rows, none]), torch.cat([*numbers, none])

    @cached_property
    def samples(self) -> Tensor:
        """The sample whose pre-activation is the switching value of each variable, (κ,)."""
        rows = [p.kinks[p.heads] // p.slope[0].numel() for p in self.pieces if isinstance(p, Pieces)]
        return torch.cat([*rows, torch.zeros(0, dtype=torch.long)])

    def whole(self, theta: Tensor, *, absolute: bool = False) -> Tensor:
        """The vector of the trained parameters, from the free ones."""
        return (self.base.abs() if absolute else self.base).index_copy(0, self.free, theta)

    def evaluate(
        self, theta: Tensor, s: Tensor, *, absolute: bool = False, visit: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The outputs (N, K) and the switching values (κ,).

        Args:
            theta: the free parameters, (P,).
            s: the values for |z|, (κ,).
            absolute: whether to replace all that is not θ by its absolute value.
            visit: called with the number of each operation and its input.
        """
        size = torch.abs if absolute else lambda t: t
        parameters = self.model.parameters(self.whole(theta, absolute=absolute))
        if absolute:
            parameters = {
                name: value if name in self.model.trained else value.abs() for name, value in parameters.items()
            }
        h, switching, used = size(self.model.inputs), [], 0
        for number, (op, piece) in enumerate(zip(self.model.layers.operations, self.pieces, strict=True)):
            if visit is not None:
                visit(number, h)
            if isinstance(piece, Pieces):
                place = size(piece.place)
                values, place = h.flatten()[piece.kinks[piece.heads]], place[piece.heads]
                switching.append(values + place if absolute else values - place)
                result = size(piece.slope) * h + size(piece.offset)
                if count := len(piece.heads):
                    extra = size(piece.half) * s[used : used + count][piece.groups]
                    result = result.flatten().index_add(0, piece.kinks, extra).reshape(result.shape)
                    used += count
                h = result
            elif isinstance(op, Largest) and piece is not None:
                h = h.flatten()[piece]
            else:
                h = apply_linear(op, h, parameters, absolute=absolute)
        return h, torch.cat([*switching, s.new_zeros(0)])

    def objective(self, theta: Tensor, outputs: Tensor) -> Tensor:
        """Loss and penalty."""
        weights = self.model.weights_of_penalty
        return self.model.loss(outputs) + 0.5 * (weights * self.whole(theta).square()).sum()

    def lagrangian(self, theta: Tensor, s: Tensor, multipliers: Tensor) -> Tensor:
        """φ + λᵀz as a function of (θ, s)."""
        outputs, switching = self.evaluate(theta, s)
        return self.objective(theta, outputs) + multipliers @ switching

    def absolute_lagrangian(self, theta: Tensor, s: Tensor, multipliers: Tensor, outputs: Tensor) -> Tensor:
        """The absolute evaluation of it, for θ ≥ 0 and λ ≥ 0, with the absolute outputs at the point."""
        f, switching = self.evaluate(theta, s, absolute=True)
        penalty = 0.5 * (self.model.weights_of_penalty[self.free] * theta.square()).sum()
        return self.model.loss.absolute(f, outputs) + penalty + multipliers @ switching


def on_kinks(face: Face, active: dict[int, Tensor], classes: dict[int, Tensor]) -> Face:
    """The same face with the units of some places on their kinks, and all others on the pieces they have.

    Args:
        face: the face.
        active: by the number of the activation, the kink of each unit, or −1, (N, …).
        classes: by the number of the activation, see :func:`kink_groups`.
    """
    pieces = list(face.pieces)
    for number, on in active.items():
        op, piece = face.model.layers.operations[number], pieces[number]
        assert isinstance(op, Bends)  # noqa: S101 (what kinks are of)
        assert isinstance(piece, Pieces)  # noqa: S101 (what activations have)
        places = (on.flatten() >= 0).nonzero()[:, 0]
        kink = on.flatten()[places]
        slopes, kinks, values = (torch.tensor(t, dtype=torch.float64) for t in (op.slopes, op.kinks, op.values))
        mean, half = (slopes[kink + 1] + slopes[kink]) / 2, (slopes[kink + 1] - slopes[kink]) / 2
        slope = piece.slope.flatten().index_copy(0, places, mean).reshape(piece.slope.shape)
        offset = piece.offset.flatten().index_copy(0, places, values[kink] - mean * kinks[kink])
        groups = kink_groups(places, classes[number], piece.slope[0].numel())
        pieces[number] = Pieces(slope, offset.reshape(piece.offset.shape), places, half, kinks[kink], *groups)
    return replace(face, pieces=tuple(pieces))


def apply_linear(op: object, h: Tensor, parameters: dict[str, Tensor], *, absolute: bool = False) -> Tensor:
    """An operation without kinks; ``absolute``: with the absolute values of its fixed numbers."""
    match op:
        case Affine():
            return op.apply(h, parameters[op.weight], None if op.bias is None else parameters[op.bias])
        case Scale():
            axes = (-1, *[1] * (h.ndim - 2))
            mean = (-op.mean.abs() if absolute else op.mean).reshape(axes)
            scaled = (h - mean) * op.scale.reshape(axes)
            if op.weight is not None:
                scaled = scaled * parameters[op.weight].reshape(axes)
            return scaled if op.bias is None else scaled + parameters[op.bias].reshape(axes)
        case Average():
            return op.apply(h)
        case Flatten():
            return h.flatten(1)
        case _:
            raise TypeError(op)


@dataclass(frozen=True)
class Derivatives:
    """First derivatives on a face.

    Attributes:
        gradient: a = ∇ψ, (P,).
        normal: b = ∂φ/∂s, (κ,).
        switching: z, (κ,).
        jacobian: Z = ∂z/∂θ, (κ, P).
        coupling: L = ∂z/∂s, (κ, κ).
    """

    gradient: Tensor
    normal: Tensor
    switching: Tensor
    jacobian: Tensor
    coupling: Tensor


def derivatives(face: Face, theta: Tensor, s: Tensor | None = None, *, absolute: bool = False) -> Derivatives:
    """First derivatives at a point, with the active kinks at zero unless s is given.

    ``absolute``: of the absolute evaluation, at θ ≥ 0.
    """
    none = theta.new_zeros(face.num_kinks)
    s = none if s is None else s
    lagrangian = _lagrangian(face, theta, absolute=absolute)
    gradient, normal = torch.func.grad(lagrangian, argnums=(0, 1))(theta, s, none)

    def switching(theta: Tensor, s: Tensor) -> Tensor:
        return face.evaluate(theta, s, absolute=absolute)[1]

    if not face.num_kinks:
        empty = theta.new_zeros(0, len(theta))
        return Derivatives(gradient, normal, none, empty, theta.new_zeros(0, 0))
    chunk = chunk_size(face, 1)
    jacobian, coupling = torch.func.jacrev(switching, argnums=(0, 1), chunk_size=chunk)(theta, s)
    return Derivatives(gradient, normal, switching(theta, s), jacobian, coupling)


def hessian(face: Face, theta: Tensor, multipliers: Tensor, *, absolute: bool = False) -> Tensor:
    """The Hessian of ψ + λᵀz in θ, (P, P)."""
    s = theta.new_zeros(face.num_kinks)
    gradient = torch.func.grad(_lagrangian(face, theta, absolute=absolute))
    product = torch.func.jacrev(lambda t: gradient(t, s, multipliers), chunk_size=chunk_size(face, 2))
    found: Tensor = product(theta)
    return (found + found.T) / 2


def _lagrangian(face: Face, theta: Tensor, *, absolute: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not absolute:
        return face.lagrangian
    outputs = face.evaluate(theta, theta.new_zeros(face.num_kinks), absolute=True)[0].detach()
    return lambda t, s, multipliers: face.absolute_lagrangian(t, s, multipliers, outputs)


def chunk_size(face: Face, order: int) -> int:
    """Number of directions that are differentiated together."""
    numbers = face.model.inputs.numel() + sum(
        p.slope.numel() if isinstance(p, Pieces) else p.numel() for p in face.pieces if p is not None
    )
    return max(1, _CHUNK_NUMBERS // (4 * order * (numbers + len(face.base))))


def outputs_jacobian(face: Face, theta: Tensor) -> Tensor:
    """The Jacobian of outputs (sample by sample) and switching values, (N·K + κ, P).

    Some samples at a time, since an output depends on its own sample only.
    """
    rows = []
    for start in range(0, len(face.model.inputs), _SAMPLES_AT_ONCE):
        part = of_samples(face, start, start + _SAMPLES_AT_ONCE)
        s = theta.new_zeros(part.num_kinks)

        def values(t: Tensor, part: Face = part, s: Tensor = s) -> Tensor:
            return part.evaluate(t, s)[0].flatten()

        rows.append(torch.func.jacrev(values, chunk_size=chunk_size(part, 1))(theta))
    if face.num_kinks:
        rows.append(derivatives(face, theta).jacobian)
    return torch.cat(rows)


def of_samples(face: Face, start: int, end: int) -> Face:
    """The face of some of the samples, without the connection of kinks that are the same function."""
    inputs = face.model.inputs[start:end]
    targets = face.model.loss.targets[start:end]
    model = replace(face.model, inputs=inputs, loss=replace(face.model.loss, targets=targets))
    pieces: list[Pieces | Tensor | None] = []
    for number, (op, piece) in enumerate(zip(face.model.layers.operations, face.pieces, strict=True)):
        if isinstance(piece, Pieces):
            size = piece.slope[0].numel()
            own = (piece.kinks >= start * size) & (piece.kinks < end * size)
            every = torch.arange(int(own.sum()))
            pieces.append(
                Pieces(
                    piece.slope[start:end],
                    piece.offset[start:end],
                    piece.kinks[own] - start * size,
                    piece.half[own],
                    piece.place[own],
                    every,
                    every,
                )
            )
        elif isinstance(op, Largest) and piece is not None:
            pieces.append(piece[start:end] - start * face.sizes[number])
        else:
            pieces.append(None)
    return replace(face, model=model, pieces=tuple(pieces))


def largest_curvature(face: Face, theta: Tensor, multipliers: Tensor) -> float:
    """A bound on the norm of the Hessian of the absolute evaluation.

    Its numbers are at least zero: so for every v > 0 its norm is at most the largest (Hv)_i/v_i (Collatz).
    """
    s = theta.new_zeros(face.num_kinks)
    gradient = torch.func.grad(_lagrangian(face, theta, absolute=True))

    def product(v: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda t: gradient(t, s, multipliers) @ v)(theta)
        return found

    return _collatz(product, torch.ones_like(theta))


def largest_slope(face: Face, theta: Tensor) -> float:
    """A bound on the norm of the Jacobian of the absolute outputs and switching values, at θ ≥ 0."""
    s = theta.new_zeros(face.num_kinks)

    def values(t: Tensor) -> Tensor:
        f, z = face.evaluate(t, s, absolute=True)
        return torch.cat([f.flatten(), z])

    def product(v: Tensor) -> Tensor:
        result, back = torch.func.vjp(values, theta)[:2]
        ahead = torch.func.grad(lambda u: back(u)[0] @ v)(torch.zeros_like(result))
        found: Tensor = back(ahead)[0]
        return found

    return math.sqrt(_collatz(product, torch.ones_like(theta)))


def _collatz(product: Callable[[Tensor], Tensor], v: Tensor) -> float:
    """The largest (Mv)_i/v_i, after some steps of the power method, for a symmetric M ≥ 0."""
    for _ in range(_POWER_STEPS):
        following = product(v)
        v = following + 1e-3 * following.norm() / len(v) ** 0.5 + 1e-300
    largest = float((product(v) / v).max())
    return largest * (1 + 1e-9)
