"""Loaders and data modules whose training set is seen sample by sample, exactly once an epoch, on any device count.

Shapes: N samples, d0 inputs, R replicas, B samples of a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_mnn.data.loaders.visits import Visits, packed, unpacked
from lightning_mnn.utilities.compat.lightning_internals import (
    training_iterators,
)
from lightning_mnn.utilities.distributed import part_of
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import dtype_named, positive_integer, seed_number, truth_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


STEPS = 1000  # of a bundle, at most

# Operations of a bundle, about, in which no checkpoint by time is written and no signal heeded: some 0.2 s of a CPU, or
# of a GPU that is slow in float64. A fast one takes 10 ms, still long beside what Lightning takes.
_WORK = {"cpu": 1e10, "cuda": 2e11}


def steps_at_a_time(operations: float, device: str = "cpu") -> int:
    """Steps of a bundle, of so many operations each on a kind of device.

    >>> steps_at_a_time(1e4), steps_at_a_time(1e9), steps_at_a_time(1e12)
    (1000, 10, 1)
    >>> steps_at_a_time(1e4, "cuda"), steps_at_a_time(1e9, "cuda")
    (1000, 200)
    """
    return max(1, min(STEPS, int(_WORK.get(device, _WORK["cpu"]) / operations)))


class EpochShuffle:
    """Order of the samples in each epoch: a permutation that depends on a seed and the epoch only.

    Args:
        num_samples: N.
        seeds: one seed, or one a replica.
        shuffle: False keeps the samples in their order.

    >>> order = EpochShuffle(4, seeds=[0])
    >>> bool(torch.equal(order.permutation().sort().values, torch.arange(4)))
    True
    """

    def __init__(self, num_samples: int, seeds: Sequence[int], *, shuffle: bool = True) -> None:
        self.num_samples = num_samples
        self.seeds = list(seeds)
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before each."""
        self.epoch = epoch

    def permutation(self) -> Tensor:
        """Sample indices in this epoch's order: (N,), with several seeds (R, N)."""
        if not self.shuffle:
            orders = [torch.arange(self.num_samples) for _ in self.seeds]
        else:
            generators = [generator(seed, "shuffle", self.epoch) for seed in self.seeds]
            orders = [torch.randperm(self.num_samples, generator=g) for g in generators]
        return orders[0] if len(orders) == 1 else torch.stack(orders)


