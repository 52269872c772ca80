"""Newton's method at a point: how much it would still lower the loss, and whether its quadratic model is valid there.

Shapes: n numbers in θ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.perturbation import Jitter
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_mnn.landscape.curvature.loss_surface import LossSurface

_MAX_STEPS = 10


class NewtonDoubt(StrEnum):
    """The reason why Newton's method does not end near its start."""

    MODEL = "model"  # gradient or loss at the end of a step differ from the quadratic model
    FLAT = "flat"  # the gradient has a part along directions without positive curvature
    PRODUCTS = "products"  # too few were allowed


@dataclass(frozen=True)
class Scales:
    """Reference scales at a point.

    Attributes:
        length: scale of a step: ‖θ‖, or the length to which a gradient of the size of the reference would lead.
        curvature: the largest eigenvalue of the Hessian.
        eps: spacing of floats at 1.
    """

    length: float
    curvature: float
    eps: float

    def loss_error(self, loss: float) -> float:
        """Rounding error of a loss: of its sum, and of predictions whose errors it squares."""
        zero = self.eps**2 * self.curvature * self.length**2
        return tolerances.LOSS_ROUNDINGS * (self.eps * abs(loss) + math.sqrt(abs(loss) * zero) + zero)

    @property
    def zero(self) -> float:
        """The loss up to which a loss counts as zero: the square of the rounding error of predictions."""
        return (tolerances.ZERO_PREDICTION_SPACINGS * self.eps) ** 2 * self.curvature * self.length**2


@dataclass(frozen=True)
class NewtonCheck:
    """Result of Newton's method from a point θ.

    Attributes:
        gain: ½ gᵀH⁻¹g at θ: the decrease of the loss by its quadratic model.
        step: from θ to the end, (n,).
        length: ‖step‖.
        loss: at the end.
        gradient_norm: at the end.
        gradient_error: measured rounding error of the gradient.
        misfit: largest ‖g(θ + d) − g(θ) − H d‖/‖g(θ)‖ of a step d.
        doubt: why the end is not a stationary point near θ; None: it is one, up to rounding.
        products: number of Hessian–vector products.
        gradients: number of gradients.
    """

    gain: float
    step: Tensor
    length: float
    loss: float
    gradient_norm: float
    gradient_error: float
    misfit: float
    doubt: NewtonDoubt | None
    products: int
    gradients: int


def newton_check(
    surface: LossSurface,
    scales: Scales,
    curvature_error: float,
    *,
    largest_misfit: float,
    max_products: int = 128,
) -> NewtonCheck:
    """Follow Newton's method from θ until the gradient is zero up to rounding, and check its model at each step.

    Near a regular minimum the steps shrink quadratically. Along a tail of the loss, as that of exp(−y), each step
    reduces the gradient only to 1/e; along a power yᵏ, k ≥ 3, only to a quarter or more. A part of the gradient that
    is hidden by others at the first step shows at the next. Each step solves H d = −g by conjugate gradients, with one
    wait for a GPU for each product.

    Args:
        surface: the loss at θ; θ is restored afterwards.
        scales: the scales of the point.
        curvature_error: rounding error of a product with a vector of length 1: less curvature counts as zero.
        largest_misfit: largest difference between the gradient at the end of a step and its model, relative to the
            gradient before.
        max_products: largest number of products, for all steps.

    >>> from lightning_mnn.landscape import LossSurface
    >>> theta = torch.tensor([1e-9, 9.0], dtype=torch.float64, requires_grad=True)
    >>> tail = LossSurface([theta], lambda: [(1.0, lambda: 1 + theta[0] ** 2 + torch.exp(-theta[1]))])
    >>> found = newton_check(tail, Scales(9.0, 2.0, 2.0**-52), 1e-15, largest_misfit=0.1)
    >>> str(found.doubt), 0.3 < found.misfit < 0.4
    ('model', True)
    """
    run = _Run(surface, scales, curvature_error, largest_misfit, max_products)
    doubt = run.follow()
    return NewtonCheck(
        run.gain,
        run.total,
        float(run.total.double().norm()),
        run.loss,
        run.norm,
        run.error,
        run.misfit,
        doubt,
        run.products,
        run.gradients,
    )


