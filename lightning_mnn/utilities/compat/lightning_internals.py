"""Private parts of PyTorch Lightning, in both of its namespaces."""

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
    """The module or data module whose ``train_dataloader`` a fit uses: ``FitLoop._data_source``.

    ``trainer.datamodule`` may belong to an earlier fit.
    """
    return attribute(trainer, "fit_loop._data_source.instance", _LIBRARY)


def training_iterators(trainer: pl.Trainer) -> Sequence[Any]:
    """The iterators over loaders that a fit reads from: ``FitLoop._combined_loader._iterator.iterators``."""
    loaders = attribute(trainer, "fit_loop._combined_loader", _LIBRARY)
    combined = None if loaders is None else attribute(loaders, "_iterator", _LIBRARY)
    iterators: Sequence[Any] = () if combined is None else attribute(combined, "iterators", _LIBRARY)
    return iterators


def load_training_data(trainer: pl.Trainer) -> None:
    """Create the training loader now instead of after ``on_train_start``: ``FitLoop.setup_data``."""
    attribute(trainer, "fit_loop.setup_data", _LIBRARY)()


def hooks_before_transfer(pl_module: pl.LightningModule, batch: Any) -> Any:
    """A batch after the hook ``on_before_batch_transfer`` of the module or the data module.

    ``LightningModule._on_before_batch_transfer`` chooses which of the two hooks to call.
    """
    return attribute(pl_module, "_on_before_batch_transfer", _LIBRARY)(batch)


# Counters for work that Lightning itself did not do


def count_epochs(trainer: pl.Trainer, epochs: int = 1) -> None:
    """Count more epochs as done, inside one of Lightning's epochs: ``FitLoop.epoch_progress``."""
    progress = attribute(trainer, "fit_loop.epoch_progress", _LIBRARY)
    expected = trainer.current_epoch + epochs
    _increase(progress, ("ready", "started", "processed", "completed"), epochs)
    if trainer.current_epoch != expected:
        disagree(
            _LIBRARY, "Trainer.fit_loop.epoch_progress, read by Trainer.current_epoch", trainer.current_epoch, expected
        )


class StepCount:
    """Counts optimiser steps that were not done by Lightning's optimiser.

    It uses ``Trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress``.

    Args:
        trainer: the Trainer whose ``global_step`` counts them.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._progress = attribute(trainer, f"fit_loop.epoch_loop.{_MANUAL}", _LIBRARY)
        self._ready = attribute(self._progress, "increment_ready", _LIBRARY)
        self._completed = attribute(self._progress, "increment_completed", _LIBRARY)
        self._expected = trainer.global_step

    def add(self, steps: int = 1) -> None:
        """Count one or more steps.

        Raises:
            MissingPartError: ``trainer.global_step`` did not increase by as much.
        """
        if steps == 1:  # the faster way
            self._ready()
            self._completed()
        else:
            _increase(self._progress, ("ready", "completed"), steps)
        self._expected += steps
        found = self._trainer.global_step
        if found != self._expected:
            disagree(_LIBRARY, f"{_MANUAL}, read by Trainer.global_step", found, self._expected)


def _increase(progress: Any, names: Sequence[str], number: int) -> None:
    """Add a number to the counts of Lightning's progress: what ``increment_*`` does for one."""
    for part in ("total", "current"):
        counts = attribute(progress, part, _LIBRARY)
        for name in names:
            setattr(counts, name, attribute(counts, name, _LIBRARY) + number)


def count_batches(trainer: pl.Trainer, batches: int) -> None:
    """Count the batches beyond the first that a bundle contained, so that logged values have the right step.

    Lightning sees a bundle as one batch. There is no public counter: ``_TrainingEpochLoop._batches_that_stepped``.
    """
    loop = attribute(trainer, "fit_loop.epoch_loop", _LIBRARY)
    loop._batches_that_stepped = attribute(loop, "_batches_that_stepped", _LIBRARY) + batches


