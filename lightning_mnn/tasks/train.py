"""Train a network, say what it converged to, and leave everything in the run folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationKeyError
from pytorch_lightning.callbacks import Callback, Timer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from typing_extensions import override

from lightning_mnn.callbacks import LastCheckpoint
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.stop_on_request import StopOnRequest
from lightning_mnn.config.build import build
from lightning_mnn.config.mistakes import UserError
from lightning_mnn.figures import run_figure
from lightning_mnn.loggers.csv_logs import ResumableCSVLogger
from lightning_mnn.loggers.media import log_image
from lightning_mnn.loggers.wandb import ResumableWandbLogger
from lightning_mnn.runs.checkpoints import check_fits
from lightning_mnn.runs.console import config_tree, print_config, print_verdict
from lightning_mnn.runs.memory import check_training_memory
from lightning_mnn.runs.processes.devices import check_devices, check_trainer, processes
from lightning_mnn.runs.processes.signals import LostProcessError, RunSignals, interruptible
from lightning_mnn.runs.resume import RunState, initialise, run_lock, run_state
from lightning_mnn.runs.wandb import end_wandb_runs, is_wandb, leave_in_wandb, only_known, settings_of, wandb_options
from lightning_mnn.tasks.experiment import words_of_command
from lightning_mnn.utilities.compat.lightning_internals import completed_epochs
from lightning_mnn.utilities.errors import DivergenceError, EarlyEnd
from lightning_mnn.utilities.files import whole_file, write_json
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl

    from lightning_mnn.data import ExactData
    from lightning_mnn.model.mnn import MNN


# What the callbacks measure; null where a callback is off.
MEASURES = (
    *("mse", "mce", "wrong", "kind", "zero_error", "distance", "margin_ratio", "min_preactivation", "kinks"),
    *("rank", "rank_cap", "log_volume", "log_volume_standard_error", "log_volume_lower_bound", "regions_visited"),
)

_ENDED = Path("checkpoints", "ended.ckpt")  # the end of training, until the run is finished


class FitTimer(Timer):
    """Time from the start of training to the end of the callbacks' last work."""

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on: the other callbacks' last pass comes now."""

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)


def _timer(duration: Any) -> FitTimer:
    """The run's clock, which ends it after ``trainer.max_time``, for Lightning lets a Trainer have one Timer."""
    try:
        return FitTimer(duration)
    except MisconfigurationException:
        example = "for example +trainer.max_time=00:01:30:00"
        raise ArgumentError("trainer.max_time", duration, "must be a time DD:HH:MM:SS", example) from None


class Start(Callback):
    """Claims the run folder, and lets the loggers begin or go on, when nothing is left to be refused.

    By then data, weights and checkpoint are loaded. It is to be the first callback, and until it acts no logger of this
    package writes.

    Args:
        cfg: the config.
        found: what there is of the run.
        loggers: of the Trainer.

    Attributes:
        is_over: whether that is done.
    """

    def __init__(self, cfg: DictConfig, found: RunState, loggers: Sequence[Any]) -> None:
        self.is_over = False
        self._cfg, self._found, self._loggers = cfg, found, loggers
        self._tree = config_tree(cfg)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print_config(self._tree)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in self._loggers:
            if isinstance(logger, ResumableWandbLogger):
                logger.begin()  # which may be refused, too
        initialise(self._cfg, self._found)
        self.is_over = True
        if self._found.checkpoint is not None:
            _go_on(self._loggers, self._found.rows)
        for logger in self._loggers:
            logger.log_hyperparams(settings_of(self._cfg, HydraConfig.get().runtime.choices))


