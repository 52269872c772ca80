"""Suppress Lightning's remarks about itself."""

from __future__ import annotations

import logging
import warnings

from lightning_mnn.utilities.compat.lightning_internals import loggers_of_remarks


def quieten() -> None:
    """Suppress Lightning's remarks about its own operation; the run prints its results at its end."""
    for name in loggers_of_remarks():
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"The number of training batches \(\d+\) is smaller than the logging")
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")