def share_step_count(trainer: pl.Trainer) -> None:
    """Set the step counters of automatic and manual optimisation to the same value, their maximum.

    Lightning counts the two separately, and one fit of a Trainer may be bundled when the fit before was not. Without
    this, ``global_step`` would jump. It uses ``automatic_optimization`` and ``manual_optimization`` of
    ``Trainer.fit_loop.epoch_loop``.
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
    """Like :func:`share_step_count`, for a checkpoint that is about to be loaded: the layout of its ``loops``."""
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


# Limits of training


def set_limits(trainer: pl.Trainer, max_epochs: int | None, max_steps: int) -> None:
    """Set ``trainer.max_epochs`` and ``trainer.max_steps``: the limits of ``FitLoop`` and ``_TrainingEpochLoop``."""
    loop = attribute(trainer, "fit_loop", _LIBRARY)
    attribute(loop, "epoch_loop.max_steps", _LIBRARY)  # setting a missing attribute would also succeed
    loop.max_epochs, loop.epoch_loop.max_steps = max_epochs, max_steps
    found = trainer.max_epochs, trainer.max_steps
    if found != (max_epochs, max_steps):
        disagree(_LIBRARY, "the limits of Trainer.fit_loop", found, (max_epochs, max_steps))


def completed_epochs(trainer: pl.Trainer) -> int:
    """Number of epochs whose batches are all done, also if training ended in the hooks at the end of an epoch.

    It uses ``FitLoop.epoch_progress``; ``Trainer.current_epoch`` counts an epoch only after its hooks.
    """
    return int(attribute(trainer, "fit_loop.epoch_progress.current.processed", _LIBRARY))


@private_part(_LIBRARY, 'checkpoint["loops"]["fit_loop"], the progress of epochs and batches in it')
def complete_saved_epoch(checkpoint: dict[str, Any]) -> None:
    """Count the epoch as done in a checkpoint saved at its end, which Lightning does not do under ``max_steps``.

    It depends on the layout of the checkpoint's ``loops``.
    """
    loop = checkpoint["loops"]["fit_loop"]
    for progress in loop["epoch_progress"].values():
        progress["completed"] = progress["processed"]
    batches = loop["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] &= False  # an in-place operation, so that a missing key raises KeyError


# Processes


def take_launched_processes(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """Remove and return the processes that Lightning has started, for the caller to watch: ``procs`` of its launcher.

    Lightning's own thread checks this list every five seconds and ends this process by SIGKILL if one of them has
    failed. Once the list is empty, that thread stops.
    """
    launcher = trainer.strategy.launcher
    if launcher is None:
        return []
    processes: list[subprocess.Popen[bytes]] = attribute(launcher, "procs", _LIBRARY)
    found = list(processes)
    processes.clear()
    return found


def leave_out_exchange_of_signals(trainer: pl.Trainer) -> None:
    """Disable the broadcast before each step whether the first process got a SIGTERM, if the caller handles signals.

    The broadcast costs a collective, and on a GPU a synchronisation: ``_TrainingEpochLoop._broadcast_sigterm_tensor``.
    If there is no such method, there is nothing to disable.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None


@private_part(_LIBRARY, "_MultiProcessingLauncher")
def trains_in_children(trainer: pl.Trainer) -> bool:
    """Whether a Trainer trains in child processes, as with "ddp_spawn": ``_MultiProcessingLauncher``."""
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher  # noqa: PLC0415

    classes = type(trainer.strategy.launcher).__mro__  # compared by name, because either namespace may be in use
    return any(one.__name__ == _MultiProcessingLauncher.__name__ for one in classes)


def combination(trainer: pl.Trainer) -> Any:
    """The mode in which a fit combines several loaders, such as "max_size_cycle": ``CombinedLoader._mode``."""
    return attribute(trainer, "fit_loop._combined_loader._mode", _LIBRARY)


# Callbacks and loggers


def steps_between_checkpoints(callback: ModelCheckpoint) -> int:
    """Steps from one save of a ModelCheckpoint to the next; 0: it ignores steps: ``_every_n_train_steps``."""
    return int(attribute(callback, "_every_n_train_steps", _LIBRARY))


def time_between_checkpoints(callback: ModelCheckpoint) -> timedelta | None:
    """Time from one save of a ModelCheckpoint to the next; None: it ignores time: ``_train_time_interval``."""
    interval: timedelta | None = attribute(callback, "_train_time_interval", _LIBRARY)
    return interval


def computed_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """The entries of ``trainer.callback_metrics`` that are already computed: ``Trainer._logger_connector``.

    Reading the others would compute them, which may need all processes.
    """
    metrics: dict[str, Any] = attribute(trainer, "_logger_connector._callback_metrics", _LIBRARY)
    return metrics


def check_wandb_logger(logger: WandbLogger) -> None:
    """Check that a WandbLogger has the private attributes that our subclass uses.

    They are ``_experiment``, ``_id``, ``_offline``, ``_prefix``, ``_save_dir`` and ``_wandb_init``.
    """
    for name in ("_experiment", "_id", "_offline", "_prefix", "_save_dir", "_wandb_init"):
        attribute(logger, name, _LIBRARY)


def loggers_of_remarks() -> Sequence[str]:
    """Names of the Python loggers through which Lightning prints remarks about itself: those of its modules.

    The first two belong to the two namespaces; the namespace that is imported last logs for both. The last one reports
    that Lightning handles SLURM's signals, even if it does not.
    """
    return (
        "pytorch_lightning.utilities.rank_zero",
        "lightning.pytorch.utilities.rank_zero",
        "lightning_fabric.utilities.distributed",
        "pytorch_lightning.trainer.connectors.signal_connector",
    )
