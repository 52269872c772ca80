"""Polish: from any weights to an exact local minimum, by Gauss–Newton steps that account for every kink they cross.

Shapes: N samples, d0 inputs, d1 hidden units, ``...`` leading axes (replicas).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.certificate import (
    Case,
    Certificate,
    certificate_of,
    label_thresholds,
    search,
    split_replicas,
    turn_inactive_units,
)
from lightning_mnn.landscape.minima.optimality import Direction, Optimality, check_optimality, leave_kinks
from lightning_mnn.landscape.minima.problem import Outputs, Point, Problem
from lightning_mnn.landscape.minima.stationary_point import FaceSolution, solve_on_face
from lightning_mnn.landscape.regions.least_squares import MAX_GRAM_ROWS
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.utilities.distributed import ProcessGroup

_MAX_FAST_LOSS_RATIO = 0.7  # a step after which more than this fraction of the loss is left ends the first phase


@dataclass(frozen=True)
class Polished:
    """The result of polishing.

    Attributes:
        certificate: certificate of the minimum that was reached, with its distance from the start; otherwise of the
            last weights (a saddle or ``not_stationary``), with the distance from these weights.
        moved: whether the distance from the start exceeds ``max_distance``.
        distance: ‖W̃* − W̃‖/‖W̃‖ of the last weights from the start.
        steps: number of Gauss–Newton steps.
        losses: MSE at the start and after each step; it never rises.
    """

    certificate: Certificate
    moved: bool
    distance: float
    steps: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class _State:
    """Weights during the search, with their pattern and the active set of kinks that they are constrained to."""

    point: Point
    outputs: Outputs
    active: Tensor
    kinks: Tensor | None


def polish(
    hidden_weights: Tensor,
    output_weights: Tensor,
    inputs: Tensor,
    targets: Tensor,
    negative_slope: float = 0.0,
    *,
    threshold: float | None = None,
    max_distance: float = math.inf,
    max_steps: int | None = None,
    hidden_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Polished | list[Polished]:
    """Go from the weights of a two-layer network to an exact local minimum of ‖y − ŷ‖²/N without raising the loss.

    Each step goes towards the nearest least-squares solution of the region (or of the face of the active set of kinks),
    up to the point with the smallest loss on this ray. The loss on a ray is a piecewise parabola, whose global minimum
    is found exactly. As long as the steps reduce the loss quickly, nothing else is needed: from random weights of an
    over-parameterised network a few steps lead to zero error. After that, kinks form an active set: a step that ends on
    a kink adds it, and at the solution of a face the kink whose multiplier is furthest outside its interval is dropped.
    This is the active-set method of quadratic programming, continued from region to region. At saddles and degenerate
    kinks the step is along the descent direction of the optimality test. Output weights keep their values, except for
    z_i = 0 of a saddle.

    Args:
        hidden_weights: W, (d1, d0), or (R, d1, d0).
        output_weights: z, (d1,), or (R, d1).
        inputs: X, (N, d0), shared by the replicas or (R, N, d0).
        targets: y, (N,), shared or (R, N).
        negative_slope: ρ, any real but 1.
        threshold: decision threshold of the MCE; None: inferred from the labels.
        max_distance: ‖W̃* − W̃‖/‖W̃‖ beyond which the minimum counts as another one (``moved``). The search is given up
            at a hundred times this distance from the start.
        max_steps: largest number of steps; None: 1,000, or 10 where the Gram matrix is too large and each step is an
            iterative solution.
        hidden_bias: (d1,) or (R, d1).
        output_bias: a scalar tensor, or (R,).
        process_group: the processes that have the other samples; None: this process has all samples.

    Returns:
        The result; with a leading replica axis a list of R.

    Raises:
        ValueError: as :func:`~lightning_mnn.landscape.minima.certificate.certify` does.

    >>> torch.manual_seed(0) and None
    >>> x, y = torch.randn(30, 10), torch.randint(2, (30,))
    >>> polished = polish(torch.randn(10, 10), torch.randn(10), x, y)
    >>> polished.certificate.is_minimum, polished.certificate.zero_error, polished.steps < 20
    (True, True, True)
    """
    if not max_distance >= 0:
        raise ValueError(f"max_distance must be at least 0, got {max_distance}")
    if max_steps is not None and max_steps < 0:
        raise ValueError(f"max_steps must be at least 0, got {max_steps}")
    if max_steps is None and min(inputs.ndim, hidden_weights.ndim) > 1:
        samples, parameters = inputs.shape[-2], hidden_weights.shape[-2] * hidden_weights.shape[-1]
        max_steps = 1000 if min(samples, parameters) <= MAX_GRAM_ROWS else 10
    cases = split_replicas(
        hidden_weights,
        output_weights,
        inputs,
        targets,
        negative_slope,
        hidden_bias=hidden_bias,
        output_bias=output_bias,
        process_group=process_group,
    )
    biased = hidden_bias is not None
    found = [
        _polish(case, label_threshold, max_distance, max_steps or 0, biased=biased)
        for case, label_threshold in zip(cases, label_thresholds(cases, threshold), strict=True)
    ]
    return found if hidden_weights.ndim > 2 else found[0]


def _polish(case: Case, threshold: float | None, max_distance: float, max_steps: int, *, biased: bool) -> Polished:
    problem, start, units = case
    optimality, found = search(problem, start, max_distance)
    state = _state(problem, found.start, None)  # its negligible output weights are zero
    losses = [problem.squared_error(state.outputs.errors)]
    use_active_set = False  # the first phase ignores kinks
    while not optimality.kind.is_minimum and len(losses) <= max_steps:
        safe_point()
        found = turn_inactive_units(problem, solve_on_face(problem, state.point, state.active, state.kinks), 0.0)
        optimality = check_optimality(problem, found)
        if optimality.ends:
            optimality, found = leave_kinks(problem, found, optimality) or (optimality, found)
        following = None
        if optimality.kind.is_minimum:
            rise, uncertainty = problem.rise(state.outputs, found.outputs)
            following = _state(problem, found.point, None) if rise <= uncertainty else None
            if following is None:
                because = Reason.of(ReasonCode.HIGHER_LOSS, kind=optimality.kind)
                optimality = Optimality(Kind.NOT_STATIONARY, because)
        following = following or _next(problem, state, found, optimality, use_active_set=use_active_set)
        if following is None:
            break
        state = following
        losses.append(min(losses[-1], problem.squared_error(state.outputs.errors)))  # min: rounding of the sums
        use_active_set = use_active_set or not losses[-1] < _MAX_FAST_LOSS_RATIO * losses[-2]
        if start.distance(state.point) > tolerances.MAX_POLISH_EXCURSION * max_distance:
            break
    if not optimality.kind.is_minimum:  # test the last weights: the result above is of those before the last step
        found = solve_on_face(problem, state.point, state.active, state.kinks)
        optimality = check_optimality(problem, found)
        if optimality.kind.is_minimum:
            optimality = Optimality(Kind.NOT_STATIONARY, Reason.of(ReasonCode.STOPPED_BEFORE_MINIMUM))
        elif optimality.kind is Kind.SADDLE and not problem.rise(state.outputs, found.outputs)[0] <= 0:
            optimality = Optimality(Kind.NOT_STATIONARY, Reason.of(ReasonCode.NEXT_TO_SADDLE, optimality.because))
    reached = optimality.kind.is_minimum
    found = replace(found, start=start if reached else state.point)
    certificate = certificate_of(case, optimality, found, found.start, threshold, biased=biased)
    distance = certificate.distance if reached else start.distance(state.point)
    path = tuple(units.squares(loss / problem.num_samples) for loss in losses)
    return Polished(certificate, not distance <= max_distance, distance, len(losses) - 1, path)


def _next(
    problem: Problem, state: _State, found: FaceSolution, optimality: Optimality, *, use_active_set: bool
) -> _State | None:
    """The state after one step: a kink dropped, a descent from a degenerate point, or a step towards a solution."""
    if use_active_set and optimality.release is not None:
        released = _released(problem, state, found, optimality.release)
        if problem.rise(state.outputs, released.outputs)[0] <= 0:
            return released
        stayed = _state(problem, state.point, state.kinks, released.active)  # the solution is higher, by rounding
        return replace(stayed, kinks=released.kinks)
    if use_active_set and optimality.unclear is not None and problem.rise(state.outputs, found.outputs)[0] <= 0:
        kinks = optimality.unclear if found.kinks is None else optimality.unclear | found.kinks
        return _state(problem, found.point, kinks, found.active)
    if use_active_set and optimality.direction is not None:
        descended = _descended(problem, state, found, optimality.direction)
        if problem.rise(state.outputs, descended.outputs)[0] < 0:
            return descended
    return _step(problem, state, found, use_active_set=use_active_set)


def _state(problem: Problem, point: Point, kinks: Tensor | None, active: Tensor | None = None) -> _State:
    """The state at given weights; for pairs in the active set, the side comes from ``active``."""
    outputs = problem.outputs(point)
    side = outputs.preactivations > 0
    if kinks is not None and active is not None:
        side = torch.where(kinks, active, side)
    return _State(point, outputs, side, kinks)


def _released(problem: Problem, state: _State, found: FaceSolution, release: tuple[int, int, int]) -> _State:
    """The solution of a face, with one kink dropped from the active set, to one side."""
    sample, unit, side = release
    assert state.kinks is not None  # noqa: S101 (there was one to release)
    rows = torch.zeros(problem.num_samples, dtype=torch.bool, device=state.active.device)
    rows[sample] = True
    here = torch.zeros_like(state.active)
    here[:, unit] = problem.process_group.local_part(rows)
    kinks = state.kinks & ~here
    any_left = bool(problem.process_group.max(kinks.any().long()))
    active = torch.where(here, torch.full_like(state.active, side > 0), state.active)
    return replace(_state(problem, found.point, state.kinks, active), kinks=kinks if any_left else None)


def _descended(problem: Problem, state: _State, found: FaceSolution, direction: Direction) -> _State:
    """The solution of a face, after a move of one unit that lowers the loss; the kinks of this unit are dropped."""
    point = replace(
        found.point,
        hidden=found.point.hidden + direction.hidden_weights,
        output=found.point.output + direction.output_weights,
    )
    if found.kinks is None:
        return _state(problem, point, None)
    kinks = found.kinks & ~((direction.hidden_weights != 0).any(1) | (direction.output_weights != 0))
    any_left = bool(problem.process_group.max(kinks.any().long()))
    return _state(problem, point, kinks if any_left else None, state.active)


def _step(problem: Problem, state: _State, found: FaceSolution, *, use_active_set: bool) -> _State | None:
    """One step towards a solution, up to the smallest loss on the ray; None where no step lowers the loss."""
    target = replace(found.point, output=state.point.output)
    rows = target.hidden - state.point.hidden
    moves = problem.inputs @ rows.T
    if state.kinks is not None:
        moves = torch.where(state.kinks, 0.0, moves)
    tiny = torch.finfo(torch.float64).tiny
    u = state.outputs.preactivations
    u = torch.where(state.active, u.clamp(min=tiny), u.clamp(max=-tiny))
    shift = problem.free @ (target.free - state.point.free)
    share, gain, crossings = minimum_on_ray(problem, u, moves, state.point.output, state.outputs.errors, shift)
    kinks = state.kinks
    if use_active_set:
        reached = crossings == share
        if not gain > 0:  # blocked at the start, by the first crossing
            first = problem.process_group.min(crossings.min())
            reached = (crossings == first) & torch.isfinite(crossings)
            if not bool(torch.isfinite(first)):  # or by pairs that may be on a kink, up to rounding
                sizes = problem.norms[:, None] * state.point.sizes
                reached = (u.abs() <= tolerances.MAX_UNRESOLVED_SINE * sizes) & (sizes > 0)
                reached = reached if kinks is None else reached & ~kinks
        if bool(problem.process_group.max(reached.any().long())):
            kinks = reached if kinks is None else kinks | reached
        elif not gain > 0:
            return None
    elif not gain > 0:
        share = 0.0
    point = Point(
        state.point.hidden + share * rows, target.output, state.point.free + share * (target.free - state.point.free)
    )
    stepped = _state(problem, point, kinks, state.active)
    if not problem.rise(state.outputs, stepped.outputs)[0] <= 0:  # rounding: keep the weights, add the kinks reached
        return replace(state, kinks=kinks) if kinks is not state.kinks else None if use_active_set else state
    return stepped


def minimum_on_ray(
    problem: Problem, u: Tensor, moves: Tensor, output: Tensor, errors: Tensor, shift: Tensor
) -> tuple[float, float, Tensor]:
    """The exact minimum of the loss on the ray from pre-activations u along moves v.

    The prediction of a sample is piecewise linear on the ray, with a bend where a unit crosses its kink. Half of ‖e‖²
    therefore falls at the rate h(t) = Σ_n e_n(t) p_n(t), with p_n the slope of ŷ_n, linear between crossings. All
    crossings are sorted once.

    Args:
        problem: gives the slope ρ and the process group.
        u: (N, d1), not zero where it moves.
        moves: (N, d1).
        output: z, (d1,).
        errors: e at the start, (N,).
        shift: rate of the predictions from the parameters that no kink depends on, (N,).

    Returns:
        The position t in [0, 1]; the decrease of ‖e‖² there; and the position of each crossing, (N, d1), infinite where
        there is none before 1.
    """
    slope, process_group = problem.slope, problem.process_group
    crossings = torch.where(u * moves < 0, -u / moves, torch.inf)
    crossings = torch.where(crossings < 1, crossings, torch.inf)
    times, order = crossings.sort(dim=1)
    crossed = torch.isfinite(times)
    bends = torch.where(crossed, (output * (1 - slope) * moves.abs()).gather(1, order), 0.0)
    rate = torch.where(u > 0, moves, slope * moves) @ output + shift
    rates = torch.cat([rate[:, None], rate[:, None] + bends.cumsum(1)], dim=1)  # of ŷ_n on each of its pieces
    ends = torch.where(crossed, times, 1.0)
    starts = torch.cat([torch.zeros_like(rate)[:, None], ends[:, :-1]], dim=1)
    errors_there = errors[:, None] - ((ends - starts) * rates[:, :-1]).cumsum(1)  # at each crossing
    pieces = process_group.join(
        torch.stack([times, errors_there * bends, rates[:, 1:].square() - rates[:, :-1].square()], -1)[crossed]
    )
    pieces = pieces[pieces[:, 0].argsort()]
    fall, curvature = process_group.sum(torch.stack([errors @ rate, rate @ rate]))

    def running(start: Tensor, steps: Tensor) -> Tensor:
        return torch.cat([start[None], start + steps.cumsum(0)])

    begin = torch.cat([pieces.new_zeros(1), pieces[:, 0]])
    width = torch.cat([pieces[:, 0], pieces.new_ones(1)]) - begin
    curvatures = running(curvature, pieces[:, 2]).clamp(min=0)
    falls = running(fall, pieces[:, 1]) - running(torch.zeros_like(fall), curvatures * width)[:-1]
    gains = running(torch.zeros_like(fall), falls * width - curvatures * width.square() / 2)[:-1]
    stay = torch.where(curvatures > 0, falls / curvatures, torch.where(falls > 0, torch.inf, 0.0)).clamp(min=0)
    stay = torch.minimum(stay, width)
    totals = gains + falls * stay - curvatures * stay.square() / 2
    end = torch.cat([begin[1:], begin.new_full((1,), torch.inf)])  # the last piece ends at no crossing
    at = torch.where((stay == width) & torch.isfinite(end), end, begin + stay)
    place, total = torch.stack([at, totals]).index_select(1, totals.argmax()[None])[:, 0].tolist()
    return place, 2 * total, crossings
