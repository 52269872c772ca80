"""Checks of arguments that several parts share."""

from __future__ import annotations

import numbers
from typing import Any


def positive_integer(name: str, value: Any) -> int:
    """The value as an int.

    Raises:
        ValueError: it is not a whole number of at least 1.

    >>> positive_integer("width", 3)
    3
    """
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be at least 1 and a whole number, got {value!r}")
    return int(value)
