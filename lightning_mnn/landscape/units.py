"""Units of measure: powers of two, so that numbers are multiplied and divided by them without rounding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def unit_exponent(largest: float) -> int:
    """The k with 2ᵏ ≤ largest < 2ᵏ⁺¹ for the largest of some magnitudes; 0 if it is zero.

    >>> unit_exponent(6.0), unit_exponent(0.0), 2.0 ** unit_exponent(1e-200) <= 1e-200
    (2, 0, True)
    """
    return math.frexp(largest)[1] - 1 if largest > 0 else 0


def times_power(values: Tensor, exponent: int) -> Tensor:
    """Values times 2 to an exponent, in two steps, as for example 2¹⁰³⁰ overflows.

    >>> times_power(torch.tensor([1e-310], dtype=torch.float64), 1030) > 1
    tensor([True])
    """
    half = exponent // 2
    return values if exponent == 0 else values * 2.0**half * 2.0 ** (exponent - half)


def row_powers(rows: Tensor) -> Tensor:
    """The power of two for each row (…, d) that scales its largest entry into [½, 1); 1 for rows of zeros.

    >>> row_powers(torch.tensor([[6.0, -1.0], [0.0, 0.0]], dtype=torch.float64))
    tensor([0.1250, 1.0000], dtype=torch.float64)
    """
    largest = rows.abs().amax(-1)
    mantissa, _ = torch.frexp(largest)
    powers = mantissa / largest.clamp(min=torch.finfo(rows.dtype).tiny)  # exact: they differ by a power of two
    return torch.where(powers > 0, powers, 1.0)
