"""What kind of point lies next to given parameters: Newton's method on a face, then proofs.

Shapes: P free parameters, κ active kinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.cells import growth_in_cells
from lightning_mnn.landscape.minima.models.equations.face import Model, Pieces
from lightning_mnn.landscape.minima.models.equations.implied import Reach, implied_kinks
from lightning_mnn.landscape.minima.models.equations.reading import Active, Reading, read_face, true_loss
from lightning_mnn.landscape.minima.models.equations.stationarity import (
    Ball,
    Factors,
    Fit,
    System,
    linearise,
    prove_fit,
    prove_zero,
)
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.face import Face

_MAX_NEWTON_STEPS = 30
MAX_UNKNOWNS = 3500  # P + κ of dense linear algebra
MAX_EQUATIONS = 6000  # N·K + κ of a point of zero error
_MIN_STEP = 4 * tolerances.FLOAT64_EPS  # step of Newton's method, relative to the parameters, that is rounding
_PRECISE_STEP = 1e-4  # step, relative to the parameters, from which the equations are evaluated in double-double
_MAX_STALLED_STEP = 1e-11  # relative step that no longer falls, with which the point is taken
_STEPS_PER_FACTORS = 4  # steps with one factorisation, while each is a quarter of the one before


@dataclass(frozen=True)
class Classified:
    """The kind of a point on a face.

    Attributes:
        kind: the kind.
        because: the reason.
        vector: the point, a vector of all trained parameters.
        reading: its pieces.
        radius: the exact point lies within it; None if there is none.
        growth: the smallest growth; None without kinks.
        likq: σ_min/σ_max of Z, of kinks that are not implied; None without kinks.
        smallest_eigenvalue: the smallest tangential eigenvalue off the symmetries; None if there is none.
        positive_directions: number of positive tangential eigenvalues.
        flat_directions: number of tangential directions without curvature.
        symmetries: number of independent symmetries.
        implied_kinks: number of kinks that the others imply.
        zero_error: whether all outputs are the targets.
        direction: a move that lowers the loss: of a saddle, or where the loss falls off a kink; else None.
    """

    kind: Kind
    because: Reason
    vector: Tensor
    reading: Reading
    radius: float | None = None
    growth: float | None = None
    likq: float | None = None
    smallest_eigenvalue: float | None = None
    positive_directions: int | None = None
    flat_directions: int | None = None
    symmetries: int | None = None
    implied_kinks: int = 0
    zero_error: bool = False
    direction: Tensor | None = None

    @property
    def kinks(self) -> int:
        """Number of active kinks."""
        return self.reading.face.num_kinks


def solve(  # noqa: C901 (one exit for each reason)
    model: Model, vector: Tensor, active: Active, max_distance: float
) -> tuple[System, Reading, Tensor] | Reason:
    """The stationary point on the face of given kinks, by Newton's method; or why it was not found."""
    start, scale = vector, max(float(vector.norm()), 1e-300)
    multipliers, last, first = None, torch.inf, None
    for _ in range(_MAX_NEWTON_STEPS):
        safe_point()
        reading = read_face(model, vector, active)
        face = reading.face
        unknowns = len(face.free) + face.num_kinks
        if unknowns > MAX_UNKNOWNS:
            return Reason.of(ReasonCode.MODEL_TOO_LARGE, unknowns=unknowns, limit=MAX_UNKNOWNS)
        theta = vector[face.free]
        if multipliers is not None and len(multipliers) != face.num_kinks:
            multipliers = None
        system = linearise(face, theta, multipliers)
        likq = system.likq
        if likq is not None and likq < tolerances.MIN_LIKQ:
            return Reason.of(ReasonCode.KINKS_NOT_INDEPENDENT, likq=likq, kinks=face.num_kinks)
        first = system if first is None else first
        factors = Factors(system)
        if last > _PRECISE_STEP:
            step = factors.step(theta, system.multipliers, system.residual)
        else:
            step = factors.step(theta, system.multipliers, factors.residual(system.precise))
        if step is None:
            return Reason.of(ReasonCode.FLAT_DIRECTIONS_UNEXPLAINED)
        size = float((step[0] - theta).norm()) / scale
        if last <= _PRECISE_STEP and (size <= _MIN_STEP or (size >= last / 2 and size < _MAX_STALLED_STEP)):
            return system, reading, vector
        if _MIN_STEP < size <= _PRECISE_STEP:
            step, size = _further(factors, face, step, size, scale)
        last = min(size, last)
        vector, multipliers = face.whole(step[0]), step[1]
        if bool(system.implied.any()) and last > _PRECISE_STEP:
            multipliers = None  # chosen again, as they are not unique
        if not float((vector - start).norm()) <= 10 * max_distance * scale:
            break
    if first is not None and not float(first.inertia.abs().min()) > first.inertia_error:  # steps are arbitrary
        return Reason.of(ReasonCode.FLAT_DIRECTIONS_UNEXPLAINED)
    return Reason.of(ReasonCode.NO_STATIONARY_POINT, distance=float((vector - start).norm()) / scale)


