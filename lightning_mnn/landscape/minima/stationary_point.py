"""The nearest solution of the least-squares problem of a region, or of a face of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.problem import Outputs, Point, Problem
from lightning_mnn.landscape.regions.least_squares import Solution, solve
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.regions.linear_map import FaceMap


@dataclass(frozen=True)
class FaceSolution:
    """Weights that solve the least-squares problem of a region, or of a face of it.

    Attributes:
        start: the weights that the solution was started from.
        point: the weights.
        active: the region's pattern, bool (N, d1).
        kinks: pairs that are constrained to their kink, bool (N, d1); None: no constraint.
        outputs: outputs and errors at the weights.
        face: the linear map.
        solution: the least-squares solution and its method.
        forces: g_i = Σ_n e_n A_ni x_n over the samples off unit i's kink, (d1, d0), then Σ_n e_n c_n, flat.
        noise: bounds on the rounding error of the norms of these, (d1 + 1,).
        error: bound on the distance from the flat weights to the exact solution; infinite where unknown.
        drift: bound on the distance from the residual to that of the exact solution; infinite where unknown.
    """

    start: Point
    point: Point
    active: Tensor
    kinks: Tensor | None
    outputs: Outputs
    face: FaceMap
    solution: Solution
    forces: Tensor
    noise: Tensor
    error: float
    drift: float

    @property
    def move(self) -> Tensor:
        """D = W̃* − W̃ and the move of b, flat."""
        return self.point.theta - self.start.theta

    @property
    def distance(self) -> float:
        """‖W̃* − W̃‖/‖W̃‖."""
        return self.start.distance(self.point)

    @property
    def rows(self) -> Tensor:
        """The forces by unit, (d1, d0)."""
        return self.forces[: self.point.hidden.numel()].reshape(self.point.hidden.shape)


def solve_on_face(
    problem: Problem, start: Point, active: Tensor, kinks: Tensor | None, longest: float = math.inf
) -> FaceSolution:
    """The nearest least-squares solution of the region, on the face where the kinks' pre-activations are zero.

    Rows with z_i = 0 change only as far as needed to lie on their kinks.

    Args:
        problem: the training set.
        start: the weights.
        active: the pattern, bool (N, d1).
        kinks: (sample, unit) pairs that must be on their kink, bool (N, d1).
        longest: ‖W̃* − W̃‖ beyond which an iterative solution stops.
    """
    live = start.output != 0
    bases = {} if kinks is None else bases_of_kinks(problem, kinks)
    if kinks is not None:
        kinks = _spanned(problem, kinks, bases)
    face = problem.map(active, None if bool(live.all()) else live, bases)
    hidden = start.hidden.clone()
    for unit, basis in bases.items():
        for _ in range(2):  # the second pass removes the rounding error of the first
            hidden[unit] -= basis @ (basis.T @ hidden[unit])
        if len(basis) == basis.shape[1]:
            hidden[unit] = 0
    near = Point(hidden, start.output, start.free)
    solution = solve(face, problem.targets - face.predict(near.theta), longest)
    theta = near.theta + solution.theta
    point = near.moved(theta[: hidden.numel()].reshape(hidden.shape), theta[hidden.numel() :])
    outputs = problem.outputs(point, kinks)
    coefficients = face.slopes if kinks is None else torch.where(kinks, 0.0, face.slopes)
    summing = (problem.num_samples + 2) * tolerances.UNIT_ROUNDOFF * outputs.errors.abs()
    forces = replace(face, slopes=coefficients).correlate(outputs.errors)
    noises = [_noise(problem, coefficients, spread) for spread in (summing, summing + outputs.bounds)]
    error, drift = _errors(problem, face, solution, outputs, forces, noises[0])
    return FaceSolution(start, point, active, kinks, outputs, face, solution, forces, noises[1], error, drift)


def _noise(problem: Problem, coefficients: Tensor, spread: Tensor) -> Tensor:
    """Bounds on the error of each force, (d1 + 1,), from errors (N,) of its terms."""
    rows = coefficients.abs().T @ (problem.norms * spread)
    return problem.process_group.sum(torch.cat([rows, (spread @ problem.free.abs()).sum()[None]]))


def bases_of_kinks(problem: Problem, kinks: Tensor) -> dict[int, Tensor]:
    """Orthonormal bases of the inputs on each unit's kink."""
    counts = kinks.sum(0)
    here, everywhere = torch.stack([counts, problem.process_group.sum(counts)]).tolist()
    samples = torch.split(kinks.T.nonzero()[:, 1], here)
    found = {}
    for unit, count in enumerate(everywhere):
        if count:
            inputs = problem.process_group.join(problem.inputs[samples[unit]])
            _, values, right = torch.linalg.svd(inputs / inputs.norm(dim=1, keepdim=True), full_matrices=False)
            found[unit] = right, (values > tolerances.MAX_ZERO_SINGULAR_RATIO * values[0]).sum()
    ranks = fetched(*(rank for _, rank in found.values()))
    return {unit: right[: int(rank)].T for (unit, (right, _)), rank in zip(found.items(), ranks, strict=True)}


def _spanned(problem: Problem, kinks: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """The kinks, with the samples whose inputs lie in the span of the others: their pre-activations are zero too."""
    kinks = kinks.clone()
    for unit, basis in bases.items():
        beyond = (problem.inputs - problem.inputs @ basis @ basis.T).norm(dim=1)
        kinks[:, unit] |= (beyond <= tolerances.MAX_OFF_SPAN_RATIO * problem.norms) & (problem.norms > 0)
    return kinks


def _errors(
    problem: Problem, face: FaceMap, solution: Solution, outputs: Outputs, forces: Tensor, summing: Tensor
) -> tuple[float, float]:
    """Bounds on the distances of the flat weights, and of e, from those of an exact solution of the normal equations.

    With F = U S Vᵀ the distances are ‖S⁻¹ Uᵀ e‖ and ‖Uᵀ e‖. Rounding errors of e itself count in full, those of the
    sums Fᵀ e divided by the smallest singular value.
    """
    live = torch.cat([face.live if face.live is not None else summing.new_ones(len(summing) - 1).bool(),
                      summing.new_ones(1).bool()])  # fmt: skip
    bounds, summed = outputs.bounds.square().sum(), torch.where(live, summing, 0.0).norm()
    left = face.project(forces).norm() + summed
    whole = (outputs.errors.abs() + outputs.bounds).square().sum()
    bounds, whole, left = torch.stack([*problem.process_group.sum(torch.stack([bounds, whole])).sqrt(), left]).tolist()
    if solution.smallest is None:
        return (0.0, bounds) if left == 0 else (math.inf, math.inf)
    drift = bounds + left / solution.smallest
    if solution.onto:
        drift = min(drift, whole)
    return drift / solution.smallest, drift
