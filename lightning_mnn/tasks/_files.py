"""Files of a run folder, written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename; infinite and undefined numbers become null."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    unfinished.replace(path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table under a temporary name, then rename; its columns are the first row's keys, None an empty field."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    unfinished.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
