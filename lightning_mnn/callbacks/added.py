"""AddedCallbacks: the three callbacks in a run whose program does not name them, and may not suit them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from typing_extensions import override

from lightning_mnn.callbacks.activation_pattern_recorder import ActivationPatternRecorder
from lightning_mnn.callbacks.angular_volume_monitor import AngularVolumeMonitor
from lightning_mnn.callbacks.local_minimum_detector import LocalMinimumDetector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_mnn.callbacks.scheduled import ScheduledCallback

_MAKERS: dict[str, Callable[[], ScheduledCallback]] = {
    "detector": lambda: LocalMinimumDetector(stop_training=False),
    "recorder": ActivationPatternRecorder,
    "monitor": AngularVolumeMonitor,
}


class AddedCallbacks(pl.Callback):
    """Adds callbacks to a fit, of those types that neither its program nor its module brought.

    They leave training as it is: the detector does not stop it, and a callback that meets an error, divergence
    included, says so in one warning and does nothing for the rest of the fit.

    Args:
        names: any of "detector", "recorder" and "monitor".
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add what is missing, before Lightning restores the callbacks' states."""
        if stage != "fit":
            return
        run: Any = trainer
        made = [_MAKERS[name]() for name in self.names]
        added = [new for new in made if not any(isinstance(old, type(new)) for old in run.callbacks)]
        monitors = [i for i, callback in enumerate(run.callbacks) if isinstance(callback, AngularVolumeMonitor)]
        place = min(run.callbacks.index(self), *monitors, len(run.callbacks))  # a monitor looks at detectors before it
        # A new list: Lightning goes through the old one while this is called.
        run.callbacks = [*run.callbacks[:place], *added, *run.callbacks[place:]]
        for callback in added:
            callback.ends_diverged = False
            callback.setup(trainer, pl_module, stage)

    def epochs_until_due(self, done: int) -> float:
        """Any number: it looks at no epoch."""
        del done
        return float("inf")
