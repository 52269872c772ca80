"""Directions in which the loss has no curvature: does it fall along them, at higher order, or stay what it is?

Shapes: n numbers in θ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape.curvature.newton import NewtonCheck, NewtonDoubt, Scales, conjugate_gradients, newton_check
from lightning_mnn.utilities.seeding import generator as seeded

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.curvature.loss_surface import LossSurface

_SIZES = 12  # of steps, each half of the one before
_CORRECTED = 7  # of them, that other directions follow
_LARGEST = 0.5  # step, relative to the scale of lengths
_CLEAR = 16.0  # times the error of a loss, from which a change of it is one
_ORDERS = (2.5, 12.0)  # of a power of the step with which the loss falls: a slope or a curvature are judged elsewhere
_ALIKE = 0.5  # difference of the orders between one size and the next
_SEEN = 0.3  # of the fall that a power says, that is to be seen at each smaller size
_PRODUCTS = 12  # of a correction
_DRAWS = 3  # flat directions that are drawn
_MOVES = (1e-2, 1e-3)  # along them, relative to the scale of lengths; a larger one crosses kinks, where some are near
_MOVE_AT_KINKS = 1e-4  # where there are kinks that may be in the way
_COARSE_MOVES = (1e-1, 3e-2)  # in float32, whose rounding would hide what a power of a smaller one makes
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.7, 0.8, 0.9, 1.0)  # of the weights' own flat part, taken away or added
_TAIL = 2.0  # times the share at which the loss changes inwards, at which it is to change outwards
_STEPS, _STEP = 7, 0.16  # on the manifold towards smaller weights: of their flat part
_FAR = 1e-6  # relative change of the loss on that way, from which it is a kink in the way and no tail
_FLAT = 1e-8  # of a random vector, that the curvature of its flat part is left with
_LEAST_PART = 1e-4  # of a random vector, that is a flat part and no rest of what has little curvature
_MISFIT = 0.24  # of the gradient, on the way back to a manifold: along a tail or a power it is more
_STAYS = 0.5  # of a move, that is left on the manifold
_NONE = 1e-6  # of the scale of lengths, that is no flat part of the weights


@dataclass(frozen=True)
class Descent:
    """A fall of the loss along ± a direction, as a power of the step.

    Attributes:
        order: the power.
        length: of the smallest step at which it was clear.
        fall: of the loss there.
    """

    order: float
    length: float
    fall: float


@dataclass(frozen=True)
class Probe:
    """What steps along a direction showed.

    Attributes:
        descent: None where the loss does not fall as a power of the step.
        lowest: the lowest loss met.
        losses: number of losses taken.
        products: Hessian–vector products taken.
    """

    descent: Descent | None
    lowest: float
    losses: int
    products: int


def probe(surface: LossSurface, vector: Tensor, scales: Scales, *, corrected: bool = True) -> Probe:
    """Go steps of many sizes along ± a direction v without curvature: does the loss fall, at third order or higher?

    First along the line θ + t v. Where the loss does not fall there, the other directions follow: at θ + t v the loss
    is lowered across v by Newton's method, so that a bent valley is gone along as well (Peano's surface falls along
    parabolas only). A fall counts as one at θ if it follows one power of t over three sizes, and is seen at all smaller
    ones where it would be above rounding: a lower place beyond a threshold is none.

    Args:
        surface: the loss at θ, which is put back.
        vector: v of length 1, (n,).
        scales: of the point.
        corrected: whether other directions are to follow.

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
    error = _CLEAR * scales.loss_error(here)
    lowest, losses, products = here, 1, 0
    for follows in (False, True)[: 2 if corrected else 1]:
        for sign in (1.0, -1.0):
            falls: list[tuple[float, float]] = []
            for size in range(_CORRECTED if follows else _SIZES):
                length = _LARGEST * scales.length / 2**size
                step = sign * length * vector
                if follows:
                    correction, taken = _across(surface, step, vector)
                    step, products = step + correction, products + taken
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
    """A step of Newton's method at θ + step, orthogonal to a direction of length 1; and products taken."""

    def within(image: Tensor) -> Tensor:
        return image - (image @ vector) * vector

    with surface.moved(step):
        gradient = within(surface.value_and_gradient()[1])
        solved = conjugate_gradients(
            lambda v: within(surface.product(v)),
            gradient,
            max_products=_PRODUCTS,
            goes_on=lambda more: surface.process_group.any([more], surface.device)[0],
        )
    return solved.step, solved.products + 1


