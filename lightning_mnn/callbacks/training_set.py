"""What the callbacks see of a run: its network, and one exact pass over its training set that they share."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import nn

from lightning_mnn.callbacks.long_pass import count_batch
from lightning_mnn.callbacks.undisturbed import kept_generators
from lightning_mnn.data.checks import find_threshold, the_threshold
from lightning_mnn.data.shards import exact_shard, flat_batch, num_samples
from lightning_mnn.landscape.pattern import PackedPattern
from lightning_mnn.landscape.region import gram_rank
from lightning_mnn.landscape.survey import (
    Network,
    Survey,
    exact_patterns,
    fitting_thresholds,
    merge_surveys,
    on_cpu,
    survey_network,
)
from lightning_mnn.landscape.team import raise_first, transferable
from lightning_mnn.mnn import MNN, DivergenceError
from lightning_mnn.utilities.interruption import Interrupted, alone, requested, stop_if_any
from lightning_mnn.utilities.transfer import digests, fetched, to_host

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import pytorch_lightning as pl
    from torch import Tensor

Answer = TypeVar("Answer")

_FEW = 8  # samples that tell what the training set is like
_LABELS: tuple[float | None, ...] = (0.5, 0.0)  # thresholds of labels {0, 1} and ±1
_MOST_WORK = 1e12  # multiplications for the rank of the inputs, which is worth a minute

_surveys: WeakKeyDictionary[pl.LightningModule, tuple[Any, Survey]] = WeakKeyDictionary()
_input_ranks: WeakKeyDictionary[pl.LightningModule, Tensor] = WeakKeyDictionary()
_thresholds: WeakKeyDictionary[pl.LightningModule, float | None] = WeakKeyDictionary()
_other_methods: WeakSet[pl.LightningModule] = WeakSet()  # modules whose method network() returns something else


def forget(pl_module: pl.LightningModule) -> None:
    """Drop what is known of an earlier fit of a module, which may have had other data."""
    for known in (_surveys, _input_ranks, _thresholds):
        known.pop(pl_module, None)
    _other_methods.discard(pl_module)


def network_of(pl_module: pl.LightningModule) -> Network | None:
    """The piecewise-linear network of a module, or None where there is no such network.

    A module may say it itself by a method ``network() -> Network``, as MNN does. Otherwise an ``nn.Sequential`` of the
    form ``Linear, ReLU or LeakyReLU or PReLU, …, Linear → 1`` is taken where it holds all parameters and buffers of the
    module; ``Flatten`` may stand before it. With one hidden layer its Linears may have biases. A PReLU must have a
    single slope, which is taken as fixed: the network is judged as a function of the weights and biases alone. The
    network's tensors are views of the module's parameters: weights that are computed from parameters (``weight_norm``
    and other parametrisations) make no such network.
    """
    stated = _stated(pl_module)
    if stated is not None:
        return stated
    own = {id(tensor) for tensor in (*pl_module.parameters(), *pl_module.buffers())}
    for part in pl_module.modules():
        if own != {id(tensor) for tensor in part.parameters()}:
            continue
        network = _sequential(part)
        slopes = {id(kink.weight) for kink in part.modules() if isinstance(kink, nn.PReLU)}
        weights = [parameter for parameter in part.parameters() if id(parameter) not in slopes]
        if network is not None and {*map(_place, network.tensors)} == {*map(_place, weights)}:
            return network
    return None


def states_network(pl_module: pl.LightningModule) -> bool:
    """Whether a module itself says what its network is, and so that it trains that on the squared error."""
    return _stated(pl_module) is not None


def _stated(pl_module: pl.LightningModule) -> Network | None:
    """What a module's method ``network()`` returns; None where there is none, or it is a method for something else."""
    method = getattr(pl_module, "network", None)
    if not inspect.ismethod(method) or pl_module in _other_methods:
        return None
    ours = "Network" in str(inspect.signature(method).return_annotation)  # if it says so, its errors are told
    found = None
    try:
        inspect.signature(method).bind()
        with kept_generators():
            found = method()
    except Exception:
        if ours:
            raise
    if isinstance(found, Network):
        return found
    _other_methods.add(pl_module)
    return None


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies in memory, and its number of entries."""
    return tensor.data_ptr(), tensor.numel()


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


def survey_training_set(trainer: pl.Trainer, pl_module: pl.LightningModule, *, ranked: bool = False) -> Survey:
    """Survey the module's network on the whole training set: every sample once, in float64, on every process.

    The survey of the last weights is kept, so callbacks that act at one step share one pass. Inputs are first rounded
    to the weights' precision, since the network is trained on those. The first pass of a run also finds the threshold
    of the labels.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        ranked: let the pass find what :func:`input_rank` needs, too.

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
    reader = survey_reader(trainer, pl_module, network, ranked=ranked)

    def own() -> SurveyPart:
        for batch in exact_shard(trainer.train_dataloader, trainer.global_rank, trainer.world_size):
            reader.take(batch)
            count_batch()
        return reader.part()

    return keep_survey(trainer, pl_module, network, gather_results(own))


