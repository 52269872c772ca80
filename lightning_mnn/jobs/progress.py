"""JobProgress: lets the launcher of a sweep see how far a job's training is, in any Lightning application.

Lightning adds it to each Trainer by the entry point ``callbacks_factory``, where the launcher asks for it.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl

VARIABLE = "LIGHTNING_MNN_PROGRESS"  # the file that a job writes
_LOSSES = ("train/mse", "train/loss", "train_loss", "loss")
_SECONDS = 0.5  # between two notes


def factory() -> list[pl.Callback]:
    """The callback, if the process is a job of a sweep; otherwise none."""
    path = os.environ.get(VARIABLE)
    return [] if path is None else [_job_progress(Path(path))]


def note(path: Path, content: dict[str, Any]) -> None:
    """Write a note under a temporary name, then rename."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)


def read_note(path: Path) -> dict[str, Any]:
    """What is noted; {} where there is nothing yet."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return content


def _job_progress(path: Path) -> pl.Callback:
    import pytorch_lightning as pl  # noqa: PLC0415 (the entry point is loaded by all Trainers of an environment)

    class JobProgress(pl.Callback):
        """Notes the epoch and the loss twice a second at most."""

        def __init__(self) -> None:
            self._due = 0.0
            self._started = 0.0

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            self._started = time.time()
            self._note(trainer, trainer.current_epoch)

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            if time.monotonic() >= self._due:
                self._note(trainer, trainer.current_epoch + 1)

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            self._note(trainer, trainer.current_epoch)

        def epochs_until_due(self, done: int) -> float:  # noqa: ARG002 (as of the other callbacks)
            return math.inf  # whenever it can

        def _note(self, trainer: pl.Trainer, epochs: int) -> None:
            self._due = time.monotonic() + _SECONDS
            if trainer.is_global_zero:
                limit = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
                content = {"epochs": epochs, "max_epochs": limit, "loss": _loss(trainer), "started": self._started}
                note(path, content)

    return JobProgress()


def _loss(trainer: pl.Trainer) -> float | None:
    """The training loss that was logged last, by one of its usual names or any with "loss" in it."""
    logged: dict[str, Any] = trainer.callback_metrics
    name = next((name for name in (*_LOSSES, *logged) if name in logged and (name in _LOSSES or "loss" in name)), None)
    return None if name is None else float(logged[name])
