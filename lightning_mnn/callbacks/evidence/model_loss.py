"""Is the loss that a module trains one of those that certificates of models cover, of its ``nn.Sequential``?

The loss of the module's own step and that of the ``nn.Sequential`` as a certificate reads it are compared on the whole
training set, in float64, with their gradients. So a penalty, weights of classes or samples, label smoothing and a
second term of the loss are found. That the step computes the same in training mode is tested on a batch, with two seeds
and in the precision of training: dropout, batch statistics, random transforms and autocast are found.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.float64_loss import DoubleBatch, in_double
from lightning_mnn.callbacks.evaluation.isolation import isolated, trained_parameters
from lightning_mnn.callbacks.evaluation.module_model import sequential_of
from lightning_mnn.callbacks.evaluation.run_module import (
    LossNotEvaluableError,
    as_in_training,
    loss_on,
    precision_context,
)
from lightning_mnn.callbacks.evaluation.snapshots import restoring_generators, seed_generators
from lightning_mnn.callbacks.evidence.model_objective import MAX_GATHERED, ModelObjective, multiplications
from lightning_mnn.callbacks.evidence.noise import noise_like
from lightning_mnn.callbacks.trainer.weight_decay import has_decoupled_decay, weight_decays
from lightning_mnn.data.loaders.shards import draws, exact_shard, num_samples
from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.landscape.minima.models.classification import MAX_UNKNOWNS
from lightning_mnn.landscape.minima.models.model_certificate import prepare
from lightning_mnn.landscape.minima.models.reading import true_outputs
from lightning_mnn.utilities.compat.torch_internals import as_evaluated, changes_in_training
from lightning_mnn.utilities.distributed import gather, gather_results
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.minima.models.layers import LossName

_READ_TWICE = 1024  # samples that are read twice, to see whether they change
_SEEDS = (1_000_003, 1_000_033)  # of the two steps in training mode, other than those of passes
_MAX_TRAINING_DIFFERENCE = 1e-4  # relative difference of a step in training mode that float32's rounding explains
_NO_SEQUENTIAL = "it has no nn.Sequential with all its trained weights"
_LOSSES: tuple[LossName, ...] = ("squared_error", "cross_entropy", "logistic")


class NotModelLossError(Exception):
    """A module's loss turned out to differ from the one that was found for its model."""


@dataclass(frozen=True)
class ModelLoss:
    """A module's loss that is a loss of its model's outputs up to constants: L = factor · ℓ + offset.

    Attributes:
        name: ℓ, the mean over samples.
        target: which tensor of a batch has the targets.
        one_hot: whether they are classes of which ℓ takes the one-hot vectors.
        factor: positive.
        offset: a constant.
        scale: size of the losses seen, for comparison.
        gradient_scale: size of their gradients.
        products: multiplications of a forward pass on one sample.
    """

    name: LossName
    target: int
    one_hot: bool
    factor: float
    offset: float
    scale: float
    gradient_scale: float
    products: int = 0

    def targets(self, tensors: Sequence[Tensor], outputs: int) -> Tensor | None:
        """The targets of the loss in the tensors of a batch."""
        return dict(_forms(self.name, tensors[self.target], outputs)).get(self.one_hot)


@dataclass(frozen=True)
class _Samples:
    """What a model gets on the training set.

    Attributes:
        inputs: its inputs, (N, …).
        tensors: the tensors of the batches, each (N, …).
    """

    inputs: Tensor
    tensors: list[Tensor]


@dataclass(frozen=True)
class _Read:
    """A pass: the module's own loss and gradient at weights near the present ones, and what the model got there."""

    loss: float
    gradient: Tensor
    samples: _Samples
    module: nn.Sequential  # the model at these weights
    frozen: tuple[str, ...]

    def compared(self, name: LossName, targets: Tensor) -> tuple[float, Tensor] | None:
        """The loss ℓ of the model and its gradient; None if the targets do not fit it."""
        try:
            model, vector = prepare(
                self.module, self.samples.inputs, targets, loss=name, weight_decay=0.0, frozen=self.frozen
            )
        except ArgumentError:
            return None
        with torch.enable_grad():
            vector = vector.requires_grad_()
            loss = model.loss(true_outputs(model, vector))
            (gradient,) = torch.autograd.grad(loss, vector)
        return float(loss.detach()), gradient


