"""Region: the linear model inside one activation pattern.

Shapes: N samples, d0 inputs, d1 hidden units, ``...`` leading axes (replicas). Notation: A is the matrix of slopes
(1 where a unit is active, ρ elsewhere), G the linear map (G e)_i = Σ_n e_n A_ni x_n, and w̃_i = z_i w_i the rows of the
flat weights, so that predictions are Gᵀ w̃.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.pattern import ActivationPattern


class Region:
    """A differentiable region D_A: all weights with one activation pattern, where the network is linear in w̃.

    Args:
        inputs: X, (..., N, d0).
        pattern: activation pattern of N samples and d1 units.
        negative_slope: ρ, any real but 1.

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

    def __init__(self, inputs: Tensor, pattern: ActivationPattern, negative_slope: float = 0.0) -> None:
        if negative_slope == 1:
            raise ValueError("negative_slope must not be 1: the network would be linear")
        if inputs.shape[-2] != pattern.active.shape[-2]:
            raise ValueError(
                f"inputs have {inputs.shape[-2]} samples and the pattern {pattern.active.shape[-2]}: they must agree"
            )
        self.inputs = inputs.to(torch.float64)
        self.pattern = pattern
        self.negative_slope = negative_slope

    @cached_property
    def slopes(self) -> Tensor:
        """A, float64 (..., N, d1)."""
        return self.pattern.slopes(self.negative_slope)

    def predict(self, flat: Tensor) -> Tensor:
        """Gᵀ w̃: the outputs Σ_i A_ni x_n·w̃_i, (..., N), for flat weights w̃ (..., d1, d0)."""
        return (self.slopes * (self.inputs @ flat.to(torch.float64).mT)).sum(-1)

    def correlate(self, residual: Tensor) -> Tensor:
        """G e: rows Σ_n e_n A_ni x_n, (..., d1, d0), for a residual e (..., N).

        A differentiable point is a local minimum if and only if its residual satisfies G e = 0.
        """
        return correlate(self.slopes, self.inputs, residual.to(torch.float64))

    def gram(self) -> Tensor:
        """GᵀG = (A Aᵀ) ⊙ (X Xᵀ), (..., N, N): without the (N, d0·d1) matrix."""
        return (self.slopes @ self.slopes.mT) * (self.inputs @ self.inputs.mT)

    def rank(self) -> int | list[int]:
        """Rank of A∘X, an integer; with a leading replica axis, a list of R.

        Full rank is read off the Gram matrix of the smaller side, whose eigenvalues are the squared singular values:
        it is certain when the smallest stands clear of their rounding error. Otherwise singular values of the matrix
        itself decide, those above max(N, d0·d1) · eps of the largest counting as non-zero.
        """
        if self.inputs.ndim == self.slopes.ndim == 2:
            return _rank(self.inputs, self.slopes)
        replicas = max(tensor.shape[0] if tensor.ndim > 2 else 1 for tensor in (self.inputs, self.slopes))
        inputs = self.inputs.expand(replicas, *self.inputs.shape[-2:])
        slopes = self.slopes.expand(replicas, *self.slopes.shape[-2:])
        return [_rank(x, a) for x, a in zip(inputs, slopes, strict=True)]

    def residual(self, targets: Tensor) -> Tensor:
        """e*_A = y − P y, (..., N): the residual of the least-squares fit, shared by every minimum of the region."""
        targets = targets.to(torch.float64)
        features = khatri_rao(self.slopes, self.inputs)
        basis, values, _ = torch.linalg.svd(features, full_matrices=False)
        kept = values > values.amax(-1, keepdim=True) * max(features.shape[-2:]) * torch.finfo(values.dtype).eps
        basis = torch.where(kept[..., None, :], basis, 0.0)
        return targets - (basis @ (basis.mT @ targets[..., None]))[..., 0]


def correlate(coefficients: Tensor, inputs: Tensor, residual: Tensor) -> Tensor:
    """Cᵀ diag(e) X: rows Σ_n e_n C_ni x_n, (..., d1, d0), for coefficients C (..., N, d1); G e when C is A."""
    return (coefficients * residual[..., None]).mT @ inputs


def khatri_rao(slopes: Tensor, inputs: Tensor) -> Tensor:
    """(A∘X)ᵀ: row n is a_n ⊗ x_n, (..., N, d1·d0); the dense matrix of a region's linear map."""
    return (slopes[..., :, None] * inputs[..., None, :]).flatten(-2)


def gram_rank(gram: Tensor) -> Tensor:
    """Rank of a matrix from its Gram matrix (..., d, d), with columns scaled to unit length first; int64 (...).

    Singular values under about √(d · eps), 1e-7, of the largest (after scaling) are invisible here.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    values = torch.linalg.eigvalsh(gram * inverse[..., :, None] * inverse[..., None, :])
    largest = values[..., -1:].clamp(min=0)
    threshold = gram.shape[-1] * torch.finfo(gram.dtype).eps * largest
    rank: Tensor = (values > threshold).sum(-1)
    return rank


def _rank(inputs: Tensor, slopes: Tensor) -> int:
    num_samples, num_weights = inputs.shape[0], inputs.shape[1] * slopes.shape[1]
    smaller = min(num_samples, num_weights)
    if num_samples <= num_weights:
        gram = (slopes @ slopes.T) * (inputs @ inputs.T)
    else:
        features = khatri_rao(slopes, inputs)
        gram = features.T @ features
    values = torch.linalg.eigvalsh(gram)
    if values[0] > 10 * max(num_samples, num_weights) * torch.finfo(values.dtype).eps * values[-1]:
        return smaller
    return int(torch.linalg.matrix_rank(khatri_rao(slopes, inputs)))
