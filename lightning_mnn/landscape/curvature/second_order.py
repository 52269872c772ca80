"""Second-order evidence: is a stationary point off the kinks a local minimum, by the spectrum of its Hessian?

Between kinks the loss is as smooth as its smooth parts, so its gradient and Hessian classify a point up to second
order. ``check_stationarity`` is the cheap check. ``check_curvature`` is the expensive check, needed only for points
that pass the first.
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

_ACROSS = 64.0  # length of a step across kinks, in spacings of floats relative to the weights
_MAX_ERROR = 0.02  # a negative λ_min needs no more products at this error, relative to the largest |λ|
_EXPLAINED = 4.0  # times the curvature along the scaling of a unit: the gradient may explain up to this curvature
_LOSS_ROUNDINGS = 8.0  # error of a loss, in spacings of its floats
_SIGNIFICANT = 16.0  # times that error: smallest significant change of the loss
_FLOATS = ("float32", "float16", "bfloat16")
_MAX_JUMP = 0.5  # fraction of the gradient: if it changes less across kinks, it is zero on no side
_MIN_BY_CHANCE = 8.0  # units on kinks by chance, from which their number is well known
_LENGTHS = (1.0, 4.0, 16.0, 64.0)  # of the trial steps, relative to the shortest with a significant effect
_FLAT = 1e-8  # fraction of the largest eigenvalue up to which the smallest counts as zero
_MAX_GAIN = 1e-3  # fraction of the loss that a Newton step may still gain at a minimum
_MAX_DISTANCE = 1e-3  # largest distance of the minimum, relative to the weights
_SLOPE_ROUNDINGS = 8.0  # additional tolerance for a slope, in rounding errors of a gradient
_NOT_COMPARED = ", whose sides were not compared"
_SLOPE_ERROR = 0.3  # largest relative difference between a measured slope and the one that the curvature predicts


class SecondOrderKind(StrEnum):
    """Kind of a point of weight space, as far as first and second derivatives show."""

    MINIMUM = "differentiable_minimum"
    SADDLE = "saddle"
    NOT_STATIONARY = "not_stationary"
    ON_KINK = "on_kink"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class SecondOrderVerdict:
    """Classification of a point of weight space by second-order evidence: derivatives in floats, not a proof.

    Attributes:
        kind: the verdict.
        reason: the fact that decided, in words.
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
    sides = _where(kinks.relative)
    if kinks.count:
        by_chance = max(_MIN_BY_CHANCE, kinks.count / 2) <= kinks.by_chance
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
    descends = relative > gradient_tolerance and (jump is None or jump < _MAX_JUMP * relative)  # on every side
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
    if stationary.kind is not SecondOrderKind.UNDECIDED:
        return stationary

    def enough(ends: Ends) -> bool:
        low, error, high = ends.smallest, ends.below + ends.rounding, ends.largest
        negative = _is_negative(low, high, ends.above + ends.rounding, curvature_tolerance)
        accurate = error <= _MAX_ERROR * max(high, -low)
        bounded = _is_bounded(low, error, high, curvature_tolerance)
        flat_or_strict = low <= _FLAT * high or low > error  # otherwise more products show whether it is zero
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
    kind, reason = _classify(surface, stationary.gradient_norm, spectrum, curvature_tolerance)
    found = replace(found, kind=kind, reason=reason)
    if kind is SecondOrderKind.MINIMUM:
        found = _Minimum(surface, spectrum, found, reference, max_products, seed).classified()
    return replace(found, reason=f"{found.reason}; {stationary.reason}. Second-order evidence, not a proof")


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
    """The dtype in which pre-activations are rounded, if it has fewer digits than the weights."""
    if spacing <= torch.finfo(dtype).eps:
        return ""
    name = next(name for name in _FLOATS if torch.finfo(getattr(torch, name)).eps == spacing)
    return f", in the rounding of {name}, in which the module's own step computes (autocast within it)"


