"""Callbacks that say what a piecewise-linear network converges to."""

from lightning_mnn.callbacks.activation_pattern_recorder import ActivationPatternRecorder
from lightning_mnn.callbacks.angular_volume_monitor import AngularVolumeMonitor
from lightning_mnn.callbacks.last_checkpoint import LastCheckpoint
from lightning_mnn.callbacks.local_minimum_detector import LocalMinimumDetector
from lightning_mnn.callbacks.pattern_store import PatternStore
from lightning_mnn.callbacks.run_progress import RunProgress
from lightning_mnn.callbacks.schedule import Schedule

__all__ = [
    "ActivationPatternRecorder",
    "AngularVolumeMonitor",
    "LastCheckpoint",
    "LocalMinimumDetector",
    "PatternStore",
    "RunProgress",
    "Schedule",
]
