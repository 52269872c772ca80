"""One pass over the training set that shows what a module's ``nn.Sequential`` gets, and what its loss is.

Shapes: N samples.
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
from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.evidence.models.noise import noise_like
from lightning_mnn.callbacks.evidence.models.objective import MAX_GATHERED
from lightning_mnn.callbacks.evidence.models.sequential import found_sequential
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.landscape.minima.models.equations.reading import true_outputs
from lightning_mnn.landscape.minima.models.model_certificate import prepare
from lightning_mnn.utilities.compat.torch_internals import as_evaluated
from lightning_mnn.utilities.distributed import gather, gather_results
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.minima.models.equations.layers import LossName


class NotModelLossError(Exception):
    """Certificates of models do not cover what a module trains; the message says why."""


@dataclass(frozen=True)
class Samples:
    """What a model gets on the training set.

    Attributes:
        inputs: its inputs, float64 (N, …).
        tensors: the tensors of the batches with an axis of samples, each (N, …).
    """

    inputs: Tensor
    tensors: list[Tensor]


@dataclass(frozen=True)
class ModelAt:
    """A model at some weights, on samples.

    Attributes:
        module: the ``nn.Sequential``, in eval mode and without hooks.
        frozen: names of its parameters that are not trained.
        samples: the samples.
    """

    module: nn.Sequential
    frozen: tuple[str, ...]
    samples: Samples

    def outputs(self) -> int:
        """K, the number of outputs."""
        with torch.no_grad():
            like = next(self.module.parameters())
            return int(self.module(self.samples.inputs[:1].to(like)).shape[-1])

    def loss(self, name: LossName, targets: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The outputs, the loss and its gradient as certificates read the model; None if the targets do not fit it."""
        try:
            model, vector = prepare(
                self.module, self.samples.inputs, targets, loss=name, weight_decay=0.0, frozen=self.frozen
            )
        except ArgumentError:
            return None
        with torch.enable_grad():
            vector = vector.requires_grad_()
            outputs = true_outputs(model, vector)
            loss = model.loss(outputs)
            (gradient,) = torch.autograd.grad(loss, vector)
        return outputs.detach(), loss.detach(), gradient


@dataclass(frozen=True)
class ModelPass:
    """A pass over the training set at weights near the present ones.

    Attributes:
        loss: the module's own loss there.
        gradient: its gradient in the trained parameters, in the model's order.
        model: the model there.
    """

    loss: float
    gradient: Tensor
    model: ModelAt


def read_model(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loss_fn: ModelFunction | None,
    step: float,
    *,
    first: bool = False,
) -> ModelPass:
    """A pass over the training set, or over the first batch of each process, at weights a step away, in float64.

    Raises:
        NotModelLossError: the steps do not fit a certificate.
        LossNotEvaluableError: the loss cannot be evaluated.
    """
    sequential, recorder = _sequential(trainer, pl_module), Recorder()
    free = {id(parameter) for parameter in trained_parameters(trainer, pl_module)}
    ordered = [parameter for parameter in sequential.parameters() if id(parameter) in free]
    frozen = tuple(name for name, parameter in sequential.named_parameters() if id(parameter) not in free)
    handle = sequential.register_forward_pre_hook(recorder.hook)
    try:
        with in_double(pl_module) as double:
            batch = _RecordingBatch(trainer, pl_module, double, loss_fn, weight_decay=False)
            batch.recorder = recorder
            batch.check_drops()
            with batch.open():
                parameters = double.of(ordered)
                surface = batch.first_surface(parameters) if first else batch.surface(parameters)
                with surface.moved(noise_like(parameters, step)):
                    loss, gradient = surface.value_and_gradient()
                    copied = deepcopy(as_evaluated(_sequential(trainer, pl_module))).cpu()
                batch.check()
    except NoDerivativeError as error:
        raise NotModelLossError(f"its loss cannot be compared with that of its model: {error}") from error
    finally:
        handle.remove()
    assert isinstance(copied, nn.Sequential)  # noqa: S101 (a copy of one)
    return ModelPass(loss, gradient.cpu(), ModelAt(copied, frozen, _gathered(trainer, recorder)))


def _sequential(trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Sequential:
    found = found_sequential(trainer, pl_module)
    if not isinstance(found, nn.Sequential):
        raise NotModelLossError(found or "it has no nn.Sequential with all its trained weights")
    return found


class _RecordingBatch(DoubleBatch):
    """The full batch, of which each step is recorded."""

    recorder: Recorder

    @override
    def _loss(self, index: int, batch: Any) -> Tensor:
        self.recorder.start(batch)
        loss = super()._loss(index, batch)
        self.recorder.end()
        return loss

    def check_drops(self) -> None:
        """Check that training uses every sample in each epoch."""
        if self._dropped:
            raise NotModelLossError(f"its loader drops the last {self._dropped} samples, which each epoch draws anew")


class Recorder:
    """Records what a model gets in each step; if the step does not call it, the first tensor of the batch.

    Attributes:
        failure: why a step does not fit a certificate; None: all do.
        parts: (inputs, tensors) of each batch.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self.parts: list[tuple[Tensor, list[Tensor]]] = []
        self._calls: list[Any] = []
        self._tensors: list[Tensor] = []

    def hook(self, _: nn.Module, args: Any) -> None:
        """A forward pre-hook."""
        self._calls.append(args)

    def start(self, batch: Any) -> None:
        """Before a step."""
        self._calls, self._tensors = [], [tensor.detach().clone() for tensor in tensors_of(batch)]

    def end(self) -> None:
        """After a step."""
        called = len(self._calls)
        inputs = next(iter(self._calls[0]), None) if called else next(iter(self._tensors), None)
        if called > 1:
            self.failure = "a step calls its nn.Sequential several times"
        elif not isinstance(inputs, Tensor) or inputs.ndim < 2:
            self.failure = "its nn.Sequential does not get a tensor of samples"
        elif inputs.requires_grad:
            self.failure = "the inputs of its nn.Sequential require a gradient"
        else:
            tensors = [tensor.cpu() for tensor in self._tensors if len(tensor) == len(inputs)]
            self.parts.append((inputs.detach().to("cpu", torch.float64, copy=True), tensors))

    def samples(self) -> Samples | None:
        """All that was recorded; None if there was no step."""
        if not self.parts:
            return None
        columns = zip(*(tensors for _, tensors in self.parts), strict=False)
        return Samples(torch.cat([inputs for inputs, _ in self.parts]), list(map(torch.cat, columns)))


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch with an axis of samples."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append, allow_frozen=True)
    return [tensor for tensor in found if tensor.ndim]


def _gathered(trainer: pl.Trainer, recorder: Recorder) -> Samples:
    """The samples of all processes, on every process."""
    failures = [failure for failure in gather(recorder.failure) if failure is not None]
    if failures:
        raise NotModelLossError(failures[0])
    local = recorder.samples()
    sizes = [size for size in gather(None if local is None else local.inputs[0].numel()) if size is not None]
    numbers = num_samples(trainer.train_dataloader) * sizes[0]
    if numbers > MAX_GATHERED:
        raise NotModelLossError(f"its training set has {numbers:.1e} input numbers, above {MAX_GATHERED:.1e}")
    parts = [part for part in gather_results(lambda: local) if part is not None]
    columns = zip(*(part.tensors for part in parts), strict=False)
    return Samples(torch.cat([part.inputs for part in parts]), list(map(torch.cat, columns)))
