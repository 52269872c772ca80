"""The equations of a stationary point on a face, Newton's method for them, and proofs that they have a zero.

Unknowns are u = (θ, λ, μ): F(u) = (∇ψ + Zᵀλ + Gᵀμ, z, G(θ − θ̂)), with the symmetries' basis G. At a zero μ = 0, since
the loss on the face is constant along symmetries. F′ is symmetric.

Kinks that others imply (see the module ``implied``) have no equation, and their λ are numbers, not unknowns: any λ with
∇ψ + Zᵀλ = 0 will do. A linear program chooses those of the largest growth.

Shapes: P free parameters, κ active kinks, κ' of them not implied, q symmetries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linprog

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.face import (
    derivatives,
    gamma,
    hessian,
    largest_curvature,
    largest_slope,
    outputs_jacobian,
)
from lightning_mnn.landscape.minima.models.equations.implied import implied_kinks
from lightning_mnn.landscape.minima.models.equations.lipschitz import Bounds, bounds_on_ball
from lightning_mnn.landscape.minima.models.equations.precise import Precise, precise_equations
from lightning_mnn.landscape.minima.models.equations.symmetries import Gauge, gauge_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.face import Derivatives, Face

_MAX_PROOF_ROUNDS = 6  # trial radii of a ball


@dataclass(frozen=True)
class System:
    """The equations of a face linearised at a point.

    Attributes:
        face: the face.
        theta: θ, (P,).
        multipliers: λ, (κ,).
        first: first derivatives.
        hessian: of ψ + λᵀz, (P, P).
        gauge: the symmetries.
        matrix: F′, (P + κ' + q, P + κ' + q).
        implied: which kinks are implied by the others, bool (κ,).
        likq: σ_min/σ_max of the rows of Z of the other kinks; None without kinks.
    """

    face: Face
    theta: Tensor
    multipliers: Tensor
    first: Derivatives
    hessian: Tensor
    gauge: Gauge
    matrix: Tensor
    implied: Tensor
    likq: float | None

    @property
    def residual(self) -> Tensor:
        """F at μ = 0."""
        first = self.first
        gradient = first.gradient + first.jacobian.T @ self.multipliers
        return torch.cat([gradient, first.switching[~self.implied], self.theta.new_zeros(len(self.gauge.basis))])

    @property
    def num_independent(self) -> int:
        """κ'."""
        return int((~self.implied).sum())

    @cached_property
    def precise(self) -> Precise:
        """The equations and the growth in double-double."""
        return precise_equations(self.face, self.theta, self.multipliers)

    @cached_property
    def inertia(self) -> Tensor:
        """The eigenvalues of F′."""
        found: Tensor = torch.linalg.eigvalsh(self.matrix)
        return found

    @cached_property
    def absolute(self) -> Derivatives:
        """First derivatives of the absolute evaluation."""
        return derivatives(self.face, self.theta.abs(), absolute=True)

    @property
    def inertia_error(self) -> float:
        """A bound on the error of these eigenvalues."""
        largest = float(self.inertia.abs().max())
        return tolerances.MATRIX_EIGENVALUE_ROUNDINGS * len(self.matrix) * tolerances.FLOAT64_EPS * largest

    @property
    def growth(self) -> Tensor:
        """The growth b + Lᵀλ − |λ|, (κ,)."""
        return self.first.normal + self.first.coupling.T @ self.multipliers - self.multipliers.abs()

    @cached_property
    def kernel(self) -> Tensor:
        """An orthonormal basis of the kernel of Z and G, as columns."""
        rows = torch.cat([self.first.jacobian[~self.implied], self.gauge.basis])
        if not len(rows):
            return torch.eye(len(self.theta), dtype=torch.float64)
        found: Tensor = torch.linalg.qr(rows.T, mode="complete")[0][:, len(rows) :]
        return found

    @cached_property
    def tangential_values(self) -> Tensor:
        """Eigenvalues of the Hessian on this kernel."""
        found: Tensor = torch.linalg.eigvalsh(self.kernel.T @ self.hessian @ self.kernel)
        return found

    def tangential(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the Hessian on the kernel, and their vectors in θ as columns."""
        values, vectors = torch.linalg.eigh(self.kernel.T @ self.hessian @ self.kernel)
        return values, self.kernel @ vectors


def multipliers_at(first: Derivatives) -> Tensor:
    """The λ nearest to a + Zᵀλ = 0."""
    if not len(first.normal):
        return first.normal
    found: Tensor = torch.linalg.lstsq(first.jacobian.T, -first.gradient[:, None], driver="gelsd").solution[:, 0]
    return found


def multipliers_of_largest_growth(first: Derivatives, rank: int) -> Tensor:
    """Of the λ nearest to a + Zᵀλ = 0, that whose smallest growth b + Lᵀλ − |λ| is largest, by a linear program.

    Args:
        first: first derivatives.
        rank: the rank of Z.
    """
    nearest = multipliers_at(first)
    scale = float(first.normal.abs().max())
    null = torch.linalg.svd(first.jacobian)[0][:, rank:].numpy()  # λ + null μ are as near
    if not null.shape[1] or not scale > 0:
        return nearest
    own, coupled = nearest.numpy() / scale, first.coupling.T.numpy()
    ones, base = np.ones((len(own), 1)), first.normal.numpy() / scale + coupled @ own
    rows = [np.c_[sign * null - coupled @ null, ones] for sign in (1.0, -1.0)]  # t + ±λ − Lᵀλ ≤ b
    found = linprog(
        c=np.r_[np.zeros(null.shape[1]), -1.0],
        A_ub=np.concatenate(rows),
        b_ub=np.r_[base - own, base + own],
        bounds=[(None, None)] * null.shape[1] + [(None, 1.0)],
        method="highs",
        options={"primal_feasibility_tolerance": tolerances.MAX_INFEASIBILITY},
    )
    return nearest if found.x is None else nearest + scale * torch.from_numpy(null @ found.x[:-1])


def linearise(face: Face, theta: Tensor, multipliers: Tensor | None = None) -> System:
    """The equations at a point; without multipliers, with those nearest to stationarity, and of the largest growth."""
    first = derivatives(face, theta)
    implied, likq = torch.zeros(len(first.normal), dtype=torch.bool), _independence(first.jacobian)
    if likq is not None and likq < tolerances.MIN_LIKQ:
        implied = implied_kinks(face, theta)
        likq = _independence(first.jacobian[~implied])
    if multipliers is None:
        is_plain = not bool(implied.any())
        rank = int((~implied).sum())
        multipliers = multipliers_at(first) if is_plain else multipliers_of_largest_growth(first, rank)
    curvature, gauge = hessian(face, theta, multipliers), gauge_of(face, theta)
    border = torch.cat([first.jacobian[~implied], gauge.basis])
    zeros = theta.new_zeros(len(border), len(border))
    matrix = torch.cat([torch.cat([curvature, border.T], dim=1), torch.cat([border, zeros], dim=1)])
    return System(face, theta, multipliers, first, curvature, gauge, matrix, implied, likq)


def _independence(jacobian: Tensor) -> float | None:
    """σ_min/σ_max; None without rows, 0 with more rows than columns."""
    if not len(jacobian):
        return None
    if jacobian.shape[0] > jacobian.shape[1]:
        return 0.0
    values = torch.linalg.svdvals(jacobian)
    return float(values[-1] / values[0]) if float(values[0]) > 0 else 0.0


class Factors:
    """F′ factored, for several steps of Newton's method."""

    def __init__(self, system: System) -> None:
        self._lu, self._pivots, info = torch.linalg.lu_factor_ex(system.matrix)
        self._symmetries, self._independent = len(system.gauge.basis), ~system.implied
        self._singular = bool(int(info))

    def step(self, theta: Tensor, multipliers: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
        """θ and λ after a step; None where the matrix is singular."""
        if self._singular:
            return None
        solution = torch.linalg.lu_solve(self._lu, self._pivots, -residual[:, None])[:, 0]
        if not bool(solution.isfinite().all()):
            return None
        p, kinks = len(theta), int(self._independent.sum())
        following = multipliers.clone()
        following[self._independent] += solution[p : p + kinks]
        return theta + solution[:p], following

    def precise_step(self, face: Face, theta: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same with the equations in double-double, on a face."""
        return self.step(theta, multipliers, self.residual(precise_equations(face, theta, multipliers)))

    def residual(self, precise: Precise) -> Tensor:
        """F at μ = 0."""
        none = precise.gradient.new_zeros(self._symmetries)
        return torch.cat([precise.gradient, precise.switching[self._independent], none])


@dataclass(frozen=True)
class Ball:
    """A ball that holds exactly one zero of the equations.

    Attributes:
        radius: r.
        bounds: bounds on the ball.
        rounding: γ.
    """

    radius: float
    bounds: Bounds


def prove_zero(system: System) -> Ball | None:
    """A ball around the point with one zero of F in it, by the theorem of Newton and Kantorovich; None if not proved.

    With A ≈ F′⁻¹, η ≥ ‖A F‖, δ ≥ ‖1 − A F′‖ with all rounding errors, and a Lipschitz constant M of F′ on the ball:
    η + δ r + ½‖A‖M r² ≤ r and δ + ‖A‖M r < 1. F′ is then invertible on the ball. F is evaluated in double-double.
    """
    face, theta, size = system.face, system.theta, system.multipliers.abs()
    smallest = float(system.inertia.abs().min()) - system.inertia_error
    inverse, info = torch.linalg.inv_ex(system.matrix)
    if not smallest > 0 or int(info) or not bool(inverse.isfinite().all()):
        return None
    p, kinks, independent = len(theta), system.num_independent, ~system.implied
    sums = gamma(len(system.matrix) + 2)
    magnitude, precise = inverse.abs(), system.precise
    residual = system.residual.clone()
    residual[:p], residual[p : p + kinks] = precise.gradient, precise.switching[independent]
    residual_error = torch.zeros_like(residual)
    absolute = system.absolute
    residual_error[:p] = absolute.gradient + absolute.jacobian.T @ size
    residual_error[p : p + kinks] = absolute.switching[independent]
    residual_error = precise.rounding(face.model) * residual_error + tolerances.UNIT_ROUNDOFF * residual.abs()
    # ‖A E‖ for the errors E of F′ is at most ‖A‖ times bounds on the norms of the blocks of E.
    error = largest_curvature(face, theta.abs(), size) + 2 * float(absolute.jacobian.norm())
    error = face.model.second_rounding * error + sums * float(system.matrix.norm())
    eta = float((inverse @ residual).norm() + (magnitude @ (residual_error + sums * residual.abs())).norm())
    identity = torch.eye(len(inverse), dtype=torch.float64)
    delta = float((identity - inverse @ system.matrix).norm()) * (1 + 1e-6)
    delta += sums * float(inverse.norm()) * float(system.matrix.norm())
    norm = (1 + delta) / smallest * (1 + 1e-6)
    delta += norm * error
    return _ball(face, theta, system.multipliers, norm, eta, delta)


def _ball(face: Face, theta: Tensor, multipliers: Tensor, norm: float, eta: float, delta: float) -> Ball | None:
    eta, delta = 1.01 * eta, 1.01 * delta + tolerances.FLOAT64_EPS
    if not delta < 0.5:
        return None
    radius = max(eta / (1 - delta), 1e-300) * 1.25
    for _ in range(_MAX_PROOF_ROUNDS):
        bounds = bounds_on_ball(face, theta, multipliers, radius)
        change = bounds.curvature_change
        if not norm * change * radius < 1 - delta:
            return None
        if eta + delta * radius + 0.5 * norm * change * radius**2 <= radius:
            return Ball(radius, bounds)
        radius *= 2
    return None


class Fit:
    """The equations f(θ) = y, z(θ) = 0 linearised at a point.

    Attributes:
        jacobian: J, of outputs and switching values, (N·K + κ, P).
        gram: J Jᵀ.
    """

    def __init__(self, face: Face, theta: Tensor) -> None:
        self.face, self.theta = face, theta
        self.precise = precise_equations(face, theta, theta.new_zeros(face.num_kinks))
        self.residual = torch.cat([self.precise.misfit.flatten(), self.precise.switching])
        self.jacobian = outputs_jacobian(face, theta)
        self.gram = self.jacobian @ self.jacobian.T
        self._factor, info = torch.linalg.cholesky_ex(self.gram)
        self.is_definite = not bool(int(info))

    def step(self) -> Tensor:
        """θ after the smallest step to a zero of the linearised equations."""
        if self.is_definite:
            weights = torch.cholesky_solve(self.residual[:, None], self._factor)
            return self.theta - (self.jacobian.T @ weights)[:, 0]
        step: Tensor = torch.linalg.lstsq(self.jacobian, self.residual[:, None], driver="gelsd").solution[:, 0]
        return self.theta - step

    def inverse(self) -> Tensor | None:
        """X ≈ (J Jᵀ)⁻¹; None where it is singular."""
        if not self.is_definite:
            return None
        found: Tensor = torch.cholesky_inverse(self._factor)
        return found if bool(found.isfinite().all()) else None


def prove_fit(fit: Fit) -> Ball | None:
    """A ball with a point where every output is its target and every active kink is at zero; None if not proved.

    The equations F(θ) = (f − y, z) have a Jacobian J of full row rank. With X ≈ (J Jᵀ)⁻¹ and A = Jᵀ X the theorem holds
    for g(v) = F(θ + A v): g′(0) = J A ≈ 1, δ = ‖1 − J Jᵀ X‖, ‖A‖² = ‖Xᵀ J Jᵀ X‖ ≤ ‖X‖ (1 + δ), and ‖A‖² M bounds the
    change of g′.
    """
    face, theta, inverse = fit.face, fit.theta, fit.inverse()
    if inverse is None:
        return None
    at = theta.abs()
    f, z = face.evaluate(at, at.new_zeros(face.num_kinks), absolute=True)
    residual_error = fit.precise.rounding(face.model) * torch.cat([(f + face.model.loss.targets.abs()).flatten(), z])
    residual_error += tolerances.UNIT_ROUNDOFF * fit.residual.abs()
    eta = float(fit.residual.norm() + residual_error.norm())
    size, length = float(inverse.norm()), float(fit.jacobian.norm())
    sums = gamma(len(theta) + len(inverse) + 4)
    delta = float((torch.eye(len(inverse), dtype=torch.float64) - fit.gram @ inverse).norm())
    delta += 2 * sums * length**2 * size
    if not delta < 0.5:
        return None
    norm = (size * (1 + delta)) ** 0.5 * (1 + 1e-6)
    delta += face.model.second_rounding * largest_slope(face, at) * norm
    eta, delta = 1.01 * eta, 1.01 * delta + tolerances.FLOAT64_EPS
    if not delta < 0.5:
        return None
    step = max(eta / (1 - delta), 1e-300) * 1.25
    for _ in range(_MAX_PROOF_ROUNDS):
        bounds = bounds_on_ball(face, theta, theta.new_zeros(face.num_kinks), norm * step)
        change = norm**2 * float(torch.cat([bounds.outputs[1], bounds.switching[1]]).norm())
        if not delta + change * step < 1:
            return None
        if eta + delta * step + 0.5 * change * step**2 <= step:
            return Ball(norm * step, bounds)
        step *= 2
    return None
