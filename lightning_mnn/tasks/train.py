"""Train a network, report what it converged to, and save all results in the run folder."""

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

from lightning_mnn.advice import advice_on
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
from lightning_mnn.runs.wandb import (
    end_wandb_runs,
    is_resumable,
    is_wandb,
    leave_in_wandb,
    only_known,
    wandb_options,
    wandb_settings,
)
from lightning_mnn.tasks.experiment import words_of_command
from lightning_mnn.utilities.compat.lightning_internals import completed_epochs
from lightning_mnn.utilities.errors import DivergenceError, EarlyEnd
from lightning_mnn.utilities.files import whole_file, write_json
from lightning_mnn.utilities.validation import ArgumentError
from lightning_mnn.verdicts import MINIMA, Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl

    from lightning_mnn.data import ExactData
    from lightning_mnn.model.mnn import MNN


# What the callbacks measure; null if a callback is off.
MEASURES = (
    *(
        "mse",
        "mce",
        "wrong",
        "kind",
        "reason_code",
        "advice",
        "descends_to",
        "descends_to_mse",
        "descends_to_distance",
        "descends_to_zero_error",
        "zero_error",
        "distance",
        "margin_ratio",
        "min_preactivation",
        "kinks",
    ),
    *("rank", "rank_cap", "log_volume", "log_volume_standard_error", "log_volume_lower_bound", "learning_coefficient"),
    *("regions_visited", "freeze_step", "weights_freeze_step", "findings"),
)

_ENDED = Path("checkpoints", "ended.ckpt")  # the final checkpoint, until the run is finished


class FitTimer(Timer):
    """Measures the time from the start of training to the end of the callbacks' last work."""

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep running: the other callbacks still do their last pass."""

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)


def _timer(duration: Any) -> FitTimer:
    """The run's timer, which stops the run after ``trainer.max_time``: Lightning allows a Trainer only one Timer."""
    try:
        return FitTimer(duration)
    except MisconfigurationException:
        example = "for example +trainer.max_time=00:01:30:00"
        raise ArgumentError("trainer.max_time", duration, "must be a time DD:HH:MM:SS", example) from None


class Start(Callback):
    """Initialises the run folder and starts or resumes the loggers, once nothing can be refused any more.

    By then data, weights and checkpoint are loaded. This must be the first callback; before it acts, no logger of this
    package writes anything.

    Args:
        cfg: the config.
        found: the state of the run.
        loggers: loggers of the Trainer.

    Attributes:
        is_over: whether the folder is initialised.
    """

    def __init__(self, cfg: DictConfig, found: RunState, loggers: Sequence[Any]) -> None:
        self.is_over = False
        self._cfg, self._found, self._loggers = cfg, found, loggers
        self._tree = config_tree(cfg)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if HydraConfig.get().mode is RunMode.RUN:  # a sweep would print it for each job; it is in .hydra
            print_config(self._tree)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in self._loggers:
            if isinstance(logger, ResumableWandbLogger):
                logger.begin()  # this too may be refused
        initialise(self._cfg, self._found)
        self.is_over = True
        if self._found.checkpoint is not None:
            _resume_loggers(self._loggers, self._found.rows)
        _log_settings(self._cfg, self._loggers)


def _log_settings(cfg: DictConfig, loggers: Sequence[Any]) -> None:
    """Pass the config to all loggers that keep one."""
    keep = [logger for logger in loggers if not isinstance(logger, ResumableCSVLogger)]
    settings = wandb_settings(cfg, HydraConfig.get().runtime.choices) if keep else {}
    for logger in keep:
        logger.log_hyperparams(settings)


