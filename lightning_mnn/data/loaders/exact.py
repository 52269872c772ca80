"""Loaders and data modules that yield each training sample exactly once per epoch, on any number of devices.

Shapes: N samples, d0 inputs, R replicas, B samples per batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_mnn.data.loaders.selection import changed_labels
from lightning_mnn.data.loaders.visits import Visits, packed, unpacked
from lightning_mnn.utilities.compat.lightning_internals import (
    training_iterators,
)
from lightning_mnn.utilities.distributed import add_up, part_of
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import dtype_named, positive_integer, real_number, seed_number, truth_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


STEPS = 1000  # maximum number of steps of a bundle

# Approximate number of operations of a bundle. During a bundle no timed checkpoint is written and no signal is handled.
# It takes about 0.2 s on a CPU, or on a GPU that is slow in float64. A fast GPU needs 10 ms, which is still long
# compared with Lightning's overhead.
_OPERATIONS_PER_BUNDLE = {"cpu": 1e10, "cuda": 2e11}

_MIN_TEST_BATCH = 1024  # samples of a batch of the test set at least: it needs less memory than a training batch


def steps_at_a_time(operations: float, device: str = "cpu") -> int:
    """Number of steps of a bundle, given the operations of one step and the type of the device.

    >>> steps_at_a_time(1e4), steps_at_a_time(1e9), steps_at_a_time(1e12)
    (1000, 10, 1)
    >>> steps_at_a_time(1e4, "cuda"), steps_at_a_time(1e9, "cuda")
    (1000, 200)
    """
    return max(1, min(STEPS, int(_OPERATIONS_PER_BUNDLE.get(device, _OPERATIONS_PER_BUNDLE["cpu"]) / operations)))


class EpochShuffle:
    """Order of the samples in each epoch: a permutation that depends only on a seed and the epoch.

    Args:
        num_samples: N.
        seeds: one seed, or one per replica.
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
        """Set the epoch; Lightning calls this before each epoch."""
        self.epoch = epoch

    def permutation(self) -> Tensor:
        """Sample indices in this epoch's order: (N,), or (R, N) with several seeds."""
        if not self.shuffle:
            orders = [torch.arange(self.num_samples) for _ in self.seeds]
        else:
            generators = [generator(seed, "shuffle", self.epoch) for seed in self.seeds]
            orders = [torch.randperm(self.num_samples, generator=g) for g in generators]
        return orders[0] if len(orders) == 1 else torch.stack(orders)


