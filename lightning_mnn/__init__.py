"""Train a piecewise-linear network with PyTorch Lightning, and know what it converged to."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mnn import callbacks, data, landscape, metrics
    from lightning_mnn.model.mnn import MNN
    from lightning_mnn.model.together import Fit, fit_together
    from lightning_mnn.utilities.errors import DivergenceError

__version__ = "0.2.0"
__all__ = ["MNN", "DivergenceError", "Fit", "callbacks", "data", "fit_together", "landscape", "metrics"]


def __getattr__(name: str) -> Any:
    """Import parts when they are first used: torch takes seconds, and ``lightning-mnn --help`` does not need it."""
    if name in ("MNN", "DivergenceError"):
        return getattr(importlib.import_module("lightning_mnn.model.mnn"), name)
    if name in ("Fit", "fit_together"):
        return getattr(importlib.import_module("lightning_mnn.model.together"), name)
    if name in __all__:
        return importlib.import_module(f"lightning_mnn.{name}")
    raise AttributeError(f"module 'lightning_mnn' has no attribute {name!r}")
