"""LastCheckpoint: a file from which a run that was killed goes on as if it had not been."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.callbacks import Checkpoint
from typing_extensions import override

from lightning_mnn.validation import ArgumentError

if TYPE_CHECKING:
    import pytorch_lightning as pl

_INTERVAL = timedelta(minutes=1)
_LATE = 0.01  # of the interval, by which several processes may be late, so as not to ask one another after each batch
_MOMENTS = 100  # by which they may be, at most: the next ones may take longer


class SavedAndStopped(SystemExit):
    """The end, with exit code 0, of a run that saved a checkpoint when it was told to stop."""


class LastCheckpoint(Checkpoint):
    """Saves the whole state of training in ``last.ckpt`` now and then, at moments from which it can go on exactly.

    Such a moment is the end of an epoch when all other callbacks have acted, or the end of a batch, with its optimiser
    step, that is not its epoch's last: Lightning goes on from the end of an epoch's last batch without the hooks of the
    epoch's end. Nothing is saved when training is about to end, since from there it would not go through its end again.
    Nor is it at epochs' ends under ``max_steps``, from which Lightning goes on with other batches: with one batch an
    epoch, never; use ``max_epochs`` there. The file is written under another name and renamed, so that what can be seen
    is complete, also after a kill.

    Beside what Lightning saves, the checkpoint holds ``logged_rows``: how many rows the loggers that count them (see
    :mod:`lightning_mnn.loggers`) have taken; they all take the same.

    Args:
        dirpath: folder of ``last.ckpt``.
        train_time_interval: least time between two of them.

    Attributes:
        path: the file.

    Raises:
        ValueError: a negative interval.

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
        self._is_to_stop = False
        self._asked = 0.0  # when the processes asked one another
        self._pause = self._left = 1  # moments from one question to the next, and until the next

    def stop_soon(self) -> None:
        """Save at the next such moment, whatever the interval, and raise :class:`SavedAndStopped` on all processes.

        It may be called by a signal handler, and on one process of several; these may let some moments pass.
        """
        self._is_to_stop = True

    def epochs_until_due(self, done: int) -> float:  # noqa: ARG002 (as of the other callbacks)
        """Epochs after ``done`` of them until one at whose end the callback must act: it can wait."""
        return math.inf

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_time = self._asked = time.monotonic()
        self._pause = self._left = 1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and not trainer.is_last_batch:
            self._save_if_due(trainer, completed_epochs=trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.max_steps == -1:
            self._save_if_due(trainer, completed_epochs=trainer.current_epoch + 1)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        rows = [getattr(logger, "rows", 0) for logger in trainer.loggers]  # a DummyLogger answers with a function
        checkpoint["logged_rows"] = max((count for count in rows if isinstance(count, int)), default=0)

    def _save_if_due(self, trainer: pl.Trainer, completed_epochs: int) -> None:
        ends = trainer.should_stop or completed_epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if ends or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        is_due, is_to_stop = self._agreed(trainer)
        if not is_due:
            return
        unfinished = self.path.with_name(self.path.name + ".tmp")
        trainer.save_checkpoint(unfinished, weights_only=False)
        if trainer.is_global_zero:
            unfinished.replace(self.path)
        self._last_time = self._asked = time.monotonic()
        if is_to_stop:
            raise SavedAndStopped

    def _agreed(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Whether to save now, and to stop then: the same on all processes, of which the first one's clock decides."""
        is_to_stop = self._is_to_stop
        interval, now = self.train_time_interval.total_seconds(), time.monotonic()
        is_due = is_to_stop or now - self._last_time >= interval
        if trainer.world_size == 1:
            return is_due, is_to_stop
        self._left -= 1
        if self._left:
            return False, False
        in_time = self._pause * _LATE * interval / max(now - self._asked, 1e-9)
        first = [is_due, is_to_stop, max(1, min(int(in_time), _MOMENTS))]
        own = torch.tensor(first if trainer.is_global_zero else [0, is_to_stop, 0], device=trainer.strategy.root_device)
        is_due, is_to_stop, self._pause = trainer.strategy.reduce(own, reduce_op="max").tolist()
        self._asked, self._left = now, self._pause
        return bool(is_due or is_to_stop), bool(is_to_stop)
