"""What the callbacks see of a run: its network, and one exact pass over its training set that they share."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from lightning_mnn.data.checks import find_threshold
from lightning_mnn.data.shards import exact_shard, flat_batch, num_samples
from lightning_mnn.landscape.pattern import PackedPattern
from lightning_mnn.landscape.region import gram_rank
from lightning_mnn.landscape.survey import Network, Survey, exact_patterns, merge_surveys, on_cpu, survey_network
from lightning_mnn.mnn import MNN, DivergenceError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytorch_lightning as pl
    from torch import Tensor

Answer = TypeVar("Answer")

_MOST_WORK = 1e12  # multiplications for the rank of the inputs, which is worth a minute

_surveys: WeakKeyDictionary[pl.LightningModule, tuple[Any, Survey]] = WeakKeyDictionary()
_input_ranks: WeakKeyDictionary[pl.LightningModule, Tensor] = WeakKeyDictionary()
_thresholds: WeakKeyDictionary[pl.LightningModule, float | None] = WeakKeyDictionary()


def forget(pl_module: pl.LightningModule) -> None:
    """Drop what is known of an earlier fit of a module, which may have had other data."""
    for known in (_surveys, _input_ranks, _thresholds):
        known.pop(pl_module, None)


def network_of(pl_module: pl.LightningModule) -> Network | None:
    """The piecewise-linear network of a module, or None where there is no such network.

    A module may say it itself by a method ``network() -> Network``, as MNN does. Otherwise an ``nn.Sequential`` of the
    form ``Linear, ReLU or LeakyReLU or PReLU, …, Linear → 1`` is taken where it holds all parameters and buffers of the
    module; ``Flatten`` may stand before it. With one hidden layer its Linears may have biases. A PReLU must have a
    single slope, which is taken as fixed: the network is judged as a function of the weights and biases alone. The
    network's tensors are views of the module's parameters.
    """
    if states_network(pl_module):
        return cast("Network", cast("Any", pl_module).network())
    own = {id(tensor) for tensor in (*pl_module.parameters(), *pl_module.buffers())}
    for part in pl_module.modules():
        if own == {id(tensor) for tensor in part.parameters()} and (network := _sequential(part)) is not None:
            return network
    return None


def states_network(pl_module: pl.LightningModule) -> bool:
    """Whether a module itself says what its network is, and so that it trains that on the squared error."""
    return inspect.ismethod(getattr(pl_module, "network", None))


def required_network(callback: pl.Callback, pl_module: pl.LightningModule) -> Network:
    """The network of a module.

    Raises:
        TypeError: there is none that the callback could judge.
    """
    network = network_of(pl_module)
    if network is None:
        raise TypeError(
            f"{type(callback).__name__} needs a piecewise-linear network with one output: an MNN, a module with a "
            "method network() -> lightning_mnn.landscape.Network, or one nn.Sequential(Linear, ReLU, Linear → 1), "
            "where ReLU may be LeakyReLU or a PReLU with one slope, with biases only where there is one hidden layer; "
            f"{type(pl_module).__name__} has none. ActivationPatternRecorder works with any ReLU module"
        )
    return network


@torch.no_grad()
def survey_training_set(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Survey:
    """Survey the module's network on the whole training set: every sample once, in float64, on every process.

    The survey of the last weights is kept, so callbacks that act at one step share one pass. Inputs are first rounded
    to the weights' precision, since the network is trained on those.

    Raises:
        TypeError: the module has no such network, or the training set cannot be enumerated.
        DivergenceError: a weight is no longer finite.
    """
    network = network_of(pl_module)
    if network is None:
        raise TypeError(f"{type(pl_module).__name__} has no piecewise-linear network with one output")
    moment = _moment(trainer, network)
    if pl_module in _surveys and _surveys[pl_module][0] == moment:
        return _surveys[pl_module][1]
    _check_weights(trainer, network)
    threshold = threshold_of(trainer, pl_module)
    parts = [
        survey_network(network.to(inputs.device), inputs, targets, threshold)
        for inputs, targets in _batches(trainer, network)
    ]
    own = on_cpu(merge_surveys(parts)) if parts else None  # there may be fewer samples than processes
    survey = merge_surveys([part for part in gather(own) if part is not None])
    _surveys[pl_module] = moment, survey
    return survey


@torch.no_grad()
def patterns_of_training_set(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[PackedPattern]:
    """Activation patterns of every layer on the whole training set, in its order, on every process.

    They are those of the survey, where there is one of these weights; else only the pre-activations are formed.
    """
    network = cast("Network", network_of(pl_module))
    if pl_module in _surveys and _surveys[pl_module][0] == _moment(trainer, network):
        return [layer.pattern for layer in _surveys[pl_module][1].layers]
    _check_weights(trainer, network)
    blocks = [
        [pattern.pack().bits.cpu() for pattern in exact_patterns(network.to(inputs.device), inputs)]
        for inputs, _ in _batches(trainer, network)
    ]
    own = [torch.cat(parts, dim=-2) for parts in zip(*blocks, strict=True)]
    layers = zip(*(part for part in gather(own) if part), strict=True)
    return [
        PackedPattern(torch.cat(parts, dim=-2), width) for parts, width in zip(layers, network.hidden_dims, strict=True)
    ]


def input_rank(trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> Tensor:
    """Rank of the training inputs X, augmented where there is a hidden bias, int64 (...); found once a run.

    Where that would take more than 1e12 multiplications, an upper bound instead: the smaller of N and d0.
    """
    if pl_module not in _input_ranks:
        dim, samples = network.rows.shape[-1], num_samples(trainer.train_dataloader)
        if (samples + dim) * dim**2 > _MOST_WORK:
            lead = network.output_weights.shape[:-1]
            _input_ranks[pl_module] = torch.full(lead, min(samples, dim), dtype=torch.int64)
        else:
            _input_ranks[pl_module] = gram_rank(_gram(trainer, network))
    return _input_ranks[pl_module]


def _gram(trainer: pl.Trainer, network: Network) -> Tensor:
    """XᵀX over all processes, float64 (..., d0, d0)."""
    gram: Tensor | float = 0.0
    for inputs, _ in _batches(trainer, network):
        wide = network.augment(inputs.to(torch.float64))
        gram = gram + wide.mT @ wide
    total = sum(part for part in gather(gram.cpu() if isinstance(gram, torch.Tensor) else None) if part is not None)
    assert isinstance(total, torch.Tensor)  # noqa: S101 (a training set holds a sample)
    return total


def training_samples(trainer: pl.Trainer, network: Network, *, whole: bool) -> tuple[Tensor, Tensor]:
    """All training inputs and targets in the weights' precision, or this process's contiguous part of them."""
    inputs, targets = zip(*_batches(trainer, network, whole=whole), strict=True)
    return torch.cat(inputs, dim=-2), torch.cat(targets, dim=-1)


def gather(value: Any) -> list[Any]:
    """The value of every process, in rank order, on every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_process(trainer: pl.Trainer, work: Callable[[], Answer]) -> Answer:
    """What the first process finds, on every process; an error that it meets is raised on all of them.

    Nothing in the answer may lie on a device of the first process alone.
    """
    if trainer.world_size == 1:
        return work()
    box: list[Any] = [None]
    if trainer.is_global_zero:
        try:
            box = [work()]
        except Exception as error:  # noqa: BLE001 (the others wait for an answer, and shall fail with it)
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return cast("Answer", box[0])


