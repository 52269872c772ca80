"""Undocumented parts of Python's own library."""

from __future__ import annotations

import multiprocessing.spawn
from typing import Any

from lightning_mnn.utilities.compat.missing import attribute

_KEYS = ("sys_path", "init_main_from_name", "init_main_from_path")


def preparation() -> dict[str, Any]:
    """How another process is to import what this one has as ``__main__``, and where from.

    ``multiprocessing.spawn.get_preparation_data``, those of its entries that :func:`prepare` needs.
    """
    found = attribute(multiprocessing.spawn, "get_preparation_data", "python")("job")
    return {key: found[key] for key in _KEYS if key in found}


def prepare(prepared: dict[str, Any]) -> None:
    """Take over what :func:`preparation` found in another process: ``multiprocessing.spawn.prepare``."""
    attribute(multiprocessing.spawn, "prepare", "python")(prepared)
