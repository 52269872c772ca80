"""Loggers for CSV files and W&B that a resumed run can continue, and functions that log to any logger."""

from lightning_mnn.loggers.csv_logs import ResumableCSVLogger
from lightning_mnn.loggers.media import log_histogram, log_image, log_scalars, log_table, shows_images
from lightning_mnn.loggers.wandb import ResumableWandbLogger

__all__ = [
    "ResumableCSVLogger",
    "ResumableWandbLogger",
    "log_histogram",
    "log_image",
    "log_scalars",
    "log_table",
    "shows_images",
]
