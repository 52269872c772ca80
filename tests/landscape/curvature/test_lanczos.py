import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mnn.landscape import extreme_eigenvalues, products_needed


def rotated(eigenvalues, seed=0):
    """A symmetric matrix with the eigenvalues, in random directions."""
    n = len(eigenvalues)
    drawn = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(drawn)[0]
    matrix = (basis * eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def chebyshev(n):
    """The hardest spectrum for Lanczos: points crowd at both ends."""
    return torch.cos(torch.arange(n, dtype=torch.float64) * math.pi / (n - 1))


def few_large(n):
    """Like a network's: a few large eigenvalues, a bulk near zero, one slightly negative."""
    bulk = 1e-3 * torch.rand(n, dtype=torch.float64)
    bulk[:4] = torch.tensor([1.0, 2.0, 5.0, -2e-3])
    return bulk


def tiny_gaps(n):
    clusters = torch.tensor([-1.0, -0.5, 2.0], dtype=torch.float64).repeat_interleave(n // 3 + 1)[:n]
    return clusters + 1e-9 * torch.rand(n, dtype=torch.float64)


SPECTRA = [chebyshev, few_large, tiny_gaps, lambda n: torch.rand(n, dtype=torch.float64) - 0.3]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
def test_n_products_give_the_dense_answer(n, distinct, few, seed):
    """Also where the products stay in a small space, as with few distinct eigenvalues, so that fresh starts are due."""
    random = torch.Generator().manual_seed(seed)
    eigenvalues = torch.randn(n, dtype=torch.float64, generator=random)
    if few:
        eigenvalues = eigenvalues[torch.randint(min(distinct, n), (n,), generator=random)]
    matrix = rotated(eigenvalues, seed)
    exact = torch.linalg.eigvalsh(matrix)
    found = extreme_eigenvalues(lambda v: matrix @ v, n, enough=lambda _: False, seed=seed)
    assert found.products == n + 1
    assert abs(found.smallest - exact[0]) <= 1e-12
    assert abs(found.largest - exact[-1]) <= 1e-12
    assert found.smallest_error <= 1e-12
    assert found.largest_error <= 1e-12
    assert found.residual <= 1e-11
    assert torch.allclose(matrix @ found.vector, found.smallest * found.vector, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bounds_fail_no_oftener_than_they_say(spectrum, dtype):
    torch.manual_seed(0)
    failure, trials, n, missed, errors = 0.2, 150, 400, [0, 0], []
    for seed in range(trials):
        diagonal = spectrum(n).to(dtype)
        exact = diagonal.double()
        found = extreme_eigenvalues(
            lambda v, diagonal=diagonal: diagonal * v,
            n,
            dtype=dtype,
            max_products=10 + seed % 20,
            failure=failure,
            seed=seed,
        )
        low, high = float(exact.min()), float(exact.max())
        assert low <= found.smallest + found.rounding
        assert high >= found.largest - found.rounding
        missed[0] += low < found.smallest - found.smallest_error
        missed[1] += high > found.largest + found.largest_error
        errors.append(found.smallest_error / (high - low))
    allowed = failure * trials + 3 * math.sqrt(failure * (1 - failure) * trials)
    assert max(missed) <= allowed
    assert sorted(errors)[trials // 2] < 0.06  # and they say something


def test_bounds_are_not_idle():
    """With one product the bound is the start's part along the eigenvector, and fails about as often as it says."""
    missed = 0
    diagonal = torch.zeros(50, dtype=torch.float64)
    diagonal[0] = -1.0
    for seed in range(300):
        found = extreme_eigenvalues(lambda v: diagonal * v, 50, max_products=1, failure=0.3, seed=seed)
        missed += found.smallest - found.smallest_error > -1
    assert 60 <= missed <= 120


@pytest.mark.parametrize("n", [1, 2, 7])
def test_zero_and_multiples_of_the_identity(n):
    zero = extreme_eigenvalues(torch.zeros_like, n)
    assert (zero.smallest, zero.smallest_error, zero.largest, zero.residual) == (0, 0, 0, 0)
    triple = extreme_eigenvalues(lambda v: 3 * v, n)
    assert triple.products == 2
    assert abs(triple.smallest - 3) <= 1e-14
    assert triple.smallest_error <= 1e-13


def test_never_looser_than_the_bound_for_any_spectrum():
    """``products_needed`` holds for the hardest spectrum too, and few of them are needed for a network's."""
    for size in (100, 1000):
        for relative in (0.1, 0.01):
            needed = products_needed(size, relative)
            diagonal = chebyshev(size)
            found = extreme_eigenvalues(lambda v, d=diagonal: d * v, size, max_products=needed, tolerance=0.0)
            assert found.smallest - float(diagonal.min()) <= relative * 2
            assert found.smallest_error <= 1.1 * relative * 2
    torch.manual_seed(0)
    diagonal = few_large(1000)
    assert extreme_eigenvalues(lambda v: diagonal * v, 1000).products < products_needed(1000, 1e-3) / 10


def test_noise_of_the_products_is_seen():
    """Products of a matrix that is not quite symmetric: the rounding tells, and covers what it does."""
    torch.manual_seed(0)
    matrix = rotated(chebyshev(60)) + 1e-5 * torch.randn(60, 60, dtype=torch.float64)
    found = extreme_eigenvalues(lambda v: matrix @ v, 60)
    assert found.rounding >= 1e-5
    assert abs(found.smallest + 1) <= found.smallest_error


def test_memory_budget_limits_the_products():
    diagonal = chebyshev(1000)
    found = extreme_eigenvalues(lambda v: diagonal * v, 1000, memory_budget=12 * 1000 * 8 + 7)
    assert found.products == 13
    assert found.smallest + 1 <= found.smallest_error
    assert found.smallest_error > 0.05  # honest: twelve products do not tell more


def test_starts_are_repeatable():
    diagonal = chebyshev(100)
    first, second, other = (
        extreme_eigenvalues(lambda v: diagonal * v, 100, max_products=9, seed=seed) for seed in (0, 0, 1)
    )
    assert first.smallest == second.smallest
    assert torch.equal(first.vector, second.vector)
    assert first.smallest != other.smallest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"max_products": 0}, "max_products must be at least 1"),
        ({"failure": 0.0}, "failure must lie between"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64"),
        ({"memory_budget": 100}, "memory_budget must be enough for two vectors of 10 numbers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        extreme_eigenvalues(lambda v: v, **{"n": 10, **arguments})
    with pytest.raises(ValueError, match="relative_error must lie between"):
        products_needed(10, 1.0)


def test_bad_products():
    with pytest.raises(FloatingPointError, match="not finite"):
        extreme_eigenvalues(lambda v: v * math.inf, 3)
    with pytest.raises(ValueError, match=r"matvec must return \(3,\) numbers"):
        extreme_eigenvalues(lambda v: v[:2], 3)
