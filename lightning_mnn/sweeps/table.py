"""The table of a sweep: a row for each network of each job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mnn.utilities.files import whole_file, write_csv
from lightning_mnn.verdicts import class_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lightning_mnn.sweeps.jobs import Sweep

Row = dict[str, Any]

_LISTS = (
    "hidden_dims",
    "visits",
    "objective_differs_by",
    "gradient_findings",
)  # values of a summary that are lists, but not over replicas


def table_rows(sweep: Sweep) -> list[Row]:
    """The table: a row for each job and replica; its columns are the first row's keys, missing values are None.

    A job that is not finished has one row without measures, so that means over a column are over finished jobs only.
    The columns are ``job`` and ``folder``, what was swept, ``status`` and ``replica``, then the summary in its own
    order. What was swept is shown as it was given to the job: ``seed`` is the seed of a job's first replica. If any job
    has a ``kind``, its networks also have a ``class``, and ``class_is_ahead`` says whether it is of the minimum that
    descent leads to.
    """
    measures = dict.fromkeys(key for job in sweep.jobs for key in job.results if key not in sweep.swept)
    rows = [
        {"job": job.number, "folder": None if job.folder is None else str(job.folder)}
        | {key: values[place] for key, values in sweep.swept.items()}
        | {"status": str(job.status), "replica": replica}
        | {key: _of_replica(job.results, key, replica) for key in measures}
        for place, job in enumerate(sweep.jobs)
        for replica in (range(job.results.get("replicas", 1)) if job.results else (None,))
    ]
    return [_classified(row) for row in rows] if any(row.get("kind") is not None for row in rows) else rows


def _classified(row: Row) -> Row:
    """A row with its class, after the replica."""
    ended = class_of(row) if row.get("kind") is not None else None
    found = {
        "class": None if ended is None else str(ended.known),
        "class_is_ahead": None if ended is None else ended.ahead,
    }
    first = list(row)[: list(row).index("replica") + 1]
    return {key: row[key] for key in first} | found | row


def write_table(sweep: Sweep) -> list[Path]:
    """Write ``sweep.csv``, with lists as JSON, and ``sweep.parquet``, with types.

    The metadata of ``sweep.parquet`` contain the names of what was swept, and of the columns that another program
    logged.

    Returns:
        Their paths.
    """
    rows = table_rows(sweep)
    text, typed = sweep.folder / "sweep.csv", sweep.folder / "sweep.parquet"
    write_csv(text, [{key: _as_text(value) for key, value in row.items()} for row in rows])
    columns = {key: _column([row[key] for row in rows]) for key in rows[0]}
    names = {"swept": json.dumps(list(sweep.swept)), "logged": json.dumps(sweep.logged)}
    table = pa.table(columns).replace_schema_metadata(names)
    with whole_file(typed) as unfinished:
        pq.write_table(table, unfinished)
    return [text, typed]


def _of_replica(summary: Mapping[str, Any], key: str, replica: int | None) -> Any:
    value = summary.get(key)
    if replica is None or key in _LISTS or not isinstance(value, list) or summary["replicas"] == 1:
        return value
    return value[replica]


def _as_text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _column(values: Sequence[Any]) -> pa.Array:
    """A typed column; values of several types become text, in quotes if a text looks like another value."""
    if len({isinstance(value, bool) for value in values if value is not None}) < 2:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError):
            pass
    others = {json.dumps(value) for value in values if not isinstance(value, str)}
    kept = [value is None or (isinstance(value, str) and value not in others) for value in values]
    return pa.array([value if keep else json.dumps(value) for value, keep in zip(values, kept, strict=True)])
