"""What is handed to the loggers: scalars to all of them, pictures and histograms to those that can show them.

The loggers here count the rows that they take, so that a run that goes on from a checkpoint can go on with its logs
from the row that came next.
"""

from __future__ import annotations

import csv
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytorch_lightning as pl
    from torch import Tensor


class ResumableCSVLogger(Logger):
    """Writes ``metrics.csv``: a row a call, a column a name and ``step``, columns in alphabetic order.

    Each row is on disk when the call returns. Where a new name comes up, the file is written anew under a temporary
    name and renamed.

    Args:
        save_dir: folder of ``metrics.csv``.

    Attributes:
        path: the file.
        rows: rows in it.

    Raises:
        FileExistsError: (at the first row) there is such a file already.

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
        """Take no notice: a table of metrics has no place for them."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in metrics.items()}
        row["step"] = self.rows if step is None else step
        if not row.keys() <= set(self._columns):
            if not self.rows and self.path.exists():
                raise FileExistsError(f"{self.path} exists: choose another save_dir, or go on with it by resume(rows)")
            kept = self._read(self.rows)[1] if self.rows else []
            self._write(sorted({*self._columns, *row}), kept)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        self.rows += 1

    @rank_zero_only
    def resume(self, rows: int) -> None:
        """Go on with the file that is there after its first rows; where none are kept, it goes.

        Raises:
            ValueError: it has fewer.
        """
        if rows == 0:
            self.path.unlink(missing_ok=True)
            self._columns, self.rows = [], 0
            return
        columns, kept = self._read(rows) if self.path.exists() else ([], [])
        if len(kept) < rows:
            raise ValueError(f"{self.path} should hold {rows} rows or more, and holds {len(kept)}: begin the run anew")
        self._write(columns, kept)
        self.rows = rows

    def read(self) -> list[tuple[dict[str, float], int]]:
        """The rows, as metrics and step."""
        rows = self._read(self.rows)[1] if self.rows else []
        return [({k: float(v) for k, v in row.items() if v and k != "step"}, int(row["step"])) for row in rows]

    def _read(self, rows: int) -> tuple[list[str], list[dict[str, str]]]:
        """The columns and the first rows. What follows them may be torn."""
        with self.path.open(newline="") as file:
            table = csv.DictReader(file)
            return list(table.fieldnames or ()), list(islice(table, rows))

    def _write(self, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
        unfinished = self.path.with_name(self.path.name + ".tmp")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        unfinished.replace(self.path)
        self._columns = list(columns)


class ResumableWandbLogger(WandbLogger):
    """Logs to W&B, where a row's own step says which row it is, so that one that is logged again does not count twice.

    W&B's step of row ``i`` is ``2 i + 1``, that of pictures and histograms after ``i`` rows ``2 i``. A run that goes on
    after a kill logs rows again under the steps that they had: W&B passes over those that it has.

    Args:
        **options: see :class:`pytorch_lightning.loggers.WandbLogger`.

    Attributes:
        rows: rows logged, without pictures and histograms.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rows = 0

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        named = {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{k}" if self._prefix else k: v for k, v in metrics.items()}
        if step is not None:
            named["trainer/global_step"] = step
        if all(isinstance(value, int | float | torch.Tensor) for value in metrics.values()):
            self.experiment.log(named, step=2 * self.rows + 1, commit=True)
            self.rows += 1
        else:
            self.experiment.log(named, step=2 * self.rows, commit=False)

    @rank_zero_only
    def resume(self, rows: Sequence[tuple[dict[str, float], int]]) -> None:
        """Begin with the rows (metrics, step) of before: W&B writes them now and then, and a kill takes the rest."""
        for metrics, step in rows:
            self.log_metrics(metrics, step)


def log_scalars(trainer: pl.Trainer, scalars: dict[str, Tensor | float | None]) -> None:
    """Log values measured after ``trainer.global_step`` steps, means over replicas; None and non-finite are left out.

    They go to every logger at once and to ``trainer.callback_metrics``. ``LightningModule.log`` would drop those of
    steps that ``log_every_n_steps`` passes over, and cannot be called at the end of training.
    """
    means = {
        name: torch.as_tensor(value, dtype=torch.float64).mean() for name, value in scalars.items() if value is not None
    }
    finite = {name: value for name, value in means.items() if bool(value.isfinite())}
    trainer.callback_metrics.update(finite)
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in finite.items()}, step=trainer.global_step)


def log_image(logger: Logger, name: str, path: Path, step: int) -> bool:
    """Log a PNG file to W&B or TensorBoard; other loggers are passed over.

    Returns:
        Whether the logger took it.
    """
    if hasattr(logger, "log_image"):  # W&B
        logger.log_image(name, [str(path)], step=step)
        return True
    add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
    if add_image is not None:  # TensorBoard
        from matplotlib.image import imread  # noqa: PLC0415 (slow, and only used here)

        add_image(name, imread(path), step, dataformats="HWC")
        return True
    return False


def log_histogram(logger: Logger, name: str, values: Tensor, step: int) -> bool:
    """Log a histogram of values to W&B or TensorBoard; other loggers are passed over.

    Returns:
        Whether the logger took it.
    """
    if hasattr(logger, "log_image"):  # W&B
        import wandb  # noqa: PLC0415 (slow, and only used with its logger)

        media: dict[str, Any] = {name: wandb.Histogram(values.tolist())}
        logger.log_metrics(media, step)  # as the scalars go, which keeps W&B's own steps in order
        return True
    add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
    if add_histogram is not None:  # TensorBoard
        add_histogram(name, values, step)
        return True
    return False
