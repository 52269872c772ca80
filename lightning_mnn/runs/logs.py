"""What another program logged and returned in a job: Lightning's ``metrics.csv``, ``job.json``."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mnn.launchers.jobs.records import returned
from lightning_mnn.utilities.files import read_csv

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Points = dict[int, float]  # a value for each step

_VERSION = re.compile(r"version_(\d+)")
_OWN_METRICS = ("minimum/", "pattern/", "volume/")  # of our callbacks: their result is the last value
_STEP_COLUMNS = ("step", "epoch")
_NOT_DRAWN = ("kind", "reason_code", "evidence", "replicas", *_STEP_COLUMNS)
_RESERVED = (
    "job",
    "folder",
    "status",
    "replica",
    "kind",
    "reason_code",
    "evidence",
    "seconds",
    *_STEP_COLUMNS,
)  # columns of the table


def results_of(record: Mapping[str, Any], logs: Mapping[str, Points]) -> dict[str, Any]:
    """The results of a job of another program, as columns of the table of its sweep.

    ``kind``, ``reason_code`` and ``evidence``, if its Trainer had a LocalMinimumDetector; ``return_value``, or one
    column for each of its entries; for each logged metric the last value, and ``.min`` and ``.max`` over training; the
    last ``epoch`` and ``step``; ``seconds`` since the job's start.

    Args:
        record: its ``job.json``.
        logs: its metrics, as from :func:`read_logs`.

    >>> results_of({"return_value": 0.5, "seconds": 9.0}, {"loss": {0: 3.0, 1: 1.0, 2: 2.0}})
    {'return_value': 0.5, 'loss': 2.0, 'loss.min': 1.0, 'loss.max': 3.0, 'seconds': 9.0}
    """
    found = _verdict(record.get("minimum"))
    found |= dict(_entries("return_value", returned(record.get("return_value"))))
    for name in sorted(logs.keys() - set(_STEP_COLUMNS), key=lambda name: (_priority(name), name)):
        values = list(logs[name].values())
        column = f"logged.{name}" if name in _RESERVED else name
        found[column] = values[-1]
        finite = [value for value in values if math.isfinite(value)]
        if len(values) > 1 and not name.startswith(_OWN_METRICS):
            found |= {f"{column}.min": min(finite, default=None), f"{column}.max": max(finite, default=None)}
    lasts = {name: list(logs[name].values())[-1] for name in _STEP_COLUMNS if name in logs}
    found |= {name: int(last) for name, last in lasts.items() if math.isfinite(last)}
    return found | {"seconds": record.get("seconds")}


def columns_to_draw(results: Iterable[str]) -> list[str]:
    """Columns that a figure shows, the most important first: the return value, then validation, then test.

    >>> columns_to_draw(["kind", "pattern/flips", "loss", "loss.min", "val/loss", "seconds", "return_value"])
    ['return_value', 'val/loss', 'loss', 'pattern/flips', 'seconds']
    """
    known = dict.fromkeys(results)
    extremes = {f"{name}{end}" for name in known for end in (".min", ".max")}
    return sorted((name for name in known if name not in extremes and name not in _NOT_DRAWN), key=_priority)


def has_logs(columns: Iterable[str]) -> bool:
    """Whether any of the columns to draw was logged.

    >>> has_logs(["return_value", "seconds"]), has_logs(["return_value", "loss"])
    (False, True)
    """
    return any(name != "seconds" and not name.startswith("return_value") for name in columns)


def _priority(name: str) -> int:
    firsts = {"return_value": 0, "val": 1, "test": 2} | dict.fromkeys(_OWN_METRICS, 4) | {"seconds": 5}
    return next((place for first, place in firsts.items() if name.startswith(first)), 3)


def _verdict(minimum: Any) -> dict[str, Any]:
    """Kind, reason code and evidence of a LocalMinimumDetector; lists of kinds and codes are over replicas."""
    if not isinstance(minimum, dict) or "kind" not in minimum:
        return {}
    kinds, codes = minimum["kind"], minimum.get("reason_code")  # jobs of earlier versions have none
    several = isinstance(kinds, list) and len(kinds) > 1
    if not several:
        kinds, codes = (value[0] if isinstance(value, list) and value else value for value in (kinds, codes))
    replicas = {"replicas": len(kinds)} if several else {}
    return {"kind": kinds, "reason_code": codes, "evidence": minimum.get("evidence")} | replicas


def read_logs(folder: Path) -> dict[str, Points]:
    """The metrics in all ``metrics.csv`` below a folder: the values of each metric by step, in the order of steps.

    A job that was run again has a ``version_1`` beside its ``version_0``. The newest version counts, and from earlier
    versions the steps before the newest one's first step, at which it resumed. If several logs contain the same metric,
    the one written last counts.

    Raises:
        DamagedFileError: a file is not a table.
    """
    logs: dict[Path, list[Path]] = {}
    for path in _paths(folder):
        version = _VERSION.fullmatch(path.parent.name)
        logs.setdefault(path.parent.parent if version else path.parent, []).append(path)
    found: dict[str, Points] = {}
    for versions in sorted(logs.values(), key=lambda paths: max(path.stat().st_mtime_ns for path in paths)):
        found |= _joined(sorted(versions, key=_number))
    return {name: dict(sorted(points.items())) for name, points in found.items() if points}


def _paths(folder: Path) -> Iterable[Path]:
    """All logs below a folder; stores and hidden folders are skipped."""
    for place, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".") and not name.endswith(".zarr")]
        if "metrics.csv" in files:
            yield Path(place, "metrics.csv")


def _number(path: Path) -> int:
    version = _VERSION.fullmatch(path.parent.name)
    return int(version[1]) if version else 0


def _joined(versions: Iterable[Path]) -> dict[str, Points]:
    """The log of a job that was run several times, from its versions in order."""
    joined: dict[str, Points] = {}
    for path in versions:
        log = _read(path)
        start = min((step for points in log.values() for step in points), default=math.inf)
        for name, points in joined.items():
            before = {step: value for step, value in points.items() if step < start}
            log[name] = before | log.get(name, {})
        joined = log
    return joined


def _read(path: Path) -> dict[str, Points]:
    """The metrics in one file, without an incomplete last line that a kill may have left."""
    found: dict[str, Points] = {}
    for number, row in enumerate(read_csv(path, remedy="restore or delete it")):
        step = _float(row.get("step"))
        place = int(step) if step is not None and math.isfinite(step) else number
        for name, text in row.items():
            value = _float(text)
            if name and value is not None:
                found.setdefault(name, {})[place] = value
    return found


def _float(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _entries(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """A value, or each of its entries, with its name."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _entries(f"{name}.{key}", entry)
    elif value is not None:
        yield name, value
