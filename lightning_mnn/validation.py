"""Checks of arguments that several parts share."""

from __future__ import annotations

import numbers
from typing import Any

import torch

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def positive_integer(name: str, value: Any) -> int:
    """The value as an int.

    Raises:
        ValueError: it is not a whole number of at least 1, or it is True.

    >>> positive_integer("width", 3)
    3
    >>> positive_integer("width", True)
    Traceback (most recent call last):
    ValueError: width must be at least 1 and a whole number, got True
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be at least 1 and a whole number, got {value!r}")
    return int(value)


def dtype_named(name: str) -> torch.dtype:
    """The dtype "float32" or "float64".

    Raises:
        ValueError: another name.

    >>> dtype_named("float64")
    torch.float64
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
