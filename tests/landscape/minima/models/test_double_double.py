"""Double-double against exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape.minima.models.equations import double_double as dd

NUMBERS = st.floats(min_value=-1e20, max_value=1e20).filter(lambda x: x == 0 or abs(x) > 1e-20)


def pair(high, low=0.0):
    return dd.two_sum(*(torch.tensor([x], dtype=torch.float64) for x in (high, low * 2**-53 * high)))


def exact(x):
    return Fraction(float(x.hi)) + Fraction(float(x.lo))


PAIRS = st.tuples(NUMBERS, st.floats(min_value=-1, max_value=1)).map(lambda numbers: pair(*numbers))
OPERATIONS = [(dd.add, lambda a, b: a + b), (dd.multiply, lambda a, b: a * b), (dd.divide, lambda a, b: a / b)]


@pytest.mark.parametrize(("operation", "reference"), OPERATIONS)
@given(PAIRS, PAIRS)
def test_an_operation_has_a_relative_error_of_at_most_its_unit(operation, reference, x, y):
    if operation is dd.divide and not exact(y):
        return
    expected = reference(exact(x), exact(y))
    found = operation(x, y)
    assert abs(exact(found) - expected) <= Fraction(dd.UNIT) * abs(expected)
    assert abs(float(found.lo)) <= 2.0**-53 * abs(float(found.hi))


@given(NUMBERS, NUMBERS)
def test_sums_and_products_of_doubles_are_exact(a, b):
    for operation, expected in ((dd.two_sum, Fraction(a) + Fraction(b)), (dd.two_product, Fraction(a) * Fraction(b))):
        found = operation(*(torch.tensor([x], dtype=torch.float64) for x in (a, b)))
        assert exact(found) == expected


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40), st.integers(1, 5))
def test_a_product_of_matrices_is_that_of_fractions(seed, m, k, n):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        high = torch.randn(shape, generator=random, dtype=torch.float64)
        high *= 10.0 ** (6 * torch.randn(shape, generator=random, dtype=torch.float64))
        return dd.two_sum(high, high * 2**-54 * torch.rand(shape, generator=random, dtype=torch.float64))

    def at(x, i, j):
        return Fraction(float(x.hi[i, j])) + Fraction(float(x.lo[i, j]))

    x, y = draw(m, k), draw(k, n)
    found, of_doubles = dd.matmul(x, y), dd.matmul(x, y.hi)
    sums = dd.total(x, 1)
    for i in range(m):
        row = [at(x, i, p) for p in range(k)]
        error = Fraction(float(sums.hi[i])) + Fraction(float(sums.lo[i])) - sum(row)
        assert abs(error) <= k * Fraction(dd.UNIT) * sum(map(abs, row))
        for j in range(n):
            terms = [at(x, i, p) * at(y, p, j) for p in range(k)]
            bound = (k + 1) * Fraction(dd.UNIT) * sum(map(abs, terms))
            assert abs(at(found, i, j) - sum(terms)) <= bound
            terms = [at(x, i, p) * Fraction(float(y.hi[p, j])) for p in range(k)]
            assert abs(at(of_doubles, i, j) - sum(terms)) <= bound


def test_large_products_are_computed_in_blocks():
    x, y = torch.randn(300, 70).double(), torch.randn(70, 300).double()
    found = dd.matmul(dd.Pair.of(x), y)
    torch.testing.assert_close(found.hi, x @ y, rtol=1e-12, atol=1e-12)
    assert dd.matmul(dd.Pair.of(x[:0]), y).hi.shape == (0, 300)
    assert not bool(dd.matmul(dd.Pair.of(x[:, :0]), y[:0]).hi.any())


@given(st.floats(min_value=-299, max_value=0), st.floats(min_value=-1, max_value=1))
def test_the_exponential_is_that_of_a_hundred_digits(high, low):
    mpmath = pytest.importorskip("mpmath")
    x = pair(high, low)
    if float(x.hi) > 0:
        return
    with mpmath.workdps(100):
        expected = mpmath.exp(mpmath.mpf(float(x.hi)) + mpmath.mpf(float(x.lo)))
        found = dd.exponential(x)
        error = abs(mpmath.mpf(float(found.hi)) + mpmath.mpf(float(found.lo)) - expected)
        assert error <= dd.EXP_UNIT * expected


def test_small_exponentials_end():
    found = dd.exponential(pair(-1e6))
    assert float(found.hi) == pytest.approx(2.718281828459045**dd.SMALLEST_EXPONENT)
