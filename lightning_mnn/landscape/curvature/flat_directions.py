"""Directions in which the loss has no curvature: does it fall along them, at higher order, or is it constant?

Shapes: n numbers in θ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.curvature.newton import NewtonCheck, NewtonDoubt, Scales, conjugate_gradients, newton_check
from lightning_mnn.utilities.seeding import generator as seeded

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.curvature.loss_surface import LossSurface


@dataclass(frozen=True)
class Descent:
    """A fall of the loss along ± a direction, as a power of the step.

    Attributes:
        order: the power.
        length: of the smallest step at which it was significant.
        fall: the decrease of the loss there.
    """

    order: float
    length: float
    fall: float


@dataclass(frozen=True)
class Probe:
    """Result of steps along a direction.

    Attributes:
        descent: None where the loss does not fall as a power of the step.
        lowest: the lowest loss found.
        losses: number of losses computed.
        products: number of Hessian–vector products.
    """

    descent: Descent | None
    lowest: float
    losses: int
    products: int


def probe(surface: LossSurface, vector: Tensor, scales: Scales, *, corrected: bool = True) -> Probe:
    """Test steps of many sizes along ± a direction v without curvature: does the loss fall, at third order or higher?

    The first steps are on the line θ + t v. If the loss does not fall there, the steps are corrected: at θ + t v
    Newton's method lowers the loss across v, to follow a curved valley (Peano's surface falls only along parabolas). A
    fall counts as a descent at θ if it follows one power of t over three sizes, and also occurs at all smaller sizes
    where it would be above rounding. A lower loss that only begins at some distance from θ does not count.

    Args:
        surface: the loss at θ; θ is restored afterwards.
        vector: v of length 1, (n,).
        scales: the scales of the point.
        corrected: whether to try corrected steps too.

    >>> import torch
    >>> from lightning_mnn.landscape import LossSurface
    >>> theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> peano = LossSurface(
    ...     [theta], lambda: [(1.0, lambda: (theta[0] - theta[1] ** 2) * (theta[0] - 3 * theta[1] ** 2))]
    ... )
    >>> found = probe(peano, torch.tensor([0.0, 1.0], dtype=torch.float64), Scales(1.0, 2.0, 2.0**-52))
    >>> round(found.descent.order, 2)
    4.0
    """
    here = surface.loss()
    error = tolerances.MIN_LOSS_CHANGE_ERRORS * scales.loss_error(here)
    lowest, losses, products = here, 1, 0
    for with_correction in (False, True)[: 2 if corrected else 1]:
        for sign in (1.0, -1.0):
            falls: list[tuple[float, float]] = []
            for size in range(tolerances.CORRECTED_PROBE_SIZES if with_correction else tolerances.PROBE_SIZES):
                length = tolerances.MAX_PROBE_STEP_RATIO * scales.length / 2**size
                step = sign * length * vector
                if with_correction:
                    correction, used = _across(surface, step, vector)
                    step, products = step + correction, products + used
                with surface.moved(step):
                    loss = surface.loss()
                losses += 1
                if math.isfinite(loss):
                    falls.append((length, here - loss))
                    lowest = min(lowest, loss)
            descent = _power(falls, error)
            if descent is not None:
                return Probe(descent, lowest, losses, products)
    return Probe(None, lowest, losses, products)


def _across(surface: LossSurface, step: Tensor, vector: Tensor) -> tuple[Tensor, int]:
    """A step of Newton's method at θ + step, orthogonal to a direction of length 1; and the number of products."""

    def within(image: Tensor) -> Tensor:
        return image - (image @ vector) * vector

    with surface.moved(step):
        gradient = within(surface.value_and_gradient()[1])
        solved = conjugate_gradients(
            lambda v: within(surface.product(v)),
            gradient,
            max_products=tolerances.CORRECTION_PRODUCTS,
            goes_on=lambda more: surface.process_group.any([more], surface.device)[0],
        )
    return solved.step, solved.products + 1


def _power(falls: list[tuple[float, float]], error: float) -> Descent | None:
    """The power of the step with which the loss falls, at the smallest significant sizes; None if there is none.

    The falls are in the order of decreasing steps.
    """
    for place in range(len(falls) - 1, 1, -1):
        (_, first), (_, second), (length, third) = falls[place - 2 : place + 1]
        if not min(first, second, third) > error:
            continue
        orders = math.log2(first / second), math.log2(second / third)
        order = orders[1]
        steady = (
            abs(orders[0] - orders[1]) <= tolerances.MAX_ORDER_CHANGE
            and tolerances.DESCENT_ORDERS[0] <= order <= tolerances.DESCENT_ORDERS[1]
        )
        expected = ((third * (smaller / length) ** order, fall) for smaller, fall in falls[place + 1 :])
        if steady and all(fall >= tolerances.MIN_FALL_RATIO * power for power, fall in expected if power > error):
            return Descent(order, length, third)
        return None
    return None


