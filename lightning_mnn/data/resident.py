"""Data that fits in memory: tensors that stay on the device, mini-batches that are index slices of them.

Shapes: N samples, d0 inputs, R replicas, B samples of a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from typing_extensions import override

from lightning_mnn.seeding import generator
from lightning_mnn.validation import dtype_named, positive_integer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


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


class ResidentLoader:
    """Batches (inputs, targets) of tensors in memory, the same samples in each batch for any number of processes.

    A batch of B samples is split over the processes into contiguous parts, without padding: each sample is seen exactly
    once an epoch, and the gradient of a batch is the same on 1 or n processes. A process may get fewer samples of a
    batch than another, or none.

    Args:
        inputs: (N, d0), or (R, N, d0) with a data set for each replica.
        targets: (N,) or (R, N).
        batch_size: B over all processes; None: all N.
        shuffle: draw a new order each epoch (without effect on full batches).
        seeds: seed of the order, one a replica.
        rank: this process.
        world_size: number of processes.

    Attributes:
        steps_per_batch: batches that are handed to Lightning at a time, as an iterator over them, where it is above 1
            (see :mod:`lightning_mnn.bundling`).

    Raises:
        ValueError: shapes that do not agree, an empty data set, or a batch size that is not positive.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int | None = None,
        *,
        shuffle: bool = True,
        seeds: Sequence[int] = (0,),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if inputs.ndim not in (2, 3) or inputs.shape[-2] != targets.shape[-1]:
            raise ValueError(
                "inputs must be (N, d0) or (R, N, d0) and targets (N,) or (R, N), "
                f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
            )
        if inputs.shape[-2] == 0:
            raise ValueError("the data set is empty: it must hold at least one sample")
        if batch_size is not None:
            batch_size = positive_integer("batch_size", batch_size)
        for name, tensor in (("inputs", inputs), ("targets", targets)):
            replicated = tensor.ndim == (3 if name == "inputs" else 2)
            if replicated and tensor.shape[0] != len(seeds):
                raise ValueError(f"{name} hold {tensor.shape[0]} replicas and there are {len(seeds)} seeds")
        self.inputs = inputs
        self.targets = targets
        self.num_samples = inputs.shape[-2]
        self.batch_size = min(batch_size or self.num_samples, self.num_samples)
        self.rank = rank
        self.world_size = world_size
        self.sampler = EpochShuffle(self.num_samples, seeds, shuffle=shuffle)  # Lightning looks for this name
        self.steps_per_batch = 1
        self._start = 0  # first batch of the next pass
        self._next = 0  # batch to begin with, if training is resumed from here

    @property
    def num_steps(self) -> int:
        """Batches of samples an epoch."""
        return math.ceil(self.num_samples / self.batch_size)

    def __len__(self) -> int:
        """What a pass yields: batches, or with ``steps_per_batch`` > 1 bundles of so many of them."""
        return math.ceil(self.num_steps / self.steps_per_batch)

    def __iter__(self) -> Iterator[Any]:
        """This process's part of each batch; of the first pass after a resume, of those that are left."""
        start, self._start = self._start, 0
        order = None if self.num_steps == 1 else self.sampler.permutation().to(self.inputs.device)
        if self.steps_per_batch == 1:
            yield from self._batches(order, start, self.num_steps)
            return
        for first in range(start, self.num_steps, self.steps_per_batch):
            yield self._batches(order, first, min(first + self.steps_per_batch, self.num_steps))

    def _batches(self, order: Tensor | None, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        if order is None:
            low, high = part_of(self.num_samples, self.rank, self.world_size)
            yield self.samples(slice(low, high))
            return
        for batch in range(start, stop):
            self._next = (batch + 1) % self.num_steps
            first = batch * self.batch_size
            low, high = part_of(min(self.batch_size, self.num_samples - first), self.rank, self.world_size)
            index = order[..., first + low : first + high]
            yield (
                _take(self.inputs, index, own=self.inputs.ndim == 3),
                _take(self.targets, index, own=self.targets.ndim == 2),
            )

    def state_dict(self) -> dict[str, int]:
        """Where in the epoch the loader is."""
        return {"next_batch": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where a loader with this state was."""
        self._start = self._next = state_dict.get("next_batch", 0)

    def samples(self, index: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples, in the data set's order."""
        return self.inputs[..., index, :], self.targets[..., index]


def _take(tensor: Tensor, index: Tensor, *, own: bool) -> Tensor:
    """Samples (B,) or (R, B) of a tensor that all replicas share, or of which each has its own part (R, N, …).

    By ``index_select``, which takes a third of the time of indexing with brackets.
    """
    if own:
        starts = tensor.shape[1] * torch.arange(len(tensor), device=index.device)
        tensor, index = tensor.flatten(0, 1), index + starts[:, None]
    return tensor.index_select(0, index.flatten()).reshape(*index.shape, *tensor.shape[1:])


def part_of(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [low, high) of ``total`` things that falls to one process.

    >>> [part_of(10, rank, 3) for rank in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """
    return total * rank // world_size, total * (rank + 1) // world_size


class ResidentData(pl.LightningDataModule, ABC):
    """A LightningDataModule whose training set is a pair of tensors; a subclass says which.

    Args:
        batch_size: samples of a batch over all processes; None: the full batch.
        shuffle: draw a new order each epoch.
        replicas: number of independent networks that are trained side by side.
        seed: replica r uses ``seed + r``.
        dtype: "float32" or "float64".

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
        self.shuffle = shuffle
        self.replicas = positive_integer("replicas", replicas)
        self.seed = seed
        self.dtype = dtype_named(dtype)
        self.inputs: Tensor | None = None
        self.targets: Tensor | None = None
        self.steps_per_batch = 1  # for MNN to choose
        self._loader: ResidentLoader | None = None
        self._loader_state: dict[str, int] = {}

    @abstractmethod
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The training set: inputs (N, d0) or (R, N, d0), targets (N,) or (R, N)."""

    @property
    @abstractmethod
    def input_dim(self) -> int:
        """d0."""

    @property
    def seeds(self) -> list[int]:
        """One seed a replica."""
        return [self.seed + replica for replica in range(self.replicas)]

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.inputs is None:
            inputs, targets = self.tensors()
            self.inputs, self.targets = inputs.to(self.dtype), targets.to(self.dtype)

    @override
    def train_dataloader(self) -> ResidentLoader:
        self.setup()
        assert self.inputs is not None  # noqa: S101 (for the type checker)
        assert self.targets is not None  # noqa: S101
        rank, world_size, device = 0, 1, self.inputs.device
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            device = self.trainer.strategy.root_device
        self._loader = ResidentLoader(
            self.inputs.to(device),
            self.targets.to(device),
            self.batch_size,
            shuffle=self.shuffle,
            seeds=self.seeds,
            rank=rank,
            world_size=world_size,
        )
        self._loader.steps_per_batch = self.steps_per_batch
        self._loader.load_state_dict(self._loader_state)
        self._loader_state = {}  # of the resumed epoch only: a loader made later begins at the beginning
        return self._loader

    @override
    def state_dict(self) -> dict[str, int]:
        return {} if self._loader is None else self._loader.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        # Lightning itself restores a loader's state only where nothing asked for the loader before.
        self._loader_state = state_dict


class TensorData(ResidentData):
    """A training set of the user's own tensors.

    Args:
        inputs: (N, d0), or (R, N, d0) with a data set for each replica.
        targets: (N,) or (R, N).
        **options: see :class:`ResidentData`.

    >>> len(TensorData(torch.zeros(10, 3), torch.ones(10), batch_size=4).train_dataloader())
    3
    """

    def __init__(self, inputs: Tensor, targets: Tensor, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._tensors = inputs, targets

    @override
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._tensors

    @property
    @override
    def input_dim(self) -> int:
        return self._tensors[0].shape[-1]
