"""Errors that several parts raise or catch."""

from __future__ import annotations


class DivergenceError(ArithmeticError):
    """Training reached values that are not finite."""
