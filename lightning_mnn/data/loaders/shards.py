"""Passes over a training set in which each sample is seen exactly once, on any number of processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_mnn.data.loaders.exact import ExactLoader
from lightning_mnn.utilities.compat.lightning_internals import combination
from lightning_mnn.utilities.compat.torch_internals import without_iterator
from lightning_mnn.utilities.distributed import part_of
from lightning_mnn.utilities.interruption import safe_point

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pytorch_lightning as pl
    from torch import Tensor


class NotEnumerableError(TypeError):
    """The samples of a training loader cannot be enumerated, that is, read one by one."""


_WHOLE_SET_SAMPLERS = (RandomSampler, SequentialSampler, DistributedSampler)  # they use every sample of a data set
_LOADER_COLLECTIONS = (dict, list, tuple)
_BLOCK_ELEMENTS = 1 << 22  # numbers of inputs at a time: 32 MiB in float64


def exact_shard(
    loader: Any,
    rank: int = 0,
    world_size: int = 1,
    chosen: Tensor | None = None,
    batch_size: int | None = None,
    most: int | None = None,
) -> Iterator[Any]:
    """Batches of one process's contiguous part of the training set, in the data set's order, not padded or shuffled.

    Args:
        loader: the Trainer's ``train_dataloader``: an :class:`ExactLoader`, or a ``DataLoader`` over a map-style
            data set.
        rank: of this process.
        world_size: number of processes.
        chosen: indices of the samples to read; None: all of them.
        batch_size: samples per batch; None: for an ExactLoader about 4 million numbers of inputs, else the loader's
            batch size.
        most: maximum number of batches; without it, workers would read further batches in advance. None: all.

    Yields:
        Batches, as the loader collates them.

    Raises:
        NotEnumerableError: the samples of the loader cannot be enumerated: an ``IterableDataset``, a sampler that
            chooses among the samples, several loaders at once, no automatic batching.
        Interrupted: (between batches) the process was asked to stop.
    """
    if isinstance(loader, ExactLoader):
        low, high = part_of(loader.num_samples if chosen is None else len(chosen), rank, world_size)
        size = batch_size or _block_of(loader)
        high = high if most is None else min(high, low + most * size)
        for start in range(low, high, size):
            safe_point()
            block = slice(start, min(start + size, high))
            yield loader.samples(block if chosen is None else chosen[block])
    elif isinstance(loader, DataLoader):
        indices = _map_style_samples(loader)
        if chosen is not None:
            indices = [indices[i] for i in chosen.tolist()]
        low, high = part_of(len(indices), rank, world_size)
        size = batch_size or batch_size_of(loader)
        high = high if most is None else min(high, low + most * size)
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
            generator=torch.Generator(),  # so that a pass does not change the global generator, which training uses
        )
        for batch in batches:
            safe_point()
            yield batch
    else:
        raise _not_enumerable(loader)


def _block_of(loader: ExactLoader) -> int:
    return max(1, _BLOCK_ELEMENTS // loader.numbers_per_sample)


def num_samples(loader: Any) -> int:
    """The number of samples of a loader's training set.

    Raises:
        NotEnumerableError: its samples cannot be enumerated.
    """
    if isinstance(loader, ExactLoader):
        return loader.num_samples
    if isinstance(loader, DataLoader):
        return len(_map_style_samples(loader))
    raise _not_enumerable(loader)


def can_be_enumerated(loader: Any) -> bool:
    """Whether the samples of a loader can be enumerated: read one by one, each once."""
    try:
        num_samples(loader)
    except NotEnumerableError:
        return False
    return True


def batch_size_of(loader: Any) -> int:
    """The number of samples per training batch of a loader whose samples can be enumerated."""
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size or num_samples(loader)


def num_batches(loader: Any, rank: int = 0, world_size: int = 1) -> int:
    """The number of batches of one process's pass over the training set.

    Raises:
        NotEnumerableError: its samples cannot be enumerated.
    """
    low, high = part_of(num_samples(loader), rank, world_size)
    size = _block_of(loader) if isinstance(loader, ExactLoader) else batch_size_of(loader)
    return math.ceil((high - low) / size)


def draws(loader: Any) -> str | None:
    """What draws the samples of a loader if they cannot be enumerated, but an epoch of the loader can be repeated.

    This holds for loaders with their own order, sampler or batches, and for several loaders at once. One epoch then
    stands for the training set.

    Returns:
        What draws the samples, in words; None: they can be enumerated, or an epoch cannot be repeated either.
    """
    return None if can_be_enumerated(loader) else _drawn_by(loader)


def one_epoch(trainer: pl.Trainer) -> Iterator[Any]:
    """This process's batches of one epoch of a training loader for which :func:`draws` does not return None.

    The caller must set and restore the random generators that the loader uses.

    Raises:
        Interrupted: (between batches) the process was asked to stop.
    """
    for batch in _restarted(trainer.train_dataloader, combination(trainer)):
        safe_point()
        yield batch


def _restarted(loader: Any, mode: Any) -> Iterable[Any]:
    """A loader of the same data that does not affect the iterators of training."""
    if not isinstance(loader, _LOADER_COLLECTIONS):
        return cast("Iterable[Any]", without_iterator(loader))
    combined = CombinedLoader(loader, mode)
    combined.flattened = [_restarted(part, mode) for part in combined.flattened]
    return (batch for batch, _, _ in combined)


def _drawn_by(loader: Any) -> str | None:
    if isinstance(loader, _LOADER_COLLECTIONS):
        parts = CombinedLoader(loader).flattened
        repeats = all(can_be_enumerated(part) or _drawn_by(part) for part in parts)
        return "several loaders at once" if parts and repeats else None
    if isinstance(getattr(loader, "dataset", None), IterableDataset) or not _has_length(loader):
        return None
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return f"a {type(loader).__name__}"
    sampler = loader.batch_sampler or loader.sampler
    inner = getattr(sampler, "sampler", None)
    return f"a {type(inner if type(sampler) is BatchSampler else sampler).__name__}"


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) > 0
    except (TypeError, NotImplementedError):
        return False


def _not_enumerable(loader: Any) -> NotEnumerableError:
    return NotEnumerableError(
        f"the samples of a {type(loader).__name__} cannot be enumerated: train on a DataLoader over a map-style data "
        "set or on an ExactLoader"
    )


def _map_style_samples(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices of the samples that an epoch reads, or may read."""
    if isinstance(loader.dataset, IterableDataset):
        raise NotEnumerableError(
            "the samples of an IterableDataset cannot be enumerated: train on a map-style data set"
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise _not_enumerable(loader)
    if loader.batch_sampler is None:
        raise NotEnumerableError("samples that come in batches of their own (batch_size=None) cannot be enumerated")
    if type(loader.batch_sampler) is not BatchSampler:
        raise NotEnumerableError(f"which samples a {type(loader.batch_sampler).__name__} chooses cannot be known")
    sampler = loader.batch_sampler.sampler
    if type(sampler) is SubsetRandomSampler:
        return sampler.indices
    wraps_another = isinstance(sampler, DistributedSampler) and sampler.dataset is not loader.dataset
    if wraps_another or type(sampler) not in _WHOLE_SET_SAMPLERS:
        raise NotEnumerableError(
            f"which samples a {type(sampler).__name__} chooses cannot be known: "
            "wrap the chosen samples in a torch.utils.data.Subset instead"
        )
    return range(len(loader.dataset))  # type: ignore[arg-type]


def flat_batch(batch: Any, *, replicated: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs (N, d0) and targets (N,) of a batch (inputs, targets), whose inputs may be images and targets a column.

    Args:
        batch: an item that a loader yields.
        replicated: whether the batch is for several networks side by side, (N, d0) or (R, N, d0) and (N,) or (R, N);
            such a batch is returned unchanged.

    Raises:
        TypeError: the batch is not a pair of tensors.
    """
    match batch:
        case (torch.Tensor() as inputs, torch.Tensor() as targets):
            return (inputs, targets) if replicated else (inputs.flatten(1), targets.flatten())
    raise TypeError(f"a batch must be a pair of tensors (inputs, targets), got {type(batch).__name__}")