def train(cfg: DictConfig) -> float:
    """Train as the config says.

    The run folder gets ``summary.json``, ``metrics.csv``, ``figure.png``, ``patterns.zarr``, ``checkpoints/``,
    ``plan.json`` and, by Hydra, ``.hydra/``. A run that diverges or is interrupted leaves what it had, with a summary
    that says so: its ``finished`` is false.

    A ``trainer.fast_dev_run`` leaves nothing but ``.hydra/``: it is to show that nothing fails.

    With ``cfg.resume`` a run that was killed or interrupted, at whatever moment, goes on from its last checkpoint and
    ends in the numbers of an unbroken run; without a checkpoint it begins anew; a finished one stays as it is. So it
    does, whatever ``cfg.resume``, in a SLURM job that was requeued.

    Returns:
        The final MSE, the largest of the replicas'.

    Raises:
        ValueError: ``resume`` together with ``ckpt_path``, the experiment has no settings for the data set, or the
            Trainer's processes cannot be started rightly (see
            :func:`~lightning_mnn.runs.processes.devices.check_devices`).
        FileExistsError: the run folder already holds a run, and ``resume`` is false or the run was begun otherwise; or
            another process trains there.
        DivergenceError: training reached values that are not finite.
        Interrupted: a SystemExit with code 143 after a SIGTERM, and 130 after Ctrl-C (see
            :mod:`~lightning_mnn.runs.processes.signals`).
        LostProcessError: a SystemExit with code 1, as another process of the run is gone.
    """
    with interruptible() as signals, run_lock(Path(cfg.run_dir)):
        return _train(cfg, signals)


def _train(cfg: DictConfig, signals: RunSignals) -> float:
    _require_row(cfg)
    check_trainer(cfg)
    check_devices(cfg.trainer)
    run_dir = Path(cfg.run_dir)
    found = run_state(cfg)
    if found.summary is not None:
        _print_again(cfg, found.summary)
        return _largest(found.summary["mse"])
    loggers = _loggers(cfg, found)
    start = Start(cfg, found, loggers)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    datamodule: ExactData = build(cfg, "data")
    input_dim = datamodule.input_dim if cfg.model.input_dim is None else cfg.model.input_dim
    timer = _timer(cfg.trainer.get("max_time"))
    callbacks = [signals, start, timer, *_callbacks(cfg)]
    trainer: pl.Trainer = build(cfg, "trainer", callbacks=callbacks, logger=loggers)
    check_training_memory(trainer, cfg.model, input_dim, datamodule)
    model: MNN = build(cfg, "model", input_dim=input_dim)
    if cfg.ckpt_path is not None:
        check_fits(cfg.ckpt_path, model)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return _try_out(trainer, model, datamodule, cfg.ckpt_path)
    failure: BaseException | None = None

    def summary_of(failure: BaseException | None, callbacks: Sequence[pl.Callback]) -> dict[str, Any]:
        seconds = timer.time_elapsed("train")
        return summarise(trainer, model, datamodule, seconds, cfg.seed, failure, callbacks=callbacks)

    def leave_last_words() -> None:
        if start.is_over:
            _leave_last_words(run_dir, summary_of(signals.cause(), callbacks=()))

    signals.watch.last_words = leave_last_words
    try:
        failure = _fit(signals, trainer, model, datamodule, found.checkpoint or cfg.ckpt_path, run_dir)
        if failure is not None and not start.is_over:
            raise failure
        summary = summary_of(failure, callbacks=trainer.callbacks)  # type: ignore[attr-defined]
        _leave(run_dir, trainer, summary, figure=not isinstance(failure, SystemExit))
    finally:
        end_wandb_runs(loggers, failed=sys.exc_info()[0] is not None or failure is not None)
    return _certify(cfg, run_dir, summary, failure)


def _certify(cfg: DictConfig, run_dir: Path, summary: dict[str, Any], failure: BaseException | None) -> float:
    """Print what the run ended in; raise what ended it before its time, or return its largest MSE."""
    if failure is None:
        _close(run_dir, summary)
    if isinstance(failure, DivergenceError):
        raise failure
    print_verdict(cfg.name, summary, run_dir, offline=any(run_dir.glob("wandb/offline-run-*")))
    if failure is not None:
        _print_how_to_resume(run_dir)
        raise failure
    return _largest(summary["mse"])


