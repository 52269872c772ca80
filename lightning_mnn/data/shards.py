"""A pass over a training set in which each sample is seen exactly once, on any number of processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_mnn.data.loader import ExactLoader, part_of
from lightning_mnn.utilities.interruption import safe_point

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22  # of inputs at a time: 32 MiB in float64


def exact_shard(
    loader: Any, rank: int = 0, world_size: int = 1, chosen: Tensor | None = None, batch_size: int | None = None
) -> Iterator[Any]:
    """Batches of one process's contiguous part of the training set, in the data set's order, unpadded, unshuffled.

    Args:
        loader: the Trainer's ``train_dataloader``: a :class:`ExactLoader`, or a ``DataLoader`` over a map-style
            data set.
        rank: this process.
        world_size: number of processes.
        chosen: indices of the samples to pass over; None: all of them.
        batch_size: samples of a batch; None: of an ExactLoader about 4 million numbers of inputs, else as the loader's.

    Yields:
        Batches, as the loader collates them.

    Raises:
        TypeError: a loader whose samples cannot be enumerated: an ``IterableDataset``, a sampler that chooses among the
            samples, several loaders at once, no automatic batching.
        Interrupted: (between batches) the process was asked to stop.
    """
    if isinstance(loader, ExactLoader):
        low, high = part_of(loader.num_samples if chosen is None else len(chosen), rank, world_size)
        size = batch_size or max(1, _BLOCK_ELEMENTS // loader.numbers_per_sample)
        for start in range(low, high, size):
            safe_point()
            block = slice(start, min(start + size, high))
            yield loader.samples(block if chosen is None else chosen[block])
    elif isinstance(loader, DataLoader):
        indices = range(_map_style_samples(loader)) if chosen is None else chosen.tolist()
        low, high = part_of(len(indices), rank, world_size)
        size = batch_size or loader.batch_size or 256
        num_workers = min(loader.num_workers, math.ceil((high - low) / size))
        batches = DataLoader(
            Subset(loader.dataset, indices[low:high]),
            batch_size=size,
            collate_fn=loader.collate_fn,
            num_workers=num_workers,
            timeout=loader.timeout if num_workers else 0,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context if num_workers else None,
            prefetch_factor=loader.prefetch_factor if num_workers else None,
            generator=torch.Generator(),  # a pass draws nothing from the global generator, which training uses
        )
        for batch in batches:
            safe_point()
            yield batch
    else:
        raise _not_enumerable(loader)


def num_samples(loader: Any) -> int:
    """N of a loader's training set.

    Raises:
        TypeError: its samples cannot be enumerated.
    """
    if isinstance(loader, ExactLoader):
        return loader.num_samples
    if isinstance(loader, DataLoader):
        return _map_style_samples(loader)
    raise _not_enumerable(loader)


def _not_enumerable(loader: Any) -> TypeError:
    return TypeError(
        f"the samples of a {type(loader).__name__} cannot be enumerated: train on a DataLoader over a map-style data "
        "set or on an ExactLoader"
    )


def _map_style_samples(loader: DataLoader[Any]) -> int:
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError("the samples of an IterableDataset cannot be enumerated: train on a map-style data set")
    if loader.batch_sampler is None:
        raise TypeError("samples that come in batches of their own (batch_size=None) cannot be enumerated")
    sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    wraps_another = isinstance(sampler, DistributedSampler) and sampler.dataset is not loader.dataset
    if wraps_another or not isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
        raise TypeError(
            f"which samples a {type(sampler).__name__} chooses cannot be known: "
            "wrap the chosen samples in a torch.utils.data.Subset instead"
        )
    return len(loader.dataset)  # type: ignore[arg-type]


def flat_batch(batch: Any, *, replicated: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs (N, d0) and targets (N,) of a batch that is a pair (inputs, targets) of images, columns and the like.

    Args:
        batch: what a loader yields.
        replicated: the batch is for networks side by side, (N, d0) or (R, N, d0) and (N,) or (R, N), and is left alone.

    Raises:
        TypeError: the batch is not a pair of tensors.
    """
    match batch:
        case (torch.Tensor() as inputs, torch.Tensor() as targets):
            return (inputs, targets) if replicated else (inputs.flatten(1), targets.flatten())
    raise TypeError(f"a batch must be a pair of tensors (inputs, targets), got {type(batch).__name__}")
