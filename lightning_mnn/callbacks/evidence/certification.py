"""Certificates of a module's network on its training set, on any number of processes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.callbacks.evaluation.training_set import input_rank, threshold_of, training_samples
from lightning_mnn.callbacks.evidence.models.objective import CHECK_SHARE, work_of_steps
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.landscape.minima.certificate import Certificate, certify
from lightning_mnn.landscape.minima.polishing import Polished, polish
from lightning_mnn.utilities.distributed import DistributedGroup, on_first_process

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.landscape.network import Network

_MAX_DESCENT_WORK = 1 << 37  # of all replicas together: about 15 s of one core
_MIN_DESCENT_WORK = 1 << 33  # of a replica: about 0.6 s, what a descent may cost however short the training was
_WORK_OF_A_STEP = 1 << 26  # whatever its size: about 5 ms
_WORK_PER_SAMPLE = 1 << 13
_MAX_GATHERED = 1 << 24  # input numbers up to which one process gathers all samples: 128 MiB
_MAX_PER_PROCESS = 1 << 28  # input numbers of a process: with a copy in float64 and blocks they need 6 GiB


def reason_not_certified(trainer: pl.Trainer, network: Network) -> str | None:
    """Why the training set is too large to certify a network on it; None if it is not."""
    numbers = num_samples(trainer.train_dataloader) * network.input_dim // trainer.world_size
    if numbers <= _MAX_PER_PROCESS:
        return None
    most = f"above {_MAX_PER_PROCESS:.1e}"
    return f"a certificate would have {numbers:.1e} input numbers in the memory of a process, {most}"


def steps_of_descent(samples: int, weights: int, work: float = _MAX_DESCENT_WORK) -> int:
    """How many steps of a descent fit into the limit of work, at most 1,000.

    A step factors matrices of at most N rows and d0·d1 columns: its work is min(N, d0·d1)² max(N, d0·d1), and a part
    for each sample and for itself, by measured times.

    >>> steps_of_descent(40, 40), steps_of_descent(1500, 1000), steps_of_descent(10_000, 10_000)
    (1000, 87, 0)
    """
    return min(1000, int(work / _work_of_a_step(samples, weights)))


def _work_of_a_step(samples: int, weights: int) -> int:
    smaller, larger = sorted((samples, weights))
    return smaller**2 * larger + _WORK_PER_SAMPLE * samples + _WORK_OF_A_STEP


def certify_training_set(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, max_distance: float
) -> list[Certificate]:
    """Certify a two-layer network on the module's training set; one certificate per replica, equal on every process.

    Small sets are gathered on one process, which sends its result to the others; of larger sets each process reads its
    shard.
    """
    rank = input_rank(trainer, pl_module, network)  # by all processes
    search = partial(certify, input_rank=int(rank) if rank.ndim == 0 else None, max_distance=max_distance)
    return _on_training_set(trainer, pl_module, network, search)


def polish_on_training_set(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, max_distance: float
) -> list[Polished]:
    """Polish a two-layer network on the module's training set; the module's weights stay as they are."""
    return _on_training_set(trainer, pl_module, network, partial(polish, max_distance=max_distance))


def descents_on_training_set(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, chosen: list[bool]
) -> list[Polished | None]:
    """Where descent leads to from the weights of a two-layer network; the module's weights stay as they are.

    The replicas share a limit of work, and are followed one after the other (see :func:`steps_of_descent` and
    :func:`work_of_descents`).

    Returns:
        The result of :func:`~lightning_mnn.landscape.polish` without a limit of distance; None for replicas that are
        not ``chosen``, or for which no work was left, or where the training set is spread over processes.
    """
    samples, weights = num_samples(trainer.train_dataloader), network.output_weights.shape[-1] * network.input_dim
    products = trainer.world_size * len(chosen) * weights
    work = work_of_descents(len(chosen), work_of_steps(trainer, trainer.global_step, products))
    if not any(chosen) or not steps_of_descent(samples, weights, work) or not _is_gathered(trainer, network):
        return [None] * len(chosen)

    return _on_training_set(trainer, pl_module, network, partial(_polish_in_turn, chosen, work=work))


def work_of_descents(replicas: int, training: int) -> float:
    """How much work the descents of all replicas may cost after training of so much work.

    >>> work_of_descents(1, 0) < work_of_descents(1, 10**12) < work_of_descents(1, 10**15) == work_of_descents(99, 0)
    True
    """
    return min(_MAX_DESCENT_WORK, max(replicas * _MIN_DESCENT_WORK, CHECK_SHARE * training))


def _polish_in_turn(
    chosen: list[bool],
    hidden: Tensor,
    output: Tensor,
    inputs: Tensor,
    targets: Tensor,
    slope: float,
    *,
    work: float,
    **options: Any,
) -> list[Polished | None]:
    """Polish the chosen replicas one after the other, as long as there is work left."""
    biases = {name: options.pop(name) for name in ("hidden_bias", "output_bias")}
    samples, weights = inputs.shape[-2], hidden.shape[-2] * hidden.shape[-1]

    def own(value: Tensor, ndim: int, replica: int) -> Tensor:
        return value[replica] if value.ndim > ndim else value

    left, found = work, list[Polished | None]()
    for replica, wanted in enumerate(chosen):
        steps = steps_of_descent(samples, weights, left) if wanted else 0
        if not steps:
            found.append(None)
            continue
        parts = (own(hidden, 2, replica), own(output, 1, replica), own(inputs, 2, replica), own(targets, 1, replica))
        for name, ndim in (("hidden_bias", 1), ("output_bias", 0)):
            options[name] = None if biases[name] is None else own(biases[name], ndim, replica)
        polished = polish(*parts, slope, **options, max_steps=steps)
        assert isinstance(polished, Polished)  # noqa: S101 (of one replica)
        found.append(polished)
        left = max(0.0, left - (polished.steps + 1) * _work_of_a_step(samples, weights))
    return found


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


def _is_gathered(trainer: pl.Trainer, network: Network) -> bool:
    """Whether one process works on the whole training set."""
    return trainer.world_size == 1 or num_samples(trainer.train_dataloader) * network.input_dim <= _MAX_GATHERED


def _on_training_set(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, search: Callable[..., Any]
) -> list[Any]:
    """The results of a search in float64, one per replica, on every process."""
    split, whole = trainer.world_size > 1, _is_gathered(trainer, network)
    threshold = threshold_of(trainer, pl_module)  # by all processes

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
            hidden_bias=wide.hidden_bias,
            output_bias=wide.output_bias,
            process_group=None if whole else DistributedGroup(inputs.shape[-2]),
        )
        return result if isinstance(result, list) else [result]

    return on_first_process(trainer, found_here) if whole else found_here()
