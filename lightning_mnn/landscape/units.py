"""Units of measure: powers of two, by which numbers are multiplied and divided without rounding."""

from __future__ import annotations

import math


def unit_exponent(largest: float) -> int:
    """The k for which the largest of some magnitudes lies in [2ᵏ, 2ᵏ⁺¹); 0 where all are zero.

    >>> unit_exponent(6.0), unit_exponent(0.0), 2.0 ** unit_exponent(1e-200) <= 1e-200
    (2, 0, True)
    """
    return math.frexp(largest)[1] - 1 if largest > 0 else 0
