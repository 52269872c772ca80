"""AddedCallbacks: the three callbacks in a run whose program does not name them, and may not suit them."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from typing_extensions import override

from lightning_mnn.callbacks.activation_pattern_recorder import ActivationPatternRecorder
from lightning_mnn.callbacks.angular_volume_monitor import AngularVolumeMonitor
from lightning_mnn.callbacks.local_minimum_detector import LocalMinimumDetector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_mnn.callbacks.schedule import ScheduledCallback

_MAKERS: dict[str, Callable[[], ScheduledCallback]] = {
    "detector": lambda: LocalMinimumDetector(stop_training=False),
    "recorder": ActivationPatternRecorder,
    "monitor": AngularVolumeMonitor,
}


class AddedCallbacks(pl.Callback):
    """Adds callbacks to a fit, of those types that neither its program nor its module brought.

    They leave training as it is: the detector does not stop it, and a callback that meets an error, as in a module
    without kinks, says so in one warning and does nothing for the rest of the fit.

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
            _let_fail(callback)
            callback.setup(trainer, pl_module, stage)

    def epochs_until_due(self, done: int) -> float:
        """Any number: it looks at no epoch."""
        del done
        return float("inf")


def _let_fail(callback: ScheduledCallback) -> None:
    """Let an error in a hook of the callback end its work, instead of the run."""
    failed = False

    def harmless(hook: Callable[..., None]) -> Callable[..., None]:
        @wraps(hook)
        def run(trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **options: Any) -> None:
            nonlocal failed
            if failed and hook.__name__ != "setup":  # of another fit, which may suit it
                return
            failed = False
            try:
                hook(trainer, pl_module, *args, **options)
            except Exception as error:  # noqa: BLE001 (of whatever kind, the run did not ask for it)
                failed = True
                name = type(callback).__name__
                rank_zero_warn(f"{name}, which LIGHTNING_MNN_CALLBACKS asked for, does nothing in this fit: {error}")

        return run

    own = [name for name in vars(pl.Callback) if name.startswith("on_") and name not in _OF_STATE]
    for name in ("setup", "teardown", *own):
        if getattr(type(callback), name) is not getattr(pl.Callback, name):
            setattr(callback, name, harmless(getattr(callback, name)))


_OF_STATE = ("on_save_checkpoint", "on_load_checkpoint")