def _power(falls: list[tuple[float, float]], error: float) -> Descent | None:
    """The power of the step with which the loss falls at the smallest steps at which it is clear; largest first."""
    for place in range(len(falls) - 1, 1, -1):
        (_, first), (_, second), (length, third) = falls[place - 2 : place + 1]
        if not min(first, second, third) > error:
            continue
        orders = math.log2(first / second), math.log2(second / third)
        order = orders[1]
        steady = abs(orders[0] - orders[1]) <= _ALIKE and _ORDERS[0] <= order <= _ORDERS[1]
        expected = ((third * (smaller / length) ** order, fall) for smaller, fall in falls[place + 1 :])
        if steady and all(fall >= _SEEN * power for power, fall in expected if power > error):
            return Descent(order, length, third)
        return None
    return None


class Flatness(StrEnum):
    """What there is along the directions in which the loss has no curvature."""

    CONSTANT = "constant"  # a manifold of stationary points with one and the same loss
    VARIES = "varies"  # the loss, or its gradient, is another nearby
    UNKNOWN = "unknown"  # too few products were allowed, or kinks are in the way


@dataclass(frozen=True)
class FlatCheck:
    """What moves in flat directions showed.

    Attributes:
        kind: the answer.
        vector: a flat direction of length 1 along which the loss varies; None where it does not, (n,).
        products: Hessian–vector products taken.
        gradients: gradients taken.
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

    That is what the symmetries of networks make of a minimum: units scaled up and the next layer down, units that are
    linear together and can be mixed, shifts before a softmax, weights of units that are never active, more weights than
    samples. Then flat directions hide no descent. It is seen by going along random flat directions: Newton's
    method, which moves across them, must lead back to a point where the gradient is zero up to rounding and the loss is
    the same. Where the loss is a power of the move, rounding hides it
    less in the gradient than in the loss.

    A tail too thin to be seen, as exp(−40) beside 1, shows on the way back. With the weights' own flat part taken away
    bit by bit the loss changes, and added does not; on the tangent of a manifold it changes on both sides. And on the
    manifold, along which the flat part shrinks to a third in a few moves, the gradient becomes seen, as where a unit is
    saturated. (Not of a loss of zero, below which there is nothing.)

    A random vector r has the flat part r − H⁺H r, of which the second is found by conjugate gradients.

    Args:
        surface: the loss at θ, which is put back.
        scales: of the point.
        curvature_error: rounding error of a product with a vector of length 1.
        kinks: whether there are some, so that shorter moves are tried as well.
        max_products: of each move.
        seed: of the directions.

    >>> from lightning_mnn.landscape import LossSurface
    >>> theta = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    >>> product = LossSurface([theta], lambda: [(1.0, lambda: 1 + (theta.prod() - 1) ** 2)])
    >>> str(flat_check(product, Scales(2.0, 8.0, 2.0**-52), 1e-14).kind)
    'constant'
    """
    search = _Flat(surface, scales, curvature_error, max_products, seed)
    if kinks:
        search.sizes = (*search.sizes, _MOVE_AT_KINKS) if surface.dtype == torch.float64 else search.sizes
    kind = search.kind()
    return FlatCheck(kind, search.vector, search.products, search.gradients)