def _further(
    factors: Factors, face: Face, step: tuple[Tensor, Tensor], size: float, scale: float
) -> tuple[tuple[Tensor, Tensor], float]:
    """Steps with the same factors, while each is much shorter than the one before, and the last relative length."""
    for _ in range(_STEPS_PER_FACTORS):
        following = factors.precise_step(face, *step)
        if following is None:
            break
        before, size = size, float((following[0] - step[0]).norm()) / scale
        if not size <= before / 4:
            break
        step = following
        if size <= _MIN_STEP:
            break
    return step, size


def classify_point(  # noqa: C901, PLR0911 (one exit for each reason)
    model: Model, system: System, reading: Reading, vector: Tensor
) -> Classified:
    """The kind of the stationary point of a face next to a point."""
    values = system.tangential_values
    largest = max(float(values.abs().max()) if len(values) else 0.0, 1e-300)
    growth = system.precise.growth
    zero = values.abs() <= tolerances.MAX_ZERO_RATIO * largest
    facts = {
        "growth": float(growth.min()) if len(growth) else None,
        "likq": system.likq,
        "smallest_eigenvalue": float(values[0]) if len(values) else None,
        "positive_directions": int((values > 0).sum()),
        "flat_directions": int(zero.sum()),
        "symmetries": len(system.gauge.basis),
        "implied_kinks": int(system.implied.sum()),
    }

    def result(kind: Kind, because: Reason, **more: object) -> Classified:
        return Classified(kind, because, vector, reading, **{**facts, **more})  # type: ignore[arg-type]

    def undecided(code: ReasonCode, **words: object) -> Classified:
        return result(Kind.UNDECIDED, Reason.of(code, **words))

    if reading.ties:
        return undecided(ReasonCode.POOLING_TIE, count=reading.ties)
    if bool(zero.any()):
        return undecided(ReasonCode.FLAT_DIRECTIONS_UNEXPLAINED)
    ball = prove_zero(system)
    if ball is None:
        return undecided(ReasonCode.ZERO_NOT_PROVED)
    close = numbers_within(reading, ball)
    if close or not system.gauge.smallest > 2 * system.gauge.change * ball.radius:
        return undecided(ReasonCode.PIECES_WITHIN_RADIUS, count=close, radius=ball.radius)
    if bool(system.implied.any()):
        reach = Reach(ball.radius, ball.bounds.slopes)
        if not torch.equal(implied_kinks(system.face, system.theta, reach), system.implied):
            return undecided(ReasonCode.KINKS_NOT_INDEPENDENT, likq=0.0, kinks=system.face.num_kinks)
    kind = Kind.SADDLE
    negative = int((system.inertia < 0).sum()) - system.num_independent - len(system.gauge.basis)
    smallest = _smallest_growth(system, ball)
    if smallest is None:
        return undecided(ReasonCode.GROWTH_WITHIN_ROUNDING, value=float(growth.min()))
    growth, uncertainty, off = smallest
    facts["growth"] = float(growth.min()) if len(growth) else None
    if negative > 0:
        direction = _fall_along_curvature(model, system, vector, system.tangential()[1][:, 0], ball)
        code = ReasonCode.NEGATIVE_TANGENTIAL_CURVATURE
        words: dict[str, object] = {"value": float(values[0])}
    elif bool((growth < -uncertainty).any()):
        direction = _fall_off_kink(model, system, vector, ball, off)
        code, words, kind = ReasonCode.GROWTH_NEGATIVE, {"value": float(growth.min())}, Kind.NOT_STATIONARY
    elif bool((growth > uncertainty).all()):
        kind = Kind.KINK_MINIMUM if len(growth) else Kind.DIFFERENTIABLE_MINIMUM
        reason = Reason.of(
            ReasonCode.MODEL_CERTIFIED, radius=ball.radius, value=float(values[0]) if len(values) else 0.0
        )
        return result(kind, reason, radius=ball.radius)
    else:
        return undecided(ReasonCode.GROWTH_WITHIN_ROUNDING, value=float(growth.min()))
    if direction is None:
        return undecided(ReasonCode.FALL_WITHIN_ROUNDING)
    return result(kind, Reason.of(code, **words), radius=ball.radius, direction=direction)


