"""Leave out what Lightning says of itself."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Silence Lightning's remarks on its own workings; the run's own words come at its end."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"The number of training batches \(\d+\) is smaller than the logging")
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