def model_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None = None
) -> ModelLoss | str | None:
    """The loss of a module's model and its constants, or the reason why certificates do not cover what it trains.

    None: it has no ``nn.Sequential`` with all its trained weights.

    Losses and gradients are compared at the weights plus noise of a tenth of their size, since at a minimum all
    gradients vanish. The first batches are enough to reject most other losses.

    Raises:
        LossNotEvaluableError: the loss cannot be evaluated.
    """
    if sequential_of(trainer, pl_module) is None:
        return None
    reason = _reason_against(trainer, pl_module, loss_fn)
    if reason is not None:
        return reason
    found: ModelLoss | str = ""
    for first in (True, False):
        read = _read(trainer, pl_module, loss_fn, tolerances.FAR_STEP_RATIO, first=first)
        if isinstance(read, str):
            return read
        found = _matched(read)
        if isinstance(found, str) and not (first and not read.gradient.any()):
            return found
    assert isinstance(found, ModelLoss)  # noqa: S101
    return _reason_in_training(trainer, pl_module, found, loss_fn) or found


def objective_of(
    trainer: pl.Trainer, pl_module: pl.LightningModule, fitted: ModelLoss, loss_fn: ModelFunction | None = None
) -> ModelObjective:
    """The objective at the present weights, after a test that the loss is still the one that was found.

    Raises:
        NotModelLossError: it is not.
        LossNotEvaluableError: the loss cannot be evaluated.
    """
    reason = _reason_against(trainer, pl_module, loss_fn)
    read = reason or _read(trainer, pl_module, loss_fn, tolerances.NEAR_STEP_RATIO)
    if isinstance(read, str):
        raise NotModelLossError(read)
    targets = fitted.targets(read.samples.tensors, _num_outputs(read))
    compared = None if targets is None else read.compared(fitted.name, targets)
    if compared is None or targets is None or not _agrees(fitted, read, *compared):
        raise NotModelLossError(
            f"the loss that it trains is {_named(fitted.name)} of its model at some weights only, and not here"
        )
    reason = _reason_in_training(trainer, pl_module, fitted, loss_fn)
    if reason is not None:
        raise NotModelLossError(reason)
    sequential = sequential_of(trainer, pl_module)
    assert isinstance(sequential, nn.Sequential)  # noqa: S101 (it was just found)
    names = {id(parameter): name for name, parameter in sequential.named_parameters()}
    decays = weight_decays(trainer) if loss_fn is None else []
    return ModelObjective(
        module=deepcopy(as_evaluated(sequential)).cpu(),  # type: ignore[arg-type]
        inputs=read.samples.inputs,
        targets=targets,
        loss=fitted.name,
        weight_decay={names[id(p)]: decay / fitted.factor for p, decay in decays if id(p) in names},
        frozen=read.frozen,
        factor=fitted.factor,
        offset=fitted.offset,
    )


def _matched(read: _Read) -> ModelLoss | str:
    """The loss whose gradient is parallel to the module's, or the reason why there is none."""
    outputs, closest = _num_outputs(read), torch.inf
    norm, products = float(read.gradient.norm()), multiplications(read.module, read.samples.inputs[:1])
    for name in _LOSSES:
        for target, tensor in enumerate(read.samples.tensors):
            for one_hot, targets in _forms(name, tensor, outputs):
                compared = read.compared(name, targets)
                if compared is None:
                    continue
                loss, gradient = compared
                square = float(gradient.square().sum())
                factor = float(read.gradient @ gradient) / max(square, torch.finfo(torch.float64).tiny)
                distance = float((read.gradient - factor * gradient).norm()) / max(norm, 1e-300)
                if factor > 0 and distance <= tolerances.MAX_EQUAL_DIFFERENCE_RATIO:
                    scale = max(abs(read.loss), abs(factor * loss))
                    return ModelLoss(name, target, one_hot, factor, read.loss - factor * loss, scale, norm, products)
                closest = min(closest, distance) if factor > 0 else closest
    return (
        "the loss that it trains is not the mean squared error, the cross-entropy or the logistic loss of its model: "
        f"no gradient is parallel to its own (the closest differs by {closest:.1e}), as with a penalty in the loss, "
        "several losses, weights of samples or classes, label smoothing, predictions (N, 1) with targets (N,), which "
        "broadcast to (N, N), or a sum instead of the mean over batches of several sizes"
    )


