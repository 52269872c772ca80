"""Least squares on a region or on a face of it: the smallest θ whose predictions are nearest to a right-hand side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.linalg import eigvalsh_tridiagonal

from lightning_mnn.landscape import tolerances
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.regions.linear_map import FaceMap

MAX_GRAM_ROWS = 6000  # the largest Gram matrix that is formed: 0.3 GB, a second or two to factor
_MAX_SVD_OPERATIONS = 2e9  # about a second of one core: limit for the decomposition of a deficient matrix itself
_NUM_REFINEMENTS = 3


@dataclass(frozen=True)
class Solution:
    """A least-squares solution.

    Attributes:
        theta: the smallest θ on the face that minimises ‖b − F θ‖; the last iterate if an iteration did not converge.
        smallest: a lower bound on the smallest non-zero singular value of F on the face, zero being decided up to
            rounding; a tenth of an estimate for conjugate gradients; None where it is not known.
        onto: whether F is known to be surjective: rank N.
        method: the method, in words.
        finished: whether the method converged.
        too_long: whether the iteration was stopped because θ became longer than ``longest``.
    """

    theta: Tensor
    smallest: float | None
    onto: bool
    method: str
    finished: bool = True
    too_long: bool = False


def solve(face: FaceMap, rhs: Tensor, longest: float = float("inf"), max_iterations: int = 150) -> Solution:
    """The smallest least-squares solution of F θ = b on a face.

    The Gram matrix of the smaller side, at most 6,000 wide, is factored by Cholesky if it is definite, with refinement
    on the matrix itself. Otherwise a matrix of moderate size is solved by its singular values. For a larger one they
    are computed from the Gram matrix, and those below about 1e-7 of the largest, which it cannot resolve, are dropped.
    Still larger problems are solved by conjugate gradients on the normal equations. Their iterates never get shorter,
    so an iterate that is too long ends the iteration.

    Args:
        face: the linear map F; with several processes, each has its own samples.
        rhs: b, (N,), for this process's samples.
        longest: stop an iteration whose θ is longer than this.
        max_iterations: largest number of iterations of conjugate gradients.
    """
    dual = face.process_group.size == 1 and face.num_samples <= face.num_parameters
    if (face.num_samples if dual else face.num_parameters) > MAX_GRAM_ROWS:
        return _iterate(face, rhs, longest, max_iterations)
    matrix = face.gram() if dual else face.normal_matrix()
    solution = _by_cholesky(face, matrix, rhs, dual=dual)
    if solution is not None:
        return solution
    operations = face.num_samples * face.num_parameters * len(matrix)
    if face.process_group.size == 1 and operations <= _MAX_SVD_OPERATIONS:
        return _by_singular_values(face, rhs)
    return _by_eigenvalues(face, matrix, rhs, dual=dual)


def _apply(face: FaceMap, factor: Tensor, residual: Tensor, *, dual: bool) -> Tensor:
    """Pseudo-inverse of F times a residual, from the Cholesky factor of a Gram matrix."""
    if dual:
        return face.adjoint(torch.cholesky_solve(residual[:, None], factor)[:, 0])
    return face.project(torch.cholesky_solve(face.adjoint(residual)[:, None], factor)[:, 0])


def _by_cholesky(face: FaceMap, matrix: Tensor, rhs: Tensor, *, dual: bool) -> Solution | None:
    factor, info = torch.linalg.cholesky_ex(matrix)
    smallest = _smallest_eigenvalue(matrix, factor, info, tolerances.PROJECTION_ROUNDING_RATIO * face.size**2)
    if smallest is None:
        return None
    theta = _apply(face, factor, rhs, dual=dual)
    for _ in range(_NUM_REFINEMENTS):
        theta = theta + _apply(face, factor, rhs - face.predict(theta), dual=dual)
    return Solution(theta, smallest**0.5, onto=dual, method="Cholesky factor of the Gram matrix")


def _smallest_eigenvalue(matrix: Tensor, factor: Tensor, info: Tensor, floor: float) -> float | None:
    """A lower bound on the smallest eigenvalue, proved by one more Cholesky factor; None where rounding hides it.

    Inverse iteration estimates it from above; a shifted matrix that still has a factor bounds it from below.

    Args:
        matrix: a positive definite matrix.
        factor: its Cholesky factor.
        info: whether the factorisation failed; read together with the estimate, so that the host waits for a GPU once.
        floor: a lower bound on the rounding errors of the matrix.
    """
    vector = torch.linspace(1, 2, len(matrix), dtype=matrix.dtype, device=matrix.device).sin()[:, None]
    for _ in range(6):
        vector = torch.cholesky_solve(vector / vector.norm(), factor)
    failed, length, trace = fetched(info, vector.norm(), matrix.diagonal().sum())
    if failed or not length > 0:
        return None
    estimate, noise = 1 / length, max((len(matrix) + 10) * tolerances.FLOAT64_EPS * trace, floor)
    for share in (0.5, 0.05):
        shift = share * estimate
        if shift <= 10 * noise:
            return None
        shifted = matrix.clone()
        shifted.diagonal().sub_(shift + noise)
        if not int(torch.linalg.cholesky_ex(shifted)[1]):
            return shift
    return None


def _by_eigenvalues(face: FaceMap, matrix: Tensor, rhs: Tensor, *, dual: bool) -> Solution:
    values, vectors = torch.linalg.eigh(matrix)
    rounding = 10 * (len(matrix) + 10) * tolerances.FLOAT64_EPS * values[-1]
    nonzero = values > rounding.clamp(min=tolerances.PROJECTION_ROUNDING_RATIO * face.size**2)
    inverse = torch.where(nonzero, 1 / values, 0.0)

    def apply(residual: Tensor) -> Tensor:
        if dual:
            return face.adjoint(vectors @ (inverse * (vectors.T @ residual)))
        return face.project(vectors @ (inverse * (vectors.T @ face.adjoint(residual))))

    theta = apply(rhs)
    for _ in range(_NUM_REFINEMENTS):
        theta = theta + apply(rhs - face.predict(theta))
    smallest = float(values[nonzero][0]) ** 0.5 if bool(nonzero.any()) else None
    return Solution(theta, smallest, onto=False, method="eigenvalues of the Gram matrix")


def _by_singular_values(face: FaceMap, rhs: Tensor) -> Solution:
    left, values, right = torch.linalg.svd(face.dense(), full_matrices=False)
    rounding = tolerances.MAX_DROPPED_SINGULAR_RATIO * values[0]
    nonzero = values > rounding.clamp(min=tolerances.PROJECTION_ROUNDING_RATIO * face.size)
    inverse = torch.where(nonzero, 1 / values, 0.0)
    theta = rhs.new_zeros(face.num_parameters)
    for _ in range(_NUM_REFINEMENTS):
        theta = theta + right.T @ (inverse * (left.T @ (rhs - face.predict(theta))))
    rank = int(nonzero.sum())
    smallest = float(values[rank - 1]) if rank else None
    return Solution(face.project(theta), smallest, onto=rank == face.num_samples, method="singular values")


def _iterate(face: FaceMap, rhs: Tensor, longest: float, max_iterations: int) -> Solution:
    """Conjugate gradients on the normal equations (CGLS), restarted once from its result to remove rounding errors.

    Processes exchange only sums over samples. The lengths of the iterates never decrease (Steihaug 1983), and the Ritz
    values of the coefficients estimate the smallest singular value from above.
    """
    theta = rhs.new_zeros(face.num_parameters)
    spent, ritz = 0, float("inf")
    finished = too_long = False
    for _ in range(2):
        residual = rhs - face.predict(theta)
        gradient = face.adjoint(residual)
        goal = 4 * tolerances.FLOAT64_EPS * face.size * float(face.process_group.sum(residual @ residual)) ** 0.5
        direction, square = gradient, gradient @ gradient
        diagonal, off_diagonal, last = [], [], (0.0, 1.0)
        while not (finished := float(square) ** 0.5 <= goal) and spent < max_iterations and not too_long:
            safe_point()
            change = face.predict(direction)
            share = float(square) / float(face.process_group.sum(change @ change))
            theta, residual = theta + share * direction, residual - share * change
            gradient = face.adjoint(residual)
            ratio, square = float(gradient @ gradient) / float(square), gradient @ gradient
            direction = gradient + ratio * direction
            diagonal.append(1 / share + last[0] / last[1])
            off_diagonal.append(ratio**0.5 / share)
            last = (ratio, share)
            spent += 1
            too_long = float(theta.norm()) > longest
        if diagonal:
            ritz = min(ritz, float(eigvalsh_tridiagonal(diagonal, off_diagonal[:-1])[0]))
        if not finished:
            break
    return Solution(
        theta=face.project(theta),
        smallest=0.1 * ritz**0.5 if finished and 0 < ritz < float("inf") else None,
        onto=False,
        method=f"{spent} iterations of CG" + ("" if finished else ", not converged"),
        finished=finished,
        too_long=too_long,
    )