@rank_zero_only
def _print_how_to_resume(run_dir: Path) -> None:
    if HydraConfig.get().mode is RunMode.RUN:  # of a sweep, its launcher says it
        command = shlex.join(words_of_command(run_dir, ["resume=true"]))
        Console(soft_wrap=True, highlight=False).print(f"interrupted: go on with\n  {command}", markup=False)


def _fit(
    signals: RunSignals, trainer: pl.Trainer, model: MNN, datamodule: ExactData, checkpoint: Any, run_dir: Path
) -> BaseException | None:
    """Train, and save the end of it; what ended training before: divergence, a signal or the loss of a process."""
    try:
        trainer.fit(model, datamodule, ckpt_path=checkpoint, weights_only=True)
        with whole_file(run_dir / _ENDED, writes=trainer.is_global_zero) as unfinished:
            trainer.save_checkpoint(unfinished, weights_only=False)  # optimiser too
    except BaseException as error:
        cause = signals.end_training(error)
        if isinstance(cause, DivergenceError | KeyboardInterrupt | SystemExit):
            return cause
        raise
    signals.end_training()
    return None


def summarise(
    trainer: pl.Trainer,
    model: MNN,
    datamodule: ExactData,
    seconds: float,
    seed: int,
    failure: BaseException | None,
    *,
    callbacks: Sequence[pl.Callback],
) -> dict[str, Any]:
    """The run's ``summary.json``: what the callbacks found, and the run's sizes; measures are lists over R."""
    found: dict[str, Any] = dict.fromkeys(MEASURES)
    for callback in callbacks:
        if isinstance(callback, ScheduledCallback):
            found |= callback.summary()
    ended = None
    if failure is not None:  # what the last check found is not what the run ended in
        ended = EarlyEnd.DIVERGENCE if isinstance(failure, DivergenceError) else EarlyEnd.INTERRUPTION
        reason = _reason(failure, trainer.global_step) + _certified_before(found["kind"])
        verdict = {"kind": "not_stationary", "reason": reason, "zero_error": False}
        found |= {key: [value] * model.replicas if model.replicas > 1 else value for key, value in verdict.items()}
    return found | {
        "finished": False,  # until all else is written
        "ended_by": ended,
        "epochs": completed_epochs(trainer),
        "steps": trainer.global_step,
        "processes": processes(),
        # A process that failed does not wait for the others' counts.
        "visits": datamodule.visits() if failure is None or trainer.world_size == 1 else None,
        "seconds": seconds,
        "num_samples": None if datamodule.exact_loader is None else datamodule.exact_loader.num_samples,
        "input_dim": model.hparams["input_dim"],
        "hidden_dims": model.hparams["hidden_dims"],
        "negative_slope": model.hparams["negative_slope"],
        "replicas": model.replicas,
        "seed": seed,
    }


def _reason(failure: BaseException, steps: int) -> str:
    """Why a run ended early."""
    if isinstance(failure, DivergenceError):
        return str(failure)
    lost = f" by the loss of process {failure.rank}" if isinstance(failure, LostProcessError) else ""
    return f"interrupted after {steps} steps{lost}"


def _certified_before(kinds: Any) -> str:
    """How many replicas the last check had certified, in words."""
    listed = kinds if isinstance(kinds, list) else [kinds]
    minima = sum(kind in ("differentiable_minimum", "kink_minimum") for kind in listed)
    return f"; {minima} of {len(listed)} were at certified minima at the last check" if len(listed) > 1 else ""


