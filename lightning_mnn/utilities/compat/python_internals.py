"""Undocumented parts of Python's standard library."""

from __future__ import annotations

import multiprocessing.spawn
from typing import Any

from lightning_mnn.utilities.compat.missing import attribute

_KEYS = ("sys_path", "init_main_from_name", "init_main_from_path")


def preparation() -> dict[str, Any]:
    """What another process needs to import the ``__main__`` module of this one.

    These are the entries of ``multiprocessing.spawn.get_preparation_data`` that :func:`prepare` uses.
    """
    found = attribute(multiprocessing.spawn, "get_preparation_data", "python")("job")
    return {key: found[key] for key in _KEYS if key in found}


def prepare(prepared: dict[str, Any]) -> None:
    """Apply what :func:`preparation` returned in another process: ``multiprocessing.spawn.prepare``."""
    attribute(multiprocessing.spawn, "prepare", "python")(prepared)