class Flatness(StrEnum):
    """Behaviour of the loss along the directions in which it has no curvature."""

    CONSTANT = "constant"  # a manifold of stationary points with the same loss
    VARIES = "varies"  # the loss, or its gradient, changes nearby
    UNKNOWN = "unknown"  # too few products were allowed, or there are kinks on the way


@dataclass(frozen=True)
class FlatCheck:
    """Result of moves in flat directions.

    Attributes:
        kind: the result.
        vector: a flat direction of length 1 along which the loss varies, (n,); None if none was tried.
        products: number of Hessian–vector products.
        gradients: number of gradients and losses.
    """

    kind: Flatness
    vector: Tensor | None
    products: int
    gradients: int


def flat_check(
    surface: LossSurface,
    scales: Scales,
    curvature_error: float,
    *,
    kinks: bool = False,
    max_products: int = 128,
    seed: int = 0,
) -> FlatCheck:
    """Is a stationary point without negative curvature on a manifold of such points, all with the same loss?

    The symmetries of networks give minima such manifolds: a unit scaled up and the next layer down, units that are
    linear together and can be mixed, shifts before a softmax, weights of units that are never active, more weights than
    samples. On a manifold flat directions hide no descent. The test moves along random flat directions. Then Newton's
    method, which moves across them, must lead back to a point where the gradient is zero up to rounding and the loss is
    the same. If the loss changes as a power of the move, the gradient shows it above rounding better than the loss.

    A tail too small for floats, as exp(−40) added to 1, shows towards smaller weights, by two tests. First, the loss
    changes as the weights' own flat part is subtracted in steps, and does not as it is added; on the tangent of a
    manifold it changes on both sides. Second, along the manifold, on which the flat part shrinks to a third in a few
    moves, the gradient becomes larger than rounding, for example where a unit is saturated. (This second test is left
    out for a loss of zero, as no loss is lower.)

    A random vector r has the flat part r − H⁺H r; conjugate gradients compute H⁺H r.

    Args:
        surface: the loss at θ; θ is restored afterwards.
        scales: the scales of the point.
        curvature_error: rounding error of a product with a vector of length 1.
        kinks: whether the loss has kinks, so that shorter moves are tried too.
        max_products: largest number of products of each move.
        seed: seed of the directions.

    >>> from lightning_mnn.landscape import LossSurface
    >>> theta = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    >>> product = LossSurface([theta], lambda: [(1.0, lambda: 1 + (theta.prod() - 1) ** 2)])
    >>> str(flat_check(product, Scales(2.0, 8.0, 2.0**-52), 1e-14).kind)
    'constant'
    """
    search = _Flat(surface, scales, curvature_error, max_products, seed, kinks=kinks)
    kind = search.kind()
    return FlatCheck(kind, search.vector, search.products, search.gradients)


