"""Second-order evidence: is a stationary point off the kinks a local minimum, by the spectrum of its Hessian?

Between kinks the loss is as smooth as its smooth parts, so its gradient and Hessian classify a point up to second
order. ``check_stationarity`` is the cheap check. ``check_curvature`` is the expensive check, needed only for points
that pass the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.curvature.flat_directions import Descent, Flatness, flat_check, probe
from lightning_mnn.landscape.curvature.lanczos import Ends, Spectrum, extreme_eigenvalues, products_needed
from lightning_mnn.landscape.curvature.newton import NewtonCheck, NewtonDoubt, Scales, newton_check
from lightning_mnn.landscape.perturbation import Jitter
from lightning_mnn.verdicts import Kind, Reason, ReasonCode, Reasoned

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.curvature.loss_surface import LossSurface
    from lightning_mnn.landscape.kinks.distance import KinkDistance

_FLOAT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class SecondOrderVerdict(Reasoned):
    """Classification of a point of weight space by second-order evidence: derivatives in floats, not a proof.

    Attributes:
        kind: the verdict.
        because: the fact that decided: ``reason_code`` is its code, ``reason`` its sentence.
        loss: L(θ).
        gradient_norm: ‖∇L(θ)‖.
        relative_gradient: ‖∇L(θ)‖ relative to the reference.
        nearest_kink: smallest distance of a unit to its kink; infinite without kinks.
        relative_kink: the same relative to the root mean square of the layer's input.
        kinks: number of units on their kink within rounding.
        relative_jump: change of the gradient between the sides of these kinks, relative to the reference; 0 without
            such kinks, None where it was not computed.
        smallest_eigenvalue: of the Hessian: λ_min is at most this, up to rounding; None where it was not computed.
        eigenvalue_error: λ_min is at least ``smallest_eigenvalue`` less this, with probability 1 − ``failure``.
        largest_eigenvalue: λ_max is at least this.
        newton_gain: predicted decrease of the loss by the quadratic model, ½ gᵀH⁻¹g; None where it was not computed.
        newton_distance: distance that Newton's method moved, relative to the weights.
        flat: whether the loss is constant or varies along the directions without curvature; None where it was not
            tested.
        products: number of Hessian–vector products.
        gradients: number of other gradients and losses.
    """

    kind: Kind
    because: Reason
    loss: float
    gradient_norm: float
    relative_gradient: float
    nearest_kink: float
    relative_kink: float
    kinks: int
    relative_jump: float | None
    smallest_eigenvalue: float | None = None
    eigenvalue_error: float | None = None
    largest_eigenvalue: float | None = None
    newton_gain: float | None = None
    newton_distance: float | None = None
    flat: Flatness | None = None
    products: int = 0
    gradients: int = 0


def check_stationarity(
    surface: LossSurface,
    kinks: KinkDistance,
    reference: float,
    *,
    gradient_tolerance: float = 1e-3,
    jump_tolerance: float = 0.0,
    known: tuple[float, Tensor] | None = None,
    compare_sides: bool = True,
) -> SecondOrderVerdict:
    """Is the point off the kinks, and stationary? It costs one gradient of the full batch, or three on relevant kinks.

    The kind is ``on_kink`` if a unit is on its kink within rounding: torch's derivatives are then those of one side, so
    they allow no verdict. Of millions of units in float32 a few always are, by chance, with little effect. Therefore
    the reason states how much the gradient changes between the two sides of these kinks (at θ ± s, with s random and
    64 spacings of floats relative to the weights; this includes the smooth change over that step). Kinks with a change
    of at most ``jump_tolerance`` are ignored. The change is not computed if the gradient exceeds its tolerance and at
    most twice as many units are on kinks as would be by chance.

    The kind is ``not_stationary`` if ‖∇L‖ exceeds the tolerance times the reference. If the change across kinks was
    computed, ‖∇L‖ must also exceed twice this change, so that −∇L is a descent direction on all their sides. Otherwise
    the kind is ``undecided``, and :func:`check_curvature` can decide.

    Args:
        surface: the loss at the parameters θ.
        kinks: the distance of θ from the nearest kink.
        reference: a gradient norm to compare with, for example the largest one of training.
        gradient_tolerance: largest ‖∇L(θ)‖/reference of a stationary point.
        jump_tolerance: largest ‖∇L(θ + s) − ∇L(θ − s)‖/reference for which kinks within rounding are ignored.
        known: L(θ) and its gradient, if they were already computed.
        compare_sides: False computes no gradients on both sides of kinks: a stationary point on kinks is ``on_kink``.

    Raises:
        ValueError: the reference or a tolerance is not positive, or ``jump_tolerance`` is negative.
        NoDerivativeError: the loss cannot be differentiated.
    """
    for name, value in (("reference", reference), ("gradient_tolerance", gradient_tolerance)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value}")
    if not jump_tolerance >= 0:
        raise ValueError(f"jump_tolerance must not be negative, got {jump_tolerance}")
    loss, gradient = surface.value_and_gradient() if known is None else known
    norm = float(gradient.double().norm())
    relative = norm / reference
    jump: float | None = 0.0
    if kinks.count:
        by_chance = max(tolerances.MIN_CHANCE_UNITS, kinks.count / 2) <= kinks.by_chance
        left_out = not compare_sides or (relative > gradient_tolerance and by_chance)
        jump = None if left_out else _jump(surface, kinks.spacing) / reference
    facts = _kink_facts(kinks, surface.dtype, jump)
    on_every_side = jump is None or jump < tolerances.MAX_JUMP_PER_GRADIENT * relative
    descends = relative > gradient_tolerance and on_every_side
    if not descends and not (jump is not None and jump <= jump_tolerance):
        kind, because = Kind.ON_KINK, Reason.of(ReasonCode.ONE_SIDED, *facts)
    elif not (math.isfinite(loss) and math.isfinite(norm)):
        kind, because = Kind.NOT_STATIONARY, Reason.of(ReasonCode.NOT_FINITE, loss=loss, norm=norm)
    elif relative > gradient_tolerance:
        kind, code = Kind.NOT_STATIONARY, ReasonCode.GRADIENT_ABOVE_TOLERANCE
        because = Reason.of(code, *facts, relative=relative, tolerance=gradient_tolerance)
    else:
        kind, because = Kind.UNDECIDED, Reason.of(ReasonCode.GRADIENT_SMALL, *facts, relative=relative)
    return SecondOrderVerdict(kind, because, loss, norm, relative, kinks.nearest, kinks.relative, kinks.count, jump)


def check_curvature(
    surface: LossSurface,
    stationary: SecondOrderVerdict,
    *,
    curvature_tolerance: float = 1e-3,
    reference: float = 0.0,
    max_products: int = 128,
    failure: float = 1e-3,
    memory_budget: int = 2**31,
    seed: int = 0,
) -> SecondOrderVerdict:
    """Classify a stationary point off the kinks, by Hessian–vector products of the full batch.

    ``saddle``: λ_min is below zero by more than rounding and by more than the remaining gradient can explain, and
    along the eigenvector v the loss was measured to fall as ½ λ t² predicts. Or λ_min is zero, and along v the loss was
    measured to fall as a higher power of t.

    ``differentiable_minimum``: neither of these, and all of the following:

    - Newton's method leads to a point near θ where the gradient is zero up to rounding; loss and gradient at the end
      of each step are as the quadratic model predicts
      (:func:`~lightning_mnn.landscape.curvature.newton.newton_check`);
    - it gains almost nothing: at most 1e-3 of the loss, within 1e-3 of the weights (or all of the loss, if it ends at a
      loss of zero within this distance);
    - the Hessian there is positive definite beyond its error bound, and its smallest eigenvalue is the same at both
      ends of the step that rounding leaves open; or its flat directions belong to a manifold of stationary points with
      the same loss, as symmetries cause (:func:`~lightning_mnn.landscape.curvature.flat_directions.flat_check`); or the
      loss there is zero, and nowhere lower along a flat direction.

    Otherwise ``undecided``: flat directions may hide a descent, as along 1 + x² − y⁴ or exp(−y).

    λ_min = 0 is the usual case, and its computed sign depends on rounding and on the gradient. Scaling a ReLU unit's
    inputs by s and its outputs by 1/s does not change the loss. Along this direction the second derivative is therefore
    −∇L·θ_v/‖θ_v‖², with the unit's weights θ_v: it is zero only if the gradient is. So the remaining gradient can
    explain a curvature of up to ‖∇L‖/Σ_i |v_i θ_i|, where the sum is ‖θ_v‖ for such a direction. A point whose
    curvature is more negative than the tolerance is not a minimum.

    Args:
        surface: the loss at the parameters θ.
        stationary: the result of :func:`check_stationarity`; if it is not ``undecided``, it is returned.
        curvature_tolerance: the largest −λ_min/λ_max that a minimum may have, by its bound.
        reference: as for :func:`check_stationarity`; it sets the size of steps if all weights are zero.
        max_products: largest number of products of each stage (λ_min; Newton's method; each move in flat directions),
            after which the point stays undecided.
        failure: probability that the lower bound of λ_min may fail.
        memory_budget: bytes for the vectors of the Lanczos basis.
        seed: seed of its random start.

    Raises:
        ValueError: a tolerance is not positive, or an argument is out of range for :func:`extreme_eigenvalues`.
        NoDerivativeError: the loss cannot be differentiated twice.
        FloatingPointError: a product with the Hessian is not finite.
    """
    if not curvature_tolerance > 0:
        raise ValueError(f"curvature_tolerance must be positive, got {curvature_tolerance}")
    if stationary.kind is not Kind.UNDECIDED:
        return stationary

    def enough(ends: Ends) -> bool:
        low, error, high = ends.smallest, ends.below + ends.rounding, ends.largest
        negative = _is_negative(low, high, ends.above + ends.rounding, curvature_tolerance)
        accurate = error <= tolerances.MAX_EIGENVALUE_ERROR_RATIO * max(high, -low)
        bounded = _is_bounded(low, error, high, curvature_tolerance)
        flat = low <= tolerances.MAX_FLAT_CURVATURE_RATIO * high
        flat_or_strict = flat or low > error  # otherwise more products show whether it is zero
        decided = ends.exhausted or (negative and accurate) or (bounded and flat_or_strict)
        (goes_on,) = surface.process_group.any([not decided], surface.device)
        return not goes_on  # all processes stop together

    spectrum = extreme_eigenvalues(
        surface.product,
        surface.size,
        dtype=surface.dtype,
        device=surface.device,
        max_products=max_products,
        enough=enough,
        failure=failure,
        memory_budget=memory_budget,
        seed=seed,
    )
    found = replace(
        stationary,
        smallest_eigenvalue=spectrum.smallest,
        eigenvalue_error=spectrum.smallest_error,
        largest_eigenvalue=spectrum.largest,
        products=spectrum.products,
    )
    against = _against_minimum(surface, stationary.gradient_norm, spectrum, curvature_tolerance)
    if against is None:
        found = _Minimum(surface, spectrum, found, reference, max_products, seed).classified()
    else:
        found = replace(found, kind=against[0], because=against[1])
    facts = (*found.because.facts, _eigenvalues(spectrum), stationary.because, Reason.of(ReasonCode.NOT_A_PROOF))
    return replace(found, because=replace(found.because, facts=facts))


def second_order_verdict(
    surface: LossSurface,
    kinks: KinkDistance,
    reference: float,
    *,
    gradient_tolerance: float = 1e-3,
    jump_tolerance: float = 0.0,
    curvature_tolerance: float = 1e-3,
    max_products: int = 128,
    failure: float = 1e-3,
    memory_budget: int = 2**31,
    seed: int = 0,
) -> SecondOrderVerdict:
    """:func:`check_stationarity`, then :func:`check_curvature` where the first does not decide.

    >>> import torch
    >>> from lightning_mnn.landscape import KinkDistance, LossSurface
    >>> theta = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> surface = LossSurface([theta], lambda: [(1.0, lambda: 1 + theta[0] ** 2 - theta[1] ** 2)])
    >>> verdict = second_order_verdict(surface, KinkDistance(), 1.0)
    >>> str(verdict.kind), abs(verdict.smallest_eigenvalue + 2) < verdict.eigenvalue_error
    ('saddle', True)
    """
    stationary = check_stationarity(
        surface, kinks, reference, gradient_tolerance=gradient_tolerance, jump_tolerance=jump_tolerance
    )
    return check_curvature(
        surface,
        stationary,
        curvature_tolerance=curvature_tolerance,
        reference=reference,
        max_products=max_products,
        failure=failure,
        memory_budget=memory_budget,
        seed=seed,
    )


def _kink_facts(kinks: KinkDistance, dtype: torch.dtype, jump: float | None) -> list[Reason]:
    """What is known of the kinks next to a point."""
    if not kinks.count:
        known = kinks.relative < math.inf
        return [Reason.of(ReasonCode.NEAREST_KINK, relative=kinks.relative) if known else Reason.of(ReasonCode.NO_KINK)]
    counts = {"count": kinks.count, "units": kinks.units, "by_chance": kinks.by_chance}
    facts = [Reason.of(ReasonCode.UNITS_ON_KINKS, layer=kinks.layer, **counts)]
    if kinks.spacing > torch.finfo(dtype).eps:  # pre-activations have fewer digits than the weights
        coarse = next(name for name in _FLOAT_DTYPES if torch.finfo(getattr(torch, name)).eps == kinks.spacing)
        facts.append(Reason.of(ReasonCode.COARSE_PREACTIVATIONS, dtype=coarse))
    code = ReasonCode.SIDES_NOT_COMPARED if jump is None else ReasonCode.SIDES_COMPARED
    return [*facts, Reason.of(code, jump=jump)]


def _eigenvalues(found: Spectrum) -> Reason:
    """The extreme eigenvalues, as a fact."""
    bound = found.smallest - found.smallest_error
    numbers = {"smallest": found.smallest, "bound": bound, "largest": found.largest, "products": found.products}
    return Reason.of(ReasonCode.EIGENVALUES, **numbers)


def _jump(surface: LossSurface, spacing: float) -> float:
    """‖∇L(θ + s) − ∇L(θ − s)‖ for a step s that leaves the kinks of θ (those within rounding)."""
    jitter = Jitter(surface.parameters)
    with jitter.moved(tolerances.KINK_CROSSING_SPACINGS * spacing):
        gradient = surface.value_and_gradient()[1]
    with jitter.moved(-tolerances.KINK_CROSSING_SPACINGS * spacing):
        return float((gradient - surface.value_and_gradient()[1]).double().norm())


def _is_negative(smallest: float, largest: float, largest_error: float, tolerance: float) -> bool:
    """Whether λ_min < −tolerance · |λ| for the largest possible |λ|."""
    return smallest < -tolerance * max(largest + largest_error, -smallest)


def _is_bounded(smallest: float, error: float, largest: float, tolerance: float) -> bool:
    """Whether λ_min ≥ −tolerance · λ_max, and λ_max is above its error."""
    return largest > 0 and smallest - error >= -tolerance * largest


def _against_minimum(
    surface: LossSurface, norm: float, spectrum: Spectrum, tolerance: float
) -> tuple[Kind, Reason] | None:
    """The verdict by λ_min, for a gradient of this norm; None if λ_min is that of a minimum."""
    low, error, high = spectrum.smallest, spectrum.smallest_error, spectrum.largest
    if max(high, -low) <= spectrum.rounding:
        return Kind.UNDECIDED, Reason.of(ReasonCode.HESSIAN_ZERO)
    norm = norm if norm > spectrum.rounding * _size(surface) else 0.0  # zero up to rounding explains no curvature
    explained = tolerances.EXPLAINED_CURVATURE_FACTOR * norm / _local_size(surface, spectrum.vector) if norm else 0.0
    is_explained = -low <= spectrum.rounding + explained
    fall = None if is_explained else _verified_fall(surface, spectrum.vector, low)
    if fall is not None:
        length, lower = fall
        return Kind.SADDLE, Reason.of(ReasonCode.NEGATIVE_CURVATURE, fall=lower, length=length)
    if _is_bounded(low, error, high, tolerance):
        return None
    if _is_negative(low, high, spectrum.largest_error, tolerance):
        code = ReasonCode.CURVATURE_EXPLAINED_BY_GRADIENT if is_explained else ReasonCode.CURVATURE_NOT_CONFIRMED
        return Kind.UNDECIDED, Reason.of(code, explained=explained)
    if spectrum.rounding > tolerance * max(high, -low):
        return Kind.UNDECIDED, Reason.of(ReasonCode.ROUNDING_HIDES_CURVATURE)
    needed = products_needed(surface.size, min(tolerance / 2, 0.5), spectrum.failure)
    return Kind.UNDECIDED, Reason.of(ReasonCode.MORE_PRODUCTS_FOR_SIGN, needed=needed)


def _size(surface: LossSurface) -> float:
    """‖θ‖."""
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in surface.parameters))


def _local_size(surface: LossSurface, vector: Tensor) -> float:
    """Σ_i |v_i θ_i|."""
    theta = torch.cat([parameter.detach().flatten() for parameter in surface.parameters])
    return max(float((vector * theta).abs().double().sum()), torch.finfo(torch.float64).tiny)


def _verified_fall(surface: LossSurface, vector: Tensor, curvature: float) -> tuple[float, float] | None:
    """Length t of a step along ±v at which the loss is lower as ½ λ t² predicts, and the decrease; None if none is.

    The mean of both sides is compared, because the gradient cancels in it; the loss on one of the sides must be lower
    than at θ.
    """
    here = surface.loss()
    noise = tolerances.LOSS_ROUNDINGS * torch.finfo(surface.dtype).eps * abs(here)
    shortest = (
        math.sqrt(2 * tolerances.MIN_LOSS_CHANGE_ERRORS * noise / -curvature) or torch.finfo(surface.dtype).eps ** 0.25
    )
    for factor in tolerances.TRIAL_STEP_FACTORS:
        length, sides = factor * shortest, []
        for sign in (1.0, -1.0):
            with surface.moved(sign * length * vector):
                sides.append(surface.loss())
        predicted = -0.5 * curvature * length**2
        measured = here - sum(sides) / 2
        if 0.5 * predicted <= measured <= 2 * predicted and here - min(sides) >= max(0.5 * predicted, noise):
            return length, here - min(sides)
    return None


class _Minimum:
    """Test whether a point without negative curvature is near a minimum."""

    def __init__(
        self,
        surface: LossSurface,
        spectrum: Spectrum,
        verdict: SecondOrderVerdict,
        reference: float,
        max_products: int,
        seed: int,
    ) -> None:
        self._surface = surface
        self._spectrum = spectrum
        self._verdict = verdict
        self._max_products = max_products
        self._seed = seed
        length = max(_size(surface), reference / spectrum.largest) or 1.0
        self._scales = Scales(length, spectrum.largest, torch.finfo(surface.dtype).eps)

    def classified(self) -> SecondOrderVerdict:
        """The verdict."""
        check = newton_check(
            self._surface,
            self._scales,
            self._spectrum.rounding,
            largest_misfit=tolerances.MAX_GRADIENT_MISFIT,
            max_products=self._max_products,
        )
        self._verdict = replace(
            self._verdict, newton_gain=check.gain, newton_distance=check.length / self._scales.length
        )
        self._count(check.products, check.gradients)
        doubt = self._reason_not_near_minimum(check)
        if doubt is not None:
            return replace(self._verdict, kind=Kind.UNDECIDED, because=doubt)
        with self._surface.moved(check.step):
            return self._verdict_there(check)

    def _reason_not_near_minimum(self, check: NewtonCheck) -> Reason | None:
        """The reason why Newton's method leads to no stationary point, or to one too far from θ."""
        gain = {"gain": check.gain, "loss": self._verdict.loss}
        if check.doubt is NewtonDoubt.FLAT:
            return Reason.of(ReasonCode.GRADIENT_ALONG_FLAT_DIRECTION)
        if check.doubt is NewtonDoubt.PRODUCTS:
            return Reason.of(ReasonCode.MORE_PRODUCTS_FOR_NEWTON, **gain)
        if check.doubt is NewtonDoubt.MODEL:
            return Reason.of(ReasonCode.QUADRATIC_MODEL_WRONG, **gain, misfit=check.misfit)
        if not (self._is_zero(check) or check.gain <= tolerances.MAX_NEWTON_GAIN_RATIO * abs(self._verdict.loss)):
            return Reason.of(ReasonCode.NEWTON_STEP_GAINS, **gain)
        if check.length > tolerances.MAX_NEWTON_DISTANCE_RATIO * self._scales.length:
            return Reason.of(ReasonCode.NEWTON_STEP_FAR, **gain, distance=check.length / self._scales.length)
        return None

    def _verdict_there(self, check: NewtonCheck) -> SecondOrderVerdict:
        """The verdict, at the stationary point."""
        if self._spectrum.smallest > self._spectrum.smallest_error:
            return self._strict_verdict(check)
        flat = flat_check(
            self._surface,
            self._scales,
            self._spectrum.rounding,
            kinks=self._verdict.relative_kink < math.inf,
            max_products=self._max_products,
            seed=self._seed,
        )
        self._verdict = replace(self._verdict, flat=flat.kind)
        self._count(flat.products, flat.gradients)
        if flat.kind is Flatness.CONSTANT:
            return self._minimum(ReasonCode.FLAT_MINIMUM, check)
        return self._flat_verdict(check, [v for v in (flat.vector, self._spectrum.vector) if v is not None], flat.kind)

    def _is_zero(self, check: NewtonCheck) -> bool:
        return abs(check.loss) <= self._scales.zero

    def _strict_verdict(self, check: NewtonCheck) -> SecondOrderVerdict:
        """The verdict where the Hessian is positive definite: is it also at both ends of the step left open?"""
        smallest, vector = self._spectrum.smallest, self._spectrum.vector
        lower_bound = smallest - self._spectrum.smallest_error
        length = max(4 * (check.gradient_norm + check.gradient_error) / lower_bound, check.length)
        if length > tolerances.MAX_NEWTON_DISTANCE_RATIO * self._scales.length:
            return self._undecided(ReasonCode.ROUNDING_HIDES_MINIMUM, distance=length / self._scales.length)
        here = self._surface.value_and_gradient()[1]
        self._count(0, 3)
        for sign in (1.0, -1.0):
            with self._surface.moved(sign * length * vector):
                there = self._surface.value_and_gradient()[1]
            slope, expected = float((there - here).double() @ vector.double()), sign * length * smallest
            rounding = tolerances.MAX_GRADIENT_ROUNDINGS * check.gradient_error
            if abs(slope - expected) > tolerances.MAX_SLOPE_ERROR * abs(expected) + rounding:
                return self._undecided(ReasonCode.CURVATURE_VARIES, length=length)
        return self._minimum(ReasonCode.STRICT_MINIMUM, check)

    def _flat_verdict(self, check: NewtonCheck, vectors: list[Tensor], flat: Flatness) -> SecondOrderVerdict:
        """The verdict where there are flat directions in which the loss was not shown to be constant."""
        lowest = check.loss
        for vector in vectors:
            found = probe(self._surface, vector, self._scales)
            self._count(found.products, found.losses)
            if found.descent is not None:
                return self._descent_verdict(found.descent)
            lowest = min(lowest, found.lowest)
        nowhere_below = lowest >= -self._scales.loss_error(check.loss)
        if flat is Flatness.UNKNOWN and self._is_zero(check) and nowhere_below:
            return self._minimum(ReasonCode.ZERO_LOSS, check)
        if flat is Flatness.UNKNOWN:
            return self._undecided(ReasonCode.MORE_PRODUCTS_FOR_FLAT_DIRECTIONS)
        return self._undecided(ReasonCode.FLAT_DIRECTIONS_UNEXPLAINED)

    def _descent_verdict(self, found: Descent) -> SecondOrderVerdict:
        descent = {"order": found.order, "fall": found.fall, "length": found.length}
        return replace(self._verdict, kind=Kind.SADDLE, because=Reason.of(ReasonCode.DEGENERATE_DESCENT, **descent))

    def _minimum(self, code: ReasonCode, check: NewtonCheck) -> SecondOrderVerdict:
        distance = check.length / self._scales.length
        near = Reason.of(ReasonCode.NEWTON_DISTANCE, distance=distance, gain=check.gain)
        return replace(self._verdict, kind=Kind.DIFFERENTIABLE_MINIMUM, because=Reason.of(code, near))

    def _undecided(self, code: ReasonCode, **values: float) -> SecondOrderVerdict:
        return replace(self._verdict, kind=Kind.UNDECIDED, because=Reason.of(code, **values))

    def _count(self, products: int, gradients: int) -> None:
        found = self._verdict
        self._verdict = replace(found, products=found.products + products, gradients=found.gradients + gradients)
