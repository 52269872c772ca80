"""KinkProbe: the activation patterns of any module on a fixed set of samples, in the precision of training."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mnn.callbacks.evaluation.choose_pass import pass_of_training
from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.run_module import (
    SERIOUS,
    LossNotEvaluableError,
    StepFailedError,
    as_in_training,
    batch_size,
    forward_on,
    model_batches,
    precision_context,
)
from lightning_mnn.callbacks.evaluation.snapshots import restoring_generators, seed_generators
from lightning_mnn.data.loaders.shards import (
    NotEnumerableError,
    batch_size_of,
    draws,
    exact_shard,
    num_samples,
    one_epoch,
)
from lightning_mnn.landscape.kinks.layers import FoundLayers, PatternRows, find_layers
from lightning_mnn.landscape.kinks.tracing import KinkTrace, Names, PatternError
from lightning_mnn.utilities.distributed import add_up, local_result, on_first_process, part_of
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import ArgumentError, MisfitError, positive_integer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.kinks.layers import KinkLayer
    from lightning_mnn.landscape.pattern import PackedPattern

Samples: TypeAlias = "int | Tensor | tuple[Any, ...] | list[Any] | dict[str, Any] | None"

MAX_SAMPLES = 1024  # by default
SNAPSHOTS = 3  # in memory at a time: the first, the last and the current one


class AwaitsBatchError(StepFailedError):
    """The samples to record are known only when training has its first batch."""


class AwaitsForwardError(StepFailedError):
    """The forward cannot be run on a batch, and what training calls it with is not known yet.

    Args:
        error: why it cannot.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class KinkProbe:
    """Finds a module's kink layers before training, and their patterns on the same samples at any time in training.

    Args:
        probe: number of samples; None: min(N, 1024, what the budget allows); or a batch of samples.
        memory_budget: bytes that three snapshots of the patterns may need.
        seed: seed of the random choice of samples from the training set.
        modules: names or patterns of the layers (see :class:`KinkTrace`); None: all.
        forward_fn: called instead of the module's own forward, ``forward_fn(module, batch)``.

    Attributes:
        found: the layers found by passes on a few samples; None before :meth:`prepare`.
        was_in_training: whether the probe is a batch as the module got it in training, after all hooks for batches.
    """

    def __init__(
        self,
        probe: Samples = None,
        memory_budget: int = 2**25,
        seed: int = 0,
        modules: Names = None,
        forward_fn: ModelFunction | None = None,
        *,
        was_in_training: bool = False,
    ) -> None:
        self.probe = probe
        self.was_in_training = was_in_training
        self._is_chosen = was_in_training  # whether nobody asked for just these samples
        self.memory_budget = memory_budget
        self.seed = seed
        self.modules = modules
        self.forward_fn = forward_fn
        self.found: FoundLayers | None = None
        self._run = forward_fn  # None: as forward_on does
        self._chosen = torch.empty(0, dtype=torch.int64)
        self._data_set: Callable[[], Any] | None = None  # the one at the start of training; None: it is not compared

    def __getstate__(self) -> dict[str, Any]:
        """The attributes for a copy, without the reference to the data, a function that may not be copyable."""
        return vars(self) | {"_data_set": None}

    @property
    def layers(self) -> Mapping[str, KinkLayer]:
        """The layers by name, in the order of the forward pass."""
        return {} if self.found is None else self.found.layers

    @property
    def num_samples(self) -> int:
        """Number of recorded samples; 0 before :meth:`prepare`."""
        return batch_size(self.probe) if self.is_batch else len(self._chosen)

    @torch.no_grad()
    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule, first: Any = None) -> None:
        """Find the layers, and choose the samples. This runs the module on the same few samples on every process.

        Args:
            trainer: the Trainer.
            pl_module: the module.
            first: the first batch of training as the module gets it, whose samples are taken if those of the training
                set cannot be enumerated; None: there was none yet.

        Raises:
            AwaitsBatchError: they cannot be enumerated, and there is no first batch.
            AwaitsForwardError: the forward cannot be run on a batch of the training set, nor the ``training_step``.
            NoKinksError: the module has no kinks, or none in the layers that ``modules`` names.
            TypeError: the samples of the training set cannot be enumerated, and the probe is not a batch.
            ValueError: the budget does not allow the probe, or the numbers of a layer cannot be assigned to samples.
        """
        if not self.is_batch and draws(trainer.train_dataloader):
            self.probe, self._is_chosen = first_batch(trainer), True
        try:
            total = self._total(trainer)
        except NotEnumerableError as error:
            total = self._take_first(trainer, first, error)

        def batch(num: int = 3) -> Any:
            return self._ready(trainer, pl_module, self._few(trainer, [i % total for i in range(num)]))

        def run(num: int) -> None:
            with isolated(trainer, pl_module), _as_training(trainer):
                forward_on(pl_module, batch(num), self._run)

        if self.forward_fn is None:
            try:
                self._run = pass_of_training(trainer, pl_module, batch, self.modules)
            except (LossNotEvaluableError, MisfitError, *SERIOUS):
                raise
            except Exception as error:
                raise AwaitsForwardError(error) from error
        self.found = find_layers(pl_module, run, self.modules)
        total = self._check_budget(trainer, total)
        _log_limits(type(pl_module).__name__, self.found)
        if not self.is_batch:
            self._chosen = chosen_samples(total, self._size(trainer, total), self.seed)
            self._data_set = _reference(_data_set(trainer))

    @torch.no_grad()
    def patterns(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, PackedPattern]:
        """Pattern of every layer on the samples, in the data set's order, on every process, on the module's device.

        Raises:
            PatternError: the input of a kink is NaN, a layer is not the same in every batch, or the training set has
                become smaller.
        """
        assert self.found is not None  # noqa: S101 (prepare comes first)
        if self.is_batch:
            return local_result(lambda: self._pass(trainer, pl_module, 0, self.num_samples)).patterns()
        self._check_data(trainer)
        low, high = part_of(self.num_samples, trainer.global_rank, trainer.world_size)
        rows = local_result(lambda: self._pass(trainer, pl_module, low, high))
        for bits in rows.bits.values():  # the rows of other processes are zero
            add_up(bits)
        return rows.patterns()

    def some_samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule, size: int) -> Any:
        """Evenly spaced ones of the recorded samples as one batch as in training, the same on every process.

        It must be called within ``isolated``.

        Raises:
            PatternError: the training set has become smaller.
        """
        spaced = torch.arange(size) * self.num_samples // size
        if self.is_batch:
            found = select(self.probe, spaced, self.num_samples)
        else:
            self._check_data(trainer)
            (found,) = exact_shard(trainer.train_dataloader, chosen=self._chosen[spaced], batch_size=size)
        return self._ready(trainer, pl_module, found)

    def run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Run the module on a batch as for patterns; within ``isolated``."""
        with _as_training(trainer):
            forward_on(pl_module, batch, self._run)

    def _pass(self, trainer: pl.Trainer, pl_module: pl.LightningModule, low: int, high: int) -> PatternRows:
        """Run the module on this process's samples, whose rows are ``low`` to ``high``."""
        assert self.found is not None  # noqa: S101
        rows = PatternRows(self.layers, self.num_samples, pl_module.device, low, self.found.without_samples)
        trace = KinkTrace(pl_module, rows.take, self.modules)
        with isolated(trainer, pl_module), _as_training(trainer):
            for batch in self._batches(trainer, pl_module):
                with trace, self._note_on_partial_batch(trainer, high - rows.row):
                    forward_on(pl_module, batch, self._run)
                rows.end_batch()
            rows.check()
        if rows.row != high:
            raise PatternError(
                f"{high - low} samples gave patterns of {rows.row - low}: a forward pass must have one number for each "
                "sample and unit"
            )
        return rows

    def _batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
        if self.is_batch:
            yield self._ready(trainer, pl_module, self.probe)
        else:
            yield from model_batches(trainer, pl_module, self._chosen)

    @property
    def layers_without_samples(self) -> tuple[str, ...]:
        """Kink calls without a number for each sample, which are not recorded."""
        return () if self.found is None else self.found.without_samples

    @property
    def is_batch(self) -> bool:
        """Whether the samples are a batch, instead of samples of the training set."""
        return not (self.probe is None or isinstance(self.probe, int))

    def _ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
        """A batch as the module gets it in training; for one that training has had, only its device is left."""
        if self.was_in_training:
            return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(pl_module.device))
        return as_in_training(trainer, pl_module, batch)

    def _take_first(self, trainer: pl.Trainer, first: Any, error: NotEnumerableError) -> int:
        """Take the samples of the first batch of training, that of the first process; return their number."""
        if first is None:
            raise AwaitsBatchError(str(error)) from error
        size = min(batch_size(first), self.probe if isinstance(self.probe, int) else MAX_SAMPLES)

        def copied() -> Any:
            some = select(first, torch.arange(size), batch_size(first))
            return apply_to_collection(some, Tensor, lambda tensor: tensor.detach().cpu().clone())

        self.probe, self.was_in_training, self._is_chosen = on_first_process(trainer, copied), True, True
        rank_zero_info(
            f"Activation patterns: {error.args[0].partition(':')[0]}: those of the first batch of training are recorded"
        )
        return batch_size(self.probe)

    def _total(self, trainer: pl.Trainer) -> int:
        if self.is_batch:
            return batch_size(self.probe)
        try:
            return num_samples(trainer.train_dataloader)
        except NotEnumerableError as error:
            raise NotEnumerableError(f"{error}; or give the recorder a batch of samples: probe=batch") from error

    def _few(self, trainer: pl.Trainer, indices: list[int]) -> Any:
        """A collated batch of a few samples, the same on every process."""
        if self.is_batch:
            return select(self.probe, torch.tensor(indices), batch_size(self.probe))
        chosen = torch.tensor(indices)
        (batch,) = exact_shard(trainer.train_dataloader, chosen=chosen, batch_size=len(indices))
        return batch

    def _check_data(self, trainer: pl.Trainer) -> None:
        """Check that the samples still exist; warn once if they may have changed."""
        total = self._total(trainer)
        if self._data_set is not None and _data_set(trainer) is not self._data_set():
            rank_zero_warn(
                "Activation patterns: the training set is a different object than at the start of training; if its "
                "samples differ, too, patterns change with them and not with the weights alone. A batch of samples "
                "does not change: probe=batch"
            )
            self._data_set = None
        if int(self._chosen.max()) >= total:
            raise PatternError(
                f"the training set has {total} samples now, but sample {int(self._chosen.max())} is to be recorded"
            )

    @contextmanager
    def _note_on_partial_batch(self, trainer: pl.Trainer, left: int) -> Iterator[None]:
        """Add a note to an error in a last batch that is smaller than those in training."""
        size = 0 if self.is_batch else _dropping(trainer)
        try:
            yield
        except Exception as error:
            if left < size:
                error.add_note(
                    f"It was in a last batch of {left} samples, which training leaves out (batch_size={size}, "
                    "drop_last=True): set probe to a multiple of the batch size"
                )
            raise

    def _size(self, trainer: pl.Trainer, total: int) -> int:
        """Number of samples to record out of ``total``."""
        if isinstance(self.probe, int):
            return min(self.probe, total)
        most = min(total, MAX_SAMPLES, self.memory_budget // self._bytes(1))
        whole = max(1, _dropping(trainer) * trainer.world_size)
        return most - most % whole if most >= whole else most

    def _bytes(self, samples: int) -> int:
        return SNAPSHOTS * samples * sum(layer.bytes_per_sample for layer in self.layers.values())

    def _check_budget(self, trainer: pl.Trainer, total: int) -> int:
        """Check that the samples fit into the budget; of a batch that nobody asked for, keep as many as do."""
        size = total if self.is_batch else max(1, self._size(trainer, total))
        if self._is_chosen and (most := self.memory_budget // self._bytes(1)) < size and most > 0:
            self.probe = select(self.probe, torch.arange(most), total)
            return most
        if self._bytes(size) > self.memory_budget:
            one = self._bytes(1)
            raise (ValueError if self.probe is None or self._is_chosen else MisfitError)(
                f"the patterns of probe={size} samples need {self._bytes(size)} bytes ({SNAPSHOTS} snapshots of "
                f"{one // SNAPSHOTS} bytes per sample), more than memory_budget={self.memory_budget}: record at most "
                f"{self.memory_budget // one} samples, fewer layers by modules=, or raise memory_budget"
            )
        return total


def first_batch(trainer: pl.Trainer) -> Any:
    """The first batch of an epoch of the training loader, as it collates it, the same on every process.

    It serves as the probe for data whose samples cannot be enumerated.
    """

    def first() -> Any:
        with restoring_generators(trainer):
            seed_generators(0)
            return next(one_epoch(trainer))

    return on_first_process(trainer, first)


def checked_probe(probe: Any) -> Any:
    """A callback's argument ``probe`` after a check: a number of samples, a batch of samples, or None.

    Raises:
        ArgumentError: a number that is not a number of samples, or a text.
    """
    if isinstance(probe, bool | float | str):
        raise ArgumentError("probe", probe, "must be a number of samples", "such as 32; in Python also a batch")
    return positive_integer("probe", probe) if isinstance(probe, int) else probe


def chosen_samples(total: int, size: int, seed: int) -> Tensor:
    """Indices of a random subset of ``total`` samples, ascending, the same on any machine; at most all of them."""
    return torch.randperm(total, generator=generator(seed, "probe"))[:size].sort().values


def _dropping(trainer: pl.Trainer) -> int:
    """Batch size of a loader that drops a smaller last batch; 0 for other loaders."""
    loader = trainer.train_dataloader
    drops = isinstance(loader, DataLoader) and getattr(loader.batch_sampler, "drop_last", False)
    return batch_size_of(loader) if drops else 0


def _data_set(trainer: pl.Trainer) -> Any:
    return getattr(trainer.train_dataloader, "dataset", None)


def _reference(thing: Any) -> Callable[[], Any]:
    """A weak reference if possible, so that an old training set does not stay in memory."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


@contextmanager
def _as_training(trainer: pl.Trainer) -> Iterator[None]:
    """A context with the precision of training, without warnings about gradients, which are not needed here."""
    with warnings.catch_warnings(), precision_context(trainer, autocast=True):
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # from checkpointed blocks
        yield


def select(batch: Any, indices: Tensor, total: int) -> Any:
    """Some samples of a batch of ``total``: their rows of each tensor with ``total`` rows; other parts unchanged."""
    if isinstance(batch, Tensor):
        return batch[indices.to(batch.device)] if batch.ndim > 0 and len(batch) == total else batch
    if isinstance(batch, Mapping):
        selected: Any = copy(batch)
        for key, value in batch.items():
            selected[key] = select(value, indices, total)
        return selected
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(select(part, indices, total) for part in batch))
    if isinstance(batch, list | tuple):
        if len(batch) == total and not any(isinstance(part, Tensor | Mapping | list | tuple) for part in batch):
            return type(batch)(batch[i] for i in indices.tolist())
        return type(batch)(select(part, indices, total) for part in batch)
    return batch


def _log_limits(name: str, found: FoundLayers) -> None:
    """Log once what the patterns do not show."""
    smooth = [f"between its kinks {name} is not linear because of {_listed(found.smooth)}"] if found.smooth else []
    for note in (*smooth, *limits(found)):
        rank_zero_info(f"Activation patterns: {note}")


def limits(found: FoundLayers) -> list[str]:
    """Which kinks the patterns do not show, or not sample by sample, as sentences."""
    notes = []
    if found.opaque:
        notes.append(f"the kinks of {_listed(found.opaque)} cannot be seen")
    if found.without_samples:
        notes.append(f"{_listed(found.without_samples)} are left out: they do not have a number for each sample")
    if found.mixed:
        notes.append(f"in {_listed(found.mixed)} a sample's numbers depend on chance or on other samples of its batch")
    return notes


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
