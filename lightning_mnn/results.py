"""Read the results of runs and sweeps in a notebook or script: tables, patterns as arrays, modules and data.

>>> from lightning_mnn.results import load_run, load_sweep
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from lightning_mnn.runs.saved import Patterns, Run, in_pandas, load_run
from lightning_mnn.sweeps.jobs import read_sweep
from lightning_mnn.sweeps.table import write_table

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Patterns", "Run", "SweepResults", "load_run", "load_sweep"]


@dataclass(frozen=True)
class SweepResults:
    """The results of a sweep.

    Attributes:
        folder: the folder of the sweep.
        table: a row for each job and replica, as in ``sweep.csv``: a pandas ``DataFrame``, without pandas a
            ``pyarrow.Table``.
        swept: names of the columns that differ between the jobs by the command.
        folders: the folders of all jobs that were started, in the order of the table.
    """

    folder: Path
    table: Any
    swept: tuple[str, ...]
    folders: tuple[Path, ...]

    @property
    def runs(self) -> Iterator[Run]:
        """The runs, one after the other, in the order of the table."""
        return map(load_run, self.folders)


def load_sweep(folder: str | Path) -> SweepResults:
    """The results of the sweep in a folder; ``sweep.csv`` and ``sweep.parquet`` there are written anew.

    Raises:
        FileNotFoundError: the folder contains no training runs.
    """
    folder = Path(folder)
    sweep = read_sweep(folder)
    _, typed = write_table(sweep)
    folders = tuple(
        folder / job.folder for job in sweep.jobs if job.folder is not None and (folder / job.folder).is_dir()
    )
    return SweepResults(folder, in_pandas(pq.read_table(typed)), tuple(sweep.swept), folders)
