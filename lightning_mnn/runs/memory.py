"""Whether a training fits into memory, checked before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning_mnn.utilities.validation import check_memory

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

    from lightning_mnn.data import ExactData

# Tensors of the weights' size that an optimiser keeps, at least.
_STATES = {
    "adam": 2,
    "adamw": 2,
    "nadam": 2,
    "radam": 2,
    "adamax": 2,
    "adadelta": 2,
    "lbfgs": 2,
    "rmsprop": 1,
    "rprop": 2,
}


def check_training_memory(trainer: pl.Trainer, model: DictConfig, input_dim: int, datamodule: ExactData) -> None:
    """Check the least memory for a step: weights, gradients, the optimiser's state, and twice the activations.

    Args:
        trainer: determines the device.
        model: the model's config; invalid sizes in it are left for the model to refuse.
        input_dim: d0.
        datamodule: determines the number of samples in a batch.

    Raises:
        ArgumentError: less memory is free.
    """
    widths, replicas, optimizer = model.hidden_dims, model.replicas, model.optimizer
    if not isinstance(widths, Sequence) or not all(isinstance(size, int) for size in (*widths, replicas, input_dim)):
        return
    device = trainer.strategy.root_device
    on_cpu = device.type == "cpu"  # the processes share its memory
    name, samples = _batch(datamodule)
    states = _STATES.get(str(optimizer.name).lower(), 0) * int(optimizer.get("history_size", 1))
    layers = (input_dim, *widths, 1)
    weights = (2 + states) * replicas * sum(a * b for a, b in pairwise(layers))
    activations = 2 * replicas * sum(widths) * samples
    element = 4 if model.dtype == "float32" else 8
    needed = element * ((trainer.num_devices if on_cpu else 1) * weights + activations)
    sizes: dict[str, Any] = {"hidden_dims": list(widths), "replicas": replicas, name: samples}
    check_memory(needed, "a training step", sizes, None if on_cpu else device)


def _batch(datamodule: ExactData) -> tuple[str, int]:
    """The argument that determines the number of samples in a batch, and that number; 1 if it is not known yet."""
    known = getattr(datamodule, "num_samples", None)
    if datamodule.batch_size is not None:
        return "batch_size", min(datamodule.batch_size, known or datamodule.batch_size)
    return "num_samples", known or 1