class ExactLoader(ABC):
    """Batches (inputs, targets) of samples with random access; the batches do not depend on the number of processes.

    A batch of B samples is split over the processes into contiguous parts, without padding: each sample is seen exactly
    once per epoch, and the gradient of a batch is the same on 1 or n processes. A process may get fewer samples of a
    batch than another, or none.

    Other code may iterate over the loader while a Trainer trains from it. Only the pass that the Trainer itself
    consumes counts as training below. Without a Trainer, every pass counts as training.

    Args:
        num_samples: N.
        batch_size: B over all processes; None: all N samples.
        shuffle: draw a new order in each epoch (no effect on full batches).
        seeds: seeds of the order, one per replica.
        rank: of this process.
        world_size: number of processes.

    Attributes:
        steps_per_batch: number of batches that Lightning gets at a time. If it is above 1, Lightning gets an iterator
            over them (see :mod:`lightning_mnn.model.bundling`).
        trainer: the Trainer that trains from the loader; None if there is none.
        visits: how often training got each sample from this process.
        size_of_batch: number of samples of training's last batch, over all processes.

    Raises:
        ValueError: the data set is empty, or the batch size is not positive.
    """

    batch_sampler = None  # Lightning reads it from a validation loader with a sampler

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
            raise ValueError("the data set is empty: it must contain at least one sample")
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
        self._start = (0, 0)  # epoch, and first batch of training's next pass if that pass is in this epoch
        self._next = 0  # first batch, if training is resumed from here

    @abstractmethod
    def samples(self, index: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the samples at an index into the data set."""

    @property
    @abstractmethod
    def numbers_per_sample(self) -> int:
        """Number of input values of one sample, over all replicas."""

    @property
    def operations_per_sample(self) -> float:
        """Approximate number of operations needed to prepare a sample."""
        return 0.0

    @abstractmethod
    def _part(self, first: int, low: int, high: int, *, reuse: bool) -> tuple[tuple[Tensor, Tensor], slice | Tensor]:
        """Samples first + low to first + high of this epoch's order, and the index that was used to read them."""

    @property
    def num_steps(self) -> int:
        """Number of batches per epoch."""
        return math.ceil(self.num_samples / self.batch_size)

    def __len__(self) -> int:
        """Number of items that a pass yields: batches, or bundles of batches if ``steps_per_batch`` > 1."""
        return math.ceil(self.num_steps / self.steps_per_batch)

    def __iter__(self) -> Iterator[Any]:
        """This process's part of each batch; training's first pass after a resume yields only the remaining batches."""
        return _Pass(self)

    def handed_out(self, *, trains: bool) -> Iterator[Any]:
        """The items of a pass, for training or for another reader."""
        start = self._first_batch() if trains else 0
        if self.steps_per_batch == 1:
            yield from self.batches(start, self.num_steps, trains=trains)
            return
        for first in range(start, self.num_steps, self.steps_per_batch):
            stop = min(first + self.steps_per_batch, self.num_steps)
            yield self.batches(first, stop, reuse=trains, trains=trains)

    def _first_batch(self) -> int:
        """The first batch of this training pass."""
        epoch, start = self._start
        self._start = (0, 0)
        return start if epoch == self.sampler.epoch else 0  # else the state is of an epoch that ended early

    def batches(
        self, start: int, stop: int, *, reuse: bool = False, trains: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of some batches of the sampler's current epoch.

        Args:
            start: the first batch.
            stop: the batch after the last one.
            reuse: whether the next batch may overwrite the memory of this one.
            trains: whether training gets them.
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

    @property
    def repeats(self) -> bool:
        """Whether each epoch consists of the same full batch."""
        return False

    def count_repetitions(self, epochs: int) -> None:
        """Count that training got the full batch in further epochs, too."""
        self.visits.add(slice(0, self.num_samples), epochs)

    def state_dict(self) -> dict[str, int]:
        """The position of training in the epoch."""
        return {"epoch": self.sampler.epoch, "next_batch": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at the position in this state."""
        self._next = state_dict.get("next_batch", 0)
        self._start = (state_dict.get("epoch", self.sampler.epoch), self._next)


class _Pass(Iterator[Any]):
    """A pass over a loader. At its first batch it finds out whether training consumes it."""

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


class NoLoaders(CombinedLoader):
    """What ``val_dataloader`` or ``test_dataloader`` returns if there is no such set: Lightning then skips the loop.

    Without the method, or for an empty list, Lightning would warn.
    """

    def __init__(self) -> None:
        super().__init__([], "sequential")

    @property
    @override
    def flattened(self) -> list[Any]:
        return []

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        """Nothing to set: Lightning sets what it got from the property."""


class ExactData(pl.LightningDataModule, ABC):
    """A LightningDataModule with an :class:`ExactLoader`, which a subclass returns from :meth:`loader`.

    Args:
        batch_size: samples per batch over all processes; None: the full batch.
        shuffle: draw a new order in each epoch.
        replicas: number of independent networks that are trained side by side.
        seed: replica r uses ``seed + r``.
        dtype: "float32" or "float64".
        label_noise: fraction of the training labels that are flipped, exactly so many up to rounding; each replica has
            its own. Labels of the test set are never changed.
        random_labels: whether the training labels are replaced by random ones, each of the two with probability ½.

    Attributes:
        exact_loader: the loader of the training set; None before the Trainer has created it.
        operations_per_sample: operations of a step per sample; MNN sets it if batches may be bundled for Lightning.
        test_set_remedy: how to get a test set, for the error message if there is none.

    Raises:
        ValueError: an argument is out of its range.
    """

    test_set_remedy = "use a data set with one"

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        replicas: int = 1,
        seed: int = 0,
        dtype: str = "float32",
        label_noise: float = 0.0,
        random_labels: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = None if batch_size is None else positive_integer("batch_size", batch_size)
        self.shuffle = truth_value("shuffle", shuffle)
        self.replicas = positive_integer("replicas", replicas)
        self.seed = seed_number("seed", seed)
        self.dtype = dtype_named(dtype)
        self.label_noise = real_number("label_noise", label_noise, at_least=0, at_most=1)
        self.random_labels = truth_value("random_labels", random_labels)
        self.operations_per_sample: float | None = None
        self.exact_loader: ExactLoader | None = None
        self._loader_state: dict[str, Any] = {}
        self._test_loader: tuple[tuple[Any, ...], ExactLoader | None] | None = None  # by the place of this process

    @property
    @abstractmethod
    def input_dim(self) -> int:
        """d0."""

    @abstractmethod
    def loader(self, device: torch.device, **options: Any) -> ExactLoader:
        """The loader of the training set, with ``options`` of :class:`ExactLoader`.

        Args:
            device: the device on which the training set may be kept.
            **options: ``batch_size``, ``shuffle``, ``seeds``, ``rank`` and ``world_size``.
        """

    def test_loader(self, device: torch.device, **options: Any) -> ExactLoader | None:  # noqa: ARG002 (of subclasses)
        """The loader of the test set, with arguments as in :meth:`loader`; None: the data set has no test set."""
        return None

    def exact_test_loader(self) -> ExactLoader | None:
        """The loader of the test set for this process; it is created once. None: the data set has no test set.

        :func:`~lightning_mnn.data.loaders.shards.exact_shard` of it yields this process's part of the test set.
        """
        self.setup("test")
        rank, world_size, device = place = self._place()
        if self._test_loader is None or self._test_loader[0] != place:
            options = {"shuffle": False, "seeds": self.seeds, "rank": rank, "world_size": world_size}
            batch_size = max(self.batch_size or 0, _MIN_TEST_BATCH)
            self._test_loader = place, self.test_loader(device, batch_size=batch_size, **options)
        return self._test_loader[1]

    @property
    def seeds(self) -> list[int]:
        """One seed per replica."""
        return [self.seed + replica for replica in range(self.replicas)]

    def changed_labels(self, targets: Tensor) -> Tensor:
        """The training set's labels after ``random_labels`` and ``label_noise``: (N,) or (R, N)."""
        return changed_labels(targets, self.seeds, self.label_noise, random_labels=self.random_labels)

    def _place(self) -> tuple[int, int, torch.device]:
        """Rank of this process, number of processes, and its device."""
        if self.trainer is None:
            return 0, 1, torch.device("cpu")
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.root_device

    @override
    def test_dataloader(self) -> ExactLoader | NoLoaders:
        """The test set; if there is none, nothing, which a fit skips.

        Raises:
            ValueError: there is none, and the Trainer was asked to validate or test.
        """
        loader = self.exact_test_loader()
        evaluates = self.trainer is not None and self.trainer.state.fn in ("validate", "test")
        if loader is None and evaluates:
            raise ValueError(f"{type(self).__name__} has no test set: {self.test_set_remedy}")
        return NoLoaders() if loader is None else loader

    @property
    @override
    def val_dataloader(self) -> Callable[[], Any]:
        """The method :meth:`test_dataloader`: there is one set of samples that training does not see.

        For a module without a ``validation_step`` it is Lightning's own method, or Lightning would warn in each fit.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is not None and not is_overridden("validation_step", module):
            return super().val_dataloader
        return self.test_dataloader

    @override
    def train_dataloader(self) -> ExactLoader:
        self.setup("fit")
        rank, world_size, device = self._place()
        previous, self.exact_loader = (
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
        if previous is not None and previous.num_samples == self.exact_loader.num_samples:
            self.exact_loader.visits = previous.visits
        visits = self._loader_state.get("visits", {})
        if visits.get("samples") == self.exact_loader.num_samples:
            # The saved counts are the sum over all processes, so only one process continues with them.
            self.exact_loader.visits.go_on_from(unpacked(visits) * int(rank == 0))
        self.exact_loader.load_state_dict(self._loader_state)
        self._loader_state = {}  # only for the resumed epoch: a later loader starts at its first batch
        return self.exact_loader

    def visits(self) -> tuple[int, int] | None:
        """How often training saw a sample: the minimum and the maximum over all samples (and replicas). Collective.

        The counts come from the indices that the loader used to read the samples. They cover all processes and all fits
        with this data module, and after a resume also those before the checkpoint. None before training.
        """
        if self.exact_loader is None:
            return None
        counts = self._visits_of_all(self.exact_loader)
        return int(counts.min()), int(counts.max())

    def _visits_of_all(self, loader: ExactLoader) -> Tensor:
        counts = loader.visits.counts()
        if self.trainer is None or self.trainer.world_size == 1:
            return counts
        counts = counts.to(self.trainer.strategy.root_device, copy=True)
        add_up(counts)
        return counts.cpu()

    @override
    def state_dict(self) -> dict[str, Any]:
        used = None if self.trainer is None else self.trainer.train_dataloader
        loader = used if isinstance(used, ExactLoader) else self.exact_loader  # other code may have created another
        return {} if loader is None else loader.state_dict() | {"visits": packed(self._visits_of_all(loader))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning itself restores a loader's state only if nothing created the loader before.
        self._loader_state = state_dict
