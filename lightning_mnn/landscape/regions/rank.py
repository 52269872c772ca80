"""Rank of the matrix (A∘X)ᵀ of a region, by its singular values, computed without forming the matrix.

Shapes: N samples, d0 inputs, d1 hidden units; n = min(N, d0·d1) is the shorter side of the matrix and m the longer one.
B is the matrix with the shorter side as its n rows; only chunks of its columns are formed. K = B Bᵀ.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from scipy.linalg.lapack import dpstrf

from lightning_mnn.landscape import tolerances

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


def khatri_rao_rank(inputs: Tensor, slopes: Tensor) -> int:
    """Number of singular values of F = (A∘X)ᵀ, rows a_n ⊗ x_n, above max(N, d0·d1) · eps · σ_max.

    Squared singular values are the eigenvalues of K, where rounding hides singular values below √eps of the largest.
    Therefore rows S that K shows to be independent are counted and eliminated: the other rows R become B_R − W B_S. The
    remainder is computed from B itself. It is orthogonal to B_S and much smaller, and its own K resolves singular
    values that are smaller by the same factor. This repeats until nothing above the threshold is left, or until K
    resolves the threshold.

    Args:
        inputs: X, float64 (N, d0).
        slopes: A, float64 (N, d1).

    Returns:
        The result of ``torch.linalg.matrix_rank`` on the dense matrix, in memory for less than six n × n matrices. The
        number of operations, beyond those to form K, is O(n³) if the rank r is n. Otherwise it is
        O(n³ + (n − r) r m) if the other singular values are zero, and O(n³ + (n − r) n m) if not.

    Raises:
        ValueError: an input or a slope is infinite or NaN.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    >>> a = torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)
    >>> khatri_rao_rank(x, a)
    2
    """
    x, a = _scaled(inputs, "inputs"), _scaled(slopes, "slopes")
    gram = _gram(x, a, [])
    size, trace, eps = len(gram), float(gram.trace()), torch.finfo(gram.dtype).eps
    if trace == 0:
        return 0
    share = max(len(x), x.shape[1] * a.shape[1]) * eps
    # If K, less all rounding errors of K and the factor, has a Cholesky factor, every eigenvalue is large enough.
    margin = ((len(x) + x.shape[1] + a.shape[1] + 4) * eps + share**2) * trace
    diagonal = gram.diagonal().clone()
    gram.diagonal().sub_(margin)
    if not int(torch.linalg.cholesky_ex(gram).info):
        return size
    gram.diagonal().copy_(diagonal)
    return _count_by_elimination(x, a, gram, share**2 * _largest_eigenvalue(gram.matmul, diagonal, 20))


class _Elimination(NamedTuple):
    """Elimination of the rows `chosen` from the others: B_rest − weights · B_chosen; with a `basis`, of `basis`ᵀ B."""

    chosen: Tensor
    rest: Tensor
    weights: Tensor
    basis: Tensor | None = None

    def split(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen rows of columns (n, ...) of B, and the remainder of the other rows."""
        if self.basis is not None:
            columns = self.basis.T @ columns
        chosen = columns[self.chosen]
        return chosen, columns[self.rest].addmm_(self.weights, chosen, alpha=-1)


def _count_by_elimination(x: Tensor, a: Tensor, gram: Tensor, threshold: float) -> int:
    """Number of eigenvalues of K = `gram` above `threshold`; overwrites `gram`."""
    size, rank = len(gram), 0
    done: list[_Elimination] = []
    while (trace := float(gram.trace())) > tolerances.MAX_TRACE_PER_THRESHOLD * threshold:
        largest = float(gram.diagonal().max())
        smallest = max(tolerances.MIN_PIVOT_RATIO * largest, tolerances.MIN_PIVOT_PER_THRESHOLD * threshold)
        step, factor = _eliminate(gram, smallest)
        rank += len(step.chosen)
        if rank == size or _energy(x, a, [*done, step]) <= threshold:
            return rank
        _refine(x, a, done, step, factor)
        done.append(step)
        gram = _gram(x, a, done)
    if trace <= threshold:
        return rank
    # With Z B the remainder, the small eigenvalues λ of K are those of the pencil Z K Zᵀ − λ Z Zᵀ: use its inertia.
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    for n in range(0, size, _CHUNK_COLUMNS):
        weights = _rest(eye[:, n : n + _CHUNK_COLUMNS], done)
        gram.addmm_(weights, weights.T, alpha=-threshold)
    return rank + int((torch.linalg.eigvalsh(gram) > 0).sum())


