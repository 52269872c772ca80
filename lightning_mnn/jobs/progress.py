"""JobProgress: lets the launcher of a sweep see how far a job's training is, in any Lightning application.

Lightning adds it to each Trainer by the entry point ``callbacks_factory``, where the launcher asks for it.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mnn.jobs.records import read_record
from lightning_mnn.tasks._files import write_json

if TYPE_CHECKING:
    import pytorch_lightning as pl

VARIABLE = "LIGHTNING_MNN_PROGRESS"  # the file that a job writes
_SECONDS = 0.5  # between two notes


def factory() -> list[pl.Callback]:
    """The callback, if the process is a job of a sweep; otherwise none."""
    path = os.environ.get(VARIABLE)
    return [] if path is None else [_job_progress(Path(path))]


def _job_progress(path: Path) -> pl.Callback:
    import pytorch_lightning as pl  # noqa: PLC0415 (the entry point is loaded by all Trainers of an environment)

    class JobProgress(pl.Callback):
        """Notes the epoch and the loss twice a second at most; the first process does, and asks the others nothing."""

        def __init__(self) -> None:
            self._due = 0.0
            self._started = 0.0

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            self._started = time.time()
            self._note(trainer, trainer.current_epoch)

        def on_train_batch_end(
            self,
            trainer: pl.Trainer,
            pl_module: pl.LightningModule,  # noqa: ARG002
            outputs: Any,
            batch: Any,  # noqa: ARG002
            batch_idx: int,  # noqa: ARG002
        ) -> None:
            if time.monotonic() >= self._due:
                self._note(trainer, trainer.current_epoch, outputs)

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            self._note(trainer, trainer.current_epoch)

        def epochs_until_due(self, done: int) -> float:  # noqa: ARG002 (as of the other callbacks)
            return math.inf  # whenever it can

        def _note(self, trainer: pl.Trainer, epochs: int, outputs: Any = None) -> None:
            self._due = time.monotonic() + _SECONDS
            if not trainer.is_global_zero:
                return
            limit = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
            loss = _loss(trainer, outputs)
            content = {"epochs": epochs, "max_epochs": limit, "loss": loss, "started": self._started}
            known = {key: value for key, value in content.items() if value is not None}
            with contextlib.suppress(OSError):  # of which the training is not to die
                write_json(path, read_record(path) | known)

    return JobProgress()


def _loss(trainer: pl.Trainer, outputs: Any) -> float | None:
    """MNN's error, or else the loss of a batch, or else what was logged with "loss" in its name.

    Of what is logged only that counts which Lightning has computed already: to compute may take all processes.
    """
    logged: dict[str, Any] = getattr(trainer._logger_connector, "_callback_metrics", {})  # noqa: SLF001 (see above)
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    losses = [logged.get("train/mse"), loss, *(value for name, value in logged.items() if "loss" in name)]
    return next((float(value.detach()) for value in losses if hasattr(value, "numel") and value.numel() == 1), None)
