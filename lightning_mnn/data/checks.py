"""Checks of a training set before any work is done on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_mnn.data.shards import exact_shard, flat_batch, is_resident
from lightning_mnn.landscape.survey import fitting_thresholds

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl
    from torch import Tensor


def check_training_set(
    trainer: pl.Trainer, input_dim: int, replicas: int, threshold: float | None, *, regression: bool
) -> float | None:
    """Check the Trainer's training set, and find the decision threshold of its labels.

    Data in memory are checked whole, each process its part; of others only the first batch.

    Returns:
        The threshold: as given, or 0.5 for labels {0, 1} and 0 for ±1; None for regression.

    Raises:
        ValueError: inputs of another dimension or number of replicas, NaN or infinity, labels that are not binary.
    """
    for batch in _readable_batches(trainer):
        inputs, targets = flat_batch(batch, replicated=replicas > 1)
        check_batch(inputs, targets, input_dim, replicas)
    if regression:
        return None
    if threshold is not None:
        return threshold
    found = find_threshold(trainer)
    if found is None:
        _, targets = next(iter(_readable_batches(trainer)))
        examples = sorted(set(targets.flatten().tolist()))[:5]
        raise ValueError(
            f"labels are not binary: expected {{0, 1}} or ±1, found {examples}, for example. Map the "
            "classes to two labels, or train on real-valued targets with MNN(regression=True) (model.regression=true)"
        )
    return found


def find_threshold(trainer: pl.Trainer) -> float | None:
    """The decision threshold of the training labels: 0.5 for {0, 1}, 0 for ±1, None for others. Collective.

    Raises:
        ValueError: all labels are 1, which fits both.
    """
    fitting = {0.5, 0.0}
    for _, targets in _readable_batches(trainer):
        fitting &= fitting_thresholds(targets)
    fitting = {t for t in (0.5, 0.0) if trainer.strategy.reduce_boolean_decision(t in fitting, all=True)}
    if len(fitting) > 1:
        raise ValueError("all labels are 1, which fits {0, 1} and ±1: give MNN(threshold=0.5) or MNN(threshold=0.0)")
    return fitting.pop() if fitting else None


def _readable_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """This process's part of data in memory; of other data the first batch."""
    loader: Any = trainer.train_dataloader
    if is_resident(loader):
        yield from exact_shard(loader, trainer.global_rank, trainer.world_size)
    else:
        yield next(iter(loader))


def check_batch(inputs: Tensor, targets: Tensor, input_dim: int, replicas: int) -> None:
    """Check shapes and finiteness of one batch.

    Raises:
        ValueError: inputs of another dimension or number of replicas, NaN or infinity.
    """
    if inputs.shape[-1] != input_dim:
        raise ValueError(
            f"the data have {inputs.shape[-1]} inputs a sample and the network input_dim={input_dim}: they must agree"
        )
    for name, tensor, plain in (("inputs", inputs, 2), ("targets", targets, 1)):
        if tensor.ndim not in (plain, plain + 1) or (tensor.ndim > plain and tensor.shape[0] != replicas):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} do not fit a network with replicas={replicas}: "
                "the first axis of per-replica data must have one entry a replica"
            )
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ValueError(f"the {name} hold {count} values that are NaN or infinite: remove those samples first")
