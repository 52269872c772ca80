"""JobProgress: reports the progress of a job's training to the launcher of a sweep, in any Lightning application.

Lightning adds it to each Trainer by the entry point ``callbacks_factory``, if the launcher requests it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mnn.launchers.jobs.records import read_record
from lightning_mnn.utilities.compat.lightning_internals import computed_metrics
from lightning_mnn.utilities.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytorch_lightning as pl

log = logging.getLogger(__name__)

VARIABLE = "LIGHTNING_MNN_PROGRESS"  # path of the file that a job writes
_SECONDS = 0.5  # between two reports


def factory() -> list[pl.Callback]:
    """The callback, if the process is a job of a sweep; otherwise an empty list."""
    path = os.environ.get(VARIABLE)
    return [] if path is None else [_job_progress(Path(path))]


def _job_progress(path: Path) -> pl.Callback:
    import pytorch_lightning as pl  # noqa: PLC0415 (the entry point is loaded by all Trainers of an environment)

    class JobProgress(pl.Callback):
        """Reports the epoch and the loss at most twice a second, and at the end the result of a LocalMinimumDetector.

        Only the first process reports; it does not communicate with the others.
        """

        def __init__(self) -> None:
            self._due = 0.0
            self._started = 0.0

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            self._started = time.time()
            self._report(trainer)

        def on_train_batch_end(
            self,
            trainer: pl.Trainer,
            pl_module: pl.LightningModule,  # noqa: ARG002
            outputs: Any,
            batch: Any,  # noqa: ARG002
            batch_idx: int,  # noqa: ARG002
        ) -> None:
            if time.monotonic() >= self._due:
                self._report(trainer, outputs)

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            self._report(trainer)

        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            _write_report(path, trainer, lambda: {"minimum": _verdict(trainer)})  # after all callbacks' on_train_end

        def epochs_until_due(self, done: int) -> float:  # noqa: ARG002 (as in the other callbacks)
            return math.inf  # it never requires a particular epoch

        def _report(self, trainer: pl.Trainer, outputs: Any = None) -> None:
            if self._due < math.inf:
                self._due = _write_report(path, trainer, lambda: _training(trainer, outputs, self._started))

    return JobProgress()


def _write_report(path: Path, trainer: pl.Trainer, content: Callable[[], dict[str, Any]]) -> float:
    """Add to the report, if possible; return the time of the next one."""
    try:
        if trainer.is_global_zero:
            known = {key: value for key, value in content().items() if value is not None}
            write_json(path, read_record(path) | known, durable=False)
    except OSError:  # such as a full disk: the next report may succeed
        pass
    except Exception as error:  # noqa: BLE001 (a training must not end because of a sweep's table)
        log.warning("the progress of this job is not shown: %s: %s", type(error).__name__, error)
        return math.inf
    return time.monotonic() + _SECONDS


def _training(trainer: pl.Trainer, outputs: Any, started: float) -> dict[str, Any]:
    """The progress of the training."""
    limit = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
    loss = _loss(trainer, outputs)
    return {"epochs": trainer.current_epoch, "max_epochs": limit, "loss": loss, "started": started}


def _verdict(trainer: pl.Trainer) -> dict[str, Any] | None:
    """Evidence, kind, reason code and reason of the Trainer's LocalMinimumDetector; None: there is none."""
    module: Any = sys.modules.get("lightning_mnn.callbacks.local_minimum_detector")
    if module is None:
        return None
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    summaries = [one.summary() for one in callbacks if isinstance(one, module.LocalMinimumDetector)]
    found = next((summary for summary in summaries if "kind" in summary), None)
    return None if found is None else {key: found[key] for key in ("evidence", "kind", "reason_code", "reason")}


def _loss(trainer: pl.Trainer, outputs: Any) -> float | None:
    """MNN's error, else the loss of a batch, else a logged value with "loss" in its name.

    Only values that Lightning has already computed are used, because computing one may need all processes.
    """
    logged = computed_metrics(trainer)
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    losses = [logged.get("train/mse"), loss, *(value for name, value in logged.items() if "loss" in name)]
    return next((float(value.detach()) for value in losses if hasattr(value, "numel") and value.numel() == 1), None)
