"""LinearOperator: a linear map that is given by its products with vectors.

Shapes: m numbers in an image, n numbers in a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import linalg

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class LinearOperator(ABC):
    """x ↦ F x for vectors (n,), with its adjoint y ↦ Fᵀ y."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the vectors."""

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """F x, (m,)."""

    @abstractmethod
    def adjoint(self, vector: Tensor) -> Tensor:
        """Fᵀ y, (n,)."""

    def __matmul__(self, other: Tensor) -> Tensor:
        """F x for a vector (n,), or for the columns of a matrix (n, k).

        So an operator can be given to the estimators of ``curvlinops``, such as ``hutchinson_trace``.
        """
        if other.ndim == 1:
            return self.apply(other)
        return torch.stack([self.apply(column) for column in other.unbind(1)], dim=1)

    def dense(self) -> Tensor:
        """F itself, (m, n), from n products."""
        basis = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return torch.stack([self.apply(vector) for vector in basis], dim=1)

    def to_scipy(self) -> linalg.LinearOperator:
        """The operator for the solvers of ``scipy.sparse.linalg``, whose vectors are on the CPU."""

        def on_cpu(product: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
            def of_arrays(vector: np.ndarray) -> np.ndarray:
                image = product(torch.as_tensor(vector.ravel(), dtype=self.dtype, device=self.device))
                return np.asarray(image.cpu())

            return of_arrays

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return linalg.LinearOperator(self.shape, on_cpu(self.apply), on_cpu(self.adjoint), dtype=dtype)
