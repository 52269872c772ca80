"""Problem and Point: a training set and two-layer weights in the form that the search for minima uses.

Shapes: N samples (of this process), d0 inputs (including a column of ones, if the hidden layer has a bias), d1 hidden
units, f free columns (one column of ones, if the output has a bias; otherwise none). Everything is float64 and of one
network. The units of measure make inputs, targets and z_i about 1 in size; they are powers of two, so nothing is
rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.regions.linear_map import FaceMap
from lightning_mnn.landscape.units import row_powers, times_power, unit_exponent
from lightning_mnn.utilities.distributed import ProcessGroup
from lightning_mnn.utilities.transfer import fetched


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

    @property
    def sizes(self) -> Tensor:
        """‖w_i‖, (d1,), also for rows whose squares overflow or underflow."""
        powers = row_powers(self.hidden)
        norms: Tensor = (self.hidden * powers[:, None]).norm(dim=1)
        return norms / powers

    def distance(self, other: Point) -> float:
        """‖W̃′ − W̃‖/‖W̃‖ to another point, biases included; infinite if W̃ = 0 and W̃′ is not."""
        size, moved = fetched(self.theta.norm(), (other.theta - self.theta).norm())
        return moved / size if size else math.inf if moved else 0.0

    def moved(self, rows: Tensor, free: Tensor) -> Point:
        """The point with new flat rows (d1, d0) where z_i ≠ 0, and new b."""
        live = self.output != 0
        hidden = torch.where(live[:, None], rows / torch.where(live, self.output, 1.0)[:, None], self.hidden)
        return Point(hidden, self.output, free)


@dataclass(frozen=True)
class Units:
    """Units of measure of a problem and a point: w_i in units of 1/rows_i, x in 2^inputs, y in 2^targets.

    They make z_i about 1 in size, so that w_i has about the size of w̃_i.

    Attributes:
        inputs: exponent.
        targets: exponent.
        rows: powers of two, (d1,).
    """

    inputs: int
    targets: int
    rows: Tensor

    @classmethod
    def of(cls, point: Point, inputs: int, targets: int) -> Units:
        """The units of a point, for a problem whose exponents are known."""
        outputs = row_powers(times_power(point.output, inputs - targets)[:, None])
        return cls(inputs, targets, torch.where(point.output == 0, row_powers(point.hidden), 1 / outputs))

    @property
    def _flat(self) -> int:
        """The exponent of w̃ and b, which turn inputs into targets."""
        return self.targets - self.inputs

    def scaled(self, point: Point) -> Point:
        """A point in these units, from one in the caller's scale."""
        output = times_power(point.output / self.rows, -self._flat)
        return Point(point.hidden * self.rows[:, None], output, times_power(point.free, -self._flat))

    def unscaled(self, point: Point) -> Point:
        """A point in the caller's scale, from one in these units."""
        output = times_power(point.output, self._flat) * self.rows
        return Point(point.hidden / self.rows[:, None], output, times_power(point.free, self._flat))

    def preactivations(self, scaled: Tensor) -> Tensor:
        """w_i·x_n, (N, d1), in the caller's scale, from those in these units."""
        return times_power(scaled / self.rows, self.inputs)

    def predictions(self, scaled: Tensor) -> Tensor:
        """Targets, predictions or errors in the caller's scale, from those in these units."""
        return times_power(scaled, self.targets)

    def squares(self, scaled: float) -> float:
        """A squared error in the caller's scale, from one in these units."""
        return scaled * 2.0**self.targets * 2.0**self.targets


def in_units(problem: Problem) -> tuple[Problem, int, int]:
    """A problem in units that make its inputs and targets about 1 in size, and the exponents of both units."""
    sizes = torch.stack([problem.inputs.abs().max(), problem.targets.abs().max()])
    inputs, targets = (unit_exponent(size) for size in problem.process_group.max(sizes).tolist())
    scaled = replace(
        problem,
        inputs=times_power(problem.inputs, -inputs),
        targets=times_power(problem.targets, -targets),
        free=times_power(problem.free, -inputs),
    )
    return scaled, inputs, targets


@dataclass(frozen=True)
class Outputs:
    """Outputs and errors of a point on the samples.

    Attributes:
        preactivations: u_ni = w_i·x_n, (N, d1).
        errors: e = y − ŷ, (N,).
        bounds: bounds on the rounding error of each e_n, (N,).
        uncertainty: bounds on the rounding errors of the pre-activations, (N, d1).
        idle: samples with no unit active but those on the given kinks, so that ŷ_n is exactly 0 there, bool (N,).
    """

    preactivations: Tensor
    errors: Tensor
    bounds: Tensor
    uncertainty: Tensor
    idle: Tensor


