"""Is this point a local minimum? First-order tests for any depth, exact certificates for two-layer networks.

Shapes: N samples, d0 inputs, d1 hidden units, ``...`` leading axes (replicas).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.labels import infer_threshold, wrong
from lightning_mnn.landscape.minima.learning_coefficient import rising_directions
from lightning_mnn.landscape.minima.optimality import Direction, Optimality, check_optimality, leave_kinks
from lightning_mnn.landscape.minima.problem import Outputs, Point, Problem, Units, in_units
from lightning_mnn.landscape.minima.stationary_point import FaceSolution, solve_on_face
from lightning_mnn.landscape.regions.least_squares import MAX_GRAM_ROWS
from lightning_mnn.landscape.regions.rank import khatri_rao_rank
from lightning_mnn.landscape.regions.region import gram_rank
from lightning_mnn.utilities.distributed import ProcessGroup
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.verdicts import Kind, Reason, ReasonCode, Reasoned

if TYPE_CHECKING:
    from torch import Tensor


_MAX_KINK_SETS = 4  # sets of kinks that are tried

_MAX_KINKS_PER_SET = 5000  # kinks in one set


@dataclass(frozen=True)
class Certificate(Reasoned):
    """The classification of a point of weight space, proved up to a stated rounding error; see :func:`certify`.

    Attributes:
        kind: kind of the minimum or saddle that was found, or ``not_stationary``.
        because: the fact that decided: ``reason_code`` is its code, ``reason`` its sentence.
        zero_error: whether e = 0 up to ``rounding_bound``: the paper's global minimum.
        mse: ‖e‖²/N of the weights below.
        mce: their fraction of misclassified samples; None where the targets are not two labels.
        distance: ‖W̃* − W̃‖/‖W̃‖ from the given point, with rows w̃_i = z_i w_i and the biases. If the point is not
            stationary, the distance to the nearest stationary point that was tried.
        weight_distance: max_i ‖w*_i − w_i‖/‖w_i‖.
        margin_ratio: min |z_i||w_i·x_n|/|D_i·x_n| with D = W̃* − W̃, off the kinks; None where nothing moves.
        min_preactivation: min |w_i·x_n| off the kinks.
        kinks: number of pre-activations that are zero.
        rank: rank of A∘X in the minimum's region; None where min(N, d0·d1) is above 6,000.
        rank_cap: min(N − #samples that activate no unit, rank A · rank X). The samples are subtracted only if ρ = 0.
        stationarity: ‖G e‖/(‖G‖_F ‖y‖), on the kinks' face.
        rounding_bound: the largest bound on the rounding error of an e_n.
        hidden_weights: W of the minimum or saddle itself, float64 (d1, d0); if there is neither, the given W.
        output_weights: z, float64 (d1,).
        hidden_bias: (d1,), or None without a bias.
        output_bias: scalar, or None without a bias.
        direction: for a saddle, a move of W and z that lowers the loss; so does every fraction of it.
        kink_directions: number of independent directions off the kinks, in which the loss rises linearly; None if this
            is no minimum, or the count does not follow.
        positive_directions: number of directions on the kinks' face in which it rises quadratically; None likewise.
    """

    kind: Kind
    because: Reason
    zero_error: bool
    mse: float
    mce: float | None
    distance: float
    weight_distance: float
    margin_ratio: float | None
    min_preactivation: float
    kinks: int
    rank: int | None
    rank_cap: int
    stationarity: float
    rounding_bound: float
    hidden_weights: Tensor
    output_weights: Tensor
    hidden_bias: Tensor | None = None
    output_bias: Tensor | None = None
    direction: Direction | None = None
    kink_directions: int | None = None
    positive_directions: int | None = None

    @property
    def is_minimum(self) -> bool:
        """Whether the certificate is of a local minimum."""
        return self.kind.is_minimum


def certify(
    hidden_weights: Tensor,
    output_weights: Tensor,
    inputs: Tensor,
    targets: Tensor,
    negative_slope: float = 0.0,
    *,
    threshold: float | None = None,
    max_distance: float = 1e-3,
    hidden_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    input_rank: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Certificate | list[Certificate]:
    """Certify an exact local minimum of ‖y − ŷ‖²/N at the weights of a two-layer network, or near them.

    Inside the region of the weights, the differentiable minima are the solutions of G(y − Gᵀ w̃) = 0. One least-squares
    problem gives the nearest solution. If every pre-activation keeps its sign on the way, the solution is a minimum.
    Otherwise the pre-activations near zero are moved onto their kinks, the problem is solved on that face, and the
    multipliers of the kinks decide. (Theorem: a point is a local minimum if and only if, for every unit, z_i d_i(v) ≤ 0
    for all v where z_i ≠ 0, and d_i = 0 where z_i = 0; d_i(v) = Σ_n e_n A_ni x_n·v, with f(x_n·v) on kinks.)

    The certificate is valid for the float64 weights that it contains, and states their distance from the given weights.
    No sign or zero that it relies on is within its rounding error. A case that floats cannot decide is
    ``not_stationary``, with the reason. Singular values of A∘X below 1e-11 of the largest count as zero. A z_i also
    counts as zero if z_i w_i is lost in the rounding of the other units.

    Args:
        hidden_weights: W, (d1, d0), or (R, d1, d0).
        output_weights: z, (d1,), or (R, d1).
        inputs: X, (N, d0), shared by the replicas or (R, N, d0).
        targets: y, (N,), shared or (R, N).
        negative_slope: ρ, any real but 1.
        threshold: decision threshold of the MCE; None: 0.5 for labels {0, 1}, 0 for ±1, no MCE for other targets.
        max_distance: largest relative distance to the minimum or saddle.
        hidden_bias: (d1,) or (R, d1): the weight of an input of ones.
        output_bias: a scalar tensor, or (R,).
        input_rank: rank of X (with the input of ones), if the caller knows it; None: it is computed.
        process_group: the processes that have the other samples; None: this process has all samples.

    Returns:
        A certificate; with a leading replica axis a list of R.

    Raises:
        ValueError: shapes do not agree, values are not finite, ρ = 1, ``max_distance`` is negative, or all targets are
            1 and there is no threshold.

    >>> x, y = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([0.5, 1.0, 1.0])
    >>> found = certify(torch.tensor([[0.5001]]), torch.tensor([1.0]), x, y)
    >>> found.kind, found.zero_error, round(found.mse, 6), round(float(found.hidden_weights), 9)
    (<Kind.DIFFERENTIABLE_MINIMUM: 'differentiable_minimum'>, False, 0.333333, 0.5)
    """
    if not max_distance >= 0:
        raise ValueError(f"max_distance must be at least 0, got {max_distance}")
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
    found = [
        certificate_of(
            case,
            *search(case.problem, case.point, max_distance),
            case.point,
            label_threshold,
            biased=hidden_bias is not None,
            input_rank=input_rank,
        )
        for case, label_threshold in zip(cases, label_thresholds(cases, threshold), strict=True)
    ]
    return found if hidden_weights.ndim > 2 else found[0]


class Case(NamedTuple):
    """One network on its training set, in units of measure.

    Attributes:
        problem: the training set.
        point: the weights.
        units: the units of measure of both.
    """

    problem: Problem
    point: Point
    units: Units


def label_thresholds(cases: list[Case], threshold: float | None) -> list[float | None]:
    """The decision threshold of each case: the given one, or the one inferred from its labels.

    Raises:
        ValueError: all targets of a case are 1, which fits both labels {0, 1} and ±1.
    """
    if threshold is not None:
        return [threshold for _ in cases]
    return [
        infer_threshold(problem.process_group.join(units.predictions(problem.targets))) for problem, _, units in cases
    ]


def split_replicas(
    hidden_weights: Tensor,
    output_weights: Tensor,
    inputs: Tensor,
    targets: Tensor,
    negative_slope: float,
    *,
    hidden_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> list[Case]:
    """The case of each replica, checked (see :func:`certify` for arguments and errors)."""
    _check(hidden_weights, output_weights, inputs, targets, negative_slope)
    _check_sizes(hidden_weights, inputs, targets)
    _check_biases(output_weights, hidden_bias, output_bias)
    count = hidden_weights.shape[0] if hidden_weights.ndim > 2 else None

    def part(value: Tensor, ndim: int, replica: int) -> Tensor:
        return (value[replica] if count is not None and value.ndim > ndim else value).detach().to(torch.float64)

    split, shared = [], None
    for replica in range(count or 1):
        x, w = part(inputs, 2, replica), part(hidden_weights, 2, replica)
        if hidden_bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            w = torch.cat([w, part(hidden_bias, 1, replica)[:, None]], dim=1)
        free = x.new_ones(len(x), int(output_bias is not None))
        b = x.new_zeros(0) if output_bias is None else part(output_bias, 0, replica).reshape(1)
        if shared is None or inputs.ndim > 2 or targets.ndim > 1:
            shared = in_units(
                Problem(x, part(targets, 1, replica), float(negative_slope), free, process_group or ProcessGroup())
            )
        problem, of_inputs, of_targets = shared
        point = Point(w, part(output_weights, 1, replica), b)
        units = Units.of(point, of_inputs, of_targets)
        split.append(Case(problem, units.scaled(point), units))
    return split


def _check(w: Tensor, z: Tensor, x: Tensor, y: Tensor, slope: float) -> None:
    if slope == 1 or not math.isfinite(slope):
        raise ValueError(f"negative_slope must be a real number other than 1, got {slope}")
    if w.ndim not in (2, 3) or z.shape != w.shape[:-1]:
        raise ValueError(
            f"hidden_weights must be (d1, d0) and output_weights (d1,), or (R, d1, d0) and (R, d1); "
            f"got {tuple(w.shape)} and {tuple(z.shape)}"
        )
    if x.shape[-1] != w.shape[-1] or x.ndim not in (2, w.ndim):
        raise ValueError(f"inputs must be (N, {w.shape[-1]}) for these hidden_weights, got {tuple(x.shape)}")
    if y.shape[-1] != x.shape[-2] or y.ndim not in (1, w.ndim - 1):
        raise ValueError(f"targets must be ({x.shape[-2]},) for these inputs, got {tuple(y.shape)}")
    for name, value in (("hidden_weights", w), ("output_weights", z), ("inputs", x), ("targets", y)):
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite: some are NaN or infinite")


def _check_sizes(w: Tensor, x: Tensor, y: Tensor) -> None:
    if not w.numel():
        raise ValueError(f"hidden_weights must have at least one unit and one input, got the shape {tuple(w.shape)}")
    for name, value, ndim in (("inputs", x, 2), ("targets", y, 1)):
        if value.ndim > ndim and value.shape[0] != w.shape[0]:
            raise ValueError(f"{name} are for {value.shape[0]} replicas and hidden_weights for {w.shape[0]}")
    if x.shape[-2] == 0:
        raise ValueError("inputs must have at least one sample, got none")


def _check_biases(z: Tensor, hidden_bias: Tensor | None, output_bias: Tensor | None) -> None:
    for name, bias, shape in (("hidden_bias", hidden_bias, z.shape), ("output_bias", output_bias, z.shape[:-1])):
        shared = name == "output_bias" and bias is not None and bias.ndim == 0
        if bias is not None and bias.shape != shape and not shared:
            raise ValueError(f"{name} must have the shape {tuple(shape)} for these weights, got {tuple(bias.shape)}")
        if bias is not None and not bool(bias.isfinite().all()):
            raise ValueError(f"{name} must be finite: some are NaN or infinite")


def search(problem: Problem, point: Point, max_distance: float) -> tuple[Optimality, FaceSolution]:
    """The first minimum among the candidates within ``max_distance``; else a saddle; else the nearest one tried."""
    given = problem.outputs(point)
    start = _without_negligible(problem, point, given)
    outputs = given if start is point else problem.outputs(start)
    active = outputs.preactivations > 0
    longest = max_distance * float(start.theta.norm())
    tried = []
    large = min(problem.num_samples, start.theta.numel()) > MAX_GRAM_ROWS
    on_kinks = outputs.preactivations.abs() <= tolerances.MAX_KINK_ROUNDINGS * outputs.uncertainty
    on_kinks &= (problem.norms > 0)[:, None]
    untried: list[Tensor | None] = [on_kinks] if bool(problem.process_group.max(on_kinks.any().long())) else []
    untried.append(None)
    while untried:
        safe_point()
        kinks = untried.pop(0)
        found = solve_on_face(problem, start, active, kinks, longest)
        found = turn_inactive_units(problem, found, max_distance)
        optimality = check_optimality(problem, found)
        if optimality.ends:
            optimality, found = leave_kinks(problem, found, optimality) or (optimality, found)
        optimality, found = _check_distance(problem, given, optimality, found, max_distance)
        if not optimality.kind.is_minimum and problem.is_zero(outputs):  # a minimum, whether or not it is on kinks
            found = replace(found, point=start, outputs=outputs)
            optimality = Optimality(_zero_kind(problem, outputs), Reason.of(ReasonCode.ZERO_ERROR))
        if optimality.kind.is_minimum:
            return optimality, found
        tried.append((optimality, found))
        if kinks is None and large and found.solution.too_long:
            because = optimality.because
            more = replace(because, facts=(*because.facts, Reason.of(ReasonCode.KINKS_NOT_TRIED)))
            return replace(optimality, because=more), found
        if kinks is None:
            untried.extend(_candidate_kinks(problem, start, outputs)[: 1 if large else _MAX_KINK_SETS])
        if optimality.unclear is not None and not large and len(tried) <= _MAX_KINK_SETS:
            untried.insert(0, optimality.unclear if found.kinks is None else optimality.unclear | found.kinks)
    return min(tried, key=lambda pair: (pair[0].kind is not Kind.SADDLE, pair[1].distance))


def _check_distance(
    problem: Problem, given: Outputs, optimality: Optimality, found: FaceSolution, max_distance: float
) -> tuple[Optimality, FaceSolution]:
    """Keep the result only if the point found is near the given one and its loss is no higher."""
    if optimality.kind is Kind.NOT_STATIONARY:
        return optimality, found
    if not _distance(found) <= max_distance:
        because = Reason.of(ReasonCode.TOO_FAR, kind=optimality.kind, distance=_distance(found), limit=max_distance)
        return Optimality(Kind.NOT_STATIONARY, because), found
    rise, uncertainty = problem.rise(given, found.outputs)
    if not rise <= uncertainty:
        return Optimality(Kind.NOT_STATIONARY, Reason.of(ReasonCode.HIGHER_LOSS, kind=optimality.kind)), found
    if rise > 0 and problem.is_zero(given):  # of two exact fits, prefer the given one
        return Optimality(Kind.NOT_STATIONARY, Reason.of(ReasonCode.GIVEN_WEIGHTS_FIT)), found
    return optimality, found


def _zero_kind(problem: Problem, outputs: Outputs) -> Kind:
    """The kind of minimum of weights with zero error."""
    on_kink = (outputs.preactivations.abs() <= outputs.uncertainty) & (problem.norms > 0)[:, None]
    return Kind.KINK_MINIMUM if bool(problem.process_group.max(on_kink.any().long())) else Kind.DIFFERENTIABLE_MINIMUM


def _distance(found: FaceSolution) -> float:
    """Relative distance from the start: the largest of that of the flat weights and those of the rows with z_i = 0."""
    inactive = found.point.output == 0
    moved = (found.point.hidden - found.start.hidden)[inactive].norm(dim=1)
    sizes = found.start.hidden[inactive].norm(dim=1)
    turned = torch.where(moved == 0, 0.0, moved / sizes)
    return max(found.distance, float(turned.max()) if len(turned) else 0.0)


def _without_negligible(problem: Problem, point: Point, outputs: Outputs) -> Point:
    """The point with z_i = 0 where the unit's outputs on the samples are lost in the rounding of the other units."""
    activated = torch.where(outputs.preactivations > 0, 1.0, abs(problem.slope)) * outputs.preactivations.abs()
    sizes = point.output.abs() * problem.process_group.max(activated.amax(0))
    lost = (sizes <= torch.finfo(torch.float64).eps / 2 * sizes.norm()) & (sizes > 0)
    return replace(point, output=torch.where(lost, 0.0, point.output)) if bool(lost.any()) else point


def turn_inactive_units(problem: Problem, found: FaceSolution, max_distance: float) -> FaceSolution:
    """Rotate rows with z_i = 0 and a non-zero force until their gradient vanishes, if a small rotation is enough."""
    point, rows = found.point, found.rows
    hidden = point.hidden.clone()
    inactive = [unit for unit, size in enumerate(point.output.tolist()) if size == 0]
    if not inactive:
        return found
    for unit in inactive:
        force = rows[unit]
        if float(force.norm()) <= float(found.noise[unit]):
            continue
        for _ in range(2):  # the second pass removes the rounding error of the first
            shift = (hidden[unit] @ force) / (force @ force) * force
            if float(shift.norm()) <= max_distance * float(hidden[unit].norm()):
                hidden[unit] -= shift
    if torch.equal(hidden, point.hidden):
        return found
    turned = replace(point, hidden=hidden)
    return replace(found, point=turned, outputs=problem.outputs(turned, found.kinks))


def _candidate_kinks(problem: Problem, point: Point, outputs: Outputs) -> list[Tensor]:
    """Sets of samples near their kinks, separated from the rest by the widest gaps between |w·x|/(‖w‖‖x‖)."""
    sizes = problem.norms[:, None] * point.sizes
    sines = torch.where(sizes > 0, outputs.preactivations.abs() / sizes, torch.inf)
    at_zero = (point.sizes == 0) & (problem.norms > 0)[:, None]  # rows w = 0: all their samples
    near = problem.process_group.join(sines[sines < tolerances.MAX_KINK_SINE]).sort().values
    if not len(near):
        return []
    max_count = min(point.hidden.numel(), _MAX_KINKS_PER_SET)  # more constraints than weights would leave no freedom
    floor = torch.cat([near, near.new_tensor([tolerances.MAX_KINK_SINE])])[: max_count + 1].clamp(
        min=torch.finfo(torch.float64).eps
    )
    ratios = floor[1:] / floor[:-1]
    widest = ratios.sort(descending=True).indices[:_MAX_KINK_SETS].tolist()
    ends = [end for end in widest if float(ratios[end]) >= tolerances.MIN_KINK_GAP_RATIO]
    return [(sines <= near[end]) | at_zero for end in ends]


def certificate_of(
    case: Case,
    optimality: Optimality,
    found: FaceSolution,
    given: Point,
    threshold: float | None,
    *,
    biased: bool,
    input_rank: int | None = None,
) -> Certificate:
    """The certificate of a solution on a face and its optimality, for a search that started at the given weights."""
    problem, _, units = case
    stationary = optimality.kind is not Kind.NOT_STATIONARY
    point = found.point if stationary else given
    outputs = found.outputs if stationary else problem.outputs(given)
    process_group, kinks = problem.process_group, found.kinks if stationary else None
    predictions = units.predictions(problem.targets - outputs.errors)
    mistakes = None if threshold is None else wrong(predictions, units.predictions(problem.targets), threshold)
    u = outputs.preactivations.abs()
    on_kink = (problem.norms > 0)[:, None] & (u <= outputs.uncertainty)
    on_kink = on_kink if kinks is None else on_kink | kinks
    off_kink = torch.where((problem.norms > 0)[:, None] & ~on_kink, units.preactivations(u), torch.inf)
    sizes = given.sizes
    moved = (point.hidden - given.hidden).norm(dim=1)
    active = outputs.preactivations > 0
    rank, cap = _rank(problem, active if kinks is None else torch.where(kinks, found.active, active), input_rank)
    rising, zero_error = None, problem.is_zero(outputs)
    if optimality.kind.is_minimum:
        rising = rising_directions(problem, point, outputs, on_kink, zero_error=zero_error, rank=rank)
    weights = units.unscaled(point)
    width = point.hidden.shape[1] - int(biased)
    return Certificate(
        kind=optimality.kind,
        because=optimality.because,
        zero_error=zero_error,
        mse=units.squares(problem.squared_error(outputs.errors) / problem.num_samples),
        mce=None if mistakes is None else float(process_group.sum(mistakes.sum())) / problem.num_samples,
        distance=_distance(found) if stationary else found.distance,
        weight_distance=float(torch.where(moved == 0, 0.0, moved / sizes).max()),
        margin_ratio=_margin_ratio(problem, found) if stationary else None,
        min_preactivation=float(process_group.min(off_kink.min())),
        kinks=int(process_group.sum(on_kink.sum())),
        rank=rank,
        rank_cap=cap,
        stationarity=_stationarity(problem, found, outputs, stationary=stationary),
        rounding_bound=float(process_group.max(units.predictions(outputs.bounds).max())),
        hidden_weights=weights.hidden[:, :width],
        output_weights=weights.output,
        hidden_bias=weights.hidden[:, -1] if biased else None,
        output_bias=weights.free[0] if len(weights.free) else None,
        direction=_direction(optimality.direction, point, units),
        kink_directions=None if rising is None else rising.linear,
        positive_directions=None if rising is None else rising.quadratic,
    )


def _direction(direction: Direction | None, point: Point, units: Units) -> Direction | None:
    """A move in the caller's scale, from a move in units of measure."""
    if direction is None:
        return None
    move = units.unscaled(Point(direction.hidden_weights, direction.output_weights, point.free))
    return Direction(move.hidden, move.output)


def _margin_ratio(problem: Problem, found: FaceSolution) -> float | None:
    """Smallest |z_i||w_i·x_n|/|D_i·x_n| over the samples off the kinks."""
    moves = found.move[: found.point.hidden.numel()].reshape(found.point.hidden.shape)
    if not bool(moves.any()):
        return None
    shifts = (problem.inputs @ moves.T).abs()
    sizes = (problem.inputs @ found.start.hidden.T).abs() * found.start.output.abs()
    counted = shifts > 0 if found.kinks is None else (shifts > 0) & ~found.kinks
    smallest = float(problem.process_group.min(torch.where(counted, sizes / shifts, torch.inf).min()))
    return smallest if math.isfinite(smallest) else None


def _stationarity(problem: Problem, found: FaceSolution, outputs: Outputs, *, stationary: bool) -> float:
    face = found.face
    all_rows = replace(face, live=None)  # rows with z_i = 0 count: their forces make saddles
    left = all_rows.project(found.forces).norm() if stationary else face.correlate(outputs.errors).norm()
    squares = problem.process_group.sum(
        torch.stack([(face.slopes.norm(dim=1) * problem.norms).square().sum(), problem.targets.square().sum()])
    )
    scale = float(squares.prod()) ** 0.5
    return float(left) / scale if scale else (0.0 if float(left) == 0 else math.inf)


def _rank(problem: Problem, active: Tensor, input_rank: int | None) -> tuple[int | None, int]:
    """Rank of A∘X, None if the matrix is too large; and the upper bound on it."""
    process_group, slopes, inputs = problem.process_group, problem.slopes(active), problem.inputs
    if input_rank is None:
        input_rank = int(gram_rank(process_group.sum(inputs.T @ inputs)))
    unactivated = int(process_group.sum((~active.any(1)).sum())) if problem.slope == 0 else 0
    cap = min(problem.num_samples - unactivated, int(gram_rank(process_group.sum(slopes.T @ slopes))) * input_rank)
    if min(problem.num_samples, slopes.shape[1] * inputs.shape[1]) > MAX_GRAM_ROWS:
        return None, cap
    return khatri_rao_rank(process_group.join(inputs), process_group.join(slopes)), cap