def _try_out(trainer: pl.Trainer, model: MNN, datamodule: ExactData, checkpoint: str | None) -> float:
    """Train as long as ``fast_dev_run`` says; nothing is kept of it."""
    trainer.fit(model, datamodule, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        Console(soft_wrap=True, highlight=False).print(
            f"all went well in {trainer.global_step} step(s) of a fast_dev_run, of which nothing is kept: "
            "no summary, figure, checkpoint or log"
        )
    return float(trainer.callback_metrics.get("train/mse", "nan"))


def _require_row(cfg: DictConfig) -> None:
    """Say what to choose where Table 1 has no row for the data set."""
    if "table_1" not in cfg:
        return
    try:
        cfg.get("row")  # which refers to the data set's settings
    except InterpolationKeyError:
        data, known = HydraConfig.get().runtime.choices.get("data"), "|".join(map(str, cfg.table_1))
        raise UserError(f"data={data}: experiment=table_1 has no settings for it: choose data={known}") from None


def _callbacks(cfg: DictConfig) -> list[pl.Callback]:
    """The config's callbacks, one of which stops training on request."""
    callbacks = [build(cfg, f"callbacks.{key}") for key, node in cfg.callbacks.items() if node]
    stops = any(isinstance(callback, LastCheckpoint) for callback in callbacks)
    return callbacks if stops else [*callbacks, StopOnRequest()]


def _loggers(cfg: DictConfig, found: RunState) -> list[Any]:
    built = []
    for key, node in (cfg.get("logger") or {}).items():
        if not isinstance(node, DictConfig):
            continue
        is_run = "_target_" in node and is_wandb(node)
        options = wandb_options(cfg, node, found.wandb_id) if is_run else {}
        built.append(build(cfg, f"logger.{key}", only_known(node) if is_run else node, **options))
        if isinstance(built[-1], ResumableWandbLogger):
            built[-1].is_held = True
    return built


@rank_zero_only
def _go_on(loggers: Sequence[Any], rows: int) -> None:
    """Let the loggers that can go on from the row at which the checkpoint was written."""
    before: list[tuple[dict[str, float], int]] | None = None
    for table in loggers:
        if isinstance(table, ResumableCSVLogger):
            table.resume(rows)
            before = table.read()
    for logger in loggers:
        if isinstance(logger, ResumableWandbLogger):
            if before is None:  # no table; the rows are in the folder of the process that was killed
                logger.rows = rows
            else:
                logger.resume(before)


@rank_zero_only
def _leave(run_dir: Path, trainer: pl.Trainer, summary: dict[str, Any], *, figure: bool) -> None:
    """Write summary and figure, and hand both to the loggers; a run that is to end soon does without a figure."""
    write_json(run_dir / "summary.json", summary)
    for logger in trainer.loggers:
        logger.save()
    leave_in_wandb(trainer.loggers, summary, MEASURES)
    if figure and (run_dir / "metrics.csv").exists():
        picture = run_figure(run_dir)
        for logger in trainer.loggers:
            log_image(logger, "figure", picture, trainer.global_step)


def _leave_last_words(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write the summary of a run whose main thread is not there to do so."""
    write_json(run_dir / "summary.json", summary)
    last = run_dir / "checkpoints" / "last.ckpt"
    sys.stderr.write(
        f"{summary['reason']}, in the middle of something that could not be stopped in time: resume=true goes on from "
        f"{last if last.exists() else 'the beginning'}\n"
    )


@rank_zero_only
def _close(run_dir: Path, summary: dict[str, Any]) -> None:
    """Say that the run is finished; then only put the end in the place of the checkpoint to go on from."""
    write_json(run_dir / "summary.json", summary | {"finished": True})
    (run_dir / _ENDED).replace(run_dir / "checkpoints" / "last.ckpt")


@rank_zero_only
def _print_again(cfg: DictConfig, summary: dict[str, Any]) -> None:
    """Print a finished run's verdict; do what a kill at its very end may have left undone."""
    run_dir = Path(cfg.run_dir)
    if (run_dir / _ENDED).exists():
        _close(run_dir, summary)
    Console().print(f"{run_dir} holds this run, finished: there is nothing left to do", soft_wrap=True, highlight=False)
    print_verdict(cfg.name, summary, run_dir, offline=any(run_dir.glob("wandb/offline-run-*")))


def _largest(mse: float | list[float] | None) -> float:
    if mse is None:
        return float("nan")
    return max(mse) if isinstance(mse, list) else mse
