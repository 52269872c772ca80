"""Pictures for those loggers that can show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pytorch_lightning.loggers import Logger


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
