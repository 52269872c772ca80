"""Callbacks that find out what a piecewise-linear network converges to."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mnn.callbacks.activation_pattern_recorder import ActivationPatternRecorder
    from lightning_mnn.callbacks.angular_volume_monitor import AngularVolumeMonitor
    from lightning_mnn.callbacks.local_minimum_detector import LocalMinimumDetector
    from lightning_mnn.callbacks.pattern_store import PatternStore
    from lightning_mnn.callbacks.schedule import Schedule
    from lightning_mnn.callbacks.trainer.last_checkpoint import LastCheckpoint
    from lightning_mnn.callbacks.trainer.run_progress import RunProgress

__all__ = [
    "ActivationPatternRecorder",
    "AngularVolumeMonitor",
    "LastCheckpoint",
    "LocalMinimumDetector",
    "PatternStore",
    "RunProgress",
    "Schedule",
]

_MODULES = {
    "ActivationPatternRecorder": "activation_pattern_recorder",
    "AngularVolumeMonitor": "angular_volume_monitor",
    "LastCheckpoint": "trainer.last_checkpoint",
    "LocalMinimumDetector": "local_minimum_detector",
    "PatternStore": "pattern_store",
    "RunProgress": "trainer.run_progress",
    "Schedule": "schedule",
}


def __getattr__(name: str) -> Any:
    """A class, looked up again each time: ``lightning.pytorch`` may have been imported since (see join_lightning)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lightning_mnn.callbacks' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"lightning_mnn.callbacks.{_MODULES[name]}"), name)
    importlib.import_module("lightning_mnn.callbacks.scheduled").join_lightning()
    return found
