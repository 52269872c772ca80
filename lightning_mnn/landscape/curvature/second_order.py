"""Second-order evidence: is a stationary point off the kinks a local minimum, by the spectrum of its Hessian?

Between kinks the loss is as smooth as its smooth parts, so its gradient and Hessian say what a point is up to second
order. ``check_stationarity`` is the cheap part and ``check_curvature`` the dear one, which only what passed the first
calls for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape.curvature.flat_directions import Descent, Flatness, flat_check, probe
from lightning_mnn.landscape.curvature.lanczos import Ends, Spectrum, extreme_eigenvalues, products_needed
from lightning_mnn.landscape.curvature.newton import NewtonCheck, NewtonDoubt, Scales, newton_check
from lightning_mnn.landscape.perturbation import Jitter

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.curvature.loss_surface import LossSurface
    from lightning_mnn.landscape.kinks.distance import KinkDistance

_ACROSS = 64.0  # spacings of floats, relative to the weights, of a step across kinks
_KNOWN = 0.02  # error of a negative λ_min, relative to the largest |λ|, up to which products are taken
_FEIGNED = 4.0  # times the curvature that the gradient gives the scaling of a unit, up to which it may be no other
_LOSS_ROUNDINGS = 8.0  # error of a loss, in spacings of its floats
_CLEAR = 16.0  # times that error, from which a change of the loss is one
_FLOATS = ("float32", "float16", "bfloat16")
_LEAST_SHARE = 0.5  # of the gradient, that its change over kinks is below where no side can make it zero
_FEW = 8.0  # units on kinks by chance, from which their number is known well
_LENGTHS = (1.0, 4.0, 16.0, 64.0)  # of the trial steps, relative to the shortest whose effect is clear
_FLAT = 1e-8  # of the largest eigenvalue, that the smallest is no curvature
_GAIN = 1e-3  # of the loss, that a Newton step may still gain at a minimum
_NEAR = 1e-3  # of the weights, that the minimum may be away
_SLOPE = 8.0  # times the rounding error of a gradient, by which it may differ beside
_NOT_COMPARED = ", whose sides were not compared"
_BOWL = 0.3  # of the slope that the curvature gives a step from a minimum, by which the real one may differ


class SecondOrderKind(StrEnum):
    """What a point of weight space is, as far as first and second derivatives tell."""

    MINIMUM = "differentiable_minimum"
    SADDLE = "saddle"
    NOT_STATIONARY = "not_stationary"
    ON_KINK = "on_kink"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class SecondOrderVerdict:
    """What a point of weight space is, by second-order evidence: derivatives in floats, and no proof.

    Attributes:
        kind: the verdict.
        reason: what decided, in words.
        loss: L(θ).
        gradient_norm: ‖∇L(θ)‖.
        relative_gradient: that, relative to the reference.
        nearest_kink: smallest distance of a unit to its kink; infinite without kinks.
        relative_kink: the same relative to the root mean square of the layer's input.
        kinks: units on their kink within rounding.
        relative_jump: how much the gradient changes between their sides, relative to the reference; 0 without them,
            None where it would decide nothing.
        smallest_eigenvalue: of the Hessian: λ_min is at most this, up to rounding; None where it was not computed.
        eigenvalue_error: λ_min is at least ``smallest_eigenvalue`` less this, with the probability that was asked for.
        largest_eigenvalue: λ_max is at least this.
        newton_gain: what the loss would still fall by if it were its quadratic model, ½ gᵀH⁻¹g; None where that was not
            asked for.
        newton_distance: how far Newton's method went, relative to the weights.
        flat: whether it is constant along the directions without curvature, or varies; None where that was not asked.
        products: Hessian–vector products taken.
        gradients: gradients and losses taken beside them.
    """

    kind: SecondOrderKind
    reason: str
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
    """Is the point off the kinks, and stationary? One gradient of the full batch; on kinks that matter three.

    The kind is ``on_kink`` where a unit is on its kink within rounding: torch's derivatives are then those of one side,
    and no verdict follows from them. Of millions of units in float32 a few always are, by chance, and matter little:
    how much the gradient changes between both sides of them is said (at θ ± s, s random and 64 spacings of floats
    relative to the weights; the smooth change over that step included), and ``jump_tolerance`` lets small changes
    pass. Where the gradient exceeds its tolerance, and no more than twice as many units are on kinks as would be by
    chance, that is left out. The kind is ``not_stationary`` where ‖∇L‖ exceeds the tolerance times the reference (and
    twice its change over kinks, as far as that was formed, so that −∇L leads downhill on all their sides), and
    otherwise ``undecided``: for :func:`check_curvature` to decide.

    Args:
        surface: the loss at the parameters θ.
        kinks: how far θ is from the nearest kink.
        reference: a norm of the gradient to compare with: the largest of training, say.
        gradient_tolerance: largest ‖∇L(θ)‖/reference of a stationary point.
        jump_tolerance: largest ‖∇L(θ + s) − ∇L(θ − s)‖/reference at which kinks within rounding are passed over.
        known: L(θ) and its gradient, where they were formed before.
        compare_sides: False forms no gradients on both sides of kinks: a stationary point on kinks is ``on_kink``.

    Raises:
        ValueError: a reference or tolerance that is not positive, or a negative jump_tolerance.
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
    sides = _where(kinks.relative)
    if kinks.count:
        by_chance = max(_FEW, kinks.count / 2) <= kinks.by_chance
        left_out = not compare_sides or (relative > gradient_tolerance and by_chance)
        jump = None if left_out else _jump(surface, kinks.spacing) / reference
        change = (
            _NOT_COMPARED * (not compare_sides)
            if jump is None
            else f", between whose sides the gradient changes by {jump:.1e} of the reference"
        )
        sides = (
            f"{kinks.count} of {kinks.units} units are on a kink within rounding ({kinks.by_chance:.1g} would be by "
            f"chance; nearest in {kinks.layer}){_coarse(kinks.spacing, surface.dtype)}{change}"
        )
    descends = relative > gradient_tolerance and (jump is None or jump < _LEAST_SHARE * relative)  # on every side
    if not descends and not (jump is not None and jump <= jump_tolerance):
        kind = SecondOrderKind.ON_KINK
        reason = f"{sides}: the gradient and the Hessian are those of one side only"
    elif not (math.isfinite(loss) and math.isfinite(norm)):
        kind = SecondOrderKind.NOT_STATIONARY
        reason = f"the loss ({loss}) or the norm of its gradient ({norm}) is not finite"
    elif relative > gradient_tolerance:
        kind = SecondOrderKind.NOT_STATIONARY
        reason = (
            f"the gradient's norm is {relative:.1e} of the reference: above the tolerance of {gradient_tolerance:.0e}; "
            f"{sides}"
        )
    else:
        kind = SecondOrderKind.UNDECIDED
        reason = f"the gradient's norm is {relative:.1e} of the reference, and {sides}"
    return SecondOrderVerdict(kind, reason, loss, norm, relative, kinks.nearest, kinks.relative, kinks.count, jump)


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
    """What is a stationary point off the kinks? Hessian–vector products of the full batch, until it is decided.

    ``saddle``: λ_min is below zero by more than rounding, and than the rest of the gradient could feign; and along the
    direction v that shows it the loss is seen to fall as ½ λ t² says. Or λ_min is zero, and along v the loss is seen to
    fall as a higher power of t.

    ``differentiable_minimum``: nothing of the kind, and all of these:

    - Newton's method leads to a point next to θ where the gradient is zero up to rounding; loss and gradient at the
      end of each step are what the quadratic model says
      (:func:`~lightning_mnn.landscape.curvature.newton.newton_check`);
    - it gains next to nothing: 1e-3 of the loss at most, or all of it, to a loss of zero within 1e-3 of the weights;
    - the Hessian there is positive definite beyond its error bound, and its smallest eigenvalue is the same at both
      ends of the step that rounding leaves open; or in its flat directions there is a manifold of stationary points
      with the same loss, as symmetries make it
      (:func:`~lightning_mnn.landscape.curvature.flat_directions.flat_check`); or the loss is zero there, and along a
      flat direction nowhere below.

    Otherwise ``undecided``: flat directions may hide a descent, as along 1 + x² − y⁴ or exp(−y).

    λ_min = 0 is the rule, and its sign a matter of rounding and of the gradient: scaling a ReLU unit's inputs by s and
    its outputs by 1/s leaves the loss as it is, so that along this direction the second derivative is
    −∇L·θ_v/‖θ_v‖², with the unit's weights θ_v: zero only where the gradient is. So what the gradient could feign is
    ‖∇L‖/Σ_i |v_i θ_i|, the sum being ‖θ_v‖ for such a direction; and what is more negative than the tolerance is no
    minimum.

    Args:
        surface: the loss at the parameters θ.
        stationary: what :func:`check_stationarity` said; if that is not ``undecided``, it is returned.
        curvature_tolerance: the largest −λ_min/λ_max that a minimum may have, as far as products tell.
        reference: as for :func:`check_stationarity`, by which the size of steps is known where all weights are zero.
        max_products: of each of the stages (λ_min; Newton's method; each move in flat directions), after which it
            stays undecided.
        failure: probability with which the lower bound of λ_min may fail.
        memory_budget: bytes for the vectors of the Lanczos basis.
        seed: of its random start.

    Raises:
        ValueError: a tolerance that is not positive, or arguments out of range for :func:`extreme_eigenvalues`.
        NoDerivativeError: the loss cannot be differentiated twice.
        FloatingPointError: a product with the Hessian is not finite.
    """
    if not curvature_tolerance > 0:
        raise ValueError(f"curvature_tolerance must be positive, got {curvature_tolerance}")
    if stationary.kind is not SecondOrderKind.UNDECIDED:
        return stationary

    def enough(ends: Ends) -> bool:
        low, error, high = ends.smallest, ends.below + ends.rounding, ends.largest
        negative = _is_negative(low, high, ends.above + ends.rounding, curvature_tolerance)
        known = error <= _KNOWN * max(high, -low)
        bounded = _is_bounded(low, error, high, curvature_tolerance)
        flat_or_strict = low <= _FLAT * high or low > error  # a small eigenvalue that is none shows with more products
        decided = ends.exhausted or (negative and known) or (bounded and flat_or_strict)
        (goes_on,) = surface.process_group.any([not decided], surface.device)
        return not goes_on  # all stop, or none

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
    kind, reason = _judge(surface, stationary.gradient_norm, spectrum, curvature_tolerance)
    found = replace(found, kind=kind, reason=reason)
    if kind is SecondOrderKind.MINIMUM:
        found = _Minimum(surface, spectrum, found, reference, max_products, seed).classified()
    return replace(found, reason=f"{found.reason}; {stationary.reason}. Evidence of second order, not a proof")


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


