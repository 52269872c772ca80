"""Optimality test: classify the nearest least-squares solution of a region, or of a face of it.

Shapes: N samples (of this process), d0 inputs, d1 hidden units, f free columns; one network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.kink_multipliers import check_multipliers
from lightning_mnn.landscape.minima.stationary_point import FaceSolution, bases_of_kinks, solve_on_face
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.minima.problem import Problem


_SAMPLES_PER_BLOCK = 4096  # samples per block

_MAX_MATRIX_ENTRIES = 5_000_000  # samples times parameters, for the dense matrix of that step


class Direction(NamedTuple):
    """A move of the weights that lowers the loss.

    Attributes:
        hidden_weights: (d1, d0).
        output_weights: (d1,).
    """

    hidden_weights: Tensor
    output_weights: Tensor


@dataclass(frozen=True)
class Optimality:
    """Outcome of the optimality test of a point.

    Attributes:
        kind: a minimum, a saddle, or ``not_stationary`` where floats prove neither.
        because: the fact that decided.
        direction: for a saddle, a move that lowers the loss.
        release: (sample, unit, side) of a kink to drop: the loss falls as the point leaves it to that side.
        ends: (sample, unit, side) of degenerate kinks, with a multiplier at the end of its interval; given only where
            nothing else is undecided.
        unclear: pairs off the active kinks that are within rounding of their kink, bool (N, d1); given where they leave
            the point undecided.
    """

    kind: Kind
    because: Reason
    direction: Direction | None = None
    release: tuple[int, int, int] | None = None
    ends: tuple[tuple[int, int, int], ...] = ()
    unclear: Tensor | None = None


def check_optimality(problem: Problem, found: FaceSolution) -> Optimality:
    """Classify the weights of a solution on a face.

    They are a local minimum if they lie in their region (or on their face), G e = 0 there, the multipliers of the kinks
    are inside their intervals, and the force on units with z_i = 0 is zero. Equalities are tested up to their
    rounding-error bound; where a sign decides, the number must exceed its bound.
    """
    if not found.solution.finished or found.solution.too_long:
        return Optimality(Kind.NOT_STATIONARY, _reason_unsolved(found))
    flips, doubts, off, unclear = _signs(problem, found)
    if problem.is_zero(found.outputs):  # a minimum in any region
        kind = Kind.KINK_MINIMUM if doubts or found.kinks is not None else Kind.DIFFERENTIABLE_MINIMUM
        return Optimality(kind, Reason.of(ReasonCode.ZERO_ERROR))
    if flips:
        return _undecided(ReasonCode.OUTSIDE_REGION, flips=flips)
    if doubts:
        return replace(_undecided(ReasonCode.PREACTIVATIONS_WITHIN_ROUNDING, count=doubts), unclear=unclear)
    if off:
        return _undecided(ReasonCode.KINKS_DEPENDENT, count=off)
    return _check_forces(problem, found) or _check_units(problem, found)


def _reason_unsolved(found: FaceSolution) -> Reason:
    """The reason why there is no solution to test."""
    method = found.solution.method
    if found.solution.too_long:
        return Reason.of(ReasonCode.NO_POINT_WITHIN_DISTANCE, distance=found.distance, method=method)
    left = float(found.face.project(found.forces).norm())
    return Reason.of(ReasonCode.LEAST_SQUARES_UNSOLVED, method=method, left=left)


def _check_forces(problem: Problem, found: FaceSolution) -> Optimality | None:
    """None if G e = 0 on the face up to rounding, for the units that may move; otherwise why it is undecided."""
    size_of_e = problem.squared_error(found.outputs.errors) ** 0.5
    squares = problem.process_group.sum((found.face.slopes * problem.norms[:, None]).square().sum(0))
    hidden = found.noise[:-1] > tolerances.MAX_ROUNDING_PER_RESIDUAL * size_of_e * squares.sqrt()
    if not found.drift <= tolerances.MAX_ROUNDING_PER_RESIDUAL * size_of_e or bool(hidden[squares > 0].any()):
        return _undecided(ReasonCode.ROUNDING_HIDES_GRADIENT)
    gradient = found.face.project(found.forces)
    size = found.point.hidden.numel()
    rows = gradient[:size].reshape(found.point.hidden.shape).norm(dim=1)
    nonzero = (rows > found.noise[:-1]) & (found.point.output != 0)
    if bool(nonzero.any()) or float(gradient[size:].norm()) > float(found.noise[-1]):
        return _undecided(ReasonCode.GRADIENT_NOT_ZERO, method=found.solution.method)
    if _has_nonzero_entry(problem, found):
        return _undecided(ReasonCode.UNEVEN_INPUTS)
    return None


def _has_nonzero_entry(problem: Problem, found: FaceSolution) -> bool:
    """Whether one entry of G e, of a unit without kinks, exceeds the bound on the rounding error of that entry alone.

    If one input is tiny for all active samples, its entry is lost in the norm of G e, although a long move along this
    input may still lower the loss.
    """
    coefficients, outputs = found.face.slopes.abs(), found.outputs
    spread = (problem.num_samples + 2) * tolerances.UNIT_ROUNDOFF * outputs.errors.abs() + outputs.bounds
    noise = torch.zeros_like(found.rows)
    for start in range(0, len(spread), _SAMPLES_PER_BLOCK):  # memory need not hold a second training set
        part = slice(start, start + _SAMPLES_PER_BLOCK)
        noise += coefficients[part].T @ (problem.inputs[part].abs() * spread[part, None])
    free = found.point.output != 0
    if found.kinks is not None:
        free &= problem.process_group.max(found.kinks.any(0).long()) == 0
    return bool(((found.rows.abs() > problem.process_group.sum(noise)) & free[:, None]).any())


def _check_units(problem: Problem, found: FaceSolution) -> Optimality:
    """Test the kinks of each unit, and the forces on units with z_i = 0."""
    failures = []
    outputs = found.point.output.tolist()
    kinked = [0] * len(outputs)
    if found.kinks is not None:
        kinked = problem.process_group.max(found.kinks.any(0).long()).tolist()
    for unit, output in enumerate(outputs):
        safe_point()
        kinks = found.kinks[:, unit] if found.kinks is not None and kinked[unit] else None
        if output == 0:
            optimality = _check_inactive_unit(problem, found, unit, kinks)
        else:
            optimality = None if kinks is None else _check_unit_kinks(problem, found, unit, kinks)
        if optimality is not None:
            failures.append(optimality)
    if not failures:
        return _certified(found)
    moving = [failure for failure in failures if failure.kind is not Kind.SADDLE and not failure.ends]
    saddles = [failure for failure in failures if failure.kind is Kind.SADDLE]
    worst = min(moving or saddles or failures, key=lambda failure: not failure.release)
    return replace(worst, ends=sum((failure.ends for failure in failures), ())) if worst.ends else worst


def _certified(found: FaceSolution) -> Optimality:
    method = found.solution.method
    if found.kinks is None:
        return Optimality(Kind.DIFFERENTIABLE_MINIMUM, Reason.of(ReasonCode.CERTIFIED, method=method))
    return Optimality(Kind.KINK_MINIMUM, Reason.of(ReasonCode.CERTIFIED_ON_KINKS, method=method))


def _undecided(code: ReasonCode, *facts: Reason, **values: Any) -> Optimality:
    return Optimality(Kind.NOT_STATIONARY, Reason.of(code, *facts, **values))


def _signs(problem: Problem, found: FaceSolution) -> tuple[int, int, int, Tensor]:
    """Count the pre-activations whose sign contradicts the pattern or the kinks.

    Returns:
        Off the active kinks: how many changed their sign, and how many may have changed it up to rounding; on the
        active kinks: how many left their kink; and which pairs the second count is of, bool (N, d1).
    """
    point, u, uncertainty = found.point, found.outputs.preactivations, found.outputs.uncertainty
    live = point.output != 0
    drift = torch.where(live, found.error / torch.where(live, point.output.abs(), 1.0), 0.0)
    counted = (problem.norms > 0)[:, None]
    if found.kinks is not None:
        counted = counted & ~found.kinks
    flipped = counted & ((u > 0) != found.active) & (u.abs() > uncertainty)
    unclear = counted & ~flipped & ~(u.abs() > uncertainty + problem.norms[:, None] * drift)
    off = torch.zeros_like(unclear)
    if found.kinks is not None:
        off = found.kinks & (u.abs() > tolerances.MAX_KINK_ROUNDINGS * uncertainty)
    flips, doubts, left = problem.process_group.sum(torch.stack([flipped.sum(), unclear.sum(), off.sum()])).tolist()
    return int(flips), int(doubts), int(left), unclear


def _check_unit_kinks(problem: Problem, found: FaceSolution, unit: int, kinks: Tensor) -> Optimality | None:
    """Test a unit with z_i ≠ 0 on kinks: None if no step off them lowers the loss."""
    inputs = problem.process_group.join(problem.inputs[kinks])
    errors = problem.process_group.join(_residuals(problem, found)[kinks])
    square = problem.process_group.sum((found.face.slopes[:, unit] * problem.norms).square().sum())
    verdict = check_multipliers(
        inputs.cpu().numpy(),
        errors.cpu().numpy(),
        found.rows[unit].cpu().numpy(),
        float(found.point.output[unit]),
        problem.slope,
        float(found.noise[unit]) + float(square) ** 0.5 * found.drift,
        uncertainty=problem.process_group.join(_uncertainty(found)[kinks]).cpu().numpy(),
    )
    if verdict.holds:
        return None
    samples = problem.process_group.join(kinks).nonzero()[:, 0].tolist()
    because = Reason.of(verdict.reason_code, unit=unit, upward=verdict.upward)
    if verdict.holds is None:
        ends = tuple((samples[position], unit, side) for position, side in verdict.ends)
        return Optimality(Kind.NOT_STATIONARY, because, ends=ends)
    release = None if verdict.worst is None else (samples[verdict.worst[0]], unit, verdict.worst[1])
    step = torch.as_tensor(verdict.step, dtype=torch.float64, device=problem.inputs.device)
    direction = _descent(problem, found, unit, step, turn=0.0)
    if direction is None:
        return replace(_undecided(ReasonCode.FALL_WITHIN_ROUNDING, because), release=release)
    kind = Kind.SADDLE if verdict.stationary else Kind.NOT_STATIONARY
    return Optimality(kind, because, direction, release)


def _uncertainty(found: FaceSolution) -> Tensor:
    """Bounds on the distance of each e_n from that of the exact solution; 0 for idle samples, which have e_n = y_n."""
    return torch.where(found.outputs.idle, 0.0, found.outputs.bounds + found.drift)


def _residuals(problem: Problem, found: FaceSolution) -> Tensor:
    """The residual on the face; y_n for idle samples, whose predictions are only rounding errors on kinks."""
    return torch.where(found.outputs.idle, problem.targets, found.outputs.errors)


def _check_inactive_unit(problem: Problem, found: FaceSolution, unit: int, kinks: Tensor | None) -> Optimality | None:
    """Test a unit with z_i = 0: None if the force on it is zero; otherwise a saddle if its gradient vanishes."""
    noise = float(found.noise[unit])
    force = found.rows[unit]
    steps = force[None]
    if kinks is not None:
        inputs, errors = (
            problem.process_group.join(problem.inputs[kinks]),
            problem.process_group.join(_residuals(problem, found)[kinks]),
        )
        uncertainty = float(problem.process_group.join(found.outputs.bounds[kinks]).max())
        exact = not bool(problem.process_group.join(_uncertainty(found)[kinks]).any())
        if float(force.norm()) <= noise and exact and not bool(errors.any()):
            return None
        inverse = torch.linalg.pinv(inputs)
        steps = torch.cat([force[None], inverse.T, -inverse.T, inputs, -inputs])
        moves = steps @ inputs.T
        pulls = steps @ force + torch.where(moves > 0, moves, problem.slope * moves) @ errors
        best = int((pulls.abs() / steps.norm(dim=1).clamp(min=torch.finfo(pulls.dtype).tiny)).argmax())
        step, pull = steps[best], float(pulls[best])
        noise = noise + uncertainty * float(inputs.norm())
    elif float(force.norm()) <= noise:
        return None
    else:
        step, pull = force, float(force @ force)
    if abs(pull) <= noise * float(step.norm()):
        return _undecided(ReasonCode.INACTIVE_UNIT_UNDECIDED, unit=unit)
    slope = float(
        problem.process_group.sum(
            (_activated(found.outputs.preactivations[:, unit], problem.slope) * found.outputs.errors).sum()
        )
    )
    allowed = noise * float(found.point.hidden[unit].norm())
    if abs(slope) > allowed:
        return _undecided(ReasonCode.GRADIENT_ON_INACTIVE_UNIT, unit=unit)
    because = Reason.of(ReasonCode.FORCE_ON_INACTIVE_UNIT, unit=unit)
    direction = _descent(problem, found, unit, step, turn=math.copysign(1.0, pull))
    if direction is None:
        return _undecided(ReasonCode.FALL_WITHIN_ROUNDING, because)
    return Optimality(Kind.SADDLE, because, direction)


def _activated(u: Tensor, slope: float) -> Tensor:
    return torch.where(u > 0, u, slope * u)


def _descent(problem: Problem, found: FaceSolution, unit: int, step: Tensor, turn: float) -> Direction | None:
    """A move of one unit that lowers the loss by more than rounding; None if there is none.

    The move is along a step of the unit's weights and, with the sign ``turn``, of z. It ends where the loss along it is
    smallest, or half-way to the next kink, whichever comes first.
    """
    point, outputs = found.point, found.outputs
    u, moves = outputs.preactivations[:, unit], problem.inputs @ step
    if found.kinks is not None:
        u = torch.where(found.kinks[:, unit], 0.0, u)
    ahead = torch.where((u != 0) & (moves != 0), (u / moves).abs(), torch.inf)
    reach = 0.5 * float(problem.process_group.min(ahead.amin() if len(ahead) else ahead.new_tensor(torch.inf)))
    size = float(point.hidden[unit].norm()) / float(step.norm())
    reach = min(reach, size if size > 0 else 1 / float(step.norm()))
    rest, z = _activated(u, problem.slope), float(point.output[unit])
    after = _activated(u + reach * moves, problem.slope)
    if turn:
        pull, square = problem.process_group.sum(
            torch.stack([outputs.errors @ after, after @ after + rest @ rest])
        ).tolist()
        turn = abs(pull) / square * turn if square else 0.0
    change = z * (after - rest) + turn * after
    if not turn:  # the loss along the step is a parabola: go to its vertex
        pull, square = problem.process_group.sum(torch.stack([outputs.errors @ change, change @ change])).tolist()
        share = min(1.0, pull / square) if square else 0.0
        reach, change = share * reach, share * change
    gained = problem.process_group.sum((change * (2 * outputs.errors - change)).sum())
    count = (problem.num_samples + 10) * tolerances.UNIT_ROUNDOFF
    uncertainty = problem.process_group.sum(
        (change.abs() * (2 * outputs.bounds + count * (outputs.errors.abs() + change.abs()))).sum()
    )
    if not float(gained) > float(uncertainty):
        return None
    hidden, output = torch.zeros_like(point.hidden), torch.zeros_like(point.output)
    hidden[unit], output[unit] = reach * step, turn
    return Direction(hidden, output)


def leave_kinks(
    problem: Problem, found: FaceSolution, optimality: Optimality
) -> tuple[Optimality, FaceSolution] | None:
    """Leave degenerate kinks along the set of solutions, and test the optimality again; None where that is impossible.

    The usual case is two units with the same pattern and opposite z: their rows may move together without a change of
    the predictions. The step is the one that leaves all degenerate kinks fastest (a linear program), at most half the
    way to the next kink.
    """
    assert found.kinks is not None  # noqa: S101 (ends are kinks)
    process_group = problem.process_group
    if problem.num_samples * found.point.theta.numel() > _MAX_MATRIX_ENTRIES or not bool(found.point.output.any()):
        return None
    width = len(found.point.output)
    dropped = _pairs(problem, width, optimality.ends)
    positive = _pairs(problem, width, tuple(end for end in optimality.ends if end[2] > 0))
    active, kinks = torch.where(dropped, positive, found.active), found.kinks & ~dropped
    remaining = kinks if bool(process_group.max(kinks.any().long())) else None
    live = found.point.output != 0
    bases = {} if remaining is None else bases_of_kinks(problem, remaining)
    face = problem.map(active, None if bool(live.all()) else live, bases)
    _, values, right = torch.linalg.svd(process_group.join(face.dense()), full_matrices=True)
    rank = int((values > tolerances.MAX_ZERO_SINGULAR_RATIO * values[0]).sum())
    null_space = face.project(right[rank:])  # rows: moves on the face that change no prediction
    outward = torch.zeros(len(optimality.ends), face.num_parameters, dtype=torch.float64)
    dim, inputs = found.point.hidden.shape[1], process_group.join(problem.inputs)
    for row, (sample, unit, side) in enumerate(optimality.ends):
        sign = side * float(found.point.output[unit].sign())
        outward[row, unit * dim : (unit + 1) * dim] = (sign * inputs[sample] / inputs[sample].norm()).cpu()
    rates = (outward @ null_space.T.cpu()).numpy()
    if not rates.size:
        return None
    count = rates.shape[1]
    best = linprog(
        c=np.r_[np.zeros(count), -1.0],
        A_ub=np.c_[-rates, np.ones(len(rates))],
        b_ub=np.zeros(len(rates)),
        bounds=[(-1, 1)] * count + [(None, 1)],
        method="highs",
    )
    if best.x is None or (rates @ best.x[:-1]).min() <= tolerances.MIN_KINK_EXIT_RATE:
        return None
    move = torch.as_tensor(best.x[:-1], device=null_space.device) @ null_space
    theta = found.point.theta
    size = theta.numel() - found.point.free.numel()
    rows = _row_space_part(inputs, move[:size].reshape(found.point.hidden.shape))
    move = torch.cat([rows.reshape(-1), move[size:]])
    rates_of_u = torch.where(live, 1 / torch.where(live, found.point.output, 1.0), 0.0) * (problem.inputs @ rows.T)
    unmoved = found.kinks | (rates_of_u == 0)
    ahead = torch.where(unmoved, torch.inf, (found.outputs.preactivations / rates_of_u).abs())
    share = min(
        0.5 * float(process_group.min(ahead.min())),
        tolerances.MAX_KINK_EXIT_RATIO * float(theta.norm()) / float(move.norm()),
    )
    theta = theta + share * move
    near = found.point.moved(theta[:size].reshape(rows.shape), theta[size:])
    again = solve_on_face(problem, near, active, remaining)
    again = replace(again, start=found.start)
    return check_optimality(problem, again), again


def _row_space_part(inputs: Tensor, rows: Tensor) -> Tensor:
    """The parts of rows in the span of the inputs: the rest changes no pre-activation."""
    _, values, right = torch.linalg.svd(inputs, full_matrices=False)
    span: Tensor = right[values > tolerances.MAX_ZERO_SINGULAR_RATIO * values[0]]
    return rows @ span.T @ span


def _pairs(problem: Problem, width: int, pairs: tuple[tuple[int, int, int], ...]) -> Tensor:
    """This process's part of a bool (N, d1) that is true at the given (sample, unit, …)."""
    marked = torch.zeros(problem.num_samples, width, dtype=torch.bool, device=problem.inputs.device)
    for sample, unit, _ in pairs:
        marked[sample, unit] = True
    return problem.process_group.local_part(marked)