def _agrees(fitted: ModelLoss, read: _Read, loss: float, gradient: Tensor) -> bool:
    expected = fitted.factor * loss + fitted.offset
    scale, equal = max(fitted.scale, abs(read.loss), abs(expected)), tolerances.MAX_EQUAL_DIFFERENCE_RATIO
    off = float((read.gradient - fitted.factor * gradient).norm())
    return abs(read.loss - expected) <= equal * scale and off <= equal * fitted.gradient_scale


def _forms(name: LossName, tensor: Tensor, outputs: int) -> Iterator[tuple[bool, Tensor]]:
    """What a tensor of a batch can be as targets, (N, K) or classes (N,), and whether it is a one-hot vector."""
    flat = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    if flat.shape[1] == outputs and (name != "cross_entropy" or outputs > 1):
        yield False, flat.double()
    elif flat.shape[1] == 1 and outputs > 1 and name != "logistic":
        classes = flat[:, 0].long()
        if bool((classes == flat[:, 0]).all()) and int(classes.min()) >= 0 and int(classes.max()) < outputs:
            one_hot = name == "squared_error"
            yield one_hot, nn.functional.one_hot(classes, outputs).double() if one_hot else classes


def _num_outputs(read: _Read) -> int:
    with torch.no_grad():
        like = next(read.module.parameters())
        return int(read.module(read.samples.inputs[:1].to(like)).shape[-1])


def _reason_against(trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None) -> str | None:
    """Why certificates do not cover a module, as far as that is known without its loss; the same on every process."""
    sequential = sequential_of(trainer, pl_module)
    if not isinstance(sequential, nn.Sequential):
        return sequential or _NO_SEQUENTIAL
    trained = sum(parameter.numel() for parameter in trained_parameters(trainer, pl_module))
    if trained > MAX_UNKNOWNS:
        return f"{trained} trained numbers are more than the {MAX_UNKNOWNS} of dense linear algebra"
    if (changes := changes_in_training(pl_module)) is not None:
        return changes
    if hasattr(trainer.precision_plugin, "autocast_context_manager"):
        return f"training is in mixed precision ({trainer.precision})"
    if any(group.get("maximize") for optimizer in trainer.optimizers for group in optimizer.param_groups):
        return "the optimiser maximises"
    if has_decoupled_decay(trainer):
        return "the optimiser's weight decay is decoupled from the gradient (AdamW)"
    if loss_fn is not None and weight_decays(trainer):
        return "loss_fn does not include the optimiser's weight decay"
    if draws(trainer.train_dataloader):
        return "its training set cannot be read sample by sample"
    with restoring_generators(trainer):
        changed = _samples_change(trainer)
    return "the samples of the training set differ each time that they are read" if any(gather(changed)) else None


def _samples_change(trainer: pl.Trainer) -> bool:
    """Whether samples of the training set differ when they are read twice."""
    few = torch.arange(min(_READ_TWICE, num_samples(trainer.train_dataloader)))
    passes = [exact_shard(trainer.train_dataloader, chosen=few) for _ in range(2)]
    first, again = ([_tensors(batch) for batch in batches] for batches in passes)
    pairs = zip(first, again, strict=True)
    return not all(len(a) == len(b) and all(map(_same, a, b)) for a, b in pairs)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(a.allclose(b, 0, 0, equal_nan=True))


def _tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch with an axis of samples."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append, allow_frozen=True)
    return [tensor for tensor in found if tensor.ndim]


