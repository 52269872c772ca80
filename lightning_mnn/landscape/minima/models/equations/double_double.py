"""Sums and products in double-double: a number is an unevaluated sum hi + lo of two doubles, |lo| ≤ u |hi|.

The rounding errors of sums and products of doubles are doubles, and further sums and products give them (Knuth,
Dekker). Each is a kernel of its own, which no compiler can fuse with another: the results are the same on every
processor. With u = 2⁻⁵³ a sum has a relative error of at most 3.01 u², a product of at most 10 u², a quotient of at
most 20 u² (Joldes, Muller and Popescu 2017), all below ``UNIT``, where nothing underflows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

UNIT = 2.0**-100  # bound on the relative error of one operation
EXP_UNIT = 2.0**-80  # bound on the relative error of an exponential
SMALLEST_EXPONENT = -300.0  # exponents below are replaced by it: its exponential is 1e-130
_SPLITTER = 134217729.0  # 2²⁷ + 1: both halves of a double then have 26 bits (Veltkamp)
_BLOCK_NUMBERS = 2**14  # products that are held at once
_LOG_2 = (0.6931471805599453, 2.3190468138462996e-17, 5.707708438416212e-34)  # doubles with the sum log 2
_HALVINGS = 9  # e^r = (e^(r/512))^512
_TAYLOR_TERMS = 10  # of e^s − 1 for |s| ≤ log 2/1024, to 2⁻¹²⁰


class Pair(NamedTuple):
    """A double-double number hi + lo in each place.

    >>> one = Pair.of(torch.ones(1, dtype=torch.float64))
    >>> add(one, Pair.of(one.hi * 2**-80)).lo.item() == 2**-80
    True
    """

    hi: Tensor
    lo: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Pair:
        """Doubles."""
        return cls(values, torch.zeros_like(values))

    def map(self, move: Callable[[Tensor], Tensor]) -> Pair:
        """Both parts moved, without arithmetic."""
        return Pair(move(self.hi), move(self.lo))

    def __neg__(self) -> Pair:
        """−x."""
        return Pair(-self.hi, -self.lo)

    def __abs__(self) -> Pair:
        """|x|."""
        sign = torch.where(self.hi < 0, -1.0, 1.0).to(self.hi.dtype)
        return Pair(sign * self.hi, sign * self.lo)


def two_sum(a: Tensor, b: Tensor) -> Pair:
    """A + b exactly."""
    total = a + b
    of_b = total - a
    return Pair(total, (a - (total - of_b)) + (b - of_b))


def two_product(a: Tensor, b: Tensor) -> Pair:
    """A·b exactly."""
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return Pair(product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high


def _normalised(hi: Tensor, lo: Tensor) -> Pair:
    """The pair with the sum of two doubles, the first of which is larger."""
    total = hi + lo
    return Pair(total, lo - (total - hi))


def add(x: Pair, y: Pair) -> Pair:
    """X + y."""
    high, low = two_sum(x.hi, y.hi), two_sum(x.lo, y.lo)
    first = _normalised(high.hi, high.lo + low.hi)
    return _normalised(first.hi, first.lo + low.lo)


def multiply(x: Pair, y: Pair | Tensor) -> Pair:
    """X·y."""
    if not isinstance(y, Pair):
        product = two_product(x.hi, y)
        return _normalised(product.hi, product.lo + x.lo * y)
    product = two_product(x.hi, y.hi)
    return _normalised(product.hi, product.lo + (x.hi * y.lo + x.lo * y.hi))


def divide(x: Pair, y: Pair) -> Pair:
    """X/y."""
    quotient = x.hi / y.hi
    rest = add(x, -multiply(y, quotient))
    second = rest.hi / y.hi
    rest = add(rest, -multiply(y, second))
    return add(_normalised(quotient, second), Pair.of(rest.hi / y.hi))


def total(x: Pair, axis: int) -> Pair:
    """The sum along an axis, by halves; of n numbers its error is at most n ``UNIT`` Σ |x|.

    Only the leading parts are added with their rounding errors, as in a compensated sum (Ogita, Rump and Oishi 2005).
    """
    high, low = x.hi.movedim(axis, 0), x.lo.movedim(axis, 0)
    if not len(high):
        return Pair.of(high.new_zeros(high.shape[1:]))
    while (count := len(high)) > 1:
        half = count // 2
        first, second = high[:half], high[half : 2 * half]
        sums = first + second
        of_second = sums - first
        errors = (first - (sums - of_second)) + (second - of_second)
        errors = errors + (low[:half] + low[half : 2 * half])
        if count % 2:
            sums, errors = torch.cat([sums, high[-1:]]), torch.cat([errors, low[-1:]])
        high, low = sums, errors
    return _normalised(high[0], low[0])


def matmul(x: Pair, y: Pair | Tensor) -> Pair:
    """The product of matrices (m, k) and (k, l), with the error of ``total``.

    >>> x = Pair.of(torch.tensor([[1e20, 1.0, -1e20]], dtype=torch.float64))
    >>> matmul(x, torch.ones(3, 1, dtype=torch.float64)).hi.item()
    1.0
    """
    y = y if isinstance(y, Pair) else Pair(y, y.new_zeros(()).expand(y.shape))
    inner, columns = y.hi.shape
    if not inner or not columns or not len(x.hi):
        return Pair.of(x.hi.new_zeros(len(x.hi), columns))
    a, b = x.map(lambda t: t.T[:, :, None].contiguous()), y.map(lambda t: t[:, None, :].contiguous())
    (a_high, a_low), (b_high, b_low) = _halves(a.hi), _halves(b.hi)
    rows, parts = max(1, _BLOCK_NUMBERS // (inner * columns)), []
    for start in range(0, len(x.hi), rows):
        own = slice(start, start + rows)
        product = a.hi[:, own] * b.hi
        error = a_high[:, own] * b_high
        error -= product
        for left, right in ((a_high, b_low), (a_low, b_high), (a_low, b_low), (a.lo, b.hi), (a.hi, b.lo)):
            error += left[:, own] * right
        parts.append(total(Pair(product, error), 0))
    return Pair(torch.cat([part.hi for part in parts]), torch.cat([part.lo for part in parts]))


def exponential(x: Pair) -> Pair:
    """The exponential of x ≤ 0, relative error ``EXP_UNIT``; below ``SMALLEST_EXPONENT`` the value there."""
    below = x.hi < SMALLEST_EXPONENT
    x = Pair(x.hi.masked_fill(below, SMALLEST_EXPONENT), x.lo.masked_fill(below, 0.0))
    powers = (x.hi / _LOG_2[0]).round()
    rest = x
    for part in _LOG_2:
        rest = add(rest, -two_product(powers, torch.full_like(powers, part)))
    rest = rest.map(lambda t: t * 2.0**-_HALVINGS)
    ones = Pair.of(torch.ones_like(x.hi))
    series = ones
    for term in range(_TAYLOR_TERMS, 1, -1):  # 1 + s/2 (1 + s/3 (…))
        series = add(ones, divide(multiply(series, rest), Pair.of(torch.full_like(x.hi, float(term)))))
    less_one = multiply(series, rest)
    for _ in range(_HALVINGS):  # (1 + m)² − 1 = 2 m + m²
        less_one = add(less_one.map(lambda t: 2 * t), multiply(less_one, less_one))
    scale = torch.ldexp(torch.ones_like(powers), powers)
    return add(ones, less_one).map(lambda t: t * scale)