def _where(relative_kink: float) -> str:
    return (
        "no kink depends on the weights"
        if relative_kink == math.inf
        else f"the nearest kink at {relative_kink:.1e} of its scale"
    )


def _coarse(spacing: float, dtype: torch.dtype) -> str:
    """Which floats round pre-activations, where they have fewer digits than the weights."""
    if spacing <= torch.finfo(dtype).eps:
        return ""
    name = next(name for name in _FLOATS if torch.finfo(getattr(torch, name)).eps == spacing)
    return f", in the rounding of {name}, in which the module's own step computes (autocast within it)"


def _jump(surface: LossSurface, spacing: float) -> float:
    """‖∇L(θ + s) − ∇L(θ − s)‖ for a step s that leaves the kinks that θ is on within rounding."""
    jitter = Jitter(surface.parameters)
    with jitter.moved(_ACROSS * spacing):
        gradient = surface.value_and_gradient()[1]
    with jitter.moved(-_ACROSS * spacing):
        return float((gradient - surface.value_and_gradient()[1]).double().norm())


def _is_negative(smallest: float, largest: float, largest_error: float, tolerance: float) -> bool:
    """Whether λ_min < −tolerance · |λ| for the largest |λ| that there may be."""
    return smallest < -tolerance * max(largest + largest_error, -smallest)


