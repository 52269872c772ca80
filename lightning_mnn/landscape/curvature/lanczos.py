"""Extreme eigenvalues of a symmetric operator that is given by its products with vectors.

Shapes: n numbers in a vector, k products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import brentq
from scipy.special import betaincinv

from lightning_mnn.landscape import tolerances
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.seeding import generator as seeded
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ends:
    """Bounds on the ends of a spectrum after some products.

    Attributes:
        smallest: the smallest Ritz value.
        below: by how much λ_min may be below it, without rounding errors.
        largest: the largest Ritz value.
        above: by how much λ_max may be above it, without rounding errors.
        rounding: estimate of the rounding errors of each.
    """

    smallest: float
    below: float
    largest: float
    above: float
    rounding: float

    @property
    def exhausted(self) -> bool:
        """Whether more products are useless because rounding errors dominate."""
        return max(self.below, self.above) <= self.rounding


@dataclass(frozen=True)
class Spectrum:
    """The ends of the spectrum of a symmetric operator.

    λ_min ≤ ``smallest`` and ``largest`` ≤ λ_max are always true, up to ``rounding``. λ_min ≥ ``smallest`` −
    ``smallest_error`` and λ_max ≤ ``largest`` + ``largest_error`` are true with probability 1 − ``failure`` each, over
    the random start; after n products they are certain, up to rounding.

    Attributes:
        smallest: the Rayleigh quotient of ``vector``.
        smallest_error: by how much λ_min may be below it; rounding included.
        largest: the largest Ritz value.
        largest_error: by how much λ_max may be above it; rounding included.
        vector: the Ritz vector of the smallest Ritz value, of length 1, (n,).
        residual: ‖H v − θ v‖ of it, from one more product: some eigenvalue lies within this of ``smallest``.
        rounding: estimate of the rounding errors, from the spacing of floats and from the asymmetry of the products.
        products: number of products with the operator.
        failure: the probability that an error bound may fail.
    """

    smallest: float
    smallest_error: float
    largest: float
    largest_error: float
    vector: Tensor
    residual: float
    rounding: float
    products: int
    failure: float


def extreme_eigenvalues(
    matvec: Callable[[Tensor], Tensor],
    n: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    max_products: int = 128,
    tolerance: float = 1e-3,
    enough: Callable[[Ends], bool] | None = None,
    failure: float = 1e-3,
    memory_budget: int = 2**31,
    seed: int = 0,
) -> Spectrum:
    """Smallest and largest eigenvalue of a symmetric n × n operator H, by Lanczos from a random start.

    After k products the basis v_1, …, v_k+1 and the tridiagonal T_k with the off-diagonal numbers β_1, …, β_k fulfil
    v_k+1 = p_k(H) v_1, where p_k(x) = Π_j (x − θ_j)/β_j and θ_j are the eigenvalues of T_k (Ritz values). As v_k+1 has
    length 1, the part c of v_1 along an eigenvector of λ_min obeys c |p_k(λ_min)| ≤ 1. The square of that part of a
    random unit vector has the distribution Beta(1/2, (n − 1)/2). So c exceeds a quantile of this distribution with
    probability 1 − ``failure``, for all k at once, and below θ_min |p_k| increases away from it. This bounds λ_min from
    below, and in the same way λ_max from above (J. van Dorsselaer, M. Hochstenbach, H. van der Vorst, Computing
    probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos method, SIAM J. Matrix Anal.
    Appl. 22, 2000). The bound needs no estimate of the spread of the spectrum, and is sharper if fewer eigenvalues are
    near its ends. ``products_needed`` gives a number of products that is enough for any spectrum.

    Each new vector is orthogonalised twice against all earlier ones. If nothing is left of it (the basis spans an
    invariant subspace), a new random vector follows, so that n products give all eigenvalues. The host waits for a GPU
    once per product, in addition to the waits of the products themselves.

    Args:
        matvec: v ↦ H v for vectors (n,) of the dtype, on the device.
        n: numbers in a vector.
        dtype: float32 or float64, of the vectors; computations with T_k are in float64.
        device: device of the vectors.
        max_products: largest number of products, not counting one to check the vector.
        tolerance: stop when both errors are below this times the spread λ_max − λ_min, or below rounding.
        enough: stopping rule, called after each product, instead of ``tolerance``.
        failure: probability that an error bound may fail.
        memory_budget: bytes for the vectors, n times the size of a number for each product. When they are used up, the
            products stop, and the error bounds are those of the products so far.
        seed: seed of the random start.

    Raises:
        ValueError: an argument is out of its range, or the budget is too small for two vectors.
        FloatingPointError: a product is not finite.

    >>> diagonal = torch.linspace(-1, 3, 200, dtype=torch.float64)
    >>> found = extreme_eigenvalues(lambda v: diagonal * v, 200)
    >>> found.smallest - found.smallest_error <= -1 <= found.smallest + found.rounding
    True
    >>> found.products < 120 and found.smallest_error < 0.005
    True
    """
    steps = _max_steps(n, dtype, max_products, failure, memory_budget)
    lanczos = _Lanczos(n, steps, dtype, device, seed, failure)
    ends = lanczos.step(matvec)
    while lanczos.num_products < steps and not (_done(ends, tolerance) if enough is None else enough(ends)):
        safe_point()
        ends = lanczos.step(matvec)
    vector = lanczos.vector()
    image = _image(matvec, vector)
    rayleigh = vector @ image
    finite, quotient, residual = fetched(image.isfinite().all(), rayleigh, (image - rayleigh * vector).norm())
    _check(finite)
    rounding = max(ends.rounding, 2 * abs(quotient - ends.smallest))
    return Spectrum(
        quotient,
        quotient - ends.smallest + ends.below + rounding,
        ends.largest,
        ends.above + rounding,
        vector,
        residual,
        rounding,
        lanczos.num_products + 1,
        failure,
    )


def products_needed(n: int, relative_error: float, failure: float = 1e-3) -> int:
    """Number of products that is enough for an error of λ_min, relative to λ_max − λ_min, for any spectrum.

    After k products the error exceeds ε (λ_max − λ_min) only if the start's part along an eigenvector of λ_min is below
    1/cosh((2k − 1) artanh √ε); the probability of that is below 1.648 √n exp(−(2k − 1) √ε) (J. Kuczyński,
    H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start, SIAM J.
    Matrix Anal. Appl. 13, 1992, theorem 4.2). The exact distribution of that part is used here.

    >>> products_needed(1_000_000, 1e-2), products_needed(1_000_000, 1e-3)
    (72, 227)
    """
    if not 0 < relative_error < 1:
        raise ValueError(f"relative_error must lie between 0 and 1, got {relative_error}")
    angle = math.acosh(math.exp(-_log_smallest_part(n, failure)))
    return min(n, math.ceil((angle / math.atanh(math.sqrt(relative_error)) + 1) / 2))


@dataclass
class _Block:
    """Products between two random starts: diagonal α and off-diagonal β of T; the last β leads out of the block."""

    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)

    def ritz_values(self) -> Array:
        """Eigenvalues of its T, ascending."""
        values = eigh_tridiagonal(np.asarray(self.alpha), np.asarray(self.beta[:-1]), eigvals_only=True)
        return np.asarray(values, dtype=np.float64)


class _Lanczos:
    """The basis, and T in blocks."""

    def __init__(
        self, n: int, steps: int, dtype: torch.dtype, device: torch.device | str, seed: int, failure: float
    ) -> None:
        self.n = n
        self.num_products = 0
        self._log_part = _log_smallest_part(n, failure)
        self._random = seeded(seed)
        self._basis = torch.empty(steps, n, dtype=dtype, device=device)
        self._blocks = [_Block()]
        self._closed: list[Ends] = []
        self._scale = self._defect = 0.0
        self._next = self._fresh()

    def step(self, matvec: Callable[[Tensor], Tensor]) -> Ends:
        """Compute one more product, and return the bounds after it."""
        block, eps = self._blocks[-1], torch.finfo(self._basis.dtype).eps
        self._basis[self.num_products] = self._next
        image = _image(matvec, self._basis[self.num_products])
        finite = image.isfinite().all()
        basis = self._basis[: self.num_products + 1]
        parts = basis @ image
        image = image - parts @ basis
        rest = basis @ image
        image = image - rest @ basis
        parts = parts + rest
        if block.beta:
            parts[-2] -= block.beta[-1]
        is_finite, beta, alpha, defect = fetched(finite, image.norm(), parts[-1], parts[:-1].norm())
        _check(is_finite)
        block.alpha.append(alpha)
        self._defect = max(self._defect, defect)
        self._scale = max(self._scale, abs(block.alpha[-1]) + beta + (block.beta[-1] if block.beta else 0.0))
        self.num_products += 1
        broken = beta <= tolerances.MAX_BREAKDOWN_ROUNDINGS * eps * self._scale
        block.beta.append(0.0 if broken else beta)
        ends = self._ends(block)
        if broken:
            self._closed.append(ends)
            self._blocks.append(_Block())
            if self.num_products < len(self._basis):
                self._next = self._fresh()
        else:
            self._next = image / beta
        return ends

    def vector(self) -> Tensor:
        """The Ritz vector of the smallest Ritz value, (n,)."""
        start, best, found = 0, math.inf, None
        for block in self._blocks:
            size = len(block.alpha)
            if size:
                values, vectors = eigh_tridiagonal(
                    np.asarray(block.alpha), np.asarray(block.beta[:-1]), select="i", select_range=(0, 0)
                )
                if values[0] < best:
                    best, found = float(values[0]), (start, torch.from_numpy(vectors[:, 0]))
            start += size
        assert found is not None  # noqa: S101 (a step comes first)
        start, weights = found
        vector: Tensor = weights.to(self._basis) @ self._basis[start : start + len(weights)]
        vector /= vector.norm()
        return vector

    def _ends(self, block: _Block) -> Ends:
        values = block.ritz_values()
        smallest, largest = float(values[0]), float(values[-1])
        lowest, highest = smallest, largest
        if self.num_products < self.n and block.beta[-1] > 0:
            log_product = float(np.log(block.beta).sum()) - self._log_part
            lowest -= _beyond(values - smallest, log_product)
            highest += _beyond(largest - values, log_product)
        for other in self._closed:
            smallest, lowest = min(smallest, other.smallest), min(lowest, other.smallest - other.below)
            largest, highest = max(largest, other.largest), max(highest, other.largest + other.above)
        eps = torch.finfo(self._basis.dtype).eps
        rounding = tolerances.EIGENVALUE_ROUNDINGS * eps * self._scale + 2 * self._defect
        return Ends(smallest, smallest - lowest, largest, highest - largest, rounding)

    def _fresh(self) -> Tensor:
        """A random vector of length 1, orthogonal to the basis."""
        vector: Tensor = torch.randn(self.n, generator=self._random, dtype=torch.float64).to(self._basis)
        for _ in range(3):
            basis = self._basis[: self.num_products]
            vector -= (basis @ vector) @ basis
            vector /= vector.norm()
        return vector


def _beyond(distances: Array, log_product: float) -> float:
    """An upper bound, tight to 1e-6, on the g ≥ 0 with Π_j (g + d_j) = exp(log_product); d_j ≥ 0, and one d_j is 0."""
    high = log_product / len(distances)  # as each factor is at least g
    if len(distances) == 1:
        return math.exp(high)
    with np.errstate(divide="ignore"):
        widest = np.logaddexp(np.log(distances), high).sum() - high  # the other factors at g = exp(high), and no more
    low = min(log_product - float(widest), high)

    def excess(log_gap: float) -> float:
        with np.errstate(divide="ignore"):
            return float(np.logaddexp(np.log(distances), log_gap).sum()) - log_product

    if excess(low) >= 0:
        return math.exp(low)
    if excess(high) <= 0:
        return math.exp(high) * (1 + 1e-6)
    root: float = brentq(excess, low, high, xtol=1e-7)
    return math.exp(root) * (1 + 1e-6)


def _log_smallest_part(n: int, failure: float) -> float:
    """Log of the quantile that a random unit vector's part along a given direction exceeds with 1 − failure."""
    return 0.0 if n == 1 else 0.5 * math.log(float(betaincinv(0.5, (n - 1) / 2, failure)))


def _done(ends: Ends, tolerance: float) -> bool:
    error = max(ends.below, ends.above) + ends.rounding
    return ends.exhausted or error <= tolerance * (ends.largest - ends.smallest)


def _image(matvec: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    image = matvec(vector).to(vector)
    if image.shape != vector.shape:
        raise ValueError(f"matvec must return {tuple(vector.shape)} numbers, got {tuple(image.shape)}")
    return image


def _check(finite: float) -> None:
    """Raise an error for a product that is not finite."""
    if not finite:
        raise FloatingPointError("a product with the operator is not finite: the loss overflows, or has no curvature")


def _max_steps(n: int, dtype: torch.dtype, max_products: int, failure: float, memory_budget: int) -> int:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if max_products < 1:
        raise ValueError(f"max_products must be at least 1, got {max_products}")
    if not 0 < failure < 1:
        raise ValueError(f"failure must lie between 0 and 1, got {failure}")
    if dtype not in {torch.float32, torch.float64}:
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    room = memory_budget // (n * dtype.itemsize)
    if room < min(n, 2):
        raise ValueError(f"memory_budget must be enough for two vectors of {n} numbers, got {memory_budget} bytes")
    return min(n, max_products, room)
