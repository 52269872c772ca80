"""Region: the linear model inside one activation pattern.

Shapes: N samples, d0 inputs, d1 hidden units, ``...`` leading axes (replicas). Notation: A is the matrix of slopes
(1 where a unit is active, ρ elsewhere), G the linear map (G e)_i = Σ_n e_n A_ni x_n, and w̃_i = z_i w_i the rows of the
flat weights, so that predictions are Gᵀ w̃.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.regions.least_squares import solve
from lightning_mnn.landscape.regions.linear_map import FaceMap
from lightning_mnn.landscape.regions.rank import khatri_rao_rank
from lightning_mnn.utilities.distributed import ProcessGroup

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.pattern import ActivationPattern


@dataclass(frozen=True)
class LeastSquares:
    """The least-squares fit of a region's linear model.

    Attributes:
        flat: the smallest flat weights that attain the fit, (..., d1, d0).
        residual: y − Gᵀ w̃, (..., N).
        gradient: ‖G r‖/(‖G‖_F ‖y‖), (...): zero up to rounding where the fit was found.
        method: how the fit was found; with replicas, that of the last one.
    """

    flat: Tensor
    residual: Tensor
    gradient: Tensor
    method: str


class Region:
    """A differentiable region D_A: all weights with one activation pattern, where the network is linear in w̃.

    Args:
        inputs: X, (..., N, d0).
        pattern: activation pattern of N samples and d1 units.
        negative_slope: ρ, any real but 1.
        process_group: the processes that have the other samples, for products and least squares; None: this process
            has all samples.

    Raises:
        ValueError: ρ = 1, or the pattern has another number of samples than the inputs.

    >>> from lightning_mnn.landscape import ActivationPattern
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> region = Region(x, ActivationPattern(torch.tensor([[True], [True], [False]])))
    >>> region.predict(torch.tensor([[3.0, 1.0]]))
    tensor([3., 2., 0.], dtype=torch.float64)
    >>> region.rank()
    2
    """

    def __init__(
        self,
        inputs: Tensor,
        pattern: ActivationPattern,
        negative_slope: float = 0.0,
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if negative_slope == 1:
            raise ValueError("negative_slope must not be 1: the network would be linear")
        if inputs.shape[-2] != pattern.active.shape[-2]:
            raise ValueError(
                f"inputs have {inputs.shape[-2]} samples and the pattern {pattern.active.shape[-2]}: they must agree"
            )
        self.inputs = inputs.to(torch.float64)
        self.pattern = pattern
        self.negative_slope = negative_slope
        self.process_group = process_group or ProcessGroup()

    @cached_property
    def slopes(self) -> Tensor:
        """A, float64 (..., N, d1)."""
        return self.pattern.slopes(self.negative_slope)

    def operators(self) -> list[FaceMap]:
        """The linear map w̃ ↦ Gᵀ w̃ of each replica, on flat vectors (d1·d0,); one map without replicas."""
        replicas = max(tensor.shape[0] if tensor.ndim > 2 else 1 for tensor in (self.inputs, self.slopes))
        inputs = self.inputs.expand(replicas, *self.inputs.shape[-2:])
        slopes = self.slopes.expand(replicas, *self.slopes.shape[-2:])
        pairs = zip(inputs, slopes, strict=True)
        return [FaceMap(x, a, x.new_zeros(len(x), 0), process_group=self.process_group) for x, a in pairs]

    def predict(self, flat: Tensor) -> Tensor:
        """Gᵀ w̃: the outputs Σ_i A_ni x_n·w̃_i, (..., N), for flat weights w̃ (..., d1, d0)."""
        return (self.slopes * (self.inputs @ flat.to(torch.float64).mT)).sum(-1)

    def correlate(self, residual: Tensor) -> Tensor:
        """G e: rows Σ_n e_n A_ni x_n, (..., d1, d0), for a residual e (..., N); the adjoint of :meth:`predict`.

        A differentiable point is a local minimum if and only if its residual satisfies G e = 0.
        """
        return self.process_group.sum(correlate(self.slopes, self.inputs, residual.to(torch.float64)))

    def gram(self) -> Tensor:
        """GᵀG = (A Aᵀ) ⊙ (X Xᵀ), (..., N, N): without the (N, d0·d1) matrix."""
        return (self.slopes @ self.slopes.mT) * (self.inputs @ self.inputs.mT)

    def rank(self) -> int | list[int]:
        """Rank of A∘X, an integer; with a leading replica axis, a list of R.

        It counts the singular values above max(N, d0·d1) · eps of the largest, without the (N, d0·d1) matrix.
        """
        ranks = [khatri_rao_rank(face.inputs, face.slopes) for face in self.operators()]
        return ranks if self._replicated else ranks[0]

    def least_squares(self, targets: Tensor, *, max_iterations: int = 1000) -> LeastSquares:
        """Fit the region's linear model: the smallest w̃ that minimises ‖y − Gᵀ w̃‖.

        See :func:`~lightning_mnn.landscape.regions.least_squares.solve` for the methods.

        Args:
            targets: y, (..., N).
            max_iterations: of conjugate gradients, used for problems too large for memory; ``gradient`` shows how
                accurate their fit is.
        """
        flats, residuals, gradients, method = [], [], [], ""
        faces = self.operators()
        targets = targets.to(torch.float64).expand(*(len(faces),) * self._replicated, targets.shape[-1])
        for face, y in zip(faces, targets.reshape(-1, targets.shape[-1]), strict=True):
            solution = solve(face, y, max_iterations=max_iterations)
            residual = y - face.predict(solution.theta)
            left = face.adjoint(residual).norm()
            gradients.append(torch.where(left == 0, 0.0, left / (face.size * self.process_group.sum(y @ y).sqrt())))
            flats.append(solution.theta.reshape(face.row_shape))
            residuals.append(residual)
            method = solution.method
        parts = (flats, residuals, gradients)
        flat, residual, gradient = (torch.stack(part) if self._replicated else part[0] for part in parts)
        return LeastSquares(flat, residual, gradient, method)

    def residual(self, targets: Tensor) -> Tensor:
        """e*_A = y − P y, (..., N): the residual of the least-squares fit, shared by every minimum of the region.

        Raises:
            ArithmeticError: an iterative fit of a large region did not converge.
        """
        fit = self.least_squares(targets)
        if bool((fit.gradient > tolerances.MAX_FIT_STATIONARITY).any()):
            raise ArithmeticError(
                f"the least-squares fit of this region was not found by {fit.method}: "
                f"‖G r‖/(‖G‖‖y‖) = {float(fit.gradient.max()):.1e}; "
                "call least_squares with a larger max_iterations"
            )
        return fit.residual

    @property
    def _replicated(self) -> bool:
        return max(self.inputs.ndim, self.slopes.ndim) > 2


def correlate(coefficients: Tensor, inputs: Tensor, residual: Tensor) -> Tensor:
    """Cᵀ diag(e) X: rows Σ_n e_n C_ni x_n, (..., d1, d0), for coefficients C (..., N, d1); G e when C is A."""
    return (coefficients * residual[..., None]).mT @ inputs


def khatri_rao(slopes: Tensor, inputs: Tensor) -> Tensor:
    """(A∘X)ᵀ: row n is a_n ⊗ x_n, (..., N, d1·d0); the dense matrix of a region's linear map."""
    return (slopes[..., :, None] * inputs[..., None, :]).flatten(-2)


def gram_rank(gram: Tensor) -> Tensor:
    """Rank of a matrix from its Gram matrix (..., d, d), with columns scaled to unit length first; int64 (...).

    Singular values below about √(d · eps), 1e-7, of the largest (after scaling) count as zero.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    values = torch.linalg.eigvalsh(gram * inverse[..., :, None] * inverse[..., None, :])
    largest = values[..., -1:].clamp(min=0)
    threshold = gram.shape[-1] * torch.finfo(gram.dtype).eps * largest
    rank: Tensor = (values > threshold).sum(-1)
    return rank
