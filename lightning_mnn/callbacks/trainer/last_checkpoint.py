"""LastCheckpoint: a file from which a run that was stopped goes on as if it had not been."""

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
from lightning_mnn.utilities.interruption import Interrupted, Pace, stopping
from lightning_mnn.utilities.seeding import set_shared_states, shared_states
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    import pytorch_lightning as pl

_INTERVAL = timedelta(minutes=1)
_LATE = 0.01  # of the interval, by which several processes may be late, so as not to ask one another after each batch


class LastCheckpoint(Checkpoint):
    """Saves the whole state of training in ``last.ckpt`` now and then, at moments from which it can go on exactly.

    Such a moment is the end of an epoch when all other callbacks have acted, or the end of a batch, with its optimiser
    step, that is not its epoch's last: Lightning goes on from the end of an epoch's last batch without the hooks of the
    epoch's end. It is saved once more when training ends, before the callbacks' ``on_train_end``; from there a run goes
    on with those. The file is written under another name and renamed, so that what can be seen is complete, also after
    a kill.

    When any process of the run is asked to stop, by :func:`lightning_mnn.utilities.interruption.request`, it is saved
    at the next such moment, whatever the interval, and training ends on all processes; these may let some moments pass.

    Beside what Lightning saves, the checkpoint holds ``logged_rows``: how many rows the loggers that count them (see
    :mod:`lightning_mnn.loggers`) have taken; they all take the same. That of one process also holds ``generators``, the
    states of those that a program shares (torch's of the CPU and of each GPU, numpy's and Python's), from which
    dropout, noise and the order of a DataLoader go on.

    Args:
        dirpath: folder of ``last.ckpt``.
        train_time_interval: least time between two of them.

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
        self._own: dict[str, Any] = {}  # of the checkpoint that is being saved, or was loaded
        self._generators: dict[str, Any] | None = None  # of the checkpoint that was loaded
        self._limits: tuple[int | None, int] | None = None  # of epochs and steps, while they are put off

    def epochs_until_due(self, done: int) -> float:  # noqa: ARG002 (as of the other callbacks)
        """Epochs after ``done`` of them until one at whose end the callback must act: it can wait."""
        return math.inf

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._own, self._limits, self._generators = {}, None, None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._generators is not None:  # before the loader's iterator is made, which draws, as that of each epoch
            set_shared_states(self._generators)
            self._generators = None
        if self._own.get("ended"):  # where Lightning would leave out the hooks of training's start and end
            self._limits = epochs, steps = trainer.max_epochs, trainer.max_steps
            set_limits(trainer, epochs if epochs in (None, -1) else epochs + 1, steps if steps == -1 else steps + 1)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_time = time.monotonic()
        self._pace.restart(1)
        if self._limits is not None:
            set_limits(trainer, *self._limits)
            self._limits = None
        if self._own.get("should_stop"):
            trainer.should_stop = True
        self._own = {}

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
        rows = [getattr(logger, "rows", 0) for logger in trainer.loggers]  # a DummyLogger answers with a function
        checkpoint["logged_rows"] = max((count for count in rows if isinstance(count, int)), default=0)
        if self._own:  # this callback's checkpoint, and not another's
            checkpoint["moment"] = dict(self._own)
            if trainer.world_size == 1:
                checkpoint["generators"] = shared_states()
            if self._own["completed_epochs"] is not None and trainer.max_steps != -1:
                complete_saved_epoch(checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._own = checkpoint.get("moment", {})
        self._generators = checkpoint.get("generators") if trainer.world_size == 1 else None

    def _save_if_due(self, trainer: pl.Trainer, completed_epochs: int | None = None) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        ended = completed_epochs is not None and _ends(trainer, completed_epochs)
        is_due, number = self._agreed(trainer)
        if not (is_due or number or ended):
            return
        self._own = {"completed_epochs": completed_epochs, "ended": ended, "should_stop": trainer.should_stop}
        with whole_file(self.path, writes=trainer.is_global_zero) as unfinished:
            trainer.save_checkpoint(unfinished, weights_only=False)
        self._own = {}
        self._last_time = time.monotonic()
        self._pace.restart(self._pace.pause)
        if number:
            raise Interrupted(number)

    def _agreed(self, trainer: pl.Trainer) -> tuple[bool, int]:
        """Whether to save now, and the signal for which to stop then: the same on all processes."""
        if number := stopping():
            return True, number
        late = time.monotonic() - self._last_time >= self.train_time_interval.total_seconds()
        return exchange(trainer, self._pace, wish=late)


def _ends(trainer: pl.Trainer, completed_epochs: int) -> bool:
    """Whether training ends when so many epochs are completed, and no batch comes after the present one."""
    run: Any = trainer
    if run.should_stop and completed_epochs >= (run.min_epochs or 0) and run.global_step >= (run.min_steps or 0):
        return True
    return bool(completed_epochs == run.max_epochs or 0 <= run.max_steps <= run.global_step)