def train(cfg: DictConfig) -> float:
    """Train as the config specifies.

    The run folder gets ``summary.json``, ``metrics.csv``, ``figure.png``, ``patterns.zarr``, ``checkpoints/``,
    ``plan.json`` and, by Hydra, ``.hydra/``. A run that diverges or is interrupted keeps what it has computed so far;
    in its summary ``finished`` is false.

    With ``trainer.fast_dev_run`` only ``.hydra/`` is written: such a run only checks that nothing fails.

    With ``cfg.resume`` a run that was killed or interrupted, at any moment, continues from its last checkpoint and
    gives the same numbers as an uninterrupted run. Without a checkpoint it starts again from the beginning; a finished
    run is left as it is. In a SLURM job that was requeued, the run resumes whatever ``cfg.resume`` is.

    Returns:
        The final MSE; with replicas, the largest.

    Raises:
        ValueError: ``resume`` is set together with ``ckpt_path``, the experiment has no settings for the data set, or
            the Trainer's processes cannot be started correctly (see
            :func:`~lightning_mnn.runs.processes.devices.check_devices`).
        FileExistsError: the run folder already contains a run, and ``resume`` is false or that run was started with a
            different configuration; or another process is training there.
        DivergenceError: training reached values that are not finite.
        Interrupted: a SystemExit with code 143 after a SIGTERM, and 130 after Ctrl-C (see
            :mod:`~lightning_mnn.runs.processes.signals`).
        LostProcessError: a SystemExit with code 1, because another process of the run is gone.
    """
    with interruptible() as signals, run_lock(Path(cfg.run_dir)):
        return _train(cfg, signals)


def _train(cfg: DictConfig, signals: RunSignals) -> float:
    _require_settings(cfg)
    check_trainer(cfg)
    check_devices(cfg.trainer)
    run_dir = Path(cfg.run_dir)
    found = run_state(cfg)
    if found.summary is not None:
        _print_finished(cfg, found.summary)
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
        return _fast_dev_run(trainer, model, datamodule, cfg.ckpt_path)
    failure: BaseException | None = None

    def summary_of(failure: BaseException | None, callbacks: Sequence[pl.Callback]) -> dict[str, Any]:
        seconds = timer.time_elapsed("train")
        return summarise(trainer, model, datamodule, seconds, cfg.seed, failure, callbacks=callbacks)

    def save_last_summary() -> None:
        if start.is_over:
            _save_last_summary(run_dir, summary_of(signals.cause(), callbacks=()))

    signals.watch.on_forced_end = save_last_summary
    try:
        failure = _fit(signals, trainer, model, datamodule, found.checkpoint or cfg.ckpt_path, run_dir)
        if failure is not None and not start.is_over:
            raise failure
        summary = summary_of(failure, callbacks=trainer.callbacks)  # type: ignore[attr-defined]
        _save_results(run_dir, trainer, summary, figure=_draws_figure(cfg, failure))
    finally:
        end_wandb_runs(loggers, failed=sys.exc_info()[0] is not None or failure is not None)
    return _finish(cfg, run_dir, summary, failure)


def _draws_figure(cfg: DictConfig, failure: BaseException | None) -> bool:
    """Whether the run draws its figure: not if it must end soon, and in a sweep only if asked: drawing takes 0.6 s."""
    if isinstance(failure, SystemExit):
        return False
    single = HydraConfig.get().mode is RunMode.RUN or not cfg.report
    return single if cfg.figure is None else bool(cfg.figure)


def _finish(cfg: DictConfig, run_dir: Path, summary: dict[str, Any], failure: BaseException | None) -> float:
    """Print the result of the run; raise the error that ended it early, or return its largest MSE."""
    if failure is None:
        _mark_finished(run_dir, summary)
    if isinstance(failure, DivergenceError):
        raise failure
    print_verdict(cfg.name, summary, run_dir, offline=any(run_dir.glob("wandb/offline-run-*")))
    if failure is not None:
        _print_how_to_resume(run_dir)
        raise failure
    return _largest(summary["mse"])


@rank_zero_only
def _print_how_to_resume(run_dir: Path) -> None:
    if HydraConfig.get().mode is RunMode.RUN:  # in a sweep the launcher prints this
        command = shlex.join(words_of_command(run_dir, ["resume=true"]))
        Console(soft_wrap=True, highlight=False).print(f"interrupted: resume with\n  {command}", markup=False)