def _is_bounded(smallest: float, error: float, largest: float, tolerance: float) -> bool:
    """Whether λ_min ≥ −tolerance · λ_max, and λ_max is above its error."""
    return largest > 0 and smallest - error >= -tolerance * largest


def _judge(surface: LossSurface, norm: float, spectrum: Spectrum, tolerance: float) -> tuple[SecondOrderKind, str]:
    """The verdict, for a gradient of this norm; a minimum is one for now, as far as λ_min tells."""
    low, error, high = spectrum.smallest, spectrum.smallest_error, spectrum.largest
    ends = f"{low:.2e} (at least {low - error:.2e}) and λ_max = {high:.2e}, by {spectrum.products} products"
    if max(high, -low) <= spectrum.rounding:
        return SecondOrderKind.UNDECIDED, f"the Hessian is zero up to rounding: λ_min = {ends}"
    norm = norm if norm > spectrum.rounding * _size(surface) else 0.0  # what rounding made of zero feigns nothing
    explained_curvature = _FEIGNED * norm / _local_size(surface, spectrum.vector) if norm else 0.0
    fall = _verified_fall(surface, spectrum.vector, low) if -low > spectrum.rounding + explained_curvature else None
    if fall is not None:
        length, lower = fall
        return SecondOrderKind.SADDLE, f"the loss falls by {lower:.1e} at {length:.1e} along v: λ_min = {ends}"
    if _is_bounded(low, error, high, tolerance):
        return SecondOrderKind.MINIMUM, f"λ_min = {ends}"
    if _is_negative(low, high, spectrum.largest_error, tolerance):
        doubt = (
            f"no more than what is left of the gradient could feign ({explained_curvature:.1e}): train on"
            if -low <= spectrum.rounding + explained_curvature
            else "but along its direction the loss does not fall as that predicts, beyond rounding and before a kink"
        )
        return SecondOrderKind.UNDECIDED, f"negative curvature, {doubt}: λ_min = {ends}"
    if spectrum.rounding > tolerance * max(high, -low):
        return SecondOrderKind.UNDECIDED, f"rounding hides the sign of λ_min = {ends}; float64 would tell"
    needed = products_needed(surface.size, min(tolerance / 2, 0.5), spectrum.failure)
    return SecondOrderKind.UNDECIDED, (
        f"more products must tell the sign (max_products, and memory_budget; {needed} suffice for most): λ_min = {ends}"
    )