@dataclass(frozen=True)
class Problem:
    """A training set and a slope.

    Attributes:
        inputs: X, (N, d0).
        targets: y, (N,).
        slope: ρ.
        free: columns whose coefficients no kink depends on, (N, f).
        process_group: the processes that have the other samples.
    """

    inputs: Tensor
    targets: Tensor
    slope: float
    free: Tensor
    process_group: ProcessGroup = field(default_factory=ProcessGroup)

    @cached_property
    def norms(self) -> Tensor:
        """‖x_n‖, (N,)."""
        norms: Tensor = self.inputs.norm(dim=1)
        return norms

    @cached_property
    def num_samples(self) -> int:
        """N, over all processes."""
        return self.process_group.total(self.inputs.shape[0], self.inputs.device)

    def slopes(self, active: Tensor) -> Tensor:
        """A of an activation pattern, (N, d1)."""
        return active.to(torch.float64) * (1 - self.slope) + self.slope

    def map(self, active: Tensor, live: Tensor | None = None, bases: dict[int, Tensor] | None = None) -> FaceMap:
        """The linear map of a pattern, restricted to a face."""
        return FaceMap(self.inputs, self.slopes(active), self.free, live, bases or {}, self.process_group)

    def outputs(self, point: Point, kinks: Tensor | None = None) -> Outputs:
        """Evaluate a point.

        The rounding error of e_n is at most γ (|y_n| + ‖x_n‖ Σ_i s_ni |z_i| ‖w_i‖ + Σ_j |c_nj b_j|), where γ is
        d0 + d1 + f + 7 unit roundoffs: each weight is rounded once, and the rest comes from the inner products. s_ni is
        the size of the slope: the output of an inactive ReLU is exactly 0 in floats, for any pre-activation.

        Args:
            point: the weights.
            kinks: pairs that are constrained to their kink, bool (N, d1).
        """
        preactivations = self.inputs @ point.hidden.T
        sizes = point.sizes
        uncertainty = self.norms[:, None] * ((point.hidden.shape[1] + 4) * tolerances.UNIT_ROUNDOFF * sizes)
        activated = torch.where(preactivations > 0, preactivations, self.slope * preactivations)
        steepness = torch.full_like(uncertainty, max(1.0, abs(self.slope)))
        steepness.masked_fill_(preactivations > uncertainty, 1.0).masked_fill_(
            preactivations < -uncertainty, abs(self.slope)
        )
        weights = point.output.abs() * sizes
        errors = self.targets - activated @ point.output - self.free @ point.free
        terms = (steepness @ weights) * self.norms + self.free.abs() @ point.free.abs()
        gamma = (sum(point.hidden.shape) + self.free.shape[1] + 7) * tolerances.UNIT_ROUNDOFF
        bounds = torch.where(terms > 0, gamma * (self.targets.abs() + terms), 0.0)
        idle = terms == 0
        if kinks is not None:
            on_kink = kinks & (preactivations.abs() <= tolerances.MAX_KINK_ROUNDINGS * uncertainty)
            bounds = bounds + tolerances.MAX_KINK_ROUNDINGS * ((on_kink * steepness * uncertainty) @ point.output.abs())
            idle = steepness.masked_fill_(on_kink, 0.0) @ weights == 0
        if self.free.shape[1]:
            idle = torch.zeros_like(idle)
        return Outputs(preactivations, errors, bounds, uncertainty, idle)

    def is_zero(self, outputs: Outputs) -> bool:
        """Whether e = 0 up to rounding, and the rounding is small relative to the targets.

        The second condition is needed because the rounding errors of large weights hide any error.
        """
        sizes = self.process_group.sum(torch.stack([outputs.bounds.square().sum(), self.targets.square().sum()]))
        fits = self.process_group.min((outputs.errors.abs() <= outputs.bounds).all().long())
        bounds, targets, fit = fetched(*sizes, fits)
        return bool(fit) and bounds <= tolerances.MAX_ROUNDING_PER_TARGET**2 * targets

    def squared_error(self, errors: Tensor) -> float:
        """‖e‖² over all samples."""
        return float(self.process_group.sum(errors.square().sum()))

    def rise(self, before: Outputs, after: Outputs) -> tuple[float, float]:
        """By how much ‖e‖² rises, computed without cancellation of two sums, and the bound on its rounding error."""
        change = after.errors - before.errors
        doubt = before.bounds + after.bounds
        size = before.errors.abs() + after.errors.abs()
        terms = torch.stack([(change * (before.errors + after.errors)).sum(), (doubt * (2 * size + doubt)).sum()])
        rise, uncertainty = self.process_group.sum(terms).tolist()
        return rise, uncertainty
