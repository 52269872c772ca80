"""Bounds on derivatives of a face over a ball, from norms of its layers.

For each sample the recursion carries bounds D_j on the norms of the j-th derivatives of a layer's values, in all free
parameters and the variables of active kinks together, on the ball of radius r around the point. For a map W h + b with
‖W‖ ≤ s and ‖δW h‖ ≤ c ‖δW‖ ‖h‖ they become D_0' = s D_0 + ‖b‖ and D_j' = s D_j + j c D_(j−1); with a bias D_1' is
s D_1 + √(c² D_0² + 1).

Shapes: N samples, κ active kinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape.minima.models.equations.face import Pieces
from lightning_mnn.landscape.minima.models.equations.layers import Affine, Average, Scale

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.face import Face

_ROUNDED_UP = 1 + 1e-9  # factor that covers the rounding of the bounds themselves


@dataclass(frozen=True)
class Bounds:
    """Bounds on a ball.

    Attributes:
        curvature_change: a Lipschitz constant of the Jacobian of the equations of stationarity.
        growth_change: Lipschitz constants of each growth b + Lᵀλ − |λ|, (κ,).
        slopes: bounds on ‖∇z‖ of each sample by the number of the operation: pre-activations, inputs of max-pooling.
        outputs: bounds D_1, D_2 on each sample's outputs, two of (N,).
        switching: bounds D_1, D_2 on each switching value, two of (κ,).
        gradient: a bound on the norm of the objective's gradient.
    """

    curvature_change: float
    growth_change: Tensor
    slopes: dict[int, Tensor]
    outputs: tuple[Tensor, Tensor]
    switching: tuple[Tensor, Tensor]
    loss_slope: Tensor


def bounds_on_ball(face: Face, theta: Tensor, multipliers: Tensor, radius: float) -> Bounds:
    """Bounds on the ball of a radius around (θ, λ)."""
    walk = _Walk(face, theta, radius)
    outputs, _ = face.evaluate(theta, theta.new_zeros(face.num_kinks), visit=walk.step)
    walk.finish(outputs)
    d0, d1, d2, d3 = walk.jets
    loss, count = face.model.loss, len(d0)
    slope = (loss.slopes(outputs).norm(dim=1) + loss.second * d1 * radius) * _ROUNDED_UP
    z1, z2, z3 = walk.kinks()
    size = multipliers.abs() + radius
    change = (loss.third * d1**3 + 3 * loss.second * d1 * d2 + slope * d3).sum() / count
    change = change + (size * z3).sum() + 2 * z2.square().sum().sqrt()
    samples, (rows, variables) = face.samples, face.members

    def summed(of_samples: Tensor) -> Tensor:
        """For each variable, over the samples on whose kinks it is."""
        return torch.zeros_like(z1).index_add(0, variables, of_samples[rows])

    mixed = summed(loss.second * d1.square() + slope * d2) / count
    coupled = summed(torch.zeros(count, dtype=torch.float64).index_add(0, samples, size * z2))
    direct = summed(torch.zeros(count, dtype=torch.float64).index_add(0, samples, z1.square())).sqrt()
    return Bounds(
        curvature_change=float(change) * _ROUNDED_UP,
        growth_change=(mixed + coupled + direct + 1) * _ROUNDED_UP,
        slopes={number: value * _ROUNDED_UP for number, value in walk.slopes.items()},
        outputs=(d1 * _ROUNDED_UP, d2 * _ROUNDED_UP),
        switching=(z1 * _ROUNDED_UP, z2 * _ROUNDED_UP),
        loss_slope=slope,
    )


class _Walk:
    """The recursion over operations."""

    def __init__(self, face: Face, theta: Tensor, radius: float) -> None:
        self.face, self.radius = face, radius
        self.parameters = face.model.parameters(face.whole(theta))
        self.trained = set(face.model.trained)
        zero = torch.zeros(len(face.model.inputs), dtype=torch.float64)
        self.jets = (zero, zero, zero, zero)
        self.slopes: dict[int, Tensor] = {}
        self._pending: int | None = None
        self._kinks: list[tuple[Tensor, Tensor, Tensor]] = []

    def kinks(self) -> tuple[Tensor, Tensor, Tensor]:
        """D_1, D_2, D_3 of each switching value."""
        none = torch.zeros(0, dtype=torch.float64)
        parts = zip(*self._kinks, strict=True) if self._kinks else ((), (), ())
        d1, d2, d3 = (torch.cat([*part, none]) for part in parts)
        return d1, d2, d3

    def step(self, number: int, h: Tensor) -> None:
        """Apply the operation before this one, and look at its result."""
        self.finish(h)
        piece = self.face.pieces[number]
        if piece is not None:
            self.slopes[number] = self.jets[1]
        if isinstance(piece, Pieces) and len(piece.heads):
            rows = piece.kinks[piece.heads] // piece.slope[0].numel()
            self._kinks.append((self.jets[1][rows], self.jets[2][rows], self.jets[3][rows]))
        self._pending = number
        self._input = h

    def finish(self, h: Tensor) -> None:
        """Apply the last operation; h is its result at the point."""
        _, d1, d2, d3 = self.jets
        if self._pending is not None:
            _, d1, d2, d3 = self._applied(self._pending)
        d0 = h.flatten(1).norm(dim=1) * _ROUNDED_UP + self.radius * d1
        self.jets = (d0, d1, d2, d3)

    def _applied(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d0, d1, d2, d3 = self.jets
        op, piece = self.face.model.layers.operations[number], self.face.pieces[number]
        match op:
            case Affine():
                s, c, bias = self._affine(op)
                return d0, s * d1 + ((c * d0).square() + bias).sqrt(), s * d2 + 2 * c * d1, s * d3 + 3 * c * d2
            case Scale():
                largest = float(op.scale.max())
                factor = op.scale if op.weight is None else op.scale * self.parameters[op.weight]
                s = float(factor.abs().max())
                c = largest if op.weight in self.trained else 0.0
                s += c * self.radius
                places = self._input[0, 0].numel()
                centred = d0 + float(op.mean.norm()) * places**0.5
                bias = float(places) if op.bias in self.trained else 0.0
                return d0, s * d1 + ((c * centred).square() + bias).sqrt(), s * d2 + 2 * c * d1, s * d3 + 3 * c * d2
            case Average():
                s = self._norm(op.apply)
                return d0, s * d1, s * d2, s * d3
        if isinstance(piece, Pieces):
            s = float(piece.slope.abs().max())
            own = torch.zeros_like(d1)
            rows = piece.kinks // piece.slope[0].numel()
            own = own.scatter_reduce(0, rows, piece.half.abs(), "amax")
            return d0, s * d1 + own, s * d2, s * d3
        if piece is not None:  # a number may win in several windows
            s = float(torch.bincount(piece.flatten()).max()) ** 0.5
            return d0, s * d1, s * d2, s * d3
        return d0, d1, d2, d3

    def _affine(self, op: Affine) -> tuple[float, float, float]:
        """s, c and the square of the bias's factor."""
        weight = self.parameters[op.weight]
        is_trained = op.weight in self.trained
        if not op.groups:
            s, c, places = float(torch.linalg.matrix_norm(weight, 2)), 1.0, 1
        else:
            s = self._norm(lambda h: op.apply(h, weight.abs(), None))
            c = float(weight[0, 0].numel()) ** 0.5
            places = op.apply(self._input[:1], weight, None)[0, 0].numel()
        c = c if is_trained else 0.0
        return s * _ROUNDED_UP + c * self.radius, c, float(places) if op.bias in self.trained else 0.0

    def _norm(self, apply: Callable[[Tensor], Tensor]) -> float:
        """A bound on the norm of a linear map with weights ≥ 0: √(largest sum of a row · of a column)."""
        like = torch.ones_like(self._input[:1])
        with torch.enable_grad():
            like = like.detach().requires_grad_()
            rows = apply(like)
            (columns,) = torch.autograd.grad(rows.sum(), like)
        largest = float(rows.detach().max() * columns.max())
        return math.sqrt(largest) * _ROUNDED_UP
