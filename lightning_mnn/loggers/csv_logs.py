"""A CSV logger that writes each row to disk at once, and that a resumed run continues from its checkpoint."""

from __future__ import annotations

import csv
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from lightning_mnn.loggers.media import plain_value
from lightning_mnn.utilities.files import DamagedFileError, whole_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ResumableCSVLogger(Logger):
    """Writes ``metrics.csv``: one row per call, one column per name and ``step``, columns in alphabetical order.

    Each row is on disk when the call returns. If a call has a new name, the whole file is written again under a
    temporary name, which is then renamed.

    Args:
        save_dir: folder of ``metrics.csv``.

    Attributes:
        path: the file.
        rows: number of rows in it.

    Raises:
        FileExistsError: (at the first row) the file already exists.

    >>> import tempfile
    >>> logger = ResumableCSVLogger(tempfile.mkdtemp())
    >>> logger.log_metrics({"mse": 0.5}, step=1)
    >>> logger.log_metrics({"mce": 0.1}, step=2)
    >>> logger.path.read_text().split()
    ['mce,mse,step', ',0.5,1', '0.1,,2']
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self.rows = 0
        self._columns: list[str] = []

    @property
    @override
    def name(self) -> str:
        return ""

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Ignore the hyperparameters: a table of metrics has no place for them."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.log_rows([(metrics, self.rows if step is None else step)])

    @rank_zero_only
    def log_rows(self, rows: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        """Write several rows, given as metrics and step, as :meth:`log_metrics` writes one."""
        written = [{**{k: plain_value(value) for k, value in metrics.items()}, "step": step} for metrics, step in rows]
        names = set().union(*written)
        if not names <= set(self._columns):
            if not self.rows and self.path.exists():
                raise FileExistsError(f"{self.path} exists: choose another save_dir, or continue it by resume(rows)")
            kept = self._read(self.rows)[1] if self.rows else []
            self._write(sorted({*self._columns, *names}), kept)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerows(written)
        self.rows += len(written)

    @rank_zero_only
    def resume(self, rows: int) -> None:
        """Continue the existing file after its first ``rows`` rows; with 0 rows the file is deleted.

        Raises:
            DamagedFileError: see :meth:`check`.
        """
        if rows == 0:
            self.path.unlink(missing_ok=True)
            self._columns, self.rows = [], 0
            return
        self.check(rows)
        self._write(*self._read(rows))
        self.rows = rows

    def check(self, rows: int) -> None:
        """Check that the file has at least this many rows, so that :meth:`resume` can continue after them.

        Raises:
            DamagedFileError: the file has fewer rows, or they contain something other than numbers.
        """
        try:
            found = self._read(rows)[1] if self.path.exists() else []
            kept = [row for row in found if None not in (*row, *row.values())]  # complete rows only
            for row in kept:
                for name, text in row.items():
                    int(text) if name == "step" else float(text or 0)
        except (ValueError, csv.Error) as error:
            raise DamagedFileError(self.path, f"it is not a table of numbers: {error}") from error
        if len(kept) < rows:
            raise DamagedFileError(self.path, f"it should have {rows} rows or more, and has {len(kept)}")

    def read(self) -> list[tuple[dict[str, float], int]]:
        """The rows, as metrics and step."""
        rows = self._read(self.rows)[1] if self.rows else []
        return [({k: float(v) for k, v in row.items() if v and k != "step"}, int(row["step"])) for row in rows]

    def _read(self, rows: int) -> tuple[list[str], list[dict[str, str]]]:
        """The columns and the first rows; what follows these rows may be incomplete."""
        with self.path.open(newline="") as file:
            table = csv.DictReader(file)
            return list(table.fieldnames or ()), list(islice(table, rows))

    def _write(self, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as unfinished, unfinished.open("w", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        self._columns = list(columns)