def _fit(
    signals: RunSignals, trainer: pl.Trainer, model: MNN, datamodule: ExactData, checkpoint: Any, run_dir: Path
) -> BaseException | None:
    """Train and save the final checkpoint; return what ended training early: divergence, a signal or a lost process."""
    try:
        trainer.fit(model, datamodule, ckpt_path=checkpoint, weights_only=True)
        with whole_file(run_dir / _ENDED, writes=trainer.is_global_zero) as unfinished:
            trainer.save_checkpoint(unfinished, weights_only=False)  # with the optimiser's state
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
    """The content of ``summary.json``: results of the callbacks, sizes of the run; measures are lists over replicas."""
    found: dict[str, Any] = dict.fromkeys(MEASURES)
    for callback in callbacks:
        if isinstance(callback, ScheduledCallback):
            found |= callback.summary()
    ended = None
    if failure is not None:  # the last check does not describe the final weights
        ended = EarlyEnd.DIVERGENCE if isinstance(failure, DivergenceError) else EarlyEnd.INTERRUPTION
        because, before = _reason(failure, trainer.global_step), _certified_before(found["kind"])
        verdict: dict[str, Any] = {
            "kind": str(Kind.NOT_STATIONARY),
            "reason_code": str(because.code),
            "reason": f"{because}{before}",
            "advice": advice_on(Kind.NOT_STATIONARY, because.code),
            "zero_error": False,
            **{key: None for key in MEASURES if key.startswith("descends_to")},
        }
        found |= {key: [value] * model.replicas if model.replicas > 1 else value for key, value in verdict.items()}
    return found | {
        "finished": False,  # until everything else is written
        "ended_by": ended,
        "epochs": completed_epochs(trainer),
        "steps": trainer.global_step,
        "processes": processes(),
        # A process that failed cannot wait for the others' counts.
        "visits": datamodule.visits() if failure is None or trainer.world_size == 1 else None,
        "seconds": seconds,
        "num_samples": None if datamodule.exact_loader is None else datamodule.exact_loader.num_samples,
        "input_dim": model.hparams["input_dim"],
        "hidden_dims": model.hparams["hidden_dims"],
        "negative_slope": model.hparams["negative_slope"],
        "replicas": model.replicas,
        "seed": seed,
    }


def _reason(failure: BaseException, steps: int) -> Reason:
    """Why a run ended early."""
    if isinstance(failure, DivergenceError):
        return Reason.of(ReasonCode.DIVERGED, cause=str(failure))
    if isinstance(failure, LostProcessError):
        return Reason.of(ReasonCode.PROCESS_LOST, steps=steps, rank=failure.rank)
    return Reason.of(ReasonCode.INTERRUPTED, steps=steps)


def _certified_before(kinds: Any) -> str:
    """How many replicas were certified at the last check, in words."""
    listed = kinds if isinstance(kinds, list) else [kinds]
    minima = sum(kind in MINIMA for kind in listed)
    return f"; {minima} of {len(listed)} were at certified minima at the last check" if len(listed) > 1 else ""