def _eliminate(gram: Tensor, tolerance: float) -> tuple[_Elimination, Tensor]:
    """Rows that are independent by more than about `tolerance`, and their Cholesky factor; overwrites `gram`."""
    diagonal = gram.diagonal().clone()
    packed, pivots, count, _ = dpstrf(gram.cpu().numpy().T, tol=tolerance, lower=1, overwrite_a=1)
    order = torch.from_numpy(pivots).to(gram.device, torch.int64) - 1
    factor = torch.from_numpy(packed[:, :count]).to(gram.device)
    chosen = factor[:count].T.contiguous().T
    inverse = _largest_eigenvalue(partial(_solve, chosen), order[:count], 4)
    if inverse <= tolerances.MAX_PIVOT_PER_EIGENVALUE / tolerance:
        weights = torch.linalg.solve_triangular(chosen, factor[count:], upper=False, left=False)
        return _Elimination(order[:count], order[count:], weights), chosen
    # Rare: an eigenvalue is far below the pivots. Use eigenvectors instead of rows.
    gram.diagonal().copy_(diagonal)  # dpstrf leaves the triangle below it as it was
    values, basis = torch.linalg.eigh(gram)
    order, count = torch.arange(len(gram), device=gram.device), int((values <= tolerance).sum())
    step = _Elimination(order[count:], order[:count], gram.new_zeros(count, len(gram) - count), basis)
    return step, values[count:].sqrt().diag()


def _refine(x: Tensor, a: Tensor, done: list[_Elimination], step: _Elimination, factor: Tensor) -> None:
    """Eliminate the chosen rows from the rest a second time, to remove the rounding error of the first."""
    overlap = torch.zeros_like(step.weights)
    for chunk in _chunks(x, a):
        chosen, rest = step.split(_rest(chunk, done))
        overlap.addmm_(rest, chosen.T)
    step.weights.add_(_solve(factor, overlap.T).T)


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ b."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True)
    return solution


def _rest(columns: Tensor, eliminations: list[_Elimination]) -> Tensor:
    """The remainder of columns (n, ...) of B after eliminations."""
    for step in eliminations:
        _, columns = step.split(columns)
    return columns


def _energy(x: Tensor, a: Tensor, eliminations: list[_Elimination]) -> float:
    """Sum of squares of the remainder after eliminations: an upper bound on the squared singular values not counted."""
    return sum(float(torch.linalg.vector_norm(_rest(chunk, eliminations))) ** 2 for chunk in _chunks(x, a))


def _chunks(x: Tensor, a: Tensor) -> Iterator[Tensor]:
    """B in chunks of its columns, which are products of a unit and an input, or samples."""
    (size, width), units = x.shape, a.shape[1]
    if size <= width * units:
        step = max(1, _CHUNK_COLUMNS // width)
        for i, j in itertools.product(range(0, units, step), range(0, width, _CHUNK_COLUMNS)):
            yield (a[:, i : i + step, None] * x[:, None, j : j + _CHUNK_COLUMNS]).flatten(1)
    else:
        for n in range(0, size, _CHUNK_COLUMNS):
            yield (a[n : n + _CHUNK_COLUMNS].T[:, None, :] * x[n : n + _CHUNK_COLUMNS].T[None, :, :]).flatten(0, 1)


def _gram(x: Tensor, a: Tensor, eliminations: list[_Elimination]) -> Tensor:
    """K of the remainder after eliminations."""
    if not eliminations and len(x) <= x.shape[1] * a.shape[1]:
        return (a @ a.T).mul_(x @ x.T)
    size = len(eliminations[-1].rest) if eliminations else x.shape[1] * a.shape[1]
    gram = x.new_zeros(size, size)
    for chunk in _chunks(x, a):
        rest = _rest(chunk, eliminations)
        gram.addmm_(rest, rest.T)
    return gram


def _largest_eigenvalue(matrix: Callable[[Tensor], Tensor], like: Tensor, rounds: int) -> float:
    """A rough lower estimate of the largest eigenvalue of a positive semi-definite matrix, by power iteration."""
    vector = torch.randn(len(like), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like.device)
    for _ in range(rounds):
        vector = matrix(vector / torch.linalg.vector_norm(vector))
    return float(torch.linalg.vector_norm(vector))


def _scaled(values: Tensor, name: str) -> Tensor:
    """Values times a power of two, without rounding, so that their products and squares do not overflow."""
    values = values.detach()
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, got {largest}")
    return values * math.ldexp(1.0, -max(math.frexp(largest)[1], -1000))


_CHUNK_COLUMNS = 512