def _moment(trainer: pl.Trainer, network: Network) -> Any:
    """What changes when the weights do."""
    changes = ((w.data_ptr(), w._version) for w in network.tensors)  # noqa: SLF001 (counts changes)
    return (trainer.global_step, network.negative_slope, *changes)  # a PReLU's slope is no tensor of the network


def _check_weights(trainer: pl.Trainer, network: Network) -> None:
    if not (math.isfinite(network.negative_slope) and all(bool(w.isfinite().all()) for w in network.tensors)):
        raise DivergenceError(
            f"training diverged: weights are not finite after {trainer.global_step} steps. Lower the learning rate"
        )


def _batches(trainer: pl.Trainer, network: Network, *, whole: bool = False) -> Any:
    device = network.output_weights.device
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    part = (0, 1) if whole else (trainer.global_rank, trainer.world_size)
    for batch in exact_shard(trainer.train_dataloader, *part):
        inputs, targets = flat_batch(batch, replicated=network.output_weights.ndim > 1)
        yield inputs.to(device, network.output_weights.dtype), targets.to(device, network.output_weights.dtype)


def threshold_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
    """Decision threshold of the classification error; None where the targets are not two labels."""
    if isinstance(pl_module, MNN):
        return pl_module.threshold
    if pl_module not in _thresholds:
        _thresholds[pl_module] = find_threshold(trainer)
    return _thresholds[pl_module]


def _sequential(module: nn.Module) -> Network | None:
    if not isinstance(module, nn.Sequential):
        return None
    parts: list[Any] = [part for part in module if not isinstance(part, nn.Flatten)]
    linear, kinks = parts[::2], parts[1::2]
    fits = (
        len(parts) >= 3
        and len(linear) == len(kinks) + 1
        and all(isinstance(part, nn.Linear) for part in linear)
        and (len(linear) == 2 or all(part.bias is None for part in linear))
        and linear[-1].out_features == 1
    )
    slopes = {_slope(kink) for kink in kinks}
    if not fits or len(slopes) != 1 or (slope := slopes.pop()) is None:
        return None
    *hidden, output = (part.weight.detach() for part in linear)
    first, last = linear[0].bias, linear[-1].bias
    return Network(
        tuple(hidden),
        output[0],
        slope,
        unit_roundoff=torch.finfo(output.dtype).eps / 2,
        hidden_bias=None if first is None else first.detach(),
        output_bias=None if last is None else last.detach()[0],
    )


def _slope(kink: nn.Module) -> float | None:
    """ρ of a layer that applies f to every unit; None for other layers."""
    match kink:
        case nn.ReLU():
            return 0.0
        case nn.LeakyReLU():
            return float(kink.negative_slope)
        case nn.PReLU(num_parameters=1):
            return float(kink.weight.detach())
    return None