def survey_reader(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, *, ranked: bool
) -> SurveyReader:
    """What takes a pass over a module's training set for :func:`survey_training_set`, which may serve others, too."""
    stated = isinstance(pl_module, MNN) or pl_module in _thresholds
    thresholds = [threshold_of(trainer, pl_module)] if stated else _LABELS
    small = _work_of_rank(trainer, network) <= _MOST_WORK
    gram = ranked and small and pl_module not in _input_ranks
    return SurveyReader(network, network.output_weights.dtype, thresholds, gram=gram)


def keep_survey(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network, parts: list[SurveyPart]
) -> Survey:
    """The survey of a module's training set from those of all processes, kept for the next that asks for it."""
    survey, threshold, gram = merged_parts(parts)
    if not isinstance(pl_module, MNN):
        _thresholds[pl_module] = threshold
    if gram is not None:
        _input_ranks[pl_module] = gram_rank(gram)
    _surveys[pl_module] = _moment(trainer, network), survey
    return survey


@dataclass(frozen=True)
class SurveyPart:
    """What a process found in its part of the training set.

    Attributes:
        surveys: of its samples by the threshold of their labels; empty where it has no samples.
        thresholds: those that fit its labels.
        gram: XᵀX of its inputs, where that was asked for.
    """

    surveys: dict[float | None, Survey]
    thresholds: set[float | None]
    gram: Tensor | None


class SurveyReader:
    """Surveys a network on the training set batch by batch, rounded to a precision.

    Args:
        network: the network.
        dtype: to which inputs and targets are rounded.
        thresholds: of the classification error, or several among which the labels choose.
        gram: form XᵀX of the inputs, augmented where there is a hidden bias.
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
        self._open = len(thresholds) > 1  # the labels choose
        self._fitting = set(thresholds)
        self._blocks: list[dict[float | None, Survey]] = []
        self._wants_gram = gram
        self._gram: Tensor | None = None

    @torch.no_grad()
    def take(self, batch: Any) -> None:
        """Survey a batch as the loader collates it.

        Raises:
            TypeError: it is no pair (inputs, targets).
            ValueError: it is of other sizes than the network's.
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
        self._blocks.append({label: survey_network(network, inputs, targets, label) for label in fitting})
        if self._wants_gram:
            wide = network.augment(inputs.to(torch.float64))
            self._gram = wide.mT @ wide if self._gram is None else self._gram + wide.mT @ wide

    def part(self) -> SurveyPart:
        """What was found, on the CPU."""
        fitting = (self._fitting or {None}) if self._blocks else set()
        surveys = {
            label: on_cpu(merge_surveys([_labelled(block, label) for block in self._blocks])) for label in fitting
        }
        return SurveyPart(surveys, self._fitting, None if self._gram is None else self._gram.cpu())


def merged_parts(parts: list[SurveyPart]) -> tuple[Survey, float | None, Tensor | None]:
    """The survey of all samples, the threshold of their labels, and XᵀX of their inputs, if that was asked for."""
    threshold = the_threshold(set.intersection(*(part.thresholds for part in parts)))
    survey = merge_surveys([_labelled(part.surveys, threshold) for part in parts if part.surveys])
    grams = [part.gram for part in parts if part.gram is not None]
    return survey, threshold, sum(grams[1:], grams[0]) if grams else None


def _labelled(surveys: dict[float | None, Survey], threshold: float | None) -> Survey:
    """The survey with a threshold; with None that without a classification error."""
    if threshold in surveys:
        return surveys[threshold]
    return replace(next(iter(surveys.values())), wrong=None)


def why_not_surveyed(trainer: pl.Trainer, network: Network) -> str | None:
    """Why a network cannot be judged by itself on the training set, the same on every process; None where it can.

    A few samples tell, read twice: they must be pairs (inputs, targets) of the network's sizes, the same each time.
    """
    with kept_generators(trainer):
        own = _why_not_read(trainer, network)
    return next((reason for reason in gather(own) if reason is not None), None)


def _why_not_read(trainer: pl.Trainer, network: Network) -> str | None:
    few = torch.arange(min(_FEW, num_samples(trainer.train_dataloader)))
    read = []
    for _ in range(2):
        (batch,) = exact_shard(trainer.train_dataloader, chosen=few, batch_size=len(few))
        try:
            read.append(_checked(batch, network))
        except (TypeError, ValueError) as error:
            return str(error)
    if not all(torch.equal(first, again) for first, again in zip(*read, strict=True)):
        return "the samples of the training set are others each time that they are read"
    return None


