"""Reading the user's data from a file: .npz with named arrays, or a .csv or .parquet table with a target column."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

ARRAYS = ("inputs", "targets", "test_inputs", "test_targets")
_TABLES = (".csv", ".parquet")


def read_arrays(file: str | Path, target: str | None = None) -> dict[str, NDArray[Any]]:
    """The arrays in a file: ``inputs``, ``targets``, and ``test_inputs``, ``test_targets`` where the file has them.

    Args:
        file: an ``.npz`` with arrays of these names, or a ``.csv`` (with a header) or ``.parquet`` table.
        target: of a table, the column with the targets; the other columns are the inputs, in their order.

    Raises:
        ArgumentError: there is no such file, it cannot be read, or it lacks an array or the column; a column of inputs
            does not contain numbers, or values are missing.
    """
    path = Path(file).expanduser()
    if path.suffix not in (".npz", *_TABLES):
        raise ArgumentError(
            "file", str(file), f"must be a file {', '.join(('.npz', *_TABLES))}", "save the data as one"
        )
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "is not a file"
        raise ArgumentError("file", str(file), problem, "give the path of an existing one")
    if path.suffix == ".npz":
        if target is not None:
            raise ArgumentError("target", target, "has no meaning for an .npz file", "leave it out")
        return _npz(path, str(file))
    return _table(path, str(file), target)


def _npz(path: Path, file: str) -> dict[str, NDArray[Any]]:
    needed = f"an .npz file has inputs and targets, and may have {' and '.join(ARRAYS[2:])}"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as saved:
            names = list(saved)
            arrays = {name: saved[name] for name in ARRAYS if name in names}
    except (AttributeError, TypeError):  # np.load of a single array
        raise ArgumentError("file", file, "is a single array, not an .npz archive", needed) from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        problem = f"cannot be read ({_line(error)})"
        raise ArgumentError("file", file, problem, "save it again by numpy.savez, without Python objects") from None
    if missing := [name for name in ARRAYS[:2] if name not in arrays]:
        raise ArgumentError("file", file, f"lacks {' and '.join(missing)}, it has {_first(names)}", needed)
    return arrays


def _table(path: Path, file: str, target: str | None) -> dict[str, NDArray[Any]]:
    import pyarrow as pa  # noqa: PLC0415 (slow, and only tables need it)
    from pyarrow import csv, parquet  # noqa: PLC0415

    try:
        table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ArgumentError(
            "file", file, f"cannot be read ({_line(error)})", f"check that it is a {path.suffix}"
        ) from None
    names = table.column_names
    if target not in names:
        problem = "must name the column of the targets" if target is None else f"is no column of {file}"
        raise ArgumentError("target", target, problem, f"it has {_first(names)}")
    if len(set(names)) < len(names) or len(names) < 2:
        raise ArgumentError(
            "file", file, "must have columns of different names, and one or more of inputs", "name them"
        )
    for name in names:
        if table[name].null_count:
            problem = f"has {table[name].null_count} missing values in the column {name}"
            raise ArgumentError("file", file, problem, "fill or remove them first")
    columns = {name: table[name].to_numpy() for name in names}
    inputs = {name: column for name, column in columns.items() if name != target}
    if other := [name for name, column in inputs.items() if column.dtype.kind not in "biuf"]:
        problem = f"has inputs that are not numbers in the columns {_first(other)}"
        raise ArgumentError("file", file, problem, "encode them as numbers, or remove them")
    return {"inputs": np.stack(list(inputs.values()), axis=1), "targets": columns[target]}


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "") or "nothing"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
