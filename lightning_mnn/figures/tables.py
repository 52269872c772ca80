"""Reading the tables that runs have written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_mnn.utilities.files import DamagedFileError, read_csv

if TYPE_CHECKING:
    from pathlib import Path


Row = dict[str, Any]


def read_table(path: Path) -> list[Row]:
    """Rows of a CSV table: numbers as floats, empty fields as None, everything else as text."""
    return [{name: _value(text) for name, text in row.items()} for row in read_csv(path)]


def _value(text: str) -> Any:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each name in a ``metrics.csv``.

    Raises:
        DamagedFileError: the file is not a table of numbers.
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    for number, row in enumerate(read_csv(path), start=2):
        if "step" not in row:
            raise DamagedFileError(path, "it lacks the column step")
        for name, text in row.items():
            if name not in ("step", "epoch") and text:
                steps, values = series.setdefault(name, ([], []))
                try:
                    steps.append(int(row["step"]))
                    values.append(float(text))
                except ValueError as error:
                    raise DamagedFileError(path, f"line {number}: {error}") from None
    return series


def read_events(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each scalar in the event files of TensorBoard in a folder.

    Raises:
        ModuleNotFoundError: the package ``tensorboard`` is not installed.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 (optional)

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name not in ("epoch", "hp_metric")]
    scalars = {name: events.Scalars(name) for name in names}
    return {name: ([one.step for one in found], [one.value for one in found]) for name, found in scalars.items()}
