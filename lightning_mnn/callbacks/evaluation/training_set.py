"""Exact statistics of a run's network on its training set, computed in one pass that the callbacks share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch

from lightning_mnn.callbacks.evaluation.module_network import NetworkModule, network_of, other_methods
from lightning_mnn.callbacks.evaluation.snapshots import restoring_generators
from lightning_mnn.callbacks.trainer.long_pass import count_batch
from lightning_mnn.data.checks import find_threshold, the_threshold
from lightning_mnn.data.loaders.shards import exact_shard, flat_batch, num_samples
from lightning_mnn.landscape.labels import fitting_thresholds
from lightning_mnn.landscape.pattern import PackedPattern
from lightning_mnn.landscape.regions.region import gram_rank
from lightning_mnn.landscape.regions.statistics import (
    NetworkStatistics,
    exact_patterns,
    merge_statistics,
    network_statistics,
    on_cpu,
)
from lightning_mnn.utilities.distributed import gather, gather_results
from lightning_mnn.utilities.errors import DivergenceError
from lightning_mnn.utilities.transfer import digests, fetched, to_host

if TYPE_CHECKING:
    from collections.abc import Collection

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.landscape.network import Network


_PROBE_SAMPLES = 8  # samples that are read to find out the form of the training set

_LABELS: tuple[float | None, ...] = (0.5, 0.0)  # thresholds of labels {0, 1} and ±1

_MAX_MULTIPLICATIONS = 1e12  # largest number of multiplications for the rank of the inputs: about a minute

_statistics_of_module: WeakKeyDictionary[pl.LightningModule, tuple[Any, NetworkStatistics]] = WeakKeyDictionary()

_input_ranks: WeakKeyDictionary[pl.LightningModule, Tensor] = WeakKeyDictionary()

_thresholds: WeakKeyDictionary[pl.LightningModule, float | None] = WeakKeyDictionary()


def forget_statistics(pl_module: pl.LightningModule) -> None:
    """Drop what is stored from an earlier fit of a module, which may have had other data."""
    for known in (_statistics_of_module, _input_ranks, _thresholds):
        known.pop(pl_module, None)
    other_methods.discard(pl_module)


def training_set_statistics(
    trainer: pl.Trainer, pl_module: pl.LightningModule, *, ranked: bool = False
) -> NetworkStatistics:
    """Statistics of the module's network on the whole training set: every sample once, in float64, on every process.

    The statistics at the last weights are stored, so callbacks that act at one step share one pass. Inputs are first
    rounded to the weights' precision, since the network is trained on rounded inputs. The first pass of a run also
    finds the threshold of the labels.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        ranked: also compute what :func:`input_rank` needs.

    Raises:
        TypeError: the module has no such network, or the training set cannot be enumerated.
        DivergenceError: a weight is no longer finite.
    """
    network = network_of(pl_module)
    if network is None:
        raise TypeError(f"{type(pl_module).__name__} has no piecewise-linear network with one output")
    moment = _moment(trainer, network)
    if pl_module in _statistics_of_module and _statistics_of_module[pl_module][0] == moment:
        return _statistics_of_module[pl_module][1]
    _check_weights(trainer, network)
    reader = statistics_reader(trainer, pl_module, network, ranked=ranked)

    def local_part() -> StatisticsPart:
        for batch in exact_shard(trainer.train_dataloader, trainer.global_rank, trainer.world_size):
            reader.take(batch)
            count_batch()
        return reader.part()

    return store_statistics(trainer, pl_module, network, gather_results(local_part), moment)


def statistics_reader(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, *, ranked: bool
) -> StatisticsReader:
    """A reader of batches for :func:`training_set_statistics`, for a pass that may also have other readers."""
    stated = isinstance(pl_module, NetworkModule) or pl_module in _thresholds
    thresholds = [threshold_of(trainer, pl_module)] if stated else _LABELS
    small = _work_of_rank(trainer, network) <= _MAX_MULTIPLICATIONS
    gram = ranked and small and pl_module not in _input_ranks
    return StatisticsReader(network, network.output_weights.dtype, thresholds, gram=gram)


def store_statistics(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    network: Network,
    parts: list[StatisticsPart],
    moment: Any = None,
) -> NetworkStatistics:
    """Merge the statistics of all processes, and store them for the next caller of :func:`training_set_statistics`.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        network: its network.
        parts: the results of all processes.
        moment: identifies the weights; None: computed here, which waits for a GPU once.
    """
    statistics, threshold, gram = merged_parts(parts)
    if not isinstance(pl_module, NetworkModule):
        _thresholds[pl_module] = threshold
    if gram is not None:
        _input_ranks[pl_module] = gram_rank(gram)
    moment = _moment(trainer, network) if moment is None else moment
    _statistics_of_module[pl_module] = moment, statistics
    return statistics


@dataclass(frozen=True)
class StatisticsPart:
    """Results of a process on its part of the training set.

    Attributes:
        statistics: of its samples, by the threshold of their labels; empty if it has no samples.
        thresholds: those that fit its labels.
        gram: XᵀX of its inputs, if requested.
    """

    statistics: dict[float | None, NetworkStatistics]
    thresholds: set[float | None]
    gram: Tensor | None


class StatisticsReader:
    """Computes the statistics of a network on the training set batch by batch, with the data rounded to a precision.

    Args:
        network: the network.
        dtype: the precision to which inputs and targets are rounded.
        thresholds: threshold of the classification error, or several from which the labels select.
        gram: compute XᵀX of the inputs, augmented if there is a hidden bias.
    """

    def __init__(
        self,
        network: Network,
        dtype: torch.dtype,
        thresholds: Collection[float | None] = (None,),
        *,
        gram: bool = False,
    ) -> None:
        self._network, self._dtype = network, dtype
        self._open = len(thresholds) > 1  # the labels select one
        self._fitting = set(thresholds)
        self._blocks: list[dict[float | None, NetworkStatistics]] = []
        self._wants_gram = gram
        self._gram: Tensor | None = None

    @torch.no_grad()
    def take(self, batch: Any) -> None:
        """Add a batch as the loader collates it.

        Raises:
            TypeError: it is not a pair (inputs, targets).
            ValueError: its sizes are not those of the network.
        """
        inputs, targets = _checked(batch, self._network)
        if self._open:
            self._fitting &= fitting_thresholds(targets)
        device = _device_of(self._network)
        network, inputs, targets = (
            self._network.to(device),
            inputs.to(device, self._dtype),
            targets.to(device, self._dtype),
        )
        fitting = self._fitting or {None}
        self._blocks.append({label: network_statistics(network, inputs, targets, label) for label in fitting})
        if self._wants_gram:
            wide = network.augment(inputs.to(torch.float64))
            self._gram = wide.mT @ wide if self._gram is None else self._gram + wide.mT @ wide

    def part(self) -> StatisticsPart:
        """The results, on the CPU."""
        fitting = (self._fitting or {None}) if self._blocks else set()
        statistics = {
            label: on_cpu(merge_statistics([_labelled(block, label) for block in self._blocks])) for label in fitting
        }
        return StatisticsPart(statistics, self._fitting, None if self._gram is None else self._gram.cpu())


def merged_parts(parts: list[StatisticsPart]) -> tuple[NetworkStatistics, float | None, Tensor | None]:
    """The statistics of all samples, the threshold of their labels, and XᵀX of their inputs, if requested."""
    threshold = the_threshold(set.intersection(*(part.thresholds for part in parts)))
    statistics = merge_statistics([_labelled(part.statistics, threshold) for part in parts if part.statistics])
    grams = [part.gram for part in parts if part.gram is not None]
    return statistics, threshold, sum(grams[1:], grams[0]) if grams else None


def _labelled(statistics: dict[float | None, NetworkStatistics], threshold: float | None) -> NetworkStatistics:
    """The statistics for a threshold; for None those without a classification error."""
    if threshold in statistics:
        return statistics[threshold]
    return replace(next(iter(statistics.values())), wrong=None)


def reason_not_evaluated(trainer: pl.Trainer, network: Network) -> str | None:
    """Why a network cannot be evaluated by itself on the training set, equal on every process; None if it can.

    A few samples are read twice: they must be pairs (inputs, targets) of the network's sizes, the same each time.
    """
    with restoring_generators(trainer):
        local_reason = _reason_not_read(trainer, network)
    return next((reason for reason in gather(local_reason) if reason is not None), None)


def _reason_not_read(trainer: pl.Trainer, network: Network) -> str | None:
    few = torch.arange(min(_PROBE_SAMPLES, num_samples(trainer.train_dataloader)))
    read = []
    for _ in range(2):
        (batch,) = exact_shard(trainer.train_dataloader, chosen=few, batch_size=len(few))
        try:
            read.append(_checked(batch, network))
        except (TypeError, ValueError) as error:
            return str(error)
    if not all(torch.equal(first, again) for first, again in zip(*read, strict=True)):
        return "the samples of the training set differ each time that they are read"
    return None


@torch.no_grad()
def patterns_of_training_set(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[PackedPattern]:
    """Activation patterns of every layer on the whole training set, in its order, on every process.

    They come from the stored statistics, if these are for the same weights; otherwise only the pre-activations are
    computed.
    """
    network = cast("Network", network_of(pl_module))
    if pl_module in _statistics_of_module and _statistics_of_module[pl_module][0] == _moment(trainer, network):
        return [layer.pattern for layer in _statistics_of_module[pl_module][1].layers]
    _check_weights(trainer, network)

    def local_patterns() -> list[Tensor]:
        blocks = [
            to_host([pattern.pack().bits for pattern in exact_patterns(network.to(inputs.device), inputs)])
            for inputs, _ in _batches(trainer, network, network.output_weights.dtype)
        ]
        return [torch.cat(parts, dim=-2) for parts in zip(*blocks, strict=True)]

    layers = zip(*(part for part in gather_results(local_patterns) if part), strict=True)
    return [
        PackedPattern(torch.cat(parts, dim=-2), width) for parts, width in zip(layers, network.hidden_dims, strict=True)
    ]


def input_rank(trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> Tensor:
    """Rank of the training inputs X, augmented if there is a hidden bias, int64 (...); computed once per run.

    If that would need more than 1e12 multiplications, an upper bound instead: the smaller of N and d0.
    """
    if pl_module not in _input_ranks:
        dim, samples = network.rows.shape[-1], num_samples(trainer.train_dataloader)
        if _work_of_rank(trainer, network) > _MAX_MULTIPLICATIONS:
            lead = network.output_weights.shape[:-1]
            _input_ranks[pl_module] = torch.full(lead, min(samples, dim), dtype=torch.int64)
        else:
            _input_ranks[pl_module] = gram_rank(_gram(trainer, network))
    return _input_ranks[pl_module]


def _work_of_rank(trainer: pl.Trainer, network: Network) -> float:
    """Multiplications for the rank of the inputs."""
    dim = network.rows.shape[-1]
    return float(num_samples(trainer.train_dataloader) + dim) * dim**2


def _gram(trainer: pl.Trainer, network: Network) -> Tensor:
    """XᵀX over all processes, float64 (..., d0, d0)."""

    def local_gram() -> Tensor | None:
        gram: Tensor | float = 0.0
        for inputs, _ in _batches(trainer, network, network.output_weights.dtype):
            wide = network.augment(inputs.to(torch.float64))
            gram = gram + wide.mT @ wide
        return gram.cpu() if isinstance(gram, torch.Tensor) else None

    total = sum(part for part in gather_results(local_gram) if part is not None)
    assert isinstance(total, torch.Tensor)  # noqa: S101 (a training set has a sample)
    return total


def training_samples(trainer: pl.Trainer, network: Network, *, whole: bool) -> tuple[Tensor, Tensor]:
    """All training inputs and targets in the weights' precision, or this process's contiguous part of them."""
    inputs, targets = zip(*_batches(trainer, network, network.output_weights.dtype, whole=whole), strict=True)
    return torch.cat(inputs, dim=-2), torch.cat(targets, dim=-1)


def _moment(trainer: pl.Trainer, network: Network) -> Any:
    """A value that changes when the weights do, or the slope of a PReLU, which is not a tensor of the network."""
    return (trainer.global_step, network.negative_slope, *map(int, to_host(digests(network.tensors))))


def _check_weights(trainer: pl.Trainer, network: Network) -> None:
    if not (math.isfinite(network.negative_slope) and all(fetched(*(w.isfinite().all() for w in network.tensors)))):
        raise DivergenceError(
            f"training diverged: weights are not finite after {trainer.global_step} steps. Lower the learning rate"
        )


def _batches(trainer: pl.Trainer, network: Network, dtype: torch.dtype, *, whole: bool = False) -> Any:
    device = _device_of(network)
    part = (0, 1) if whole else (trainer.global_rank, trainer.world_size)
    for batch in exact_shard(trainer.train_dataloader, *part):
        inputs, targets = _checked(batch, network)
        count_batch()
        yield inputs.to(device, dtype), targets.to(device, dtype)


def _device_of(network: Network) -> torch.device:
    """The device on which a network is evaluated."""
    device = network.output_weights.device
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def _checked(batch: Any, network: Network) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch, checked to have the network's sizes."""
    inputs, targets = flat_batch(batch, replicated=network.output_weights.ndim > 1)
    if inputs.shape[-1] != network.input_dim:
        raise ValueError(
            f"the samples of the training set have {inputs.shape[-1]} numbers, and its network has "
            f"{network.input_dim} inputs: the module computes the network's inputs from the samples"
        )
    if targets.shape[-1] != inputs.shape[-2]:
        raise ValueError(
            f"a batch of {inputs.shape[-2]} samples has {targets.shape[-1]} targets: its network has one output"
        )
    return inputs, targets


def threshold_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
    """Decision threshold of the classification error; None if the targets are not two labels."""
    if isinstance(pl_module, NetworkModule):
        return pl_module.threshold
    if pl_module not in _thresholds:
        _thresholds[pl_module] = find_threshold(trainer)
    return _thresholds[pl_module]
