"""Lightning's W&B logger, which survives failures of W&B and which a resumed run can continue.

It counts the rows that were logged, so that a run that is resumed from a checkpoint continues with the next row.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
import weakref
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from lightning_mnn.loggers.media import plain_value
from lightning_mnn.utilities.compat.lightning_internals import check_wandb_logger
from lightning_mnn.utilities.compat.wandb_internals import forget_foreign_service, local_step, tell_terminal_to
from lightning_mnn.utilities.files import relative
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


_STEP = "trainer/global_step"

_MODES = (None, "online", "offline", "disabled")

_MAX_CHARACTERS_IN_MEMORY = 1 << 20  # of rows; beyond this they are kept on disk


class ResumableWandbLogger(WandbLogger):
    """Logs to W&B; a failure of its server neither stops a run nor loses its data.

    If an online run cannot start (no API key, no network, a server that returns an error or does not answer within
    ``settings.init_timeout``), or if W&B fails during the run, the run continues offline in a new folder that gets all
    of its rows. W&B never asks anything on the terminal. If W&B fails a second time, the run continues without it. Data
    that the server does not accept within ``settings.finish_timeout`` after the end stay in the run's folder. In each
    case there is one warning, with the command that uploads the data.

    Each row has its own W&B step, so that a row that is logged twice counts once: the W&B step of row ``i`` is
    ``2 i + 1``, and that of images, tables and histograms after ``i`` rows is ``2 i``. A run that is resumed after a
    kill logs rows again under their old steps, and W&B ignores those that it already has. Anything that is logged
    without this logger, by ``logger.experiment.log(...)``, shifts the steps of everything that follows.

    Args:
        best: for each direction, ``min`` or ``max``, the names whose best value is kept in the run's summary (as
            ``NAME.min``, ``NAME.max``) beside the last one (``NAME.last``). For other names the summary has only the
            last value (``NAME``).
        run_config: the run's settings for W&B to show, merged with the option ``config``, whose values win. If given,
            the hyperparameters that Lightning finds in the module and the data are not logged again.
        **options: see :class:`pytorch_lightning.loggers.WandbLogger`.

    Attributes:
        rows: number of rows logged, without images, tables and histograms.
        is_held: whether the start of the run is delayed. While it is, the logger has no attribute ``experiment``:
            Lightning would start the run by reading it, before it checks data and checkpoint.

    Raises:
        ValueError: ``best`` has another direction, or ``mode`` is unknown.
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
        self._shift = 0  # of W&B's steps, caused by data logged without this logger
        self._next_step = 0  # W&B's next step, if nothing is logged without this logger
        self._logged_rows = _Rows()  # for a new folder, because a failing W&B may leave the old one incomplete
        self._has_media = False
        self._has_failed = False
        self._summary: dict[str, Any] = {}
        self._messages = _Messages()

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        import wandb  # noqa: PLC0415 (slow, and only used with its logger)

        if self.is_held:
            raise AttributeError("the W&B run starts with training, and has no experiment until then")
        if self._experiment is None and wandb.run is None:
            self._experiment = self._start_or_fall_back()
            self._next_step = local_step(self._experiment)  # not 0 if W&B's server already knows the run
        return super().experiment

    @rank_zero_only
    def begin(self) -> None:
        """Start the run now, and end its delay."""
        self.is_held = False
        _ = self.experiment

    @property
    def url(self) -> str | None:
        """The run's web page; None if the run is offline or disabled, or has not started."""
        run = self._experiment
        return run.url if run is not None and _is_online(run) else None

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the run's config, unless the logger was given one."""
        if "config" not in self._wandb_init:
            super().log_hyperparams(params)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        named: dict[str, Any]
        named = {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{k}" if self._prefix else k: v for k, v in metrics.items()}
        if step is not None:
            named[_STEP] = step
        named = {name: plain_value(value) for name, value in named.items()}
        if not all(isinstance(value, int | float) for value in named.values()):
            self._log_media(named)
            return
        run = self.experiment
        step = self._free_step(2 * self.rows + 1)
        self.rows += 1
        with self._surviving_failures():
            if not run.disabled:
                self._logged_rows.append(named, step)
            run.log(named, step=step, commit=True)
        self._next_step = local_step(self._experiment)

    @rank_zero_only
    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Add to the run's summary."""
        run = self.experiment
        self._summary.update(values)
        with self._surviving_failures():
            run.summary.update(dict(values))

    @rank_zero_only
    def resume(self, rows: Sequence[tuple[dict[str, float], int]]) -> None:
        """Log the earlier rows (metrics, step) again: W&B writes only now and then, so a kill may have lost some."""
        for metrics, step in rows:
            self.log_metrics(metrics, step)

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the run, so that this process's next run does not continue it; warn if not all of it was uploaded."""
        run = self._experiment
        if run is None:
            return
        failure = None
        with self._surviving_failures():
            try:
                run.finish(exit_code)
            except TimeoutError as error:
                failure = str(error)
        if self._experiment is not run:
            self.experiment.finish(exit_code)
        elif _is_online(run) and (failure := failure or self._messages.sync_warning()):
            rank_zero_warn(f"Not all of the run was uploaded to W&B ({_first_line(failure)}). {_upload_hint(run)}")

    def _log_media(self, media: dict[str, Any]) -> None:
        run = self.experiment
        self._has_media = True
        with self._surviving_failures():
            run.log(media, step=self._free_step(2 * self.rows), commit=False)
        if self._experiment is not run:
            with suppress(Exception):  # media that W&B has already bound to the failed run cannot be logged again
                self.experiment.log(media, step=self._free_step(2 * self.rows), commit=False)
        self._next_step = local_step(self._experiment)

    def _free_step(self, step: int) -> int:
        """A W&B step after everything that was logged without this logger: W&B silently drops data of earlier steps."""
        now = local_step(self._experiment)
        self._shift += max(0, min(now - self._next_step, now - step - self._shift))
        return step + self._shift

    def _start_or_fall_back(self) -> Any:
        """Start the run; if that fails online, start it offline."""
        if self._id is None:  # a fixed id, so that a second attempt is the same run and its folders can be recognised
            given = getattr(self._wandb_init.get("settings"), "run_id", None) or os.environ.get("WANDB_RUN_ID")
            self._id = self._wandb_init["id"] = given or secrets.token_hex(4)
        mode = "offline" if self._offline else self._wandb_init.get("mode") or os.environ.get("WANDB_MODE", "online")
        if mode in ("offline", "disabled", "dryrun"):
            return self._start(mode)
        before = self._folders()
        try:
            return self._start(mode)
        except Exception as error:  # noqa: BLE001 (an error that the server did not cause is raised again offline)
            reason = _reason(error)
        _end_service()
        for attempt in self._folders() - before:  # no data were logged there
            shutil.rmtree(attempt, ignore_errors=True)
        run = self._start("offline")
        rank_zero_warn(f"W&B cannot be used ({reason}): the run continues offline. {_upload_hint(run)}")
        return run

    @contextmanager
    def _surviving_failures(self) -> Iterator[None]:
        """A context in which the run continues if W&B fails, as when its service has died; wrong values still raise."""
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
        warning = self._restart_offline(run, reason)
        if warning is None:
            _end_service()
            self._experiment = self._start("disabled")
            warning = f"W&B failed again ({reason}): the run continues without it. Its data are in {_folder(run)}"
        self._next_step = local_step(self._experiment)
        rank_zero_warn(warning)

    def _restart_offline(self, failed: Any, reason: str) -> str | None:
        """Restart the run offline, with all its rows; return a warning, or None if that fails or W&B failed before."""
        if self._has_failed:
            return None
        self._has_failed = True
        if failed.offline:
            time.sleep(1)  # the names of folders contain the time to the second
        with suppress(Exception):
            self._experiment = run = self._start("offline")
            for row, step in self._logged_rows:
                run.log(row, step=step, commit=True)
            run.summary.update(self._summary)
            media = f"Its images, tables and histograms so far stay in {_folder(failed)}. "
            what = f"{media}Everything else" if self._has_media else "All of it"
            return f"W&B failed ({reason}): the run continues offline. {_upload_hint(run, what)}"
        return None

    def _start(self, mode: str) -> Any:
        options = {name: value for name, value in self._wandb_init.items() if value is not None} | {"mode": mode}
        run = _init(options, self._messages)
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP, step_sync=True)
        for direction, names in self.best.items():
            for name in names:
                run.define_metric(name, step_metric=_STEP, step_sync=True, summary=f"{direction},last")
        return run

    def _folders(self) -> set[Path]:
        """The folders in which this run was started online."""
        timestamp = f"{'[0-9]' * 8}_{'[0-9]' * 6}"
        return set(Path(self._save_dir or ".", "wandb").glob(f"run-{timestamp}-{escape(str(self._id))}"))