def _size(surface: LossSurface) -> float:
    """‖θ‖."""
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in surface.parameters))


def _local_size(surface: LossSurface, vector: Tensor) -> float:
    """Σ_i |v_i θ_i|."""
    theta = torch.cat([parameter.detach().flatten() for parameter in surface.parameters])
    return max(float((vector * theta).abs().double().sum()), torch.finfo(torch.float64).tiny)


def _verified_fall(surface: LossSurface, vector: Tensor, curvature: float) -> tuple[float, float] | None:
    """A length t of a step along ±v at which the loss is lower, as ½ λ t² says, and by how much; None if there is none.

    The mean of both sides is compared, in which the gradient cancels; one of the sides must be lower than θ.
    """
    here = surface.loss()
    noise = _LOSS_ROUNDINGS * torch.finfo(surface.dtype).eps * abs(here)
    shortest = math.sqrt(2 * _CLEAR * noise / -curvature) or torch.finfo(surface.dtype).eps ** 0.25
    for factor in _LENGTHS:
        length, sides = factor * shortest, []
        for sign in (1.0, -1.0):
            with surface.moved(sign * length * vector):
                sides.append(surface.loss())
        predicted = -0.5 * curvature * length**2
        seen = here - sum(sides) / 2
        if 0.5 * predicted <= seen <= 2 * predicted and here - min(sides) >= max(0.5 * predicted, noise):
            return length, here - min(sides)
    return None


