"""Whether a training fits into memory, asked before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_mnn.validation import check_memory

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_mnn.data import ExactData
    from lightning_mnn.mnn import MNN

# Tensors of the size of the weights that an optimiser keeps, at least.
_STATES = {"adam": 2, "sgd": 0, "lbfgs": 2}


def check_training_memory(trainer: pl.Trainer, model: MNN, datamodule: ExactData) -> None:
    """Check what a step takes at the least: weights, gradients and the optimiser's state, and twice the activations.

    Raises:
        ArgumentError: less is free.
    """
    device = trainer.strategy.root_device
    on_cpu = device.type == "cpu"  # whose memory the processes share
    name, samples = _batch(datamodule)
    optimizer = model.hparams["optimizer"]
    states = _STATES.get(optimizer["name"], 0) * int(optimizer.get("history_size", 1))
    weights = (2 + states) * sum(parameter.numel() for parameter in model.parameters())
    activations = 2 * model.replicas * sum(model.hparams["hidden_dims"]) * samples
    needed = model.output_weights.element_size() * ((trainer.num_devices if on_cpu else 1) * weights + activations)
    sizes: dict[str, Any] = {"hidden_dims": model.hparams["hidden_dims"], "replicas": model.replicas, name: samples}
    check_memory(needed, "a training step", sizes, None if on_cpu else device)


def _batch(datamodule: ExactData) -> tuple[str, int]:
    """The argument that says how many samples a batch has, and how many; one where that is not known yet."""
    known = getattr(datamodule, "num_samples", None)
    if datamodule.batch_size is not None:
        return "batch_size", min(datamodule.batch_size, known or datamodule.batch_size)
    return "num_samples", known or 1
