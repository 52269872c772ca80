"""Stopping training on request, at a step that all processes agree on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from typing_extensions import override

from lightning_mnn.utilities.interruption import Interrupted, Pace, requested

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

LATEST = 0.5  # seconds that a request waits for the processes' next exchange


class StopOnRequest(pl.Callback):
    """Ends training before the next step when any of its processes was asked to stop.

    It is for runs that save no checkpoint; :class:`~lightning_mnn.callbacks.LastCheckpoint` saves one and ends training
    by itself. Requests are made by :func:`lightning_mnn.utilities.interruption.request`. Several processes exchange
    them about twice a second.

    Raises:
        Interrupted: (on all processes) one was asked to stop.
    """

    acts_within_epochs = False  # any batch will do

    def __init__(self) -> None:
        self._pace = Pace(LATEST)

    def epochs_until_due(self, done: int) -> float:  # noqa: ARG002 (the signature of the other callbacks)
        """Number of epochs until one at whose end the callback must act: infinite, it can wait."""
        return math.inf

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pace.restart(1)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        _, number = exchange(trainer, self._pace)
        if number:
            raise Interrupted(number)


def exchange(trainer: Trainer, pace: Pace, *, wish: bool = False) -> tuple[bool, int]:
    """Exchange wishes and stop requests among the processes of a training; all must call this the same number of times.

    Args:
        trainer: the Trainer.
        pace: how often the processes communicate; other calls return (False, 0). A single process needs none.
        wish: wish of the first process; those of the others are ignored.

    Returns:
        The wish of the first process, and the signal by which any process was asked to stop, or 0; the same on all.
    """
    if trainer.world_size == 1:
        return wish, requested()
    if not pace.is_time():
        return False, 0
    local = [int(wish), requested(), pace.proposal()] if trainer.is_global_zero else [0, requested(), 0]
    on_device = torch.tensor(local, device=trainer.strategy.root_device)
    wished, number, pause = trainer.strategy.reduce(on_device, reduce_op="max").tolist()
    pace.restart(pause)
    return bool(wished), number
