"""What is handed to the loggers: scalars to all of them, pictures and histograms to those that can show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger
    from torch import Tensor


def log_scalars(trainer: pl.Trainer, scalars: dict[str, Tensor | float | None]) -> None:
    """Log values measured after ``trainer.global_step`` steps, means over replicas; None and non-finite are left out.

    They go to every logger at once and to ``trainer.callback_metrics``. ``LightningModule.log`` would drop those of
    steps that ``log_every_n_steps`` passes over, and cannot be called at the end of training.
    """
    means = {
        name: torch.as_tensor(value, dtype=torch.float64).mean() for name, value in scalars.items() if value is not None
    }
    finite = {name: value for name, value in means.items() if bool(value.isfinite())}
    trainer.callback_metrics.update(finite)
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in finite.items()}, step=trainer.global_step)


def log_image(logger: Logger, name: str, path: Path, step: int) -> bool:
    """Log a PNG file to W&B or TensorBoard; other loggers are passed over.

    Returns:
        Whether the logger took it.
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


def log_histogram(logger: Logger, name: str, values: Tensor, step: int) -> bool:
    """Log a histogram of values to W&B or TensorBoard; other loggers are passed over.

    Returns:
        Whether the logger took it.
    """
    if hasattr(logger, "log_image"):  # W&B
        import wandb  # noqa: PLC0415 (slow, and only used with its logger)

        media: dict[str, Any] = {name: wandb.Histogram(values.tolist())}
        logger.log_metrics(media, step)  # as the scalars go, which keeps W&B's own steps in order
        return True
    add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
    if add_histogram is not None:  # TensorBoard
        add_histogram(name, values, step)
        return True
    return False