def _jump(surface: LossSurface, spacing: float) -> float:
    """‖∇L(θ + s) − ∇L(θ − s)‖ for a step s that leaves the kinks of θ (those within rounding)."""
    jitter = Jitter(surface.parameters)
    with jitter.moved(_ACROSS * spacing):
        gradient = surface.value_and_gradient()[1]
    with jitter.moved(-_ACROSS * spacing):
        return float((gradient - surface.value_and_gradient()[1]).double().norm())


def _is_negative(smallest: float, largest: float, largest_error: float, tolerance: float) -> bool:
    """Whether λ_min < −tolerance · |λ| for the largest possible |λ|."""
    return smallest < -tolerance * max(largest + largest_error, -smallest)


def _is_bounded(smallest: float, error: float, largest: float, tolerance: float) -> bool:
    """Whether λ_min ≥ −tolerance · λ_max, and λ_max is above its error."""
    return largest > 0 and smallest - error >= -tolerance * largest


def _classify(surface: LossSurface, norm: float, spectrum: Spectrum, tolerance: float) -> tuple[SecondOrderKind, str]:
    """The verdict by λ_min, for a gradient of this norm; a minimum is provisional."""
    low, error, high = spectrum.smallest, spectrum.smallest_error, spectrum.largest
    ends = f"{low:.2e} (at least {low - error:.2e}) and λ_max = {high:.2e}, by {spectrum.products} products"
    if max(high, -low) <= spectrum.rounding:
        return SecondOrderKind.UNDECIDED, f"the Hessian is zero up to rounding: λ_min = {ends}"
    norm = norm if norm > spectrum.rounding * _size(surface) else 0.0  # zero up to rounding explains no curvature
    explained_curvature = _EXPLAINED * norm / _local_size(surface, spectrum.vector) if norm else 0.0
    fall = _verified_fall(surface, spectrum.vector, low) if -low > spectrum.rounding + explained_curvature else None
    if fall is not None:
        length, lower = fall
        return SecondOrderKind.SADDLE, f"the loss falls by {lower:.1e} at {length:.1e} along v: λ_min = {ends}"
    if _is_bounded(low, error, high, tolerance):
        return SecondOrderKind.MINIMUM, f"λ_min = {ends}"
    if _is_negative(low, high, spectrum.largest_error, tolerance):
        doubt = (
            f"but the remaining gradient can explain it (up to {explained_curvature:.1e}): train on"
            if -low <= spectrum.rounding + explained_curvature
            else "but along its direction the loss does not fall as predicted, beyond rounding and before a kink"
        )
        return SecondOrderKind.UNDECIDED, f"negative curvature, {doubt}: λ_min = {ends}"
    if spectrum.rounding > tolerance * max(high, -low):
        return SecondOrderKind.UNDECIDED, f"rounding hides the sign of λ_min = {ends}; float64 may show it"
    needed = products_needed(surface.size, min(tolerance / 2, 0.5), spectrum.failure)
    return SecondOrderKind.UNDECIDED, (
        f"more products are needed for the sign (max_products, and memory_budget; {needed} are enough for most): "
        f"λ_min = {ends}"
    )


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
    noise = _LOSS_ROUNDINGS * torch.finfo(surface.dtype).eps * abs(here)
    shortest = math.sqrt(2 * _SIGNIFICANT * noise / -curvature) or torch.finfo(surface.dtype).eps ** 0.25
    for factor in _LENGTHS:
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
        check = newton_check(self._surface, self._scales, self._spectrum.rounding, max_products=self._max_products)
        self._verdict = replace(
            self._verdict, newton_gain=check.gain, newton_distance=check.length / self._scales.length
        )
        self._count(check.products, check.gradients)
        doubt = self._reason_not_near_minimum(check)
        if doubt is not None:
            return self._with(SecondOrderKind.UNDECIDED, doubt)
        with self._surface.moved(check.step):
            return self._verdict_there(check)

    def _reason_not_near_minimum(self, check: NewtonCheck) -> str | None:
        """The reason why Newton's method leads to no stationary point, or to one too far from θ."""
        gain = f"a Newton step would gain {check.gain:.1e} of the loss of {self._verdict.loss:.1e}"
        if check.doubt is NewtonDoubt.FLAT:
            return "the gradient has a part along directions without curvature, where the loss may fall further"
        if check.doubt is NewtonDoubt.PRODUCTS:
            return f"more products are needed to follow Newton's method (max_products); {gain}"
        if check.doubt is NewtonDoubt.MODEL:
            return f"{gain}, but along it the quadratic model is wrong: the gradient is off by {check.misfit:.0%}"
        if not (self._is_zero(check) or check.gain <= _MAX_GAIN * abs(self._verdict.loss)):
            return f"{gain}: train on"
        if check.length > _MAX_DISTANCE * self._scales.length:
            far = check.length / self._scales.length
            return f"{gain}, at a distance of {far:.1e} of the weights: train on"
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
            constant = "flat, but the loss is constant in its flat directions"
            return self._with(SecondOrderKind.MINIMUM, f"{constant}; {self._near(check)}")
        return self._flat_verdict(check, [v for v in (flat.vector, self._spectrum.vector) if v is not None], flat.kind)

    def _is_zero(self, check: NewtonCheck) -> bool:
        return abs(check.loss) <= self._scales.zero

    def _strict_verdict(self, check: NewtonCheck) -> SecondOrderVerdict:
        """The verdict where the Hessian is positive definite: is it also at both ends of the step left open?"""
        smallest, vector = self._spectrum.smallest, self._spectrum.vector
        lower_bound = smallest - self._spectrum.smallest_error
        length = max(4 * (check.gradient_norm + check.gradient_error) / lower_bound, check.length)
        if length > _MAX_DISTANCE * self._scales.length:
            far = length / self._scales.length
            return self._with(
                SecondOrderKind.UNDECIDED, f"rounding hides where the minimum is, up to {far:.1e} of the weights"
            )
        here = self._surface.value_and_gradient()[1]
        self._count(0, 3)
        for sign in (1.0, -1.0):
            with self._surface.moved(sign * length * vector):
                there = self._surface.value_and_gradient()[1]
            slope, expected = float((there - here).double() @ vector.double()), sign * length * smallest
            if abs(slope - expected) > _SLOPE_ERROR * abs(expected) + _SLOPE_ROUNDINGS * check.gradient_error:
                return self._with(
                    SecondOrderKind.UNDECIDED, f"the smallest curvature differs {length:.1e} along its direction"
                )
        return self._with(SecondOrderKind.MINIMUM, f"strict; {self._near(check)}")

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
            return self._with(SecondOrderKind.MINIMUM, f"a loss of zero; {self._near(check)}")
        if flat is Flatness.UNKNOWN:
            return self._with(SecondOrderKind.UNDECIDED, "more products are needed for flat directions (max_products)")
        return self._with(SecondOrderKind.UNDECIDED, "there are flat directions that no symmetry explains")

    def _descent_verdict(self, found: Descent) -> SecondOrderVerdict:
        return self._with(
            SecondOrderKind.SADDLE,
            f"degenerate: along a direction without curvature the loss falls as the step to the power "
            f"{found.order:.1f}, by {found.fall:.1e} at {found.length:.1e}",
        )

    def _near(self, check: NewtonCheck) -> str:
        distance = check.length / self._scales.length
        return f"{distance:.1e} of the weights away by Newton's method, which gains {check.gain:.1e}"

    def _count(self, products: int, gradients: int) -> None:
        found = self._verdict
        self._verdict = replace(found, products=found.products + products, gradients=found.gradients + gradients)

    def _with(self, kind: SecondOrderKind, reason: str) -> SecondOrderVerdict:
        return replace(self._verdict, kind=kind, reason=f"{reason}: {self._verdict.reason}")
