"""Errors that several parts raise or catch, and how they end a run."""

from __future__ import annotations

from enum import StrEnum


class DivergenceError(ArithmeticError):
    """Training reached values that are not finite."""


class EarlyEnd(StrEnum):
    """Why a run ended before its training did, as ``summary.json`` records it under ``ended_by``."""

    DIVERGENCE = "divergence"
    INTERRUPTION = "interruption"
