"""RunProgress: one bar over the whole run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override

if TYPE_CHECKING:
    import pytorch_lightning as pl


class RunProgress(ProgressBar):
    """One bar over all epochs of a run, with the last logged MSE and MCE.

    Lightning's own bars start again in each epoch, and a full-batch run has hundreds of epochs per second. If the
    output is not a terminal, nothing is drawn.

    Args:
        console: where to draw; None: standard error.

    Attributes:
        progress: the bar while it is drawn, as Lightning's ``RichProgressBar`` has it; None: there is none.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console
        self._enabled = True
        self.progress: Progress | None = None
        self._drawn = 0  # epochs

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        console = self._console or Console(stderr=True)
        if not (self._enabled and console.is_terminal):
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        self.progress = Progress(*columns, console=console)
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        self.progress.add_task("training", total=total, completed=trainer.current_epoch, metrics="")
        self.progress.start()
        self._drawn = trainer.current_epoch

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.progress is None:
            return
        done = trainer.current_epoch + 1
        if done >= self._drawn + max(1, (trainer.max_epochs or 1) // 1000):
            self._drawn = done
            self.progress.update(self.progress.task_ids[0], completed=done, metrics=_metrics(trainer))

    def epochs_until_due(self, done: int) -> float:
        """Infinitely many: the bar needs no particular epoch."""
        del done
        return math.inf

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.progress is not None:
            completed = trainer.current_epoch
            self.progress.update(self.progress.task_ids[0], completed=completed, metrics=_metrics(trainer))
        self._stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _metrics(trainer: pl.Trainer) -> str:
    values: dict[str, Any] = trainer.callback_metrics
    shown = []
    for name, label in (("train/mse", "MSE"), ("train/mce", "MCE")):
        if name in values:
            shown.append(f"{label} {float(values[name]):.2g}")
    return "  ".join(shown)
