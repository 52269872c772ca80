"""AddedCallbacks: adds the three callbacks to a run whose program does not name them and may not fit them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from typing_extensions import override

from lightning_mnn.callbacks.activation_pattern_recorder import ActivationPatternRecorder
from lightning_mnn.callbacks.angular_volume_monitor import AngularVolumeMonitor
from lightning_mnn.callbacks.local_minimum_detector import LocalMinimumDetector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_mnn.callbacks.scheduled import ScheduledCallback

_MAKERS: dict[str, Callable[..., ScheduledCallback]] = {
    "detector": partial(LocalMinimumDetector, stop_training=False),
    "recorder": ActivationPatternRecorder,
    "monitor": AngularVolumeMonitor,
}


class AddedCallbacks(pl.Callback):
    """Adds callbacks to a fit, of those types that neither its program nor its module provides.

    They do not change training: the detector does not stop it, and a callback that meets an error, including
    divergence, warns once and does nothing for the rest of the fit.

    Args:
        names: any of "detector", "recorder" and "monitor".
        tier: which share of training's time each may take.
    """

    def __init__(self, names: Sequence[str], tier: str = "full") -> None:
        self.names, self.tier = tuple(names), tier

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add what is missing, before Lightning restores the callbacks' states."""
        if stage != "fit":
            return
        run: Any = trainer
        made = [_MAKERS[name](tier=self.tier) for name in self.names]
        added = [new for new in made if not any(isinstance(old, type(new)) for old in run.callbacks)]
        monitors = [i for i, callback in enumerate(run.callbacks) if isinstance(callback, AngularVolumeMonitor)]
        place = min(run.callbacks.index(self), *monitors, len(run.callbacks))  # a monitor reads detectors before it
        # A new list: Lightning iterates over the old one while this is called.
        run.callbacks = [*run.callbacks[:place], *added, *run.callbacks[place:]]
        for callback in added:
            callback.ends_diverged = False
            callback.setup(trainer, pl_module, stage)

    def epochs_until_due(self, done: int) -> float:
        """Infinitely many: it acts in no epoch."""
        del done
        return float("inf")
