"""Problem and Point: a training set and two-layer weights as the search for minima sees them.

Shapes: N samples (of this process), d0 inputs (a column of ones included, where the hidden layer has a bias), d1 hidden
units, f free columns (one, of ones, where the output has a bias; else none). Everything is float64, one network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_mnn.landscape.linear_map import FaceMap
from lightning_mnn.landscape.team import Team
from lightning_mnn.utilities.transfer import fetched

ROUNDOFF = 2.0**-53  # of float64, in which all is computed
_UNKNOWABLE = 1e-6  # rounding errors of ŷ, relative to y, that hide whether e = 0


@dataclass(frozen=True)
class Point:
    """Weights of a two-layer network.

    Attributes:
        hidden: W, (d1, d0).
        output: z, (d1,).
        free: coefficients b of the free columns, (f,).
    """

    hidden: Tensor
    output: Tensor
    free: Tensor

    @property
    def theta(self) -> Tensor:
        """The flat parameters: rows w̃_i = z_i w_i, then b."""
        return torch.cat([(self.output[:, None] * self.hidden).reshape(-1), self.free])

    def distance(self, other: Point) -> float:
        """‖W̃′ − W̃‖/‖W̃‖ to another point, biases included; infinite from zero weights."""
        size, moved = fetched(self.theta.norm(), (other.theta - self.theta).norm())
        return moved / size if size else math.inf if moved else 0.0

    def moved(self, rows: Tensor, free: Tensor) -> Point:
        """The point with other flat rows (d1, d0) where z_i ≠ 0, and other b."""
        live = self.output != 0
        hidden = torch.where(live[:, None], rows / torch.where(live, self.output, 1.0)[:, None], self.hidden)
        return Point(hidden, self.output, free)


@dataclass(frozen=True)
class Outputs:
    """What a point gives on the samples.

    Attributes:
        preactivations: u_ni = w_i·x_n, (N, d1).
        errors: e = y − ŷ, (N,).
        bounds: bounds on the rounding error of each e_n, (N,).
    """

    preactivations: Tensor
    errors: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class Problem:
    """A training set and a slope.

    Attributes:
        inputs: X, (N, d0).
        targets: y, (N,).
        slope: ρ.
        free: columns whose coefficients no kink depends on, (N, f).
        team: the processes that hold the other samples.
    """

    inputs: Tensor
    targets: Tensor
    slope: float
    free: Tensor
    team: Team = field(default_factory=Team)

    @cached_property
    def norms(self) -> Tensor:
        """‖x_n‖, (N,)."""
        norms: Tensor = self.inputs.norm(dim=1)
        return norms

    @cached_property
    def num_samples(self) -> int:
        """N, over all processes."""
        return self.team.total(self.inputs.shape[0], self.inputs.device)

    def slopes(self, active: Tensor) -> Tensor:
        """A of an activation pattern, (N, d1)."""
        return active.to(torch.float64) * (1 - self.slope) + self.slope

    def map(self, active: Tensor, live: Tensor | None = None, bases: dict[int, Tensor] | None = None) -> FaceMap:
        """The linear map of a pattern, on a face."""
        return FaceMap(self.inputs, self.slopes(active), self.free, live, bases or {}, self.team)

    def outputs(self, point: Point) -> Outputs:
        """Evaluate a point.

        The rounding error of e_n is at most γ (|y_n| + ‖x_n‖ max(1, |ρ|) Σ_i |z_i| ‖w_i‖ + Σ_j |c_nj b_j|), where γ is
        d0 + d1 + f + 7 unit roundoffs: each weight is rounded once, and the rest is that of the inner products.
        """
        preactivations = self.inputs @ point.hidden.T
        activated = torch.where(preactivations > 0, preactivations, self.slope * preactivations)
        errors = self.targets - activated @ point.output - self.free @ point.free
        reach = max(1.0, abs(self.slope)) * float((point.output.abs() * point.hidden.norm(dim=1)).sum())
        terms = self.targets.abs() + reach * self.norms + self.free.abs() @ point.free.abs()
        gamma = (sum(point.hidden.shape) + self.free.shape[1] + 7) * ROUNDOFF
        return Outputs(preactivations, errors, gamma * terms)

    def is_zero(self, outputs: Outputs) -> bool:
        """Whether e = 0 up to rounding, and the rounding is small beside the targets: large weights hide all errors."""
        sizes = self.team.sum(torch.stack([outputs.bounds.square().sum(), self.targets.square().sum()]))
        fits = self.team.least((outputs.errors.abs() <= outputs.bounds).all().long())
        bounds, targets, fit = fetched(*sizes, fits)
        return bool(fit) and bounds <= _UNKNOWABLE**2 * targets

    def squared_error(self, errors: Tensor) -> float:
        """‖e‖² over all samples."""
        return float(self.team.sum(errors.square().sum()))
