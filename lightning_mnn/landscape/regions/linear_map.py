"""FaceMap: the linear map from flat weights to predictions inside one activation pattern, also on a face of its region.

Shapes: N samples (of this process), d0 inputs, d1 hidden units, f free columns. A vector of parameters θ consists of
the rows w̃_i = z_i w_i, unit by unit, and the coefficients of the free columns: d1·d0 + f numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lightning_mnn.landscape.operators import LinearOperator
from lightning_mnn.utilities.distributed import ProcessGroup

_SAMPLES_PER_BLOCK = 2048  # samples whose features are formed at a time


@dataclass(frozen=True)
class FaceMap(LinearOperator):
    """θ ↦ Σ_i A_ni x_n·w̃_i + Σ_j c_nj b_j, for θ on a face: fixed rows are zero, and others orthogonal to a basis.

    As an operator it projects θ onto the face first. With several processes, images are of this process's samples.

    Attributes:
        inputs: X, float64 (N, d0).
        slopes: A, float64 (N, d1).
        free: columns c whose coefficients b no kink depends on, float64 (N, f); an output bias is one of ones.
        live: units whose rows may move, bool (d1,); None: all.
        bases: unit → orthonormal columns (d0, b) that its row is orthogonal to.
        process_group: the processes that have the other samples.
    """

    inputs: Tensor
    slopes: Tensor
    free: Tensor
    live: Tensor | None = None
    bases: dict[int, Tensor] = field(default_factory=dict)
    process_group: ProcessGroup = field(default_factory=ProcessGroup)

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.inputs.shape[0], self.num_parameters

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.inputs.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.inputs.device

    @override
    def apply(self, vector: Tensor) -> Tensor:
        return self.predict(self.project(vector))

    @override
    def adjoint(self, vector: Tensor) -> Tensor:
        return self.project(self.correlate(vector))

    @property
    def row_shape(self) -> tuple[int, int]:
        """(d1, d0)."""
        return self.slopes.shape[1], self.inputs.shape[1]

    @cached_property
    def num_samples(self) -> int:
        """N, over all processes."""
        return self.process_group.total(self.inputs.shape[0], self.inputs.device)

    @property
    def num_parameters(self) -> int:
        """d1·d0 + f."""
        return self.slopes.shape[1] * self.inputs.shape[1] + self.free.shape[1]

    @cached_property
    def size(self) -> float:
        """Frobenius norm of the matrix before projection: its rounding errors are relative to this."""
        squares = (self.slopes.norm(dim=1) * self.inputs.norm(dim=1)).square().sum() + self.free.square().sum()
        return math.sqrt(float(self.process_group.sum(squares)))

    def predict(self, theta: Tensor) -> Tensor:
        """Predictions (N,) for parameters θ, without projection: two products of moderate matrices."""
        rows = theta[: self.num_parameters - self.free.shape[1]].reshape(self.row_shape)
        outputs = (self.slopes * (self.inputs @ rows.T)).sum(1)
        return outputs + self.free @ theta[rows.numel() :] if self.free.shape[1] else outputs

    def correlate(self, residual: Tensor) -> Tensor:
        """(Σ_n e_n A_ni x_n)_i and Σ_n e_n c_n, summed over all processes: the adjoint before projection."""
        rows = (self.slopes * residual[:, None]).T @ self.inputs
        return self.process_group.sum(torch.cat([rows.reshape(-1), residual @ self.free]))

    def project(self, theta: Tensor) -> Tensor:
        """The nearest parameters on the face, for θ (..., d1·d0 + f)."""
        if self.live is None and not self.bases:
            return theta
        theta = theta.clone()
        rows = theta[..., : self.num_parameters - self.free.shape[1]].view(*theta.shape[:-1], *self.row_shape)
        if self.live is not None:
            rows[..., ~self.live, :] = 0
        for unit, basis in self.bases.items():
            for _ in range(2):  # the second pass removes the rounding error of the first
                rows[..., unit, :] -= rows[..., unit, :] @ basis @ basis.T
            if len(basis) == basis.shape[1]:
                rows[..., unit, :] = 0
        return theta

    def gram(self) -> Tensor:
        """N × N products of the samples' features on the face; this process must have all samples."""
        slopes = self.slopes if self.live is None else self.slopes[:, self.live]
        gram = (slopes @ slopes.T).mul_(self.inputs @ self.inputs.T)
        for unit, basis in self.bases.items():
            if self.live is None or bool(self.live[unit]):
                lost = self.slopes[:, unit, None] * (self.inputs @ basis)
                gram -= lost @ lost.T
        if self.free.shape[1]:
            gram += self.free @ self.free.T
        return gram

    def normal_matrix(self) -> Tensor:
        """Products of the parameters' features on the face, (d1·d0 + f)², summed over all samples.

        On the orthogonal complement of the face it is a multiple of the identity. So it is definite if the map is
        injective on the face, and its inverse maps vectors of the face to vectors of the face.
        """
        size = self.num_parameters
        total = self.inputs.new_zeros(size, size)
        for start in range(0, self.inputs.shape[0], _SAMPLES_PER_BLOCK):
            block = slice(start, start + _SAMPLES_PER_BLOCK)
            features = (self.slopes[block, :, None] * self.inputs[block, None, :]).flatten(1)
            features = torch.cat([features, self.free[block]], 1)
            total.addmm_(features.T, features)
        total = self.process_group.sum(total)
        if self.live is None and not self.bases:
            return total
        scale = total.diagonal().mean().clamp(min=torch.finfo(total.dtype).tiny)
        eye = torch.eye(size, dtype=total.dtype, device=total.device)
        return self.project(self.project(total).T) + scale * (eye - self.project(eye))

    @override
    def dense(self) -> Tensor:
        features = (self.slopes[:, :, None] * self.inputs[:, None, :]).clone()
        if self.live is not None:
            features[:, ~self.live] = 0
        for unit, basis in self.bases.items():
            features[:, unit] -= features[:, unit] @ basis @ basis.T
        return torch.cat([features.flatten(1), self.free], 1)