class ExactLoader(ABC):
    """Batches (inputs, targets) of samples that can be looked up, the same in each batch for any number of processes.

    A batch of B samples is split over the processes into contiguous parts, without padding: each sample is seen exactly
    once an epoch, and the gradient of a batch is the same on 1 or n processes. A process may get fewer samples of a
    batch than another, or none.

    Anything may iterate the loader while a Trainer trains from it: what is said of training below is of the pass only
    that the Trainer itself consumes. Without a Trainer any pass is taken for training.

    Args:
        num_samples: N.
        batch_size: B over all processes; None: all N.
        shuffle: draw a new order each epoch (without effect on full batches).
        seeds: seed of the order, one a replica.
        rank: this process.
        world_size: number of processes.

    Attributes:
        steps_per_batch: batches that are handed to Lightning at a time, as an iterator over them, where it is above 1
            (see :mod:`lightning_mnn.model.bundling`).
        trainer: the Trainer that trains from the loader; None: there is none.
        visits: how often this process has handed out each sample to training.
        size_of_batch: samples of the batch that training got last, over all processes.

    Raises:
        ValueError: an empty data set, or a batch size that is not positive.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int | None = None,
        *,
        shuffle: bool = True,
        seeds: Sequence[int] = (0,),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_samples == 0:
            raise ValueError("the data set is empty: it must hold at least one sample")
        if batch_size is not None:
            batch_size = positive_integer("batch_size", batch_size)
        self.num_samples = num_samples
        self.batch_size = min(batch_size or num_samples, num_samples)
        self.rank = rank
        self.world_size = world_size
        self.sampler = EpochShuffle(num_samples, seeds, shuffle=shuffle)  # Lightning looks for this name
        self.steps_per_batch = 1
        self.trainer: pl.Trainer | None = None
        self.visits = Visits(num_samples)
        self.size_of_batch = 0
        self._start = (0, 0)  # epoch and batch with which training begins its next pass, if it is of that epoch
        self._next = 0  # batch to begin with, if training is resumed from here

    @abstractmethod
    def samples(self, index: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples, in the data set's order."""

    @property
    @abstractmethod
    def numbers_per_sample(self) -> int:
        """Numbers that the inputs of one sample are, over all replicas."""

    @property
    def operations_per_sample(self) -> float:
        """What it takes to make a sample ready, about."""
        return 0.0

    @abstractmethod
    def _part(self, first: int, low: int, high: int, *, reuse: bool) -> tuple[tuple[Tensor, Tensor], slice | Tensor]:
        """Samples first + low to first + high of this epoch's order, and the index by which they were looked up."""

    @property
    def num_steps(self) -> int:
        """Batches of samples an epoch."""
        return math.ceil(self.num_samples / self.batch_size)

    def __len__(self) -> int:
        """What a pass yields: batches, or with ``steps_per_batch`` > 1 bundles of so many of them."""
        return math.ceil(self.num_steps / self.steps_per_batch)

    def __iter__(self) -> Iterator[Any]:
        """This process's part of each batch; of training's first pass after a resume, of those that are left."""
        return _Pass(self)

    def handed_out(self, *, trains: bool) -> Iterator[Any]:
        """What a pass yields, to training or to another reader."""
        start = self._begin() if trains else 0
        if self.steps_per_batch == 1:
            yield from self.batches(start, self.num_steps, trains=trains)
            return
        for first in range(start, self.num_steps, self.steps_per_batch):
            stop = min(first + self.steps_per_batch, self.num_steps)
            yield self.batches(first, stop, reuse=trains, trains=trains)

    def _begin(self) -> int:
        """The batch with which training begins this pass."""
        epoch, start = self._start
        self._start = (0, 0)
        return start if epoch == self.sampler.epoch else 0  # else saved in an epoch that did not take all batches

    def batches(
        self, start: int, stop: int, *, reuse: bool = False, trains: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of some batches of the epoch that the sampler is set to.

        Args:
            start: the first batch.
            stop: the one after the last.
            reuse: the next batch may be written over the memory of this one.
            trains: it is training that gets them.
        """
        for batch in range(start, stop):
            first = batch * self.batch_size
            size = min(self.batch_size, self.num_samples - first)
            low, high = part_of(size, self.rank, self.world_size)
            samples, index = self._part(first, low, high, reuse=reuse)
            if trains:
                self._next = (batch + 1) % self.num_steps
                self.size_of_batch = size
                self.visits.add(index)
            yield samples

    def state_dict(self) -> dict[str, int]:
        """Where in the epoch the loader is."""
        return {"epoch": self.sampler.epoch, "next_batch": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where a loader with this state was."""
        self._next = state_dict.get("next_batch", 0)
        self._start = (state_dict.get("epoch", self.sampler.epoch), self._next)


class _Pass(Iterator[Any]):
    """A pass over a loader, which finds out at its first batch whether it is training that consumes it."""

    def __init__(self, loader: ExactLoader) -> None:
        self._loader = loader
        self._handed_out: Iterator[Any] | None = None

    @override
    def __next__(self) -> Any:
        if self._handed_out is None:
            self._handed_out = self._loader.handed_out(trains=self._trains())
        return next(self._handed_out)

    def _trains(self) -> bool:
        trainer = self._loader.trainer
        return trainer is None or any(one is self for one in training_iterators(trainer))


class ExactData(pl.LightningDataModule, ABC):
    """A LightningDataModule that trains from an :class:`ExactLoader`; a subclass says from which.

    Args:
        batch_size: samples of a batch over all processes; None: the full batch.
        shuffle: draw a new order each epoch.
        replicas: number of independent networks that are trained side by side.
        seed: replica r uses ``seed + r``.
        dtype: "float32" or "float64".

    Attributes:
        exact_loader: the loader of the training set, once the Trainer has asked for it.
        operations_per_sample: of a step; MNN sets it where batches may be handed to Lightning in bundles.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        replicas: int = 1,
        seed: int = 0,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.batch_size = None if batch_size is None else positive_integer("batch_size", batch_size)
        self.shuffle = truth_value("shuffle", shuffle)
        self.replicas = positive_integer("replicas", replicas)
        self.seed = seed_number("seed", seed)
        self.dtype = dtype_named(dtype)
        self.operations_per_sample: float | None = None
        self.exact_loader: ExactLoader | None = None
        self._loader_state: dict[str, Any] = {}

    @property
    @abstractmethod
    def input_dim(self) -> int:
        """d0."""

    @abstractmethod
    def loader(self, device: torch.device, **options: Any) -> ExactLoader:
        """The loader, with ``options`` of :class:`ExactLoader`.

        Args:
            device: where the training set may be kept.
            **options: ``batch_size``, ``shuffle``, ``seeds``, ``rank`` and ``world_size``.
        """

    @property
    def seeds(self) -> list[int]:
        """One seed a replica."""
        return [self.seed + replica for replica in range(self.replicas)]

    @override
    def train_dataloader(self) -> ExactLoader:
        self.setup("fit")
        rank, world_size, device = 0, 1, torch.device("cpu")
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            device = self.trainer.strategy.root_device
        before, self.exact_loader = (
            self.exact_loader,
            self.loader(
                device,
                batch_size=self.batch_size,
                shuffle=self.shuffle,
                seeds=self.seeds,
                rank=rank,
                world_size=world_size,
            ),
        )
        self.exact_loader.trainer = self.trainer
        if self.operations_per_sample is not None:
            operations = self.operations_per_sample + self.exact_loader.operations_per_sample
            self.exact_loader.steps_per_batch = steps_at_a_time(self.exact_loader.batch_size * operations, device.type)
        if before is not None and before.num_samples == self.exact_loader.num_samples:
            self.exact_loader.visits = before.visits
        visits = self._loader_state.get("visits", {})
        if visits.get("samples") == self.exact_loader.num_samples:
            # The sum over all processes, which one of them goes on with.
            self.exact_loader.visits.go_on_from(unpacked(visits) * int(rank == 0))
        self.exact_loader.load_state_dict(self._loader_state)
        self._loader_state = {}  # of the resumed epoch only: a loader made later begins at the beginning
        return self.exact_loader

    def visits(self) -> tuple[int, int] | None:
        """How often training saw a sample: the fewest and the most times, over all samples (and replicas).

        It is counted from the indices by which the loader looked the samples up, over all processes, which must all ask
        for it, and over all fits with this data module; resumed, also over those of the checkpoint. None before
        training.
        """
        if self.exact_loader is None:
            return None
        counts = self._visits_of_all(self.exact_loader)
        return int(counts.min()), int(counts.max())

    def _visits_of_all(self, loader: ExactLoader) -> Tensor:
        counts = loader.visits.counts()
        if self.trainer is None or self.trainer.world_size == 1 or not dist.is_initialized():
            return counts
        counts = counts.to(self.trainer.strategy.root_device, copy=True)
        dist.all_reduce(counts)  # over the group that was really formed
        return counts.cpu()

    @override
    def state_dict(self) -> dict[str, Any]:
        held = None if self.trainer is None else self.trainer.train_dataloader
        loader = held if isinstance(held, ExactLoader) else self.exact_loader  # a reader may have asked for another
        return {} if loader is None else loader.state_dict() | {"visits": packed(self._visits_of_all(loader))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning itself restores a loader's state only where nothing asked for the loader before.
        self._loader_state = state_dict