def _smallest_growth(system: System, ball: Ball) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Growths, bounds on their errors, and a direction in which the loss falls if it is known; None if undecided."""
    growth = system.precise.growth
    uncertainty = _growth_error(system) + ball.radius * ball.bounds.growth_change
    if not bool(system.implied.any()) or bool((growth > uncertainty).all()):
        return growth, uncertainty, None
    cells = growth_in_cells(system, ball)
    if cells is None:
        return None
    return growth.new_tensor([cells.smallest]), growth.new_tensor([cells.uncertainty]), cells.move


def numbers_within(reading: Reading, ball: Ball) -> int:
    """How many pre-activations, or differences in max-pooling, may change their piece in the ball."""
    face = reading.face
    at = face.whole(face.base[face.free].abs(), absolute=True)[face.free]
    sizes: dict[int, Tensor] = {}
    face.evaluate(at, at.new_zeros(face.num_kinks), absolute=True, visit=lambda number, h: sizes.update({number: h}))
    gamma, count = face.model.rounding, 0
    for number, unit in reading.units.items():
        piece = face.pieces[number]
        assert isinstance(piece, Pieces)  # noqa: S101 (what units are of)
        reach = ball.bounds.slopes[number].reshape(-1, *[1] * (unit.values.ndim - 1)) * ball.radius
        op = face.model.layers.operations[number]
        size = sizes[number] + max(map(abs, op.kinks))  # type: ignore[union-attr]
        error = gamma * size + torch.where(unit.varies, reach, 0.0)
        inside = unit.distances.amin(-1) <= error
        inside &= unit.varies | (sizes[number] > 0)
        count += int(inside.flatten().index_fill(0, piece.kinks, 0).sum())
    for number, gaps in reading.gaps.items():
        size = sizes[number].flatten(1).amax(1)
        count += int((gaps <= 2 * (gamma * size + ball.bounds.slopes[number] * ball.radius)).sum())
    return count


def _growth_error(system: System) -> Tensor:
    size, absolute = system.multipliers.abs(), system.absolute
    return system.precise.rounding(system.face.model) * (absolute.normal + absolute.coupling.T @ size + size)


def _fall(model: Model, vector: Tensor, moved: Tensor, ball: Ball, outputs_slope: float) -> bool:
    """Whether the loss at a point is lower than at the stationary point, beyond rounding."""
    here, error_here = true_loss(model, vector)
    there, error_there = true_loss(model, moved)
    return here - there > error_here + error_there + 2 * ball.radius * outputs_slope


def _loss_slope(model: Model, vector: Tensor, ball: Ball) -> float:
    """A bound on the norm of the objective's gradient on the ball."""
    weights = model.weights_of_penalty
    penalty = float((weights * vector).norm()) + float(weights.max()) * ball.radius
    return float((ball.bounds.loss_slope * ball.bounds.outputs[0]).mean()) + penalty


