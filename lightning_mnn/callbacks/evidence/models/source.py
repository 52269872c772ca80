"""Where a certificate of a model gets the module's objective from, and where it writes a minimum to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.evaluation.module_network import network_of
from lightning_mnn.callbacks.evaluation.training_set import training_samples
from lightning_mnn.callbacks.evidence.models.loss import ModelLoss, objective_of, whole_model_loss
from lightning_mnn.callbacks.evidence.models.objective import MAX_GATHERED, ModelObjective
from lightning_mnn.callbacks.evidence.models.reading import NotModelLossError
from lightning_mnn.callbacks.evidence.models.sequential import found_sequential
from lightning_mnn.callbacks.trainer.weight_decay import weight_decays
from lightning_mnn.data.loaders.shards import num_samples

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.network import Network


class ModelSource(ABC):
    """A module as a model with an objective. Every process calls the same methods, and gets the same results."""

    @abstractmethod
    def objective(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModelObjective:
        """The objective at the present weights.

        Raises:
            NotModelLossError: certificates do not cover what the module trains now.
            LossNotEvaluableError: its loss cannot be evaluated.
        """

    @abstractmethod
    def products(self, pl_module: pl.LightningModule) -> int:
        """Multiplications of a forward pass on one sample."""

    @abstractmethod
    def move(self, trainer: pl.Trainer, pl_module: pl.LightningModule, point: dict[str, Tensor]) -> None:
        """Write the trained weights of a point into the module, in their precision."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {}


class SequentialSource(ModelSource):
    """The ``nn.Sequential`` of a module whose own loss was found to be one of its outputs.

    Args:
        fitted: that loss.
        loss_fn: the module's loss, if not what its ``training_step`` returns.
        whole: whether it was found on the whole training set, not only on the first batches.
    """

    def __init__(self, fitted: ModelLoss, loss_fn: ModelFunction | None, *, whole: bool = False) -> None:
        self.fitted, self._loss_fn, self._whole = fitted, loss_fn, whole

    @override
    def objective(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModelObjective:
        if not self._whole:
            self.fitted, self._whole = whole_model_loss(trainer, pl_module, self._loss_fn), True
        return objective_of(trainer, pl_module, self.fitted, self._loss_fn)

    @override
    def products(self, pl_module: pl.LightningModule) -> int:
        return self.fitted.products

    @override
    def move(self, trainer: pl.Trainer, pl_module: pl.LightningModule, point: dict[str, Tensor]) -> None:
        sequential = found_sequential(trainer, pl_module)
        assert isinstance(sequential, nn.Sequential)  # noqa: S101 (its objective was read)
        trained = {id(parameter) for parameter in trained_parameters(trainer, pl_module)}
        with torch.no_grad():
            for name, parameter in sequential.named_parameters():
                if id(parameter) in trained:
                    parameter.copy_(point[name])

    @override
    def state(self) -> dict[str, Any]:
        return {"fitted": asdict(self.fitted), "whole": self._whole}


class NetworkSource(ModelSource):
    """The network of a module that states it and trains it on the squared error, as an MNN."""

    @override
    def objective(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModelObjective:
        (objective,) = replica_objectives(trainer, pl_module)
        return objective

    @override
    def products(self, pl_module: pl.LightningModule) -> int:
        return products_of_network(pl_module)

    @override
    def move(self, trainer: pl.Trainer, pl_module: pl.LightningModule, point: dict[str, Tensor]) -> None:
        move_replica(pl_module, 0, point)


def replica_objectives(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[ModelObjective]:
    """The objective of each replica of a module's network, at the present weights.

    Raises:
        NotModelLossError: the training set is too large.
    """
    network = _network(pl_module)
    numbers = num_samples(trainer.train_dataloader) * network.input_dim
    if numbers > MAX_GATHERED:
        raise NotModelLossError(f"its training set has {numbers:.1e} input numbers, above {MAX_GATHERED:.1e}")
    inputs, targets = (t.cpu().double() for t in training_samples(trainer, network, whole=True))
    tensors = _tensors(network)
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    trained = {parameter.data_ptr() for parameter in trained_parameters(trainer, pl_module)}
    decays = {names[p.data_ptr()]: decay for p, decay in weight_decays(trainer) if p.data_ptr() in names}
    wide = network.to(torch.device("cpu")).to(torch.float64)  # certificates are computed there
    return [
        ModelObjective(
            module=wide.replica(number).to_sequential(),
            inputs=inputs[number] if inputs.ndim > 2 else inputs,
            targets=targets[number] if targets.ndim > 1 else targets,
            loss="squared_error",
            weight_decay=decays,
            frozen=tuple(name for name, tensor in tensors.items() if tensor.data_ptr() not in trained),
        )
        for number in range(network.replicas)
    ]


def products_of_network(pl_module: pl.LightningModule) -> int:
    """Multiplications of a forward pass on one sample, of one replica."""
    network = _network(pl_module)
    weights = sum(tensor.numel() for tensor in (*network.hidden_weights, network.output_weights))
    return weights // network.replicas


def move_replica(pl_module: pl.LightningModule, number: int, point: dict[str, Tensor]) -> None:
    """Write the weights of a point into a replica, in their precision."""
    with torch.no_grad():
        for name, tensor in _tensors(_network(pl_module).replica(number)).items():
            tensor.copy_(point[name].reshape(tensor.shape))


def _network(pl_module: pl.LightningModule) -> Network:
    network = network_of(pl_module)
    assert network is not None  # noqa: S101 (known since setup)
    return network


def _tensors(network: Network) -> dict[str, Tensor]:
    """The tensors of a network by their names in its ``nn.Sequential``."""
    weights = {f"{2 * layer}.weight": weight for layer, weight in enumerate(network.hidden_weights)}
    last = 2 * len(network.hidden_weights)
    found = {**weights, f"{last}.weight": network.output_weights, "0.bias": network.hidden_bias}
    found[f"{last}.bias"] = network.output_bias
    return {name: tensor for name, tensor in found.items() if tensor is not None}
