"""What is handed to the loggers: scalars to all of them, pictures and histograms to those that can show them.

The loggers here count the rows that they take, so that a run that goes on from a checkpoint can go on with its logs
from the row that came next.
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
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


_STEP = "trainer/global_step"

_MODES = (None, "online", "offline", "disabled")

_IN_MEMORY = 1 << 20  # characters of rows, before they are kept on disk


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
        named = {name: plain_value(value) for name, value in named.items()}
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
        warning = self._start_again(run, reason)
        if warning is None:
            _end_service()
            self._experiment = self._start("disabled")
            warning = f"W&B failed again ({reason}): the run goes on without it. What it has is in {_folder(run)}"
        self._next_step = local_step(self._experiment)
        rank_zero_warn(warning)

    def _start_again(self, failed: Any, reason: str) -> str | None:
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