def _fall_off_kink(model: Model, system: System, vector: Tensor, ball: Ball, move: Tensor | None) -> Tensor | None:
    """A given move, or one off the kink of the most negative growth, on the side where the loss falls."""
    if move is not None:
        return _lowest(model, system, vector, move, ball, onto_face=False)
    kink = int(system.precise.growth.argmin())
    target = -system.first.coupling[:, kink].clone()
    target[kink] += 1.0 if float(system.multipliers[kink]) >= 0 else -1.0
    move = torch.linalg.lstsq(system.first.jacobian, target[:, None], driver="gelsd").solution[:, 0]
    return _lowest(model, system, vector, move, ball, onto_face=False)


def _fall_along_curvature(model: Model, system: System, vector: Tensor, move: Tensor, ball: Ball) -> Tensor | None:
    """A move on the face in a direction of negative curvature."""
    return _lowest(model, system, vector, move, ball, onto_face=True)


def _lowest(
    model: Model, system: System, vector: Tensor, move: Tensor, ball: Ball, *, onto_face: bool
) -> Tensor | None:
    slope, face = _loss_slope(model, vector, ball), system.face
    length = float(vector.norm()) / max(float(move.norm()), 1e-300)
    signs = (1.0, -1.0) if onto_face else (1.0,)
    best, lowest = None, torch.inf
    for power in range(2, 44, 2):
        for sign in signs:
            theta = system.theta + sign * length * 2.0**-power * move
            if onto_face and face.num_kinks:
                theta = _projected(face, theta, system)
            moved = face.whole(theta)
            loss = true_loss(model, moved)[0]
            if loss < lowest:
                best, lowest = moved, loss
    if best is None or not _fall(model, vector, best, ball, slope):
        return None
    return best - vector


def _projected(face: Face, theta: Tensor, system: System) -> Tensor:
    """A point nearby where the active kinks are zero, by a few steps with the Jacobian of the stationary point."""
    inverse = torch.linalg.pinv(system.first.jacobian)
    for _ in range(6):
        theta = theta - inverse @ face.evaluate(theta, theta.new_zeros(face.num_kinks))[1]
    return theta


def fit_exactly(model: Model, vector: Tensor, active: Active, max_distance: float) -> Classified | None:
    """A point with zero error near the given one on the face of given kinks, with a proof; None if none was found."""
    start, scale, last = vector, max(float(vector.norm()), 1e-300), torch.inf
    for _ in range(_MAX_NEWTON_STEPS):
        safe_point()
        reading = read_face(model, vector, active)
        face, equations = reading.face, model.loss.targets.numel() + reading.face.num_kinks
        if equations > min(len(face.free), MAX_EQUATIONS) or reading.ties:
            return None
        fit = Fit(face, vector[face.free])
        theta = fit.step()
        size = float((theta - vector[face.free]).norm()) / scale
        if size <= _MIN_STEP or (size <= 1e-12 and size >= last / 2):
            break
        if not float((face.whole(theta) - start).norm()) <= max_distance * scale:
            return None
        vector, last = face.whole(theta), size
    else:
        return None
    ball = prove_fit(fit)
    if ball is None or numbers_within(reading, ball):
        return None
    kinks, outputs = face.num_kinks, model.loss.targets.numel()
    gram, spectrum = fit.gram[:outputs, :outputs], None
    if kinks:
        mixed, own = fit.gram[outputs:, :outputs], fit.gram[outputs:, outputs:]
        gram, spectrum = gram - mixed.T @ torch.linalg.solve(own, mixed), torch.linalg.eigvalsh(own)
    values = torch.linalg.eigvalsh(gram)
    return Classified(
        Kind.KINK_MINIMUM if kinks else Kind.DIFFERENTIABLE_MINIMUM,
        Reason.of(ReasonCode.MODEL_FITS, radius=ball.radius),
        vector,
        reading,
        radius=ball.radius,
        growth=0.0 if kinks else None,
        likq=None if spectrum is None else float((spectrum[0] / spectrum[-1]).clamp(min=0).sqrt()),
        smallest_eigenvalue=2 * float(values[0]) / len(model.inputs),
        positive_directions=outputs,
        flat_directions=len(theta) - kinks - outputs,
        symmetries=None,
        zero_error=True,
    )
