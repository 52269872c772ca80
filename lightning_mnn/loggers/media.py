"""Functions that log scalars, images, tables and histograms to every logger that supports them."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_mnn.utilities.transfer import fetched, widest_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pytorch_lightning as pl
    from pytorch_lightning.loggers.logger import Logger
    from torch import Tensor


def plain_value(value: Any) -> Any:
    """A single number as a Python number, with a bool as 0.0 or 1.0; anything else unchanged."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    return float(value) if type(value) is not int and isinstance(value, Real) else value


def log_scalars(trainer: pl.Trainer, scalars: dict[str, Tensor | float | None]) -> None:
    """Log values measured after ``trainer.global_step`` steps, as means over replicas; skip None and non-finite values.

    They go immediately to every logger and to ``trainer.callback_metrics``. ``LightningModule.log`` would drop the
    values of steps that ``log_every_n_steps`` skips, and cannot be called at the end of training.
    """
    log_rows(trainer, [(_finite_values(scalars), trainer.global_step)])


def log_rows(trainer: pl.Trainer, rows: Sequence[tuple[Mapping[str, float], int]]) -> None:
    """Log rows of finite numbers, each with its step, to every logger; ``callback_metrics`` get the last values."""
    latest: dict[str, float] = {}
    for values, _ in rows:
        latest.update(values)
    trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in latest.items()})
    for logger in trainer.loggers:
        if hasattr(logger, "log_rows"):  # all at a time
            logger.log_rows(rows)
        else:
            for values, step in rows:
                logger.log_metrics(dict(values), step=step)


def _finite_values(scalars: Mapping[str, Tensor | float | None]) -> dict[str, float]:
    """Means over replicas, on the host; None and values that are not finite are left out."""
    given = {name: value for name, value in scalars.items() if value is not None}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    means = fetched(*(value.to(widest_dtype(value.device)).mean() for value in tensors.values()))
    values = given | dict(zip(tensors, means, strict=True))
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def shows_images(logger: Logger) -> bool:
    """Whether :func:`log_image` supports a logger; callers ask before they draw an image, which takes time."""
    return hasattr(logger, "log_image") or hasattr(getattr(logger, "experiment", None), "add_image")


def log_image(logger: Logger, name: str, path: Path, step: int) -> bool:
    """Log a PNG file to W&B or TensorBoard; other loggers are ignored.

    Returns:
        Whether the logger supports images.
    """
    if hasattr(logger, "log_image"):  # W&B
        logger.log_image(name, [str(path)], step=step)
        return True
    add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
    if add_image is not None:  # TensorBoard
        from matplotlib.image import imread  # noqa: PLC0415 (slow, and only used here)

        add_image(name, imread(path), step, dataformats="HWC")
        return True
    return False


def log_table(logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> bool:
    """Log a table to W&B; other loggers are ignored.

    Returns:
        Whether the logger supports tables.
    """
    if not hasattr(logger, "log_table"):
        return False
    logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
    return True


def log_histogram(logger: Logger, name: str, values: Tensor, step: int) -> bool:
    """Log a histogram of values to W&B or TensorBoard; other loggers are ignored.

    Returns:
        Whether the logger supports histograms.
    """
    if hasattr(logger, "log_image"):  # W&B
        import wandb  # noqa: PLC0415 (slow, and only used with its logger)

        media: dict[str, Any] = {name: wandb.Histogram(values.tolist())}
        logger.log_metrics(media, step)  # the same way as scalars, which keeps W&B's own steps in order
        return True
    add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
    if add_histogram is not None:  # TensorBoard
        add_histogram(name, values, step)
        return True
    return False
