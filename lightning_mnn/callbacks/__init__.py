"""Callbacks that find out what a piecewise-linear network converges to."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mnn.callbacks.activation_pattern_recorder import ActivationPatternRecorder
    from lightning_mnn.callbacks.angular_volume_monitor import AngularVolumeMonitor
    from lightning_mnn.callbacks.evidence.choose_tier import FirstOrderTolerances, SecondOrderSettings
    from lightning_mnn.callbacks.gradient_statistics import GradientStatistics
    from lightning_mnn.callbacks.learning_coefficient import LearningCoefficient
    from lightning_mnn.callbacks.local_minimum_detector import LocalMinimumDetector
    from lightning_mnn.callbacks.pattern_store import PatternStore
    from lightning_mnn.callbacks.schedule import Schedule
    from lightning_mnn.callbacks.slices.loss_slice import LossSlice
    from lightning_mnn.callbacks.trainer.last_checkpoint import LastCheckpoint
    from lightning_mnn.callbacks.trainer.run_progress import RunProgress
    from lightning_mnn.callbacks.volumes.cones import ConeSettings
    from lightning_mnn.callbacks.volumes.probe import LocalVolumeSettings

__all__ = [
    "ActivationPatternRecorder",
    "AngularVolumeMonitor",
    "ConeSettings",
    "FirstOrderTolerances",
    "GradientStatistics",
    "LastCheckpoint",
    "LearningCoefficient",
    "LocalMinimumDetector",
    "LocalVolumeSettings",
    "LossSlice",
    "PatternStore",
    "RunProgress",
    "Schedule",
    "SecondOrderSettings",
]

_MODULES = {
    "ActivationPatternRecorder": "activation_pattern_recorder",
    "AngularVolumeMonitor": "angular_volume_monitor",
    "ConeSettings": "volumes.cones",
    "FirstOrderTolerances": "evidence.choose_tier",
    "GradientStatistics": "gradient_statistics",
    "LastCheckpoint": "trainer.last_checkpoint",
    "LearningCoefficient": "learning_coefficient",
    "LocalMinimumDetector": "local_minimum_detector",
    "LocalVolumeSettings": "volumes.probe",
    "LossSlice": "slices.loss_slice",
    "PatternStore": "pattern_store",
    "RunProgress": "trainer.run_progress",
    "Schedule": "schedule",
    "SecondOrderSettings": "evidence.choose_tier",
}


def __getattr__(name: str) -> Any:
    """A class, imported when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lightning_mnn.callbacks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lightning_mnn.callbacks.{_MODULES[name]}"), name)