class _Messages:
    """Collects the warnings that W&B would have written to the terminal."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def sync_warning(self) -> str | None:
        """The first warning that not everything was uploaded; None if there is none."""
        return next((line for line in self.warnings if "wandb sync" in line), None)

    def info(self, message: str) -> None:
        """Ignore a message."""

    def warning(self, message: str) -> None:
        """Keep a warning."""
        self.warnings.append(message.removeprefix("wandb: WARNING "))

    error = warning


class _Rows:
    """Rows with W&B's steps. If they are many, they are on disk in an unnamed file. A pickled copy has no rows."""

    def __init__(self) -> None:
        self._file: SpooledTemporaryFile[str] | None = None

    def append(self, row: Mapping[str, Any], step: int) -> None:
        if self._file is None:
            self._file = SpooledTemporaryFile(  # noqa: SIM115 (closed together with this object)
                _MAX_CHARACTERS_IN_MEMORY, "w+", encoding="utf-8"
            )
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


def _is_online(run: Any) -> bool:
    return not (run.offline or run.disabled)


def _init(options: Mapping[str, Any], messages: _Messages) -> Any:
    """``wandb.init`` with a service of this process, and without questions on the terminal."""
    import wandb  # noqa: PLC0415 (slow, and only used with its logger)

    forget_foreign_service()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's error reports would delay the exit
    settings = options.get("settings")
    if isinstance(settings, wandb.Settings) and settings.silent:
        wandb.setup(wandb.Settings(silent=True))  # before it prints where it found an API key
        tell_terminal_to(messages)
    with without_terminal():
        return wandb.init(**options)


def _end_service() -> None:
    """End the service, which would still treat the name of a run that failed to start as in use."""
    import wandb  # noqa: PLC0415 (slow, and only used with its logger)

    with suppress(Exception, SystemExit):  # if its process has ended, W&B exits with its code
        wandb.teardown()


@contextmanager
def without_terminal() -> Iterator[None]:
    """A context in which the standard input is not a terminal, so that nothing asks the user."""
    terminal = sys.stdin
    with Path(os.devnull).open() as empty:
        sys.stdin = empty
        try:
            yield
        finally:
            sys.stdin = terminal


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].removesuffix(".")


def _reason(error: Exception) -> str:
    """The first line of an error's message; for invalid settings, the setting and the reason."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    if "validation error" in lines[0] and len(lines) > 2:
        return f"{lines[1]}: {lines[2]}"
    return lines[0].removesuffix(".")


def _upload_hint(run: Any, what: str = "All of it") -> str:
    return f"{what} is in {_folder(run)}; upload it with: wandb sync {_folder(run)}"


def _folder(run: Any) -> Path:
    return relative(Path(run.dir).parent)
