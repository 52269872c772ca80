"""What is handed to the loggers: scalars to all of them, pictures and histograms to those that can show them.

The loggers here count the rows that they take, so that a run that goes on from a checkpoint can go on with its logs
from the row that came next.
"""

from __future__ import annotations

import csv
import json
import math
import os
import secrets
import shutil
import sys
import time
import weakref
from contextlib import contextmanager, suppress
from glob import escape
from itertools import islice
from numbers import Real
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from lightning_mnn.utilities.compat.lightning_internals import check_wandb_logger
from lightning_mnn.utilities.compat.wandb_internals import forget_foreign_service, local_step, tell_terminal_to
from lightning_mnn.utilities.files import DamagedFileError, whole_file
from lightning_mnn.utilities.transfer import fetched, widest_dtype
from lightning_mnn.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pytorch_lightning as pl
    from torch import Tensor

_STEP = "trainer/global_step"
_MODES = (None, "online", "offline", "disabled")
_IN_MEMORY = 1 << 20  # characters of rows, before they are kept on disk


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
        row = {name: _plain(value) for name, value in metrics.items()}
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
        """Check that the file has so many rows to go on after.

        Raises:
            DamagedFileError: it has fewer, or they hold something else than numbers.
        """
        try:
            found = self._read(rows)[1] if self.path.exists() else []
            kept = [row for row in found if None not in (*row, *row.values())]  # and not torn
            for row in kept:
                for name, text in row.items():
                    int(text) if name == "step" else float(text or 0)
        except (ValueError, csv.Error) as error:
            raise DamagedFileError(self.path, f"it is no table of numbers: {error}") from error
        if len(kept) < rows:
            raise DamagedFileError(self.path, f"it should hold {rows} rows or more, and holds {len(kept)}")

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as unfinished, unfinished.open("w", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        self._columns = list(columns)


class ResumableWandbLogger(WandbLogger):
    """Logs to W&B; trouble with its server neither stops a run nor loses anything of it.

    Where an online run cannot begin (no API key, no network, a server that errs or does not answer within
    ``settings.init_timeout``), or W&B fails on the way, the run goes on offline in a folder that gets all of its rows;
    nothing is ever asked on a terminal. Where W&B fails once more, the run goes on without it. What the server does not
    take within ``settings.finish_timeout`` after the end stays in the run's folder. Each is said in one warning with
    the command that uploads it.

    A row's own W&B step says which row it is, so that one that is logged again does not count twice: W&B's step of row
    ``i`` is ``2 i + 1``, that of pictures, tables and histograms after ``i`` rows ``2 i``. A run that goes on after a
    kill logs rows again under the steps that they had: W&B passes over those that it has. What is logged past the
    logger, by ``logger.experiment.log(...)``, moves the steps of all that follows.

    Args:
        best: by direction, ``min`` or ``max``, the names of which a run's summary keeps the best value (as
            ``NAME.min``, ``NAME.max``) beside the last one (``NAME.last``). Of others it keeps the last (``NAME``).
        run_config: the run's settings, as W&B is to show them, beside an option ``config``, whose values come first;
            the hyperparameters that Lightning finds in the module and the data are then not logged a second time.
        **options: see :class:`pytorch_lightning.loggers.WandbLogger`.

    Attributes:
        rows: rows logged, without pictures, tables and histograms.
        is_held: whether the run may not begin yet; as long as it is, the logger has no attribute ``experiment``, by
            which Lightning would begin it before it looks at data and checkpoint.

    Raises:
        ValueError: ``best`` has another direction, or there is no such ``mode``.
    """

    def __init__(
        self,
        *,
        best: Mapping[str, Sequence[str]] | None = None,
        run_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if options.get("mode") not in _MODES:
            raise ArgumentError("mode", options["mode"], "must be online, offline or disabled")
        if run_config is not None:
            options["config"] = {**run_config, **(options.get("config") or {})}
        super().__init__(**options)
        check_wandb_logger(self)
        self.best = {direction: list(names) for direction, names in (best or {}).items()}
        if not self.best.keys() <= {"min", "max"}:
            raise ArgumentError("best", self.best, "must have the keys min and max, lists of names")
        self.rows = 0
        self.is_held = False
        self._shift = 0  # of W&B's steps, by what was logged past the logger
        self._next_step = 0  # of W&B, if nothing is
        self._kept = _Rows()  # for a new folder, as W&B's process may leave that of the run torn
        self._has_media = False
        self._has_failed = False
        self._summary: dict[str, Any] = {}
        self._said = _Said()

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        import wandb  # noqa: PLC0415 (slow, and only used with its logger)

        if self.is_held:
            raise AttributeError("the W&B run begins with training, and has no experiment until then")
        if self._experiment is None and wandb.run is None:
            self._experiment = self._begin()
            self._next_step = local_step(self._experiment)  # of a run that W&B's server knows, where that left off
        return super().experiment

    @rank_zero_only
    def begin(self) -> None:
        """Begin the run now, and hold it no longer."""
        self.is_held = False
        _ = self.experiment

    @property
    def url(self) -> str | None:
        """Where W&B shows the run; None if it is offline or disabled, or has not begun."""
        run = self._experiment
        return run.url if run is not None and _is_online(run) else None

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the run's config; where the run was given one, take no notice."""
        if "config" not in self._wandb_init:
            super().log_hyperparams(params)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        named: dict[str, Any]
        named = {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{k}" if self._prefix else k: v for k, v in metrics.items()}
        if step is not None:
            named[_STEP] = step
        named = {name: _plain(value) for name, value in named.items()}
        if not all(isinstance(value, int | float) for value in named.values()):
            self._log_media(named)
            return
        run = self.experiment
        step = self._free_step(2 * self.rows + 1)
        self.rows += 1
        with self._going_on():
            if not run.disabled:
                self._kept.append(named, step)
            run.log(named, step=step, commit=True)
        self._next_step = local_step(self._experiment)

    @rank_zero_only
    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Add to the run's summary."""
        run = self.experiment
        self._summary.update(values)
        with self._going_on():
            run.summary.update(dict(values))

    @rank_zero_only
    def resume(self, rows: Sequence[tuple[dict[str, float], int]]) -> None:
        """Begin with the rows (metrics, step) of before: W&B writes them now and then, and a kill takes the rest."""
        for metrics, step in rows:
            self.log_metrics(metrics, step)

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the run, or the next one of this process would go on with it; warn if not all of it was uploaded."""
        run = self._experiment
        if run is None:
            return
        left = None
        with self._going_on():
            try:
                run.finish(exit_code)
            except TimeoutError as error:
                left = str(error)
        if self._experiment is not run:
            self.experiment.finish(exit_code)
        elif _is_online(run) and (left := left or self._said.of_sync()):
            rank_zero_warn(f"Not all of the run came to W&B ({_first_line(left)}). {_all_is_in(run)}")

    def _log_media(self, media: dict[str, Any]) -> None:
        run = self.experiment
        self._has_media = True
        with self._going_on():
            run.log(media, step=self._free_step(2 * self.rows), commit=False)
        if self._experiment is not run:
            with suppress(Exception):  # what W&B has bound to the run before stays there
                self.experiment.log(media, step=self._free_step(2 * self.rows), commit=False)
        self._next_step = local_step(self._experiment)

    def _free_step(self, step: int) -> int:
        """W&B's step, behind what was logged past the logger: W&B drops silently what comes under an earlier one."""
        now = local_step(self._experiment)
        self._shift += max(0, min(now - self._next_step, now - step - self._shift))
        return step + self._shift

    def _begin(self) -> Any:
        """Start the run; if that fails online, offline."""
        if self._id is None:  # or a second attempt would be another run, and the folders of others look like its own
            given = getattr(self._wandb_init.get("settings"), "run_id", None) or os.environ.get("WANDB_RUN_ID")
            self._id = self._wandb_init["id"] = given or secrets.token_hex(4)
        mode = "offline" if self._offline else self._wandb_init.get("mode") or os.environ.get("WANDB_MODE", "online")
        if mode in ("offline", "disabled", "dryrun"):
            return self._start(mode)
        before = self._folders()
        try:
            return self._start(mode)
        except Exception as error:  # noqa: BLE001 (what is not the server's fault comes again offline)
            reason = _reason(error)
        _end_service()
        for attempt in self._folders() - before:  # which holds nothing but the beginning
            shutil.rmtree(attempt, ignore_errors=True)
        run = self._start("offline")
        rank_zero_warn(f"W&B cannot be used ({reason}): the run goes on offline. {_all_is_in(run)}")
        return run

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Where W&B fails, as when its own process has died, go on; a value that it does not take is an error still."""
        run = self._experiment
        try:
            yield
        except (TypeError, ValueError):
            raise
        except Exception as error:
            if run is None or run.disabled:
                raise
            reason = _reason(error)
        else:
            return
        _end_service()
        warning = self._begin_anew(run, reason)
        if warning is None:
            _end_service()
            self._experiment = self._start("disabled")
            warning = f"W&B failed again ({reason}): the run goes on without it. What it has is in {_folder(run)}"
        self._next_step = local_step(self._experiment)
        rank_zero_warn(warning)

    def _begin_anew(self, failed: Any, reason: str) -> str | None:
        """Begin the run anew offline, with its rows; what to warn of, or None where that fails or has failed before."""
        if self._has_failed:
            return None
        self._has_failed = True
        if failed.offline:
            time.sleep(1)  # folders are told apart by the second
        with suppress(Exception):
            self._experiment = run = self._start("offline")
            for row, step in self._kept:
                run.log(row, step=step, commit=True)
            run.summary.update(self._summary)
            media = f"Its pictures, tables and histograms until now stay in {_folder(failed)}. "
            what = f"{media}All else" if self._has_media else "All of it"
            return f"W&B failed ({reason}): the run goes on offline. {_all_is_in(run, what)}"
        return None

    def _start(self, mode: str) -> Any:
        options = {name: value for name, value in self._wandb_init.items() if value is not None} | {"mode": mode}
        run = _init(options, self._said)
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP, step_sync=True)
        for direction, names in self.best.items():
            for name in names:
                run.define_metric(name, step_metric=_STEP, step_sync=True, summary=f"{direction},last")
        return run

    def _folders(self) -> set[Path]:
        """Where this run was begun online."""
        moment = f"{'[0-9]' * 8}_{'[0-9]' * 6}"
        return set(Path(self._save_dir or ".", "wandb").glob(f"run-{moment}-{escape(str(self._id))}"))


class _Said:
    """What W&B would have written to a terminal."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def of_sync(self) -> str | None:
        """The first warning that not all is uploaded."""
        return next((line for line in self.warnings if "wandb sync" in line), None)

    def info(self, message: str) -> None:
        """Pass over a message."""

    def warning(self, message: str) -> None:
        """Keep a warning."""
        self.warnings.append(message.removeprefix("wandb: WARNING "))

    error = warning


class _Rows:
    """Rows with W&B's steps; many are kept on disk, in a file without a name. In another process there are none."""

    def __init__(self) -> None:
        self._file: SpooledTemporaryFile[str] | None = None

    def append(self, row: Mapping[str, Any], step: int) -> None:
        if self._file is None:
            self._file = SpooledTemporaryFile(_IN_MEMORY, "w+", encoding="utf-8")  # noqa: SIM115 (closed with its owner)
            weakref.finalize(self, self._file.close)
        self._file.write(json.dumps([row, step]) + "\n")

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int]]:
        if self._file is None:
            return
        self._file.seek(0)
        for line in self._file:
            row, step = json.loads(line)
            yield row, step

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": None}


def _plain(value: Any) -> Any:
    """A single number as Python's own, a truth value as 0 or 1; anything else as it is."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    return float(value) if type(value) is not int and isinstance(value, Real) else value


def _is_online(run: Any) -> bool:
    return not (run.offline or run.disabled)


def _init(options: Mapping[str, Any], said: _Said) -> Any:
    """``wandb.init`` in a service of this process's own, which asks nothing."""
    import wandb  # noqa: PLC0415 (slow, and only used with its logger)

    forget_foreign_service()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports of W&B's own, for which the exit would wait
    settings = options.get("settings")
    if isinstance(settings, wandb.Settings) and settings.silent:
        wandb.setup(wandb.Settings(silent=True))  # before it says where it found a key
        tell_terminal_to(said)
    with _nobody_to_ask():
        return wandb.init(**options)


def _end_service() -> None:
    """End the service, for which the name of a run that failed to begin remains in use."""
    import wandb  # noqa: PLC0415 (slow, and only used with its logger)

    with suppress(Exception, SystemExit):  # of a process that is no more, by whose code W&B would exit
        wandb.teardown()


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Let the input not be a terminal."""
    terminal = sys.stdin
    with Path(os.devnull).open() as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].removesuffix(".")


def _reason(error: Exception) -> str:
    """A line of what an error says; of one on settings, which of them and why."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    if "validation error" in lines[0] and len(lines) > 2:
        return f"{lines[1]}: {lines[2]}"
    return lines[0].removesuffix(".")


def _folder(run: Any) -> Path:
    folder = Path(run.dir).parent
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _all_is_in(run: Any, what: str = "All of it") -> str:
    return f"{what} is in {_folder(run)}; upload it with: wandb sync {_folder(run)}"


def log_scalars(trainer: pl.Trainer, scalars: dict[str, Tensor | float | None]) -> None:
    """Log values measured after ``trainer.global_step`` steps, means over replicas; None and non-finite are left out.

    They go to every logger at once and to ``trainer.callback_metrics``. ``LightningModule.log`` would drop those of
    steps that ``log_every_n_steps`` passes over, and cannot be called at the end of training.
    """
    given = {name: value for name, value in scalars.items() if value is not None}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    means = fetched(*(value.to(widest_dtype(value.device)).mean() for value in tensors.values()))
    values = given | dict(zip(tensors, means, strict=True))
    finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in finite.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(finite), step=trainer.global_step)


def shows_images(logger: Logger) -> bool:
    """Whether a logger is one that :func:`log_image` logs to, for pictures that take time to draw."""
    return hasattr(logger, "log_image") or hasattr(getattr(logger, "experiment", None), "add_image")


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


def log_table(logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> bool:
    """Log a table to W&B; other loggers are passed over.

    Returns:
        Whether the logger took it.
    """
    if not hasattr(logger, "log_table"):
        return False
    logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
    return True


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
