"""LastCheckpoint: a file from which a stopped run is resumed as if it had not been stopped."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.callbacks import Checkpoint
from typing_extensions import override

from lightning_mnn.callbacks.trainer.stop_on_request import LATEST, exchange
from lightning_mnn.utilities.compat.lightning_internals import complete_saved_epoch, set_limits
from lightning_mnn.utilities.files import whole_file
from lightning_mnn.utilities.interruption import Interrupted, Pace, stop_at_this_step, stopping
from lightning_mnn.utilities.seeding import set_shared_states, shared_states
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytorch_lightning as pl

_INTERVAL = timedelta(minutes=1)
_LATE = 0.01  # fraction of the interval by which processes may be late, so as not to communicate after each batch


class LastCheckpoint(Checkpoint):
    """Saves the whole state of training in ``last.ckpt`` at intervals, at moments from which it can be resumed exactly.

    Such a moment is the end of an epoch when all other callbacks have acted, or the end of a batch with an optimiser
    step that is not the last of its epoch: from the end of an epoch's last batch, Lightning would resume without the
    hooks of the epoch's end. The state is saved once more when training ends, before the callbacks' ``on_train_end``; a
    run that is resumed from there runs these hooks. The file is written under another name and then renamed, so that a
    visible file is complete, also after a kill.

    When any process of the run is asked to stop, by :func:`lightning_mnn.utilities.interruption.request`, the state is
    saved at one of the next such moments, whatever the interval, and training ends on all processes. Several processes
    may let some moments pass before.

    In addition to what Lightning saves, the checkpoint contains ``logged_rows``: the number of rows in the loggers that
    count them (see :mod:`lightning_mnn.loggers`); it is the same for all of these. With one process it also contains
    ``generators``, the states of the generators that a program shares (torch's of the CPU and of each GPU, numpy's and
    Python's), so that dropout, noise and the order of a DataLoader continue.

    Args:
        dirpath: folder of ``last.ckpt``.
        train_time_interval: minimal time between two checkpoints.

    Attributes:
        path: the file.

    Raises:
        ValueError: a negative interval.
        Interrupted: (on all processes) one was asked to stop; the checkpoint is saved.

    >>> LastCheckpoint("run/checkpoints").path.as_posix()
    'run/checkpoints/last.ckpt'
    """

    acts_within_epochs = False  # any batch will do, and any epoch

    def __init__(self, dirpath: str | Path, train_time_interval: timedelta = _INTERVAL) -> None:
        if train_time_interval < timedelta(0):
            raise ArgumentError(
                "train_time_interval", str(train_time_interval), "must not be negative", "0 saves at every such moment"
            )
        self.path = Path(dirpath) / "last.ckpt"
        self.train_time_interval = train_time_interval
        self._last_time = 0.0
        self._pace = Pace(min(_LATE * train_time_interval.total_seconds(), LATEST))
        self._moment: dict[str, Any] = {}  # the moment of the checkpoint that is being saved, or was loaded
        self._generators: dict[str, Any] | None = None  # of the checkpoint that was loaded
        self._limits: tuple[int | None, int] | None = None  # of epochs and steps, while they are raised

    def epochs_until_due(self, done: int) -> float:  # noqa: ARG002 (the signature of the other callbacks)
        """Number of epochs until one at whose end the callback must act: infinite, it can wait."""
        return math.inf

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._moment, self._limits, self._generators = {}, None, None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._generators is not None:  # before the loader's iterator is created, which draws, like in each epoch
            set_shared_states(self._generators)
            self._generators = None
        if self._moment.get("ended"):  # Lightning would leave out the hooks of training's start and end
            self._limits = epochs, steps = trainer.max_epochs, trainer.max_steps
            set_limits(trainer, epochs if epochs in (None, -1) else epochs + 1, steps if steps == -1 else steps + 1)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_time = time.monotonic()
        self._pace.restart(1)
        if self._limits is not None:
            set_limits(trainer, *self._limits)
            self._limits = None
        if self._moment.get("should_stop"):
            trainer.should_stop = True
        self._moment = {}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and not trainer.is_last_batch and not _ends(trainer, trainer.current_epoch):
            self._save_if_due(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_if_due(trainer, completed_epochs=trainer.current_epoch + 1)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        rows = [getattr(logger, "rows", 0) for logger in trainer.loggers]  # of a DummyLogger this is a function
        checkpoint["logged_rows"] = max((count for count in rows if isinstance(count, int)), default=0)
        if self._moment:  # the checkpoint is this callback's, not another's
            checkpoint["moment"] = dict(self._moment)
            if trainer.world_size == 1:
                checkpoint["generators"] = shared_states()
            if self._moment["completed_epochs"] is not None and trainer.max_steps != -1:
                complete_saved_epoch(checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._moment = checkpoint.get("moment", {})
        self._generators = checkpoint.get("generators") if trainer.world_size == 1 else None

    def _save_if_due(self, trainer: pl.Trainer, completed_epochs: int | None = None) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        ended = completed_epochs is not None and _ends(trainer, completed_epochs)
        is_due, number = self._agreed(trainer)
        if not (is_due or number or ended):
            return
        self._moment = {"completed_epochs": completed_epochs, "ended": ended, "should_stop": trainer.should_stop}
        with whole_file(self.path, writes=trainer.is_global_zero) as unfinished:
            trainer.save_checkpoint(unfinished, weights_only=False)
        self._moment = {}
        self._last_time = time.monotonic()
        self._pace.restart(self._pace.pause)
        if number:
            raise Interrupted(number)

    def _agreed(self, trainer: pl.Trainer) -> tuple[bool, int]:
        """Whether to save now, and the signal to stop for (0: none), the same on all processes."""
        if number := stopping():
            return True, number
        late = time.monotonic() - self._last_time >= self.train_time_interval.total_seconds()
        return exchange(trainer, self._pace, wish=late)


def _ends(trainer: pl.Trainer, completed_epochs: int) -> bool:
    """Whether training ends when so many epochs are completed, with no batch after the present one."""
    run: Any = trainer
    if run.should_stop and completed_epochs >= (run.min_epochs or 0) and run.global_step >= (run.min_steps or 0):
        return True
    return bool(completed_epochs == run.max_epochs or 0 <= run.max_steps <= run.global_step)


def or_stop_here(trainer: pl.Trainer, action: Callable[[], None]) -> bool:
    """Run an action at a step from which the run can be resumed; if it is interrupted, stop training at that step.

    Returns:
        Whether the action was completed; if not, a resumed run has to begin with it.

    Raises:
        Interrupted: nothing saves a checkpoint at this step.
    """
    if stopping():
        return False
    try:
        action()
    except Interrupted as stop:
        run: Any = trainer
        if run.fast_dev_run or not any(isinstance(callback, LastCheckpoint) for callback in run.callbacks):
            raise
        stop_at_this_step(stop.number)
        return False
    return True