def _fast_dev_run(trainer: pl.Trainer, model: MNN, datamodule: ExactData, checkpoint: str | None) -> float:
    """Train for the steps of ``fast_dev_run``; save nothing."""
    trainer.fit(model, datamodule, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        Console(soft_wrap=True, highlight=False).print(
            f"no errors in {trainer.global_step} step(s) of a fast_dev_run; nothing is saved: "
            "no summary, figure, checkpoint or log"
        )
    return float(trainer.callback_metrics.get("train/mse", "nan"))


def _require_settings(cfg: DictConfig) -> None:
    """Refuse a data set for which Table 1 has no settings; the message lists those that have."""
    if "table_1" not in cfg:
        return
    try:
        cfg.get("row")  # a reference to the data set's settings
    except InterpolationKeyError:
        data, known = HydraConfig.get().runtime.choices.get("data"), "|".join(map(str, cfg.table_1))
        raise UserError(f"data={data}: experiment=table_1 has no settings for it: choose data={known}") from None


def _callbacks(cfg: DictConfig) -> list[pl.Callback]:
    """The config's callbacks, one of which stops training on request (see :class:`StopOnRequest`)."""
    callbacks = [build(cfg, f"callbacks.{key}") for key, node in cfg.callbacks.items() if node]
    stops = any(isinstance(callback, LastCheckpoint) for callback in callbacks)
    return callbacks if stops else [*callbacks, StopOnRequest()]


def _loggers(cfg: DictConfig, found: RunState) -> list[Any]:
    built = []
    for key, node in (cfg.get("logger") or {}).items():
        if not isinstance(node, DictConfig):
            continue
        is_run = "_target_" in node and is_wandb(node)
        if is_run and is_resumable(node) and node.get("mode") == "disabled":  # W&B need not be imported
            continue
        options = wandb_options(cfg, node, found.wandb_id) if is_run else {}
        built.append(build(cfg, f"logger.{key}", only_known(node) if is_run else node, **options))
        if isinstance(built[-1], ResumableWandbLogger):
            built[-1].is_held = True
    return built


@rank_zero_only
def _resume_loggers(loggers: Sequence[Any], rows: int) -> None:
    """Let the loggers that can resume continue from the row at which the checkpoint was written."""
    before: list[tuple[dict[str, float], int]] | None = None
    for table in loggers:
        if isinstance(table, ResumableCSVLogger):
            table.resume(rows)
            before = table.read()
    for logger in loggers:
        if isinstance(logger, ResumableWandbLogger):
            if before is None:  # no CSV log: the rows are in the folder of the process that was killed
                logger.rows = rows
            else:
                logger.resume(before)


@rank_zero_only
def _save_results(run_dir: Path, trainer: pl.Trainer, summary: dict[str, Any], *, figure: bool) -> None:
    """Write summary and figure, and pass both to the loggers; ``figure`` is false for a run that must end soon."""
    write_json(run_dir / "summary.json", summary)
    for logger in trainer.loggers:
        logger.save()
    leave_in_wandb(trainer.loggers, summary, MEASURES)
    if figure and (run_dir / "metrics.csv").exists():
        picture = run_figure(run_dir)
        for logger in trainer.loggers:
            log_image(logger, "figure", picture, trainer.global_step)


def _save_last_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write the summary of a run whose main thread cannot write it any more."""
    write_json(run_dir / "summary.json", summary)
    last = run_dir / "checkpoints" / "last.ckpt"
    sys.stderr.write(
        f"{summary['reason']}, during a step that could not be stopped in time: resume=true continues from "
        f"{last if last.exists() else 'the beginning'}\n"
    )


@rank_zero_only
def _mark_finished(run_dir: Path, summary: dict[str, Any]) -> None:
    """Mark the run as finished in its summary; only then replace the last checkpoint by the final one."""
    write_json(run_dir / "summary.json", summary | {"finished": True})
    (run_dir / _ENDED).replace(run_dir / "checkpoints" / "last.ckpt")


@rank_zero_only
def _print_finished(cfg: DictConfig, summary: dict[str, Any]) -> None:
    """Print the verdict of a finished run; complete what a kill at its very end may have left undone."""
    run_dir = Path(cfg.run_dir)
    if (run_dir / _ENDED).exists():
        _mark_finished(run_dir, summary)
    line = f"{run_dir} contains this run, finished: there is nothing left to do"
    Console().print(line, soft_wrap=True, highlight=False)
    print_verdict(cfg.name, summary, run_dir, offline=any(run_dir.glob("wandb/offline-run-*")))


def _largest(mse: float | list[float] | None) -> float:
    if mse is None:
        return float("nan")
    return max(mse) if isinstance(mse, list) else mse
