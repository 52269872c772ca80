"""Errors of a network on the test set of its data module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_mnn.callbacks.evaluation.module_network import NetworkModule
from lightning_mnn.data.error_sums import ErrorSums
from lightning_mnn.data.loaders.exact import ExactData
from lightning_mnn.data.loaders.shards import exact_shard, flat_batch
from lightning_mnn.utilities.transfer import widest_dtype

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor


def errors_on_test_set(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """``mse`` and ``mce`` on the test set, float64 () or with replicas (R,), each sample once over all processes.

    Every process must call this. ``mce`` is left out where the targets are not two labels.

    Returns:
        The errors; empty if the module does not define a network, or its data module has no test set.
    """
    run: Any = trainer
    loader = run.datamodule.exact_test_loader() if isinstance(run.datamodule, ExactData) else None
    if loader is None or not isinstance(pl_module, NetworkModule):
        return {}
    network = pl_module.network()
    network = network.to(widest_dtype(network.output_weights.device))
    sums = ErrorSums(pl_module.threshold, regression=pl_module.threshold is None)
    nothing = network.output_weights.new_zeros((*network.output_weights.shape[:-1], 0))
    sums.add(nothing, nothing)  # a process may have no sample
    for batch in exact_shard(loader, trainer.global_rank, trainer.world_size):
        inputs, targets = flat_batch(batch, replicated=network.output_weights.ndim > 1)
        sums.add(network.predict(inputs.to(network.output_weights)), targets.to(network.output_weights.device))
    return sums.means(trainer.strategy)