@torch.no_grad()
def patterns_of_training_set(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[PackedPattern]:
    """Activation patterns of every layer on the whole training set, in its order, on every process.

    They are those of the survey, where there is one of these weights; else only the pre-activations are formed.
    """
    network = cast("Network", network_of(pl_module))
    if pl_module in _surveys and _surveys[pl_module][0] == _moment(trainer, network):
        return [layer.pattern for layer in _surveys[pl_module][1].layers]
    _check_weights(trainer, network)

    def own() -> list[Tensor]:
        blocks = [
            to_host([pattern.pack().bits for pattern in exact_patterns(network.to(inputs.device), inputs)])
            for inputs, _ in _batches(trainer, network, network.output_weights.dtype)
        ]
        return [torch.cat(parts, dim=-2) for parts in zip(*blocks, strict=True)]

    layers = zip(*(part for part in gather_results(own) if part), strict=True)
    return [
        PackedPattern(torch.cat(parts, dim=-2), width) for parts, width in zip(layers, network.hidden_dims, strict=True)
    ]


def input_rank(trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> Tensor:
    """Rank of the training inputs X, augmented where there is a hidden bias, int64 (...); found once a run.

    Where that would take more than 1e12 multiplications, an upper bound instead: the smaller of N and d0.
    """
    if pl_module not in _input_ranks:
        dim, samples = network.rows.shape[-1], num_samples(trainer.train_dataloader)
        if _work_of_rank(trainer, network) > _MOST_WORK:
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

    def own() -> Tensor | None:
        gram: Tensor | float = 0.0
        for inputs, _ in _batches(trainer, network, network.output_weights.dtype):
            wide = network.augment(inputs.to(torch.float64))
            gram = gram + wide.mT @ wide
        return gram.cpu() if isinstance(gram, torch.Tensor) else None

    total = sum(part for part in gather_results(own) if part is not None)
    assert isinstance(total, torch.Tensor)  # noqa: S101 (a training set holds a sample)
    return total


def training_samples(trainer: pl.Trainer, network: Network, *, whole: bool) -> tuple[Tensor, Tensor]:
    """All training inputs and targets in the weights' precision, or this process's contiguous part of them."""
    inputs, targets = zip(*_batches(trainer, network, network.output_weights.dtype, whole=whole), strict=True)
    return torch.cat(inputs, dim=-2), torch.cat(targets, dim=-1)


def gather(value: Any) -> list[Any]:
    """The value of every process, in rank order, on every process.

    Raises:
        Interrupted: (on every process) one was asked to stop.
        Exception: (on every process) one has met this error, and called :func:`share_error`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values, requests, errors = _exchanged(value, None)
    stop_if_any(requests)
    raise_first(errors)
    return values


def gather_results(work: Callable[[], Answer]) -> list[Answer]:
    """What each process finds, in rank order, on every process; the work must not wait for other processes.

    Raises:
        Interrupted: (on every process) one was asked to stop; where it is in the middle of its work, it stops there.
        Exception: (on every process) the first error that one of them met.
    """
    if not (dist.is_available() and dist.is_initialized()):
        with alone():
            return [work()]
    found: Answer | None = None
    error: Exception | None = None
    try:
        with alone():
            found = work()
    except Interrupted:
        pass  # which is raised on all below
    except Exception as own:  # noqa: BLE001 (of whatever kind)
        error = own
    values, requests, errors = _exchanged(found, error)
    stop_if_any(requests)
    raise_first(errors)
    return values


def share_error(error: Exception | None) -> None:
    """Tell the other processes of an error, or of none; they call this, too, or wait in :func:`gather`.

    Raises:
        Exception: (on every process) the first error that one of them met.
    """
    if getattr(error, "is_shared", False):  # the others raise it as well
        raise cast("Exception", error)
    if dist.is_available() and dist.is_initialized():
        raise_first(_exchanged(None, error)[2])
    if error is not None:
        raise error


def _exchanged(value: Any, error: Exception | None) -> tuple[list[Any], list[int], list[BaseException | None]]:
    """Values, requests to stop and errors of all processes."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (value, requested(), error and transferable(error)))
    values, requests, errors = (list(column) for column in zip(*parts, strict=True))
    return values, requests, errors


def on_first_process(trainer: pl.Trainer, work: Callable[[], Answer]) -> Answer:
    """What the first process finds, on every process; an error that it meets is raised on all of them.

    Nothing in the answer may lie on a device of the first process alone.
    """
    if trainer.world_size == 1:
        return work()
    box: list[Any] = [None]
    if trainer.is_global_zero:
        try:
            with alone():
                box = [work()]
        except (Exception, Interrupted) as error:  # noqa: BLE001 (the others wait for an answer, and fail with it)
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception | Interrupted):
        raise box[0]
    return cast("Answer", box[0])


def _moment(trainer: pl.Trainer, network: Network) -> Any:
    """What changes when the weights do, or the slope of a PReLU, which is no tensor of the network."""
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
    """Where it is surveyed."""
    device = network.output_weights.device
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


def _checked(batch: Any, network: Network) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch, of the network's sizes."""
    inputs, targets = flat_batch(batch, replicated=network.output_weights.ndim > 1)
    if inputs.shape[-1] != network.input_dim:
        raise ValueError(
            f"the samples of the training set have {inputs.shape[-1]} numbers, and its network takes "
            f"{network.input_dim}: what the network is called on is made in the module"
        )
    if targets.shape[-1] != inputs.shape[-2]:
        raise ValueError(
            f"a batch of {inputs.shape[-2]} samples has {targets.shape[-1]} targets: its network has one output"
        )
    return inputs, targets


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
