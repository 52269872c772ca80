"""Gaussian measures of many cones at once, approximately: expectation propagation (EP), without random numbers.

The cones are those of the units of one layer: {w : σ_n x_n·w > 0 ∀n} for inputs x_n that all units share, and signs σ
of each. EP replaces every constraint by a Gaussian *site* exp(−½ τ_n s² + ν_n s) of s = b_n·w with b_n = σ_n x_n/‖x_n‖,
so that q ∝ N(w; 0, I) × all sites is a normal distribution of precision I + Bᵀ diag(τ) B and shift Bᵀν. It repeats for
all constraints at once: take the site n out of the marginal of s under q (the *cavity*), cut the cavity off at s = 0,
and choose the site so that q has the mean and the variance of that. The log measure is the log of the integral of q:
Σ log Φ(cavity mean/sd) + normalisers of the sites − ½ log det(precision) + ½ μᵀ·precision·μ (Cunningham, Hennig &
Lacoste-Julien 2011, arXiv 1111.6832).

Shapes: K cones, N constraints, d dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.utilities.interruption import safe_point

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_DAMPINGS = ((80, 0.8), (120, 0.3))  # numbers of iterations, and the fraction of each change that is taken in them
_USUAL_ITERATIONS = 22
_MATRIX_PRODUCT_FACTOR = 1 / 20  # cost of a multiplication in a matrix product, relative to another one
_MEMORY = 2**28  # bytes for one batch of cones, and for one chunk of products of inputs
_MIN_SHARING_CONES = 8  # cones from which products of inputs, formed once for all of them, save time
_MIN_SKEWNESS = 1e-3  # of the constraints that the correction counts: pairs of smaller ones give less than 1e-7
_ROWS_PER_BLOCK = 1024  # rows of correlations formed at once
_ARRAYS_PER_SAMPLE, _ARRAYS_PER_SQUARE = 16, 4  # arrays of N and of d² numbers that one cone needs


@dataclass(frozen=True)
class Approximation:
    """Gaussian approximations q of K cones.

    Attributes:
        log_measures: log measures by EP, (K,). They have no error bar of their own.
        means: μ of q, (K, d).
        factors: lower triangular L, where L Lᵀ is the precision of q, (K, d, d).
        margins: b_n·μ, (K, N).
        deviations: standard deviations of b_n·w under q, (K, N).
        scores: cavity means in units of the cavities' standard deviations, (K, N).
        valid: whether EP converged to a μ inside the cone, and rounding errors are small, bool (K,).
    """

    log_measures: Tensor
    means: Tensor
    factors: Tensor
    margins: Tensor
    deviations: Tensor
    scores: Tensor
    valid: Tensor

    def __getitem__(self, cones: Tensor | slice) -> Approximation:
        """Those of some cones."""
        return Approximation(*(getattr(self, item.name)[cones] for item in fields(self)))


def approximate(directions: Tensor, sides: Tensor) -> Approximation:
    """EP for K cones {w : σ_n x_n·w > 0 ∀n} that share their inputs.

    The result is exact for orthogonal constraints. For random cones and cones of trained networks it is low by 0.1 to
    0.3 nats, whatever N and d. Equal constraints would count twice: see :func:`distinct_constraints`.

    Cost: about 20 iterations, each of 2 N d² multiplications per cone in matrix products. Memory: some 256 MiB, and the
    result; the products of the inputs are formed in chunks.

    Args:
        directions: x_n/‖x_n‖, distinct, (N, d), float64.
        sides: σ_n of each cone, ±1, (K, N).

    >>> half = approximate(torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    >>> round(float(half.log_measures.exp()), 12), bool(half.valid)
    (0.25, True)
    """
    num, dim = directions.shape
    per_cone = 8 * (_ARRAYS_PER_SAMPLE * num + _ARRAYS_PER_SQUARE * dim**2)
    batches = torch.split(sides.to(directions), max(1, _MEMORY // per_cone))
    products = _Products(directions, min(len(sides), len(batches[0])))
    parts = [_iterate(products, batch) for batch in batches]
    return Approximation(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(Approximation)))


def ep_multiplications(num_samples: int, dim: int) -> float:
    """Approximate cost of one cone, in multiplications outside of matrix products, about 1 ns each.

    >>> ep_multiplications(320, 40) < ep_multiplications(320, 80)
    True
    """
    return _USUAL_ITERATIONS * num_samples * (2 * dim**2 * _MATRIX_PRODUCT_FACTOR + _ARRAYS_PER_SAMPLE)


def distinct_constraints(directions: Tensor) -> Tensor:
    """One row of each set of parallel ones, up to rounding, among rows (N, d) of unit length: bool (N,).

    In a cone that is not empty, two parallel inputs are the same constraint, and EP would count it twice.

    >>> distinct_constraints(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)).tolist()
    [True, True, False]
    """
    probe = torch.randn(directions.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = (directions @ probe.to(directions)).abs()
    order = keys.argsort(stable=True)
    close = keys[order].diff() <= tolerances.MAX_SAME_DIRECTION_GAP * probe.norm().item()
    distinct = torch.ones(len(directions), dtype=torch.bool, device=directions.device)
    run: list[int] = []  # rows with keys close to each other that differ in direction
    indices, last = order.tolist(), -1
    for place in (close.nonzero()[:, 0] + 1).tolist():
        if place != last + 1:
            run = [indices[place - 1]]
        row, last = indices[place], place
        gaps = (directions[run] @ directions[row]).sign()[:, None] * directions[run] - directions[row]
        if bool((gaps.norm(dim=1) <= tolerances.MAX_SAME_DIRECTION_GAP).any()):
            distinct[row] = False
        else:
            run.append(row)
    return distinct


def third_order_correction(approximation: Approximation, directions: Tensor, sides: Tensor) -> Tensor:
    """What EP misses of the log measures by the skewness of pairs of constraints, (K,).

    The correction is Σ_{m<n} κ_m κ_n ρ_mn³/6 with the skewness κ of the cut cavities and the correlations ρ under q
    (Opper, Paquet & Winther 2013, arXiv 1301.2724). It explains nearly all of the error for random cones. If many
    constraints are nearly parallel, the higher orders count as well, and it is only a sign of that.

    Args:
        approximation: of K cones.
        directions: x_n/‖x_n‖, (N, d).
        sides: σ_n of each cone, (K, N).
    """
    scores = approximation.scores
    mills = math.sqrt(2 / math.pi) / torch.special.erfcx(-scores * math.sqrt(0.5))
    kept = 1 - mills * (mills + scores)
    skewness = mills * ((mills + scores) * (2 * mills + scores) - 1) / kept.pow(1.5)
    found = torch.zeros_like(approximation.log_measures)
    for k, (skew, factor) in enumerate(zip(skewness, approximation.factors, strict=True)):
        relevant = (skew.abs() > _MIN_SKEWNESS).nonzero()[:, 0]
        factors = sides[k, relevant] / approximation.deviations[k, relevant]
        rows = torch.linalg.solve_triangular(factor, (factors[:, None] * directions[relevant]).T, upper=False).T
        for block, some in zip(
            torch.split(rows, _ROWS_PER_BLOCK), torch.split(skew[relevant], _ROWS_PER_BLOCK), strict=True
        ):
            safe_point()
            found[k] += some @ ((block @ rows.T) ** 3 @ skew[relevant])
        found[k] -= skew[relevant].square().sum()
    return found / 12


class _Products:
    """Products of the inputs: Bᵀ diag(τ) B and the squared lengths b_nᵀ Σ b_n, which do not depend on signs.

    For many cones both are one matrix product with the x_ni x_nj, (N, d(d+1)/2). If that is too large, or there are few
    cones, they are computed for one cone after the other.

    Args:
        directions: (N, d).
        num_cones: number of cones of a batch.
    """

    def __init__(self, directions: Tensor, num_cones: int) -> None:
        self.directions = directions
        num, dim = directions.shape
        self._rows, self._columns = torch.triu_indices(dim, dim, device=directions.device)
        self._pairs: Tensor | None = None
        if num_cones >= _MIN_SHARING_CONES and 8 * num * len(self._rows) <= _MEMORY:
            self._pairs = directions[:, self._rows] * directions[:, self._columns]
            self._counts = torch.where(self._rows == self._columns, 1.0, 2.0).to(directions)

    def gram(self, weights: Tensor) -> Tensor:
        """Σ_n τ_n x_n x_nᵀ, (K, d, d), for weights τ (K, N)."""
        dim = self.directions.shape[1]
        found = torch.zeros(len(weights), dim, dim, dtype=weights.dtype, device=weights.device)
        if self._pairs is not None:
            flat = weights @ self._pairs
            found[:, self._rows, self._columns] = flat
            found[:, self._columns, self._rows] = flat
            return found
        for chunk in self._chunks():
            rows = self.directions[chunk]
            for total, some in zip(found, weights[:, chunk], strict=True):
                total.addmm_((rows * some[:, None]).T, rows)
        return found

    def squared_lengths(self, factors: Tensor) -> Tensor:
        """x_nᵀ (L Lᵀ)⁻¹ x_n, (K, N), for lower triangular L (K, d, d)."""
        if self._pairs is not None:
            covariances = torch.cholesky_inverse(factors)
            return (covariances[:, self._rows, self._columns] * self._counts) @ self._pairs.T
        found = self.directions.new_empty(len(factors), len(self.directions))
        for chunk in self._chunks():
            columns = self.directions[chunk].T
            for lengths, factor in zip(found, factors, strict=True):
                lengths[chunk] = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum(0)
        return found

    def _chunks(self) -> Iterator[slice]:
        num, dim = self.directions.shape
        size = max(1, _MEMORY // (8 * 4 * dim))
        for first in range(0, num, size):
            safe_point()
            yield slice(first, first + size)


def _iterate(products: _Products, sides: Tensor) -> Approximation:
    """EP for one batch of cones: those that have converged, or cannot, leave the iteration."""
    num_cones, (num, dim) = len(sides), products.directions.shape
    blank = products.directions.new_zeros
    found = Approximation(
        log_measures=blank(num_cones).fill_(math.nan),
        means=blank(num_cones, dim),
        factors=torch.eye(dim).to(products.directions).repeat(num_cones, 1, 1),
        margins=blank(num_cones, num),
        deviations=blank(num_cones, num),
        scores=blank(num_cones, num),
        valid=torch.zeros(num_cones, dtype=torch.bool, device=sides.device),
    )
    if not num:  # all of space
        found.log_measures.zero_()
        found.valid.fill_(value=True)
        return found
    pending = torch.arange(num_cones, device=sides.device)
    precisions, shifts = blank(num_cones, num), blank(num_cones, num)
    for damping in (damping for count, damping in _DAMPINGS for _ in range(count)):
        safe_point()
        state = _State.of(products, sides, precisions, shifts)
        change = torch.maximum(
            ((state.precisions - precisions) * state.variances).abs().amax(-1),
            ((state.shifts - shifts) * state.variances.sqrt()).abs().amax(-1),
        )
        sound = state.sound & change.isfinite()
        done = sound & (change <= tolerances.MAX_SITE_CHANGE)
        if bool(done.any()):
            _store(found, pending[done], state, precisions, done)
        going = sound & ~done
        if not bool(going.any()):
            break
        precisions, shifts = (
            torch.lerp(precisions, state.precisions, damping),
            torch.lerp(shifts, state.shifts, damping),
        )
        if not bool(going.all()):
            pending, sides, precisions, shifts = pending[going], sides[going], precisions[going], shifts[going]
    return found


def _store(found: Approximation, where: Tensor, state: _State, precisions: Tensor, done: Tensor) -> None:
    found.log_measures[where] = state.log_measures(precisions)[done]
    found.means[where], found.factors[where] = state.means[done], state.factors[done]
    found.margins[where], found.deviations[where] = state.margins[done], state.variances[done].sqrt()
    found.scores[where] = state.scores[done]
    inside = (state.margins > 0).all(-1) & (state.variances > tolerances.MIN_SITE_VARIANCE).all(-1)
    found.valid[where] = inside[done] & found.log_measures[where].isfinite()


@dataclass(frozen=True)
class _State:
    """q for given sites, the cavities, and the sites that follow.

    Attributes:
        factors: L, (K, d, d).
        means: μ, (K, d).
        pulls: Bᵀν, (K, d).
        margins: means of b_n·w, (K, N).
        variances: its variances, (K, N).
        scores: cavity mean/sd, (K, N).
        cavity_precisions: (K, N).
        cavity_shifts: (K, N).
        precisions: τ of the following sites, (K, N).
        shifts: ν of them, (K, N).
        sound: whether the precision is positive definite and all cavities are normal distributions, (K,).
    """

    factors: Tensor
    means: Tensor
    pulls: Tensor
    margins: Tensor
    variances: Tensor
    scores: Tensor
    cavity_precisions: Tensor
    cavity_shifts: Tensor
    precisions: Tensor
    shifts: Tensor
    sound: Tensor

    @classmethod
    def of(cls, products: _Products, sides: Tensor, precisions: Tensor, shifts: Tensor) -> _State:
        directions = products.directions
        precision = products.gram(precisions)
        precision.diagonal(dim1=-2, dim2=-1).add_(1)
        factors, failed = torch.linalg.cholesky_ex(precision)
        pulls = (shifts * sides) @ directions
        means = torch.cholesky_solve(pulls[..., None], factors)[..., 0]
        margins = (means @ directions.T) * sides
        variances = products.squared_lengths(factors)
        cavity_precisions = 1 / variances - precisions
        cavity_shifts = margins / variances - shifts
        sound = (failed == 0) & (cavity_precisions > 0).all(-1)
        roots = cavity_precisions.clamp(min=0).sqrt()
        scores = cavity_shifts / roots
        # The inverse Mills ratio φ/Φ, and the loss of variance by the cut, which is its negative derivative.
        mills = math.sqrt(2 / math.pi) / torch.special.erfcx(-scores * math.sqrt(0.5))
        loss = mills * (mills + scores)
        kept = 1 - loss
        return cls(
            factors=factors,
            means=means,
            pulls=pulls,
            margins=margins,
            variances=variances,
            scores=scores,
            cavity_precisions=cavity_precisions,
            cavity_shifts=cavity_shifts,
            precisions=cavity_precisions * loss / kept,
            shifts=(mills * roots + loss * cavity_shifts) / kept,
            sound=sound,
        )

    def log_measures(self, precisions: Tensor) -> Tensor:
        """Log integrals of q, (K,), for the precisions of the sites of which it is made."""
        exponents = self.margins.square() / self.variances - self.cavity_shifts.square() / self.cavity_precisions
        sites = torch.special.log_ndtr(self.scores) - torch.log1p(-precisions * self.variances) / 2 - exponents / 2
        determinants = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # half of the log of each
        total: Tensor = sites.sum(-1) - determinants + (self.means * self.pulls).sum(-1) / 2
        return total
