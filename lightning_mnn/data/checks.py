"""Checks of a training set before training."""

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
    """Check the Trainer's training set in one pass, and infer the decision threshold of its labels. Collective.

    If the samples cannot be enumerated, only the first batch is checked.

    Returns:
        The threshold: the given one, or 0.5 for labels {0, 1} and 0 for ±1; None for regression.

    Raises:
        ValueError: inputs have another dimension or number of replicas, contain NaN or infinity, or labels are not
            binary.
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
    """The decision threshold of the training labels: 0.5 for {0, 1}, 0 for ±1, None for other labels. Collective.

    Raises:
        ValueError: all labels are 1, so both thresholds fit.
    """
    fitting = {0.5, 0.0}
    for batch in _batches(trainer):
        fitting &= fitting_thresholds(flat_batch(batch)[1])
    return _agreed(trainer, fitting)


def check_batch(inputs: Tensor, targets: Tensor, input_dim: int, replicas: int) -> None:
    """Check the shapes of one batch, and that its values are finite.

    Raises:
        ValueError: inputs have another dimension or number of replicas, or contain NaN or infinity.
    """
    if inputs.shape[-1] != input_dim:
        raise ArgumentError("input_dim", input_dim, f"must match the data, which have {inputs.shape[-1]} inputs")
    for name, tensor, plain in (("inputs", inputs, 2), ("targets", targets, 1)):
        if tensor.ndim not in (plain, plain + 1) or (tensor.ndim > plain and tensor.shape[0] != replicas):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} do not fit a network with replicas={replicas}: "
                "the first axis of per-replica data must have one entry per replica"
            )
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ValueError(f"the {name} contain {count} values that are NaN or infinite: remove those samples first")


def _agreed(trainer: pl.Trainer, fitting: set[float]) -> float | None:
    """The one threshold that fits the labels of every process; None if none does."""
    return the_threshold({t for t in (0.5, 0.0) if trainer.strategy.reduce_boolean_decision(t in fitting, all=True)})


def the_threshold(fitting: Collection[float | None]) -> float | None:
    """The one threshold that fits all labels; None if none does.

    Raises:
        ValueError: all labels are 1, so both thresholds fit.
    """
    if len(fitting) > 1:
        raise ValueError("all labels are 1, which fits {0, 1} and ±1: give MNN(threshold=0.5) or MNN(threshold=0.0)")
    return next(iter(fitting), None)


def _batches(trainer: pl.Trainer) -> Iterator[Any]:
    """This process's part of the training set; if its samples cannot be enumerated, only the first batch."""
    loader: Any = trainer.train_dataloader
    try:
        num_samples(loader)
    except TypeError:
        with torch.random.fork_rng(devices=[]):  # this check must not change the order of training
            first = next(iter(loader))
        yield first
    else:
        yield from exact_shard(loader, trainer.global_rank, trainer.world_size)
