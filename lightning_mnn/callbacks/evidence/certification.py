"""Certificates of a module's network on its training set, on any number of processes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.callbacks.evaluation.training_set import input_rank, threshold_of, training_samples
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.landscape.minima.certificate import Certificate, certify
from lightning_mnn.landscape.minima.polishing import Polished, polish
from lightning_mnn.utilities.distributed import DistributedGroup, on_first_process

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytorch_lightning as pl

    from lightning_mnn.landscape.network import Network

_MAX_GATHERED = 1 << 24  # input numbers up to which one process gathers all samples: 128 MiB
_MAX_PER_PROCESS = 1 << 28  # input numbers of a process: with a copy in float64 and blocks they need 6 GiB


def reason_not_certified(trainer: pl.Trainer, network: Network) -> str | None:
    """Why the training set is too large to certify a network on it; None if it is not."""
    numbers = num_samples(trainer.train_dataloader) * network.input_dim // trainer.world_size
    if numbers <= _MAX_PER_PROCESS:
        return None
    most = f"above {_MAX_PER_PROCESS:.1e}"
    return f"a certificate would have {numbers:.1e} input numbers in the memory of a process, {most}"


def certify_training_set(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, max_distance: float
) -> list[Certificate]:
    """Certify a two-layer network on the module's training set; one certificate per replica, equal on every process.

    Small sets are gathered on one process, which sends its result to the others; of larger sets each process reads its
    shard.
    """
    return _on_training_set(trainer, pl_module, network, max_distance, polished=False)


def polish_on_training_set(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, max_distance: float
) -> list[Polished]:
    """Polish a two-layer network on the module's training set; the module's weights stay as they are."""
    return _on_training_set(trainer, pl_module, network, max_distance, polished=True)


@torch.no_grad()
def move_to(network: Network, certificates: list[Certificate], chosen: list[bool]) -> None:
    """Write the weights of the chosen replicas' certificates into the network's own tensors, in their precision."""
    tensors = {
        "hidden_weights": network.hidden_weights[0],
        "output_weights": network.output_weights,
        "hidden_bias": network.hidden_bias,
        "output_bias": network.output_bias,
    }
    replicated = network.output_weights.ndim > 1
    for replica, certificate in enumerate(certificates):
        for name, weights in tensors.items():
            if weights is not None and chosen[replica]:
                (weights[replica] if replicated else weights).copy_(getattr(certificate, name))


def _on_training_set(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, max_distance: float, *, polished: bool
) -> list[Any]:
    split = trainer.world_size > 1
    whole = not split or num_samples(trainer.train_dataloader) * network.input_dim <= _MAX_GATHERED
    ranks, threshold = input_rank(trainer, pl_module, network), threshold_of(trainer, pl_module)  # by all processes
    rank = int(ranks) if ranks.ndim == 0 else None
    search: Callable[..., Any] = polish if polished else partial(certify, input_rank=rank)

    def found_here() -> list[Any]:
        inputs, targets = training_samples(trainer, network, whole=whole)
        device = torch.device("cpu") if split and whole else inputs.device  # where other processes can read it
        wide = network.to(device).to(torch.float64)
        result = search(
            wide.hidden_weights[0],
            wide.output_weights,
            inputs.to(device, torch.float64),
            targets.to(device, torch.float64),
            network.negative_slope,
            threshold=threshold,
            max_distance=max_distance,
            hidden_bias=wide.hidden_bias,
            output_bias=wide.output_bias,
            process_group=None if whole else DistributedGroup(inputs.shape[-2]),
        )
        return result if isinstance(result, list) else [result]

    return on_first_process(trainer, found_here) if whole else found_here()