class _Recorder:
    """Records what a model gets in each step; if the step does not call it, the first tensor of the batch.

    Attributes:
        failure: why a step does not fit; None: all do.
        parts: (inputs, tensors) of each batch.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self.parts: list[tuple[Tensor, list[Tensor]]] = []
        self._calls: list[Any] = []
        self._tensors: list[Tensor] = []

    def hook(self, module: nn.Module, args: Any) -> None:
        self._calls.append(args)

    def start(self, batch: Any) -> None:
        self._calls, self._tensors = [], [tensor.detach().clone() for tensor in _tensors(batch)]

    def end(self) -> None:
        called = len(self._calls)
        inputs = self._calls[0][0] if called and self._calls[0] else None if called else next(iter(self._tensors), None)
        if called > 1:
            self.failure = "a step calls its nn.Sequential several times"
        elif not isinstance(inputs, Tensor) or inputs.ndim < 2:
            self.failure = "its nn.Sequential does not get a tensor of samples"
        elif inputs.requires_grad:
            self.failure = "the inputs of its nn.Sequential require a gradient"
        else:
            tensors = [t.cpu() for t in self._tensors if len(t) == len(inputs)]
            self.parts.append((inputs.detach().to("cpu", torch.float64, copy=True), tensors))

    def samples(self) -> _Samples | None:
        if not self.parts:
            return None
        tensors = [torch.cat(column) for column in zip(*(tensors for _, tensors in self.parts), strict=False)]
        return _Samples(torch.cat([inputs for inputs, _ in self.parts]), tensors)


class _RecordingBatch(DoubleBatch):
    """The full batch, of which each step is recorded."""

    recorder: _Recorder

    @override
    def _loss(self, index: int, batch: Any) -> Tensor:
        self.recorder.start(batch)
        loss = super()._loss(index, batch)
        self.recorder.end()
        return loss

    @property
    def drops(self) -> int:
        """Number of samples of a last batch that training drops."""
        return self._dropped


def _read(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loss_fn: ModelFunction | None,
    step: float,
    *,
    first: bool = False,
) -> _Read | str:
    """One pass over the training set, or over the first batch of each process, at weights a step away, in float64."""
    trained = trained_parameters(trainer, pl_module)
    free, recorder = {id(parameter) for parameter in trained}, _Recorder()
    original = sequential_of(trainer, pl_module)
    if not isinstance(original, nn.Sequential):
        return original or _NO_SEQUENTIAL
    # The order of the parameters of the model, not of the optimisers, is that of its gradient.
    ordered = [parameter for parameter in original.parameters() if id(parameter) in free]
    frozen = tuple(name for name, parameter in original.named_parameters() if id(parameter) not in free)
    handle = original.register_forward_pre_hook(recorder.hook)
    try:
        with in_double(pl_module) as double:
            batch = _RecordingBatch(trainer, pl_module, double, loss_fn, weight_decay=False)
            batch.recorder = recorder
            if batch.drops:
                return f"its loader drops the last {batch.drops} samples, which each epoch chooses anew"
            with batch.open():
                parameters = double.of(ordered)
                surface = batch.first_surface(parameters) if first else batch.surface(parameters)
                with surface.moved(noise_like(parameters, step)):
                    try:
                        loss, gradient = surface.value_and_gradient()
                    except NoDerivativeError as error:
                        batch.check()
                        return f"its loss cannot be compared with that of its model: {error}"
                    batch.check()
                    model = _copy_of(sequential_of(trainer, pl_module))
    finally:
        handle.remove()
    failures = [failure for failure in gather(recorder.failure) if failure is not None]
    if failures:
        return failures[0]
    if isinstance(model, str):
        return model
    samples = _gathered(trainer, recorder)
    if isinstance(samples, str):
        return samples
    return _Read(loss, gradient.cpu(), samples, model, frozen)


def _copy_of(sequential: nn.Sequential | str | None) -> nn.Sequential | str:
    """A model at its present weights, on the CPU and in eval mode."""
    if not isinstance(sequential, nn.Sequential):
        return sequential or _NO_SEQUENTIAL
    copied: nn.Sequential = deepcopy(as_evaluated(sequential)).cpu()  # type: ignore[assignment]
    return copied


def _gathered(trainer: pl.Trainer, recorder: _Recorder) -> _Samples | str:
    """The samples of all processes, on every process."""
    local = recorder.samples()
    sizes = [size for size in gather(None if local is None else local.inputs[0].numel()) if size is not None]
    if not sizes:
        return "its training set has no samples"
    numbers = num_samples(trainer.train_dataloader) * sizes[0]
    if numbers > MAX_GATHERED:
        return f"its training set has {numbers:.1e} input numbers, above {MAX_GATHERED:.1e}"
    parts = [part for part in gather_results(lambda: local) if part is not None]
    columns = zip(*(part.tensors for part in parts), strict=False)
    return _Samples(torch.cat([part.inputs for part in parts]), [torch.cat(column) for column in columns])


def _reason_in_training(
    trainer: pl.Trainer, pl_module: pl.LightningModule, fitted: ModelLoss, loss_fn: ModelFunction | None
) -> str | None:
    """Why a step in training mode computes something else than the model in eval mode; the same on every process."""
    modes = [(module, module.training) for module in pl_module.modules()]
    sequential, recorder, outputs = sequential_of(trainer, pl_module), _Recorder(), list[Tensor]()
    assert isinstance(sequential, nn.Sequential)  # noqa: S101 (the caller found it)
    free = {id(parameter) for parameter in trained_parameters(trainer, pl_module)}
    frozen = tuple(name for name, parameter in sequential.named_parameters() if id(parameter) not in free)
    handles = [
        sequential.register_forward_pre_hook(recorder.hook),
        sequential.register_forward_hook(lambda _, __, output: outputs.append(output)),
    ]

    def step(seed: int) -> str | None:
        batch = next(exact_shard(trainer.train_dataloader, trainer.global_rank, trainer.world_size, most=1), None)
        if batch is None:
            return None
        seed_generators(seed)
        batch = as_in_training(trainer, pl_module, batch)
        recorder.start(batch)
        outputs.clear()
        loss = loss_on(pl_module, batch, 0, loss_fn)
        recorder.end()
        if recorder.failure is not None:
            return recorder.failure
        inputs, tensors = recorder.parts[-1]
        reader = _Read(0.0, inputs, _Samples(inputs, tensors), as_evaluated(sequential), frozen)  # type: ignore[arg-type]
        return _difference(reader, fitted, float(loss.detach()), outputs[0] if outputs else None)

    def found() -> str | None:
        for seed in _SEEDS:
            restart.batch()
            for module, mode in modes:
                module.training = mode
            try:
                reason = step(seed)
            except LossNotEvaluableError as error:
                return str(error)
            if reason is not None:
                return reason
        (first, _), (again, _) = recorder.parts if recorder.parts else [(None, None)] * 2
        same = first is None or again is None or _same(first, again)
        return None if same else "the inputs of its nn.Sequential differ each time, as by random transforms"

    try:
        with (
            isolated(trainer, pl_module) as restart,
            precision_context(trainer, autocast=True),
            torch.enable_grad(),
        ):
            reasons = gather_results(found)
    finally:
        for handle in handles:
            handle.remove()
    return next((reason for reason in reasons if reason is not None), None)


def _difference(read: _Read, fitted: ModelLoss, loss: float, outputs: Tensor | None) -> str | None:
    """How a step in training mode differs from the model in eval mode in float64, if it does."""
    targets = fitted.targets(read.samples.tensors, _num_outputs(read))
    if targets is None:
        return "its targets differ from batch to batch"
    try:
        model, vector = prepare(
            read.module, read.samples.inputs, targets, loss=fitted.name, weight_decay=0.0, frozen=read.frozen
        )
    except ArgumentError as error:
        return str(error)
    exact = true_outputs(model, vector)
    expected = fitted.factor * float(model.loss(exact)) + fitted.offset
    scale = max(abs(loss), abs(expected), abs(expected - fitted.offset))
    off = abs(loss - expected) / max(scale, 1e-300)
    if outputs is not None:
        computed = outputs.detach().to("cpu", torch.float64).reshape(exact.shape)
        off = max(off, float((computed - exact).abs().max()) / max(float(exact.abs().max()), 1e-300))
    if off <= _MAX_TRAINING_DIFFERENCE:
        return None
    return (
        f"in training its step computes something else than its nn.Sequential in eval mode (by {off:.1e}), as with "
        "dropout, batch statistics, random transforms or autocast"
    )


def _named(loss: LossName) -> str:
    return {
        "squared_error": "the mean squared error",
        "cross_entropy": "the cross-entropy",
        "logistic": "the logistic loss",
    }[loss]
