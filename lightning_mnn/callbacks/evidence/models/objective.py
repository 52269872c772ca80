"""The objective of a piecewise-linear model on its training set, and its certificate, on any number of processes.

Shapes: N samples, K outputs, P trained numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_mnn.data.loaders.shards import batch_size_of, num_samples
from lightning_mnn.landscape.minima.models.model_certificate import ModelCertificate, certify_model
from lightning_mnn.landscape.minima.models.model_polishing import PolishedModel, polish_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.layers import LossName

MAX_CERTIFICATE_WORK = 1 << 39  # about a minute of one core
CHECK_SHARE = 0.05  # of the work of training that certificates at scheduled checks, or a descent, may cost
_MAX_DESCENT_WORK = 1 << 37  # about 15 s of one core
MAX_GATHERED = 1 << 24  # input numbers up to which one process gathers all samples: 128 MiB
_WORK_OF_A_STEP = 1 << 29  # of Newton's method, whatever its size: about 50 ms
_WORK_PER_MULTIPLICATION = 16  # of derivatives, which are less regular than products of matrices
_WORK_PER_CUBE = 40  # factorisations of a matrix of P rows, in P³
_STEPS_OF_A_CERTIFICATE = 4
_WORK_OF_A_TRAINING_STEP = 1 << 22  # whatever its size: about 0.4 ms


@dataclass(frozen=True)
class ModelObjective:
    """What training lowers: factor · (mean loss of the outputs + ½ Σ wd θ²) + offset.

    Attributes:
        module: the model, in eval mode; only read.
        inputs: X, (N, …).
        targets: y.
        loss: the loss of the outputs.
        weight_decay: wd by the name of a parameter, already divided by the factor.
        frozen: names of parameters that are not trained.
        factor: positive.
        offset: a constant.
    """

    module: nn.Sequential
    inputs: Tensor
    targets: Tensor
    loss: LossName
    weight_decay: dict[str, float]
    frozen: tuple[str, ...]
    factor: float = 1.0
    offset: float = 0.0

    def certify(self, max_distance: float) -> ModelCertificate:
        """The certificate of the model's parameters."""
        return certify_model(*self._samples, **self._options, max_distance=max_distance)

    def polish(self, max_steps: int, max_work: float) -> PolishedModel:
        """Where descent leads to from the model's parameters."""
        return polish_model(*self._samples, **self._options, max_steps=max_steps, max_work=max_work)

    def value(self, loss: float) -> float:
        """What training lowers, from the loss of a certificate."""
        return self.factor * loss + self.offset

    def mse_at(self, certificate: ModelCertificate) -> float | None:
        """The mean squared error at a certificate's point, summed over outputs; None of another loss."""
        if self.loss != "squared_error":
            return None
        penalty = sum(0.5 * wd * float(certificate.state_dict[name].square().sum()) for name, wd in self._decays())
        return max(certificate.loss - penalty, 0.0)

    @property
    def _samples(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        return self.module, self.inputs, self.targets

    @property
    def _options(self) -> dict[str, Any]:
        return {"loss": self.loss, "weight_decay": self.weight_decay, "frozen": self.frozen}

    def _decays(self) -> Sequence[tuple[str, float]]:
        return [(name, wd) for name, wd in self.weight_decay.items() if wd and name not in self.frozen]


def multiplications(module: nn.Module, inputs: Tensor) -> int:
    """Multiplications of a forward pass of a model on all samples, from one of a single sample."""
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)  # noqa: S101 (of these layers)
        total += output[0].numel() * weight[0].numel()

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            like = next(module.parameters())
            module(inputs[:1].to(like))
    finally:
        for hook in hooks:
            hook.remove()
    return total * len(inputs)


def work_of_a_step(parameters: int, products: int) -> int:
    """The work of one step of Newton's method, by measured times; a unit is about 0.1 ns of one core.

    Args:
        parameters: P.
        products: multiplications of a forward pass on all samples.

    >>> work_of_a_step(231, 8_400) < work_of_a_step(861, 82_000)
    True
    """
    return _WORK_OF_A_STEP + _WORK_PER_CUBE * parameters**3 + _WORK_PER_MULTIPLICATION * parameters * products


def work_of_a_certificate(parameters: int, products: int) -> int:
    """The work of a certificate, in the same units."""
    return _STEPS_OF_A_CERTIFICATE * work_of_a_step(parameters, products)


def work_of_training(steps: int, products_of_a_batch: int) -> int:
    """The work of steps of training, in the same units; a step is one pass forwards and two backwards."""
    return steps * (_WORK_OF_A_TRAINING_STEP + 3 * _WORK_PER_MULTIPLICATION * products_of_a_batch)


def work_of_steps(trainer: pl.Trainer, steps: int, products: int) -> int:
    """The work of so many steps of a Trainer, of a network with so many multiplications for a sample."""
    loader: Any = trainer.train_dataloader
    return work_of_training(steps, min(num_samples(loader), batch_size_of(loader)) * products)


def work_of_descent(training: int) -> int:
    """How much work a descent may cost after training of so much work.

    >>> work_of_descent(0) < work_of_descent(10**12) < work_of_descent(10**15) == work_of_descent(10**16)
    True
    """
    return min(_MAX_DESCENT_WORK, int(CHECK_SHARE * training))


def steps_of_descent(parameters: int, products: int, training: int) -> int:
    """How many steps of a descent fit into its limit of work, at most 300: a share of the training's work.

    >>> steps_of_descent(231, 8_400, 0), steps_of_descent(231, 8_400, 10**12), steps_of_descent(2_000, 10**6, 10**12)
    (0, 47, 0)
    """
    return min(300, work_of_descent(training) // work_of_a_step(parameters, products))