@dataclass(frozen=True)
class Solution:
    """A step d that lowers the quadratic model gᵀd + ½ dᵀH d.

    Attributes:
        step: d, (n,).
        residual: g + H d, (n,).
        products: number of products with H.
        flat: whether it stopped at a direction without positive curvature.
    """

    step: Tensor
    residual: Tensor
    products: int
    flat: bool


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    gradient: Tensor,
    *,
    smallest_curvature: float = 0.0,
    residual: float | None = None,
    max_products: int = 128,
    goes_on: Callable[[bool], bool] = bool,
) -> Solution:
    """Solve H d = −g by conjugate gradients, up to a residual or the first direction without positive curvature.

    Args:
        product: v ↦ H v.
        gradient: g, (n,).
        smallest_curvature: pᵀH p/‖p‖² up to which a direction counts as flat.
        residual: ‖g + H d‖/‖g‖ at which it stops; None: 1e-4.
        max_products: number of products after which it stops.
        goes_on: combines the answers of several processes into one.

    >>> found = conjugate_gradients(lambda v: torch.tensor([2.0, 1.0]) * v, torch.tensor([4.0, 3.0]))
    >>> found.step.round(decimals=4), found.products
    (tensor([-2., -3.]), 2)
    """
    step, left = torch.zeros_like(gradient), gradient.clone()
    direction, square = -left, float(left.double().square().sum())
    goal, products = (tolerances.MAX_STEP_RESIDUAL_RATIO if residual is None else residual) ** 2 * square, 0
    while goes_on(square > goal and products < max_products):
        safe_point()
        image = product(direction)
        products += 1
        curvature, length = fetched((direction.double() * image.double()).sum(), direction.double().square().sum())
        if not curvature > smallest_curvature * length:
            return Solution(step, left, products, flat=True)
        rate = square / curvature
        step, left = step + rate * direction, left + rate * image
        before, square = square, float(left.double().square().sum())
        direction = -left + square / before * direction
    return Solution(step, left, products, flat=False)


@dataclass
class _Run:
    """State of Newton's method."""

    surface: LossSurface
    scales: Scales
    curvature_error: float
    largest_misfit: float
    max_products: int
    products: int = 0
    gradients: int = 0
    gain: float = 0.0
    misfit: float = 0.0
    loss: float = field(init=False)
    norm: float = field(init=False)
    error: float = field(init=False)
    total: Tensor = field(init=False)

    def follow(self) -> NewtonDoubt | None:
        self.loss, gradient = self._at(None)
        self.norm = float(gradient.double().norm())
        self.error = max(self._rounding(gradient), self.scales.eps * self.norm, self._smallest_rounding())
        self.total = torch.zeros_like(gradient)
        for turn in range(_MAX_STEPS):
            if self.norm <= tolerances.MAX_GRADIENT_ROUNDINGS * self.error:
                return None
            with self.surface.moved(self.total):
                solved = conjugate_gradients(
                    self.surface.product,
                    gradient,
                    smallest_curvature=self.curvature_error,
                    max_products=self.max_products - self.products,
                    goes_on=lambda more: self.surface.process_group.any([more], self.surface.device)[0],
                )
            self.products += solved.products
            left = float(solved.residual.double().norm())
            if left > max(tolerances.MAX_GRADIENT_MISFIT * self.norm, tolerances.MAX_GRADIENT_ROUNDINGS * self.error):
                return NewtonDoubt.FLAT if solved.flat else NewtonDoubt.PRODUCTS
            predicted = -0.5 * float(((gradient + solved.residual).double() * solved.step.double()).sum())
            if turn == 0:
                self.gain = predicted
            agrees, gradient = self._apply(solved, predicted)
            if not agrees:
                return NewtonDoubt.MODEL
        return None if self.norm <= tolerances.MAX_GRADIENT_ROUNDINGS * self.error else NewtonDoubt.MODEL

    def _apply(self, solved: Solution, predicted: float) -> tuple[bool, Tensor]:
        """Make a step. Returns whether loss and gradient at its end agree with the model, and the gradient."""
        before = self.loss
        self.total = self.total + solved.step
        self.loss, after = self._at(self.total)
        off = float((after - solved.residual).double().norm())
        if off > tolerances.MAX_GRADIENT_ROUNDINGS * self.error:
            self.misfit = max(self.misfit, off / self.norm)
        within = (
            tolerances.MAX_DECREASE_ERROR / tolerances.MAX_GRADIENT_MISFIT * self.largest_misfit * predicted
            + 2 * self.scales.loss_error(before)
        )
        agrees = off <= max(self.largest_misfit * self.norm, tolerances.MAX_GRADIENT_ROUNDINGS * self.error)
        self.norm = float(after.double().norm())
        return agrees and abs(before - self.loss - predicted) <= within, after

    def _at(self, step: Tensor | None) -> tuple[float, Tensor]:
        self.gradients += 1
        if step is None:
            return self.surface.value_and_gradient()
        with self.surface.moved(step):
            self.error = max(self.error, self._smallest_rounding())  # of weights that may have become large
            return self.surface.value_and_gradient()

    def _smallest_rounding(self) -> float:
        """Rough estimate of the error of a gradient from the rounding of the weights."""
        weights = math.sqrt(sum(float(p.detach().double().square().sum()) for p in self.surface.parameters))
        return tolerances.WEIGHT_ROUNDING_FACTOR * self.scales.eps * self.scales.curvature * weights

    def _rounding(self, gradient: Tensor) -> float:
        """Rounding error of a gradient: ‖g(θ + s) + g(θ − s) − 2 g(θ)‖/√6 for s of some spacings of floats."""
        jitter, ends = Jitter(self.surface.parameters), []
        for sign in (1.0, -1.0):
            with jitter.moved(sign * tolerances.JITTER_SPACINGS * self.scales.eps):
                ends.append(self._at(None)[1])
        return float((ends[0] + ends[1] - 2 * gradient).double().norm()) / math.sqrt(6)