class _Minimum:
    """Whether a point without negative curvature is next to a minimum."""

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
        check = newton_check(self._surface, self._scales, self._spectrum.rounding, max_products=self._max_products)
        self._verdict = replace(
            self._verdict, newton_gain=check.gain, newton_distance=check.length / self._scales.length
        )
        self._count(check.products, check.gradients)
        doubt = self._reason_not_near_minimum(check)
        if doubt is not None:
            return self._told(SecondOrderKind.UNDECIDED, doubt)
        with self._surface.moved(check.step):
            return self._verdict_there(check)

    def _reason_not_near_minimum(self, check: NewtonCheck) -> str | None:
        """Why Newton's method leads to no stationary point, or to one that is not θ's."""
        told = f"a Newton step would gain {check.gain:.1e} of the loss of {self._verdict.loss:.1e}"
        if check.doubt is NewtonDoubt.FLAT:
            return "the gradient points along directions without curvature, where the loss may fall on"
        if check.doubt is NewtonDoubt.PRODUCTS:
            return f"more products must tell where Newton's method leads (max_products); {told}"
        if check.doubt is NewtonDoubt.MODEL:
            return f"{told}, but along it the quadratic model does not hold: the gradient is off by {check.misfit:.0%}"
        if not (self._is_zero(check) or check.gain <= _GAIN * abs(self._verdict.loss)):
            return f"{told}: train on"
        if check.length > _NEAR * self._scales.length:
            far = check.length / self._scales.length
            return f"{told}, at a distance of {far:.1e} of the weights: train on"
        return None

    def _verdict_there(self, check: NewtonCheck) -> SecondOrderVerdict:
        """The verdict, at the stationary point."""
        if self._spectrum.smallest > self._spectrum.smallest_error:
            return self._of_bowl(check)
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
            told = "flat, but in its flat directions the loss is one and the same"
            return self._told(SecondOrderKind.MINIMUM, f"{told}; {self._near(check)}")
        return self._of_flat(check, [v for v in (flat.vector, self._spectrum.vector) if v is not None], flat.kind)

    def _is_zero(self, check: NewtonCheck) -> bool:
        return abs(check.loss) <= self._scales.zero

    def _of_bowl(self, check: NewtonCheck) -> SecondOrderVerdict:
        """Where the Hessian is positive: is it at the ends of the step that is left open?"""
        smallest, vector = self._spectrum.smallest, self._spectrum.vector
        least = smallest - self._spectrum.smallest_error
        length = max(4 * (check.gradient_norm + check.gradient_error) / least, check.length)
        if length > _NEAR * self._scales.length:
            far = length / self._scales.length
            return self._told(
                SecondOrderKind.UNDECIDED, f"rounding leaves open where the minimum is, up to {far:.1e} of the weights"
            )
        here = self._surface.value_and_gradient()[1]
        self._count(0, 3)
        for sign in (1.0, -1.0):
            with self._surface.moved(sign * length * vector):
                there = self._surface.value_and_gradient()[1]
            slope, expected = float((there - here).double() @ vector.double()), sign * length * smallest
            if abs(slope - expected) > _BOWL * abs(expected) + _SLOPE * check.gradient_error:
                return self._told(
                    SecondOrderKind.UNDECIDED, f"the smallest curvature is another {length:.1e} along its direction"
                )
        return self._told(SecondOrderKind.MINIMUM, f"strict; {self._near(check)}")

    def _of_flat(self, check: NewtonCheck, vectors: list[Tensor], flat: Flatness) -> SecondOrderVerdict:
        """Where there are flat directions in which the loss is not seen to stay what it is."""
        lowest = check.loss
        for vector in vectors:
            found = probe(self._surface, vector, self._scales)
            self._count(found.products, found.losses)
            if found.descent is not None:
                return self._of_descent(found.descent)
            lowest = min(lowest, found.lowest)
        nowhere_below = lowest >= -self._scales.loss_error(check.loss)
        if flat is Flatness.UNKNOWN and self._is_zero(check) and nowhere_below:
            return self._told(SecondOrderKind.MINIMUM, f"a loss of zero; {self._near(check)}")
        if flat is Flatness.UNKNOWN:
            return self._told(SecondOrderKind.UNDECIDED, "more products must tell what is flat (max_products)")
        return self._told(SecondOrderKind.UNDECIDED, "there are flat directions that no symmetry explains")

    def _of_descent(self, found: Descent) -> SecondOrderVerdict:
        return self._told(
            SecondOrderKind.SADDLE,
            f"degenerate: along a direction without curvature the loss falls as the step to the {found.order:.1f}, by "
            f"{found.fall:.1e} at {found.length:.1e}",
        )

    def _near(self, check: NewtonCheck) -> str:
        distance = check.length / self._scales.length
        return f"{distance:.1e} of the weights away by Newton's method, which gains {check.gain:.1e}"

    def _count(self, products: int, gradients: int) -> None:
        found = self._verdict
        self._verdict = replace(found, products=found.products + products, gradients=found.gradients + gradients)

    def _told(self, kind: SecondOrderKind, reason: str) -> SecondOrderVerdict:
        return replace(self._verdict, kind=kind, reason=f"{reason}: {self._verdict.reason}")
