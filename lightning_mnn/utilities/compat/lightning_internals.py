"""Private parts of PyTorch Lightning, in either of its namespaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_mnn.utilities.compat.missing import attribute, disagree, private_part

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from datetime import timedelta

    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import WandbLogger

_LIBRARY = "pytorch-lightning"
_COUNTS = ("ready", "completed")
_AUTOMATIC = "automatic_optimization.optim_progress.optimizer.step.total"
_MANUAL = "manual_optimization.optim_step_progress"


# The training data


def training_data_source(trainer: pl.Trainer) -> Any:
    """Whose ``train_dataloader`` a fit uses, a module or a data module: ``FitLoop._data_source``.

    ``trainer.datamodule`` may be that of an earlier fit.
    """
    return attribute(trainer, "fit_loop._data_source.instance", _LIBRARY)


def training_iterators(trainer: pl.Trainer) -> Sequence[Any]:
    """The iterators over loaders that a fit reads from: ``FitLoop._combined_loader._iterator.iterators``."""
    loaders = attribute(trainer, "fit_loop._combined_loader", _LIBRARY)
    held = None if loaders is None else attribute(loaders, "_iterator", _LIBRARY)
    iterators: Sequence[Any] = () if held is None else attribute(held, "iterators", _LIBRARY)
    return iterators


def load_training_data(trainer: pl.Trainer) -> None:
    """Ask for the training loader now and not after ``on_train_start``: ``FitLoop.setup_data``."""
    attribute(trainer, "fit_loop.setup_data", _LIBRARY)()


def hooks_before_transfer(pl_module: pl.LightningModule, batch: Any) -> Any:
    """A batch as the hook ``on_before_batch_transfer`` of the module or the data module leaves it.

    ``LightningModule._on_before_batch_transfer`` knows whose hook is meant.
    """
    return attribute(pl_module, "_on_before_batch_transfer", _LIBRARY)(batch)


# Counts of what was done in other ways than Lightning's own


def count_epoch(trainer: pl.Trainer) -> None:
    """Count the present epoch as done, within one of Lightning's: ``FitLoop.epoch_progress``."""
    progress = attribute(trainer, "fit_loop.epoch_progress", _LIBRARY)
    expected = trainer.current_epoch + 1
    for name in ("ready", "started", "processed", "completed"):
        attribute(progress, f"increment_{name}", _LIBRARY)()
    if trainer.current_epoch != expected:
        disagree(
            _LIBRARY, "Trainer.fit_loop.epoch_progress, read by Trainer.current_epoch", trainer.current_epoch, expected
        )


