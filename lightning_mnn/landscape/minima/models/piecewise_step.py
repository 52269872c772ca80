"""The minimum of a local model of the objective: quadratic in the parameters, piecewise linear across kinks.

With candidates for active kinks, whose values are z, the model of a move Δ is

    aᵀΔ + ½ ΔᵀHΔ + bᵀ|z|,    z = z₀ + ZΔ + L(|z| − |z₀|).

Its local minimum is found with an active set: for signs σ of z, zero on active kinks, z = M⁻¹(z₀ − L|z₀| + ZΔ) with
M = 1 − L diag σ, and Δ solves a quadratic program with equations. H enters once, as H⁻¹ = R Rᵀ: then all is done with
the matrix Z H⁻¹ Zᵀ of the candidates.

Shapes: P free parameters, m candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_MIN_RIDGE = 1e-13  # of the matrix of active kinks, relative to its largest diagonal number
_MIN_CURVATURE_RATIO = 1e-9  # eigenvalue of the Hessian, relative to the largest, that is no rounding
_MAX_ROUNDS_PER_CANDIDATE = 4
_CHANGES_PER_RESTART = 64  # of a sign, after which M⁻¹ is computed again
_MIN_ROUNDS = 50
_MAX_NEGATIVE_GROWTH = 1e-12  # growth, relative to the largest number in b, that counts as zero


class Curvature:
    """A Hessian made positive: on the kernel of the active kinks' Z, and across it where the first leaves it negative.

    In a basis of the kernel and of its complement H = [[T, Cᵀ], [C, N]]. The eigenvalues of T, and of the complement
    N − C T⁻¹ Cᵀ, are replaced by their absolute values. So moves on the face are those of Newton's method.
    """

    def __init__(self, hessian: Array, jacobian: Array) -> None:
        kinks = len(jacobian)
        basis = np.linalg.qr(jacobian.T, mode="complete")[0] if kinks else np.eye(len(hessian))
        self._across, kernel = basis[:, :kinks], basis[:, kinks:]
        values, vectors = np.linalg.eigh(kernel.T @ hessian @ kernel)
        self._largest = max(float(np.abs(values).max(initial=0.0)), 1e-300)
        self._values, self._kernel = self._positive(values), kernel @ vectors
        self._coupling = self._across.T @ hessian @ self._kernel
        self._normal = self._across.T @ hessian @ self._across

    def _positive(self, values: Array) -> Array:
        # A direction without curvature is left alone: the gradient in it is rounding.
        size = np.abs(values)
        return np.where(size > _MIN_CURVATURE_RATIO * self._largest, size, self._largest)

    def root(self, damping: float) -> Array:
        """R with R Rᵀ = H⁻¹, of H with a multiple of its largest eigenvalue added, (P, P)."""
        values = self._values + damping * self._largest
        ratio = self._coupling / values
        rest, vectors = np.linalg.eigh(self._normal - ratio @ self._coupling.T)
        rest = self._positive(rest) + damping * self._largest
        across = (self._across - self._kernel @ ratio.T) @ vectors
        return np.concatenate([self._kernel / np.sqrt(values), across / np.sqrt(rest)], axis=1)


@dataclass(frozen=True)
class LocalModel:
    """The model.

    Attributes:
        gradient: a, (P,).
        normal: b, (m,).
        switching: z₀, (m,).
        jacobian: Z, (m, P).
        coupling: L, (m, m), strictly lower triangular.
    """

    gradient: Array
    normal: Array
    switching: Array
    jacobian: Array
    coupling: Array

    def value(self, curvature: Array, move: Array) -> float:
        """The model at a move, for tests and predictions."""
        z, change = self.switching.copy(), self.jacobian @ move
        size = np.abs(self.switching)
        for k in range(len(z)):  # L is strictly lower triangular
            z[k] += change[k] + self.coupling[k, :k] @ (np.abs(z[:k]) - size[:k])
        return float(self.gradient @ move + 0.5 * move @ curvature @ move + self.normal @ (np.abs(z) - size))


@dataclass(frozen=True)
class ModelMinimum:
    """A local minimum of the model.

    Attributes:
        move: Δ, (P,).
        signs: σ, (m,), 0 on active kinks.
        multipliers: λ of all candidates: on active kinks the multipliers, elsewhere the derivatives in z, (m,).
        to_kinks: H⁻¹ Z_σᵀ (Z_σ H⁻¹ Z_σᵀ)⁻¹ of the active kinks: the shortest move that changes their z, (P, κ).
        is_complete: whether the active set ended.
        rounds: number of its changes.
        value: the model there, with the damped H.
    """

    move: Array
    signs: NDArray[np.int64]
    multipliers: Array
    to_kinks: Array
    is_complete: bool
    rounds: int
    value: float


def minimise(model: LocalModel, root: Array, active: NDArray[np.bool_], max_rounds: int | None = None) -> ModelMinimum:
    """A local minimum of the model, from Δ = 0 and a first guess of the active kinks.

    Args:
        model: the model.
        root: R with H⁻¹ = R Rᵀ.
        active: the first active kinks, (m,).
        max_rounds: largest number of changes of the active set; None: 4 m.
    """
    search = _ActiveSet(model, root, active)
    rounds = max(_MIN_ROUNDS, _MAX_ROUNDS_PER_CANDIDATE * len(active))
    rounds = rounds if max_rounds is None else min(rounds, max_rounds)
    is_complete = any(search.advance() for _ in range(rounds))
    return search.result(is_complete=is_complete)


class _ActiveSet:
    """The state of the search: y = −t Rᵀa − Yᵀv, with Y = Z R."""

    def __init__(self, model: LocalModel, root: Array, active: NDArray[np.bool_]) -> None:
        self.model, self.root = model, root
        self.force = root.T @ model.gradient
        self.rows = model.jacobian @ root
        self.gram = self.rows @ self.rows.T
        self.start = model.switching - model.coupling @ np.abs(model.switching) - self.rows @ self.force
        self.z = model.switching.copy()
        self.signs = np.where(active, 0, np.where(self.z >= 0, 1, -1))
        self.t, self.v = 0.0, np.zeros(len(active))
        self.smallest = -_MAX_NEGATIVE_GROWTH * float(np.abs(model.normal).max(initial=0.0))
        self._is_coupled = bool(model.coupling.any())
        self._changes = 0
        self._restart()

    def advance(self) -> bool:
        """One change of the active set; whether the minimum is reached."""
        model, signs = self.model, self.signs
        of_gram, start = self._of_gram, self._of_start
        on = np.flatnonzero(signs == 0)
        weights = signs * model.normal
        free = start - of_gram @ weights
        weights[on] += _solve(of_gram[np.ix_(on, on)], free[on])
        target = start - of_gram @ weights
        target[on] = 0.0
        v = self._inverse.T @ weights if self._is_coupled else weights
        crossing = (signs != 0) & (target * signs < 0)
        if crossing.any():
            places = np.flatnonzero(crossing)
            ahead = np.maximum(self.z[places] * signs[places], 0.0)
            fractions = ahead / (ahead - target[places] * signs[places])
            first = int(fractions.argmin())
            fraction = float(fractions[first])
            self.z = self.z + fraction * (target - self.z)
            self.t, self.v = self.t + fraction * (1 - self.t), self.v + fraction * (v - self.v)
            self._change(int(places[first]), 0)
            return False
        self.z, self.t, self.v = target, 1.0, v
        growth = (model.normal + model.coupling.T @ v - np.abs(v))[on]
        if not len(on) or float(growth.min()) >= self.smallest:
            return True
        kink = on[int(growth.argmin())]
        self._change(int(kink), 1 if v[kink] >= 0 else -1)
        return False

    def _restart(self) -> None:
        """M⁻¹ = 1 + L diag σ + (L diag σ)² + …, with as many terms as there are layers; and M⁻¹ Y Yᵀ M⁻ᵀ."""
        self._of_gram, self._of_start = self.gram, self.start
        if not self._is_coupled:
            return
        coupling = self.model.coupling * self.signs
        found, power = np.eye(len(self.signs)) + coupling, coupling
        while (power := coupling @ power).any():
            found += power
        self._inverse = found
        self._of_gram, self._of_start = found @ self.gram @ found.T, found @ self.start

    def _change(self, place: int, sign: int) -> None:
        """Change one sign, and so a column of M: as L is strictly lower triangular, M⁻¹ changes by δ u wᵀ."""
        change = float(sign - self.signs[place])
        self.signs = self.signs.copy()
        self.signs[place] = sign
        self._changes += 1
        if not self._is_coupled:
            return
        if self._changes % _CHANGES_PER_RESTART == 0:  # so that rounding errors do not add up
            self._restart()
            return
        u, w = self._inverse @ self.model.coupling[:, place], self._inverse[place].copy()
        of_w = self.gram @ w
        half = self._inverse @ of_w + (change / 2 * float(w @ of_w)) * u
        mixed = np.outer(change * u, half)
        self._of_gram += mixed
        self._of_gram += mixed.T
        self._of_start = self._of_start + change * float(w @ self.start) * u
        self._inverse += np.outer(change * u, w)

    def result(self, *, is_complete: bool) -> ModelMinimum:
        on = np.flatnonzero(self.signs == 0)
        scaled = -self.t * self.force - self.rows.T @ self.v
        sizes = np.abs(self.z) - np.abs(self.model.switching)
        value = float(self.force @ scaled + 0.5 * scaled @ scaled + self.model.normal @ sizes)
        self._restart()
        rows = self._inverse[on] @ self.rows if self._is_coupled else self.rows[on]
        to_kinks = self.root @ _solve(rows @ rows.T, rows).T
        return ModelMinimum(self.root @ scaled, self.signs, self.v, to_kinks, is_complete, self._changes, value)


def _solve(matrix: Array, right: Array) -> Array:
    """The solution of a system of a positive semidefinite matrix, with a ridge if it is singular."""
    if not len(matrix):
        return right
    ridge = _MIN_RIDGE * max(float(matrix.diagonal().max()), 1e-300)
    while True:
        try:
            found: Array = cho_solve(cho_factor(matrix + ridge * np.eye(len(matrix)), check_finite=False), right)
        except LinAlgError:
            ridge *= 100
        else:
            return found
