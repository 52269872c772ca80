"""Checks of a training set before any work is done on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.data.loaders.shards import exact_shard, flat_batch, num_samples
from lightning_mnn.landscape.labels import check_labels, fitting_thresholds
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import pytorch_lightning as pl
    from torch import Tensor


def check_training_set(
    trainer: pl.Trainer, input_dim: int, replicas: int, threshold: float | None, *, regression: bool
) -> float | None:
    """Check the Trainer's training set in one pass, and find the decision threshold of its labels. Collective.

    Of data whose samples cannot be enumerated only the first batch is checked.

    Returns:
        The threshold: as given, or 0.5 for labels {0, 1} and 0 for ±1; None for regression.

    Raises:
        ValueError: inputs of another dimension or number of replicas, NaN or infinity, labels that are not binary.
    """
    fitting = {0.5, 0.0}
    example: list[float] = []
    for batch in _batches(trainer):
        inputs, targets = flat_batch(batch, replicated=replicas > 1)
        check_batch(inputs, targets, input_dim, replicas)
        if threshold is not None and not regression:
            check_labels(targets, threshold)
        fitting &= fitting_thresholds(targets)
        if not fitting and not example:
            example = sorted(set(targets.flatten().tolist()))[:5]
    if regression:
        return None
    if threshold is not None:
        return threshold
    found = _agreed(trainer, fitting)
    if found is None:
        raise ValueError(
            f"labels are not binary: expected {{0, 1}} or ±1, found {example or 'others'}, for example. Map the "
            "classes to two labels, or train on real-valued targets with MNN(regression=True) (model.regression=true)"
        )
    return found


def find_threshold(trainer: pl.Trainer) -> float | None:
    """The decision threshold of the training labels: 0.5 for {0, 1}, 0 for ±1, None for others. Collective.

    Raises:
        ValueError: all labels are 1, which fits both.
    """
    fitting = {0.5, 0.0}
    for batch in _batches(trainer):
        fitting &= fitting_thresholds(flat_batch(batch)[1])
    return _agreed(trainer, fitting)


def check_batch(inputs: Tensor, targets: Tensor, input_dim: int, replicas: int) -> None:
    """Check shapes and finiteness of one batch.

    Raises:
        ValueError: inputs of another dimension or number of replicas, NaN or infinity.
    """
    if inputs.shape[-1] != input_dim:
        raise ArgumentError("input_dim", input_dim, f"must be that of the data, which have {inputs.shape[-1]} inputs")
    for name, tensor, plain in (("inputs", inputs, 2), ("targets", targets, 1)):
        if tensor.ndim not in (plain, plain + 1) or (tensor.ndim > plain and tensor.shape[0] != replicas):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} do not fit a network with replicas={replicas}: "
                "the first axis of per-replica data must have one entry a replica"
            )
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ValueError(f"the {name} hold {count} values that are NaN or infinite: remove those samples first")


def _agreed(trainer: pl.Trainer, fitting: set[float]) -> float | None:
    """The one threshold that fits the labels of every process; None where none does."""
    return the_threshold({t for t in (0.5, 0.0) if trainer.strategy.reduce_boolean_decision(t in fitting, all=True)})


def the_threshold(fitting: Collection[float | None]) -> float | None:
    """The one threshold that fits all labels; None where none does.

    Raises:
        ValueError: all labels are 1, which fits both.
    """
    if len(fitting) > 1:
        raise ValueError("all labels are 1, which fits {0, 1} and ±1: give MNN(threshold=0.5) or MNN(threshold=0.0)")
    return next(iter(fitting), None)


def _batches(trainer: pl.Trainer) -> Iterator[Any]:
    """This process's part of the training set; of one that cannot be enumerated the first batch."""
    loader: Any = trainer.train_dataloader
    try:
        num_samples(loader)
    except TypeError:
        with torch.random.fork_rng(devices=[]):  # the order of training is not to depend on this look
            first = next(iter(loader))
        yield first
    else:
        yield from exact_shard(loader, trainer.global_rank, trainer.world_size)