class StepCount:
    """Counts optimiser steps that Lightning's own optimiser did not take.

    ``Trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress``.

    Args:
        trainer: whose ``global_step`` is to count them.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        progress = attribute(trainer, f"fit_loop.epoch_loop.{_MANUAL}", _LIBRARY)
        self._ready = attribute(progress, "increment_ready", _LIBRARY)
        self._completed = attribute(progress, "increment_completed", _LIBRARY)
        self._expected = trainer.global_step

    def add_one(self) -> None:
        """Count a step.

        Raises:
            MissingPartError: ``trainer.global_step`` has not counted it.
        """
        self._ready()
        self._completed()
        self._expected += 1
        found = self._trainer.global_step
        if found != self._expected:
            disagree(_LIBRARY, f"{_MANUAL}, read by Trainer.global_step", found, self._expected)


def count_batches(trainer: pl.Trainer, batches: int) -> None:
    """Count the batches that a Lightning batch held more than one, for the steps of what is logged.

    Nothing public counts them: ``_TrainingEpochLoop._batches_that_stepped``.
    """
    loop = attribute(trainer, "fit_loop.epoch_loop", _LIBRARY)
    loop._batches_that_stepped = attribute(loop, "_batches_that_stepped", _LIBRARY) + batches


def share_step_count(trainer: pl.Trainer) -> None:
    """Let both of Lightning's ways to optimise have counted the same steps, or ``global_step`` would change with them.

    They count apart, and a fit may be bundled when the one before, by the same Trainer, was not:
    ``Trainer.fit_loop.epoch_loop``, ``automatic_optimization`` and ``manual_optimization``.
    """
    expected = None
    for name in _COUNTS:
        totals = [
            attribute(trainer, f"fit_loop.epoch_loop.{one}", _LIBRARY) for one in (_AUTOMATIC, f"{_MANUAL}.total")
        ]
        expected = max(attribute(total, name, _LIBRARY) for total in totals)
        for total in totals:
            setattr(total, name, expected)
    if trainer.global_step != expected:
        disagree(_LIBRARY, "the progress of steps, read by Trainer.global_step", trainer.global_step, expected)


@private_part(_LIBRARY, 'checkpoint["loops"]["fit_loop"], the progress of steps in it')
def share_saved_step_count(checkpoint: dict[str, Any]) -> None:
    """The same for a checkpoint that is about to be loaded: the layout of its ``loops``."""
    loop = checkpoint["loops"]["fit_loop"]
    totals = (
        loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"],
        loop["epoch_loop.manual_optimization.optim_step_progress"]["total"],
    )
    steps = 0
    for name in _COUNTS:
        steps = max(total[name] for total in totals)
        for total in totals:
            total[name] = steps
    if steps != checkpoint["global_step"]:
        disagree(
            _LIBRARY, 'the progress of steps in a checkpoint, as in its "global_step"', checkpoint["global_step"], steps
        )


# How long training goes on


def set_limits(trainer: pl.Trainer, max_epochs: int | None, max_steps: int) -> None:
    """Set ``trainer.max_epochs`` and ``trainer.max_steps``: the limits of ``FitLoop`` and ``_TrainingEpochLoop``."""
    loop = attribute(trainer, "fit_loop", _LIBRARY)
    attribute(loop, "epoch_loop.max_steps", _LIBRARY)  # setting it would succeed also where nothing reads it
    loop.max_epochs, loop.epoch_loop.max_steps = max_epochs, max_steps
    found = trainer.max_epochs, trainer.max_steps
    if found != (max_epochs, max_steps):
        disagree(_LIBRARY, "the limits of Trainer.fit_loop", found, (max_epochs, max_steps))


def completed_epochs(trainer: pl.Trainer) -> int:
    """Epochs all of whose batches are done, also where training ended in the hooks of an epoch's end.

    ``FitLoop.epoch_progress``; ``Trainer.current_epoch`` counts an epoch when its hooks are done, too.
    """
    return int(attribute(trainer, "fit_loop.epoch_progress.current.processed", _LIBRARY))


@private_part(_LIBRARY, 'checkpoint["loops"]["fit_loop"], the progress of epochs and batches in it')
def complete_saved_epoch(checkpoint: dict[str, Any]) -> None:
    """Count the epoch at whose end a checkpoint is saved as done, as Lightning does not under ``max_steps``.

    By the layout of the checkpoint's ``loops``.
    """
    loop = checkpoint["loops"]["fit_loop"]
    for progress in loop["epoch_progress"].values():
        progress["completed"] = progress["processed"]
    batches = loop["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] &= False  # which must be there


# Processes


def take_launched_processes(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """The processes that Lightning has started beside this one, for the caller to watch: ``procs`` of its launcher.

    They are taken from Lightning's own thread, which looks at them every five seconds and ends this process by SIGKILL
    where one has failed; where there are none it stops.
    """
    launcher = trainer.strategy.launcher
    if launcher is None:
        return []
    processes: list[subprocess.Popen[bytes]] = attribute(launcher, "procs", _LIBRARY)
    found = list(processes)
    processes.clear()
    return found


def leave_out_exchange_of_signals(trainer: pl.Trainer) -> None:
    """Let processes not ask the first one before each step whether it got a SIGTERM, for a caller that sees to it.

    That takes a collective, and on a GPU a wait: ``_TrainingEpochLoop._broadcast_sigterm_tensor``. Where there is no
    such method there is nothing to leave out.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None


@private_part(_LIBRARY, "_MultiProcessingLauncher")
def trains_in_children(trainer: pl.Trainer) -> bool:
    """Whether a Trainer trains in children of the process, as by "ddp_spawn": ``_MultiProcessingLauncher``."""
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher  # noqa: PLC0415

    kinds = type(trainer.strategy.launcher).__mro__  # of either namespace
    return any(kind.__name__ == _MultiProcessingLauncher.__name__ for kind in kinds)


def combination(trainer: pl.Trainer) -> Any:
    """How a fit goes through several loaders at once, such as "max_size_cycle": ``CombinedLoader._mode``."""
    return attribute(trainer, "fit_loop._combined_loader._mode", _LIBRARY)


# Callbacks and loggers


def steps_between_checkpoints(callback: ModelCheckpoint) -> int:
    """After so many steps a ModelCheckpoint saves; 0: it does not look at steps: ``_every_n_train_steps``."""
    return int(attribute(callback, "_every_n_train_steps", _LIBRARY))


def time_between_checkpoints(callback: ModelCheckpoint) -> timedelta | None:
    """After so much time a ModelCheckpoint saves; None: it does not look at the clock: ``_train_time_interval``."""
    interval: timedelta | None = attribute(callback, "_train_time_interval", _LIBRARY)
    return interval


def computed_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """Of ``trainer.callback_metrics`` those that are computed already: ``Trainer._logger_connector``.

    To ask for the others computes them, which may take all processes.
    """
    metrics: dict[str, Any] = attribute(trainer, "_logger_connector._callback_metrics", _LIBRARY)
    return metrics


def check_wandb_logger(logger: WandbLogger) -> None:
    """Check that a WandbLogger has the private attributes that a subclass of it uses.

    ``_experiment``, ``_id``, ``_offline``, ``_prefix``, ``_save_dir`` and ``_wandb_init``.
    """
    for name in ("_experiment", "_id", "_offline", "_prefix", "_save_dir", "_wandb_init"):
        attribute(logger, name, _LIBRARY)


def loggers_of_remarks() -> Sequence[str]:
    """Names of the loggers by which Lightning remarks on its own workings: those of its modules.

    The first two are of the namespaces, of which the one that is imported last speaks for both. The last one says that
    it heeds SLURM's signals, also where it does not.
    """
    return (
        "pytorch_lightning.utilities.rank_zero",
        "lightning.pytorch.utilities.rank_zero",
        "lightning_fabric.utilities.distributed",
        "pytorch_lightning.trainer.connectors.signal_connector",
    )