class _Flat:
    """Moves in flat directions."""

    def __init__(
        self,
        surface: LossSurface,
        scales: Scales,
        curvature_error: float,
        max_products: int,
        seed: int,
        *,
        kinks: bool,
    ) -> None:
        self.vector: Tensor | None = None
        self.products = self.gradients = 0
        self._surface = surface
        self._scales = scales
        self._curvature_error = curvature_error
        self._max_products = max_products
        self._random = seeded(seed, "flat")
        self._loss = surface.loss()
        free = [torch.full_like(p.detach(), float(p.requires_grad)).flatten() for p in surface.parameters]
        self._free = torch.cat(free)
        wide = surface.dtype == torch.float64
        self.sizes = tolerances.FLAT_MOVE_RATIOS if wide else tolerances.FLOAT32_FLAT_MOVE_RATIOS
        if wide and kinks:
            self.sizes = (*self.sizes, tolerances.KINK_FLAT_MOVE_RATIO)

    def kind(self) -> Flatness:
        found = self._test_own_part()
        for _ in range(tolerances.FLAT_DRAWS):
            if found is not Flatness.CONSTANT:
                return found
            drawn = torch.randn(self._surface.size, generator=self._random, dtype=torch.float64)
            part = self._part_without_curvature(drawn.to(self._free) * self._free)
            if part is None or not float(part.norm()) > tolerances.MIN_FLAT_PART_RATIO * float(drawn.norm()):
                return Flatness.UNKNOWN
            found = self._moved(part / part.norm(), [size * self._scales.length for size in self.sizes])
        return found

    def _test_own_part(self) -> Flatness:
        """Whether the weights' own flat part belongs to a manifold, and not to a tail."""
        own = self._own_part(torch.zeros_like(self._free))
        if own is None:
            return Flatness.UNKNOWN
        length = float(own.double().norm())
        if length <= tolerances.MAX_ABSENT_PART_RATIO * self._scales.length:
            return Flatness.CONSTANT
        self.vector = own / length
        if self._is_tail(own):
            return Flatness.VARIES
        return Flatness.CONSTANT if abs(self._loss) <= self._scales.zero else self._towards_smaller_weights()

    def _towards_smaller_weights(self) -> Flatness:
        """Whether the gradient stays zero on the manifold, towards smaller weights."""
        total = torch.zeros_like(self._free)
        for _ in range(tolerances.SHRINKING_STEPS):
            own = self._own_part(total)
            if own is None:
                return Flatness.UNKNOWN
            step = total - tolerances.SHRINKING_STEP_SHARE * own
            check = self._led_back(step)
            change = tolerances.MAX_LOSS_CHANGE_RATIO * abs(self._loss)
            if check.doubt is not None and not abs(check.loss - self._loss) <= change:
                return Flatness.CONSTANT  # up to the first kink
            if check.doubt is NewtonDoubt.PRODUCTS:
                return Flatness.UNKNOWN
            back = float(check.step.double() @ own.double()) / float(own.double().square().sum())
            lost = 1 - tolerances.MIN_REMAINING_MOVE_SHARE
            if check.doubt is not None or back > lost * tolerances.SHRINKING_STEP_SHARE:
                return Flatness.VARIES
            total = step + check.step
        return Flatness.CONSTANT

    def _own_part(self, moved: Tensor) -> Tensor | None:
        """The flat part of the weights after a move."""
        with self._surface.moved(moved):
            theta = torch.cat([parameter.detach().flatten() for parameter in self._surface.parameters])
            return self._part_without_curvature(theta * self._free)

    def _is_tail(self, own: Tensor) -> bool:
        """Whether the loss changes inwards along the weights' own flat part, and not outwards."""
        inwards, outwards = self._first_change(-own), self._first_change(own)
        return inwards < math.inf and outwards > tolerances.MIN_TAIL_RATIO * inwards

    def _first_change(self, own: Tensor) -> float:
        """The first share of a direction at which the loss changes; infinite if it does not."""
        error = tolerances.MIN_LOSS_CHANGE_ERRORS * self._scales.loss_error(self._loss)
        for share in tolerances.FLAT_PART_SHARES:
            with self._surface.moved(share * own):
                loss = self._surface.loss()
            self.gradients += 1
            if not abs(loss - self._loss) <= error:
                return share
        return math.inf

    def _part_without_curvature(self, vector: Tensor) -> Tensor | None:
        """The flat part of a vector; None where it was not found."""
        image = self._surface.product(vector)
        size = float(vector.double().norm())
        self.products += 1
        if not float(image.double().norm()) > self._curvature_error * size:
            return vector
        solved = conjugate_gradients(
            self._surface.product,
            -image,
            smallest_curvature=self._curvature_error,
            residual=max(
                tolerances.MAX_FLAT_CURVATURE_RATIO, self._curvature_error * size / float(image.double().norm())
            ),
            max_products=self._max_products,
            goes_on=lambda more: self._surface.process_group.any([more], self._surface.device)[0],
        )
        self.products += solved.products
        left = vector - solved.step
        off = float(solved.residual.double().norm())
        within = max(
            2 * tolerances.MAX_FLAT_CURVATURE_RATIO * self._scales.curvature * size, self._curvature_error * size
        )
        return left if off <= within else None

    def _moved(self, vector: Tensor, moves: list[float]) -> Flatness:
        """Whether one of the moves along a direction of length 1 leads back to the manifold."""
        found = Flatness.UNKNOWN
        for move in moves:
            check = self._led_back(move * vector)
            left = move + float(check.step.double() @ vector.double())
            same = abs(check.loss - self._loss) <= 2 * self._scales.loss_error(max(abs(check.loss), abs(self._loss)))
            if check.doubt is None and same and left / move >= tolerances.MIN_REMAINING_MOVE_SHARE:
                return Flatness.CONSTANT
            if check.doubt is not NewtonDoubt.PRODUCTS:
                found, self.vector = Flatness.VARIES, vector
        return found

    def _led_back(self, step: Tensor) -> NewtonCheck:
        """The result of Newton's method started after a step."""
        with self._surface.moved(step):
            check = newton_check(
                self._surface,
                self._scales,
                self._curvature_error,
                largest_misfit=tolerances.MAX_RETURN_MISFIT,
                max_products=self._max_products,
            )
        self.products += check.products
        self.gradients += check.gradients
        return check