class _Flat:
    """Moves in flat directions."""

    def __init__(
        self, surface: LossSurface, scales: Scales, curvature_error: float, max_products: int, seed: int
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
        self.sizes: tuple[float, ...] = _MOVES if surface.dtype == torch.float64 else _COARSE_MOVES

    def kind(self) -> Flatness:
        found = self._of_own_part()
        for _ in range(_DRAWS):
            if found is not Flatness.CONSTANT:
                return found
            drawn = torch.randn(self._surface.size, generator=self._random, dtype=torch.float64)
            part = self._part_without_curvature(drawn.to(self._free) * self._free)
            if part is None or not float(part.norm()) > _LEAST_PART * float(drawn.norm()):
                return Flatness.UNKNOWN
            found = self._moved(part / part.norm(), [size * self._scales.length for size in self.sizes])
        return found

    def _of_own_part(self) -> Flatness:
        """Whether the weights' own flat part is that of a manifold, and of no tail."""
        own = self._own_part(torch.zeros_like(self._free))
        if own is None:
            return Flatness.UNKNOWN
        length = float(own.double().norm())
        if length <= _NONE * self._scales.length:
            return Flatness.CONSTANT
        self.vector = own / length
        if self._is_tail(own):
            return Flatness.VARIES
        return Flatness.CONSTANT if abs(self._loss) <= self._scales.zero else self._on_the_way_back()

    def _on_the_way_back(self) -> Flatness:
        """Whether the gradient stays zero on the manifold, towards smaller weights."""
        total = torch.zeros_like(self._free)
        for _ in range(_STEPS):
            own = self._own_part(total)
            if own is None:
                return Flatness.UNKNOWN
            step = total - _STEP * own
            check = self._led_back(step)
            if check.doubt is not None and not abs(check.loss - self._loss) <= _FAR * abs(self._loss):
                return Flatness.CONSTANT  # as far as kinks let it be seen
            if check.doubt is NewtonDoubt.PRODUCTS:
                return Flatness.UNKNOWN
            back = float(check.step.double() @ own.double()) / float(own.double().square().sum())
            if check.doubt is not None or back > (1 - _STAYS) * _STEP:
                return Flatness.VARIES
            total = step + check.step
        return Flatness.CONSTANT

    def _own_part(self, moved: Tensor) -> Tensor | None:
        """The flat part of the weights that are moved by as much."""
        with self._surface.moved(moved):
            theta = torch.cat([parameter.detach().flatten() for parameter in self._surface.parameters])
            return self._part_without_curvature(theta * self._free)

    def _is_tail(self, own: Tensor) -> bool:
        """Whether the loss changes inwards along the weights' own flat part, and not outwards."""
        inwards, outwards = self._first_change(-own), self._first_change(own)
        return inwards < math.inf and outwards > _TAIL * inwards

    def _first_change(self, own: Tensor) -> float:
        """The share of a direction at which the loss is another."""
        error = _CLEAR * self._scales.loss_error(self._loss)
        for share in _SHARES:
            with self._surface.moved(share * own):
                loss = self._surface.loss()
            self.gradients += 1
            if not abs(loss - self._loss) <= error:
                return share
        return math.inf

    def _part_without_curvature(self, vector: Tensor) -> Tensor | None:
        """Of a vector; None where it was not found."""
        image = self._surface.product(vector)
        size = float(vector.double().norm())
        self.products += 1
        if not float(image.double().norm()) > self._curvature_error * size:
            return vector
        solved = conjugate_gradients(
            self._surface.product,
            -image,
            smallest_curvature=self._curvature_error,
            residual=max(_FLAT, self._curvature_error * size / float(image.double().norm())),
            max_products=self._max_products,
            goes_on=lambda more: self._surface.process_group.any([more], self._surface.device)[0],
        )
        self.products += solved.products
        left = vector - solved.step
        off = float(solved.residual.double().norm())
        within = max(2 * _FLAT * self._scales.curvature * size, self._curvature_error * size)
        return left if off <= within else None

    def _moved(self, vector: Tensor, moves: list[float]) -> Flatness:
        """Whether one of the moves along a direction of length 1 leads back to the manifold."""
        found = Flatness.UNKNOWN
        for move in moves:
            check = self._led_back(move * vector)
            left = move + float(check.step.double() @ vector.double())
            same = abs(check.loss - self._loss) <= 2 * self._scales.loss_error(max(abs(check.loss), abs(self._loss)))
            if check.doubt is None and same and left / move >= _STAYS:
                return Flatness.CONSTANT
            if check.doubt is not NewtonDoubt.PRODUCTS:
                found, self.vector = Flatness.VARIES, vector
        return found

    def _led_back(self, step: Tensor) -> NewtonCheck:
        """Newton's method after a step."""
        with self._surface.moved(step):
            check = newton_check(
                self._surface,
                self._scales,
                self._curvature_error,
                largest_misfit=_MISFIT,
                max_products=self._max_products,
            )
        self.products += check.products
        self.gradients += check.gradients
        return check
