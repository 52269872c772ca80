"""Is the loss that a module trains the squared error of its network? Certificates hold for that alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mnn.callbacks.full_batch import FullBatch
from lightning_mnn.callbacks.training_set import network_of, survey_training_set
from lightning_mnn.landscape.loss_surface import NoDerivativeError
from lightning_mnn.seeding import generator

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_mnn.callbacks.model_pass import ModelFunction
    from lightning_mnn.landscape.survey import Network, Survey

_STEP = 0.1  # of the weights, relative to their size, to where no gradient vanishes by chance
_ROUNDING = 0.6  # power of the spacing of floats at 1, up to which two numbers are equal: 7e-5 in float32


@dataclass(frozen=True)
class SquaredErrorLoss:
    """A module's loss that is its network's mean squared error but for constants: L = factor · MSE + offset.

    Attributes:
        factor: positive.
        offset: a constant.
        scale: of the losses seen, for comparison.
    """

    factor: float
    offset: float
    scale: float

    def fits(self, loss: float, mse: float, eps: float) -> bool:
        """Whether a loss and a mean squared error at other weights fit too, up to rounding."""
        expected = self.factor * mse + self.offset
        return bool(abs(loss - expected) <= eps**_ROUNDING * max(self.scale, abs(loss), abs(expected)))


def squared_error_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None = None
) -> SquaredErrorLoss | str:
    """The constants, or why the loss is another than the squared error.

    The gradients of the module's loss and of the squared error by the network's weights and biases are compared at
    weights that are near the module's own, but for noise of a tenth of their size, since at a minimum both vanish. That
    they are parallel there, in as many directions as there are weights, and that the two losses agree where a
    certificate is asked for (:func:`still_fits`), is taken to mean that they agree between.

    Raises:
        LossNotEvaluableError: the loss cannot be had.
    """
    batch = FullBatch(trainer, pl_module, loss_fn)
    network = network_of(pl_module)
    assert network is not None  # noqa: S101 (the caller found it)
    with batch.open():
        parameters = _parameters(pl_module, network)
        surface = batch.surface(parameters)
        try:
            with surface.moved(_noise(parameters)):
                loss, gradient = surface.value_and_gradient()
                batch.check()
                survey = survey_training_set(trainer, pl_module)
                expected = torch.cat([_gradient_of(network, survey)[p.data_ptr()].flatten() for p in parameters])
        except NoDerivativeError as error:
            return f"its loss cannot be compared with the squared error: {error}"
    gradient, expected = gradient.double(), expected.to(gradient.device)
    factor = float(gradient @ expected / expected.square().sum().clamp(min=torch.finfo(torch.float64).tiny))
    eps = torch.finfo(parameters[0].dtype).eps
    distance = float((gradient - factor * expected).norm() / gradient.norm())
    if not (factor > 0 and distance <= eps**_ROUNDING):
        return (
            "the loss that it trains is not the mean squared error of its network: their gradients are not parallel "
            f"(their directions differ by {distance:.1e})"
        )
    mse = float(survey.mse)
    return SquaredErrorLoss(factor, loss - factor * mse, max(abs(loss), factor * mse))


def still_fits(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    survey: Survey,
    fitted: SquaredErrorLoss,
    loss_fn: ModelFunction | None = None,
) -> bool:
    """Whether the module's loss at its present weights is the squared error that it was found to be."""
    batch = FullBatch(trainer, pl_module, loss_fn)
    with batch.open():
        surface = batch.surface()
        loss = surface.loss()
        batch.check()
    return fitted.fits(loss, float(survey.mse), torch.finfo(surface.dtype).eps)


def _parameters(pl_module: pl.LightningModule, network: Network) -> list[Tensor]:
    """The module's parameters that are the network's weights and biases."""
    known = {tensor.data_ptr() for tensor in network.tensors}
    return [parameter for parameter in pl_module.parameters() if parameter.data_ptr() in known]


def _gradient_of(network: Network, survey: Survey) -> dict[int, Tensor]:
    """Gradient of the mean squared error by each tensor of a two-layer network, by the tensor's place in memory."""
    correlation, scale = survey.layers[0].correlation, -2.0 / survey.num_samples
    rows, output = network.rows.cpu().double(), network.output_weights.cpu().double()
    hidden = scale * output[:, None] * correlation.cpu()
    found = {
        network.hidden_weights[0].data_ptr(): hidden[:, : network.input_dim],
        network.output_weights.data_ptr(): scale * (rows * correlation.cpu()).sum(-1),
    }
    if network.hidden_bias is not None:
        found[network.hidden_bias.data_ptr()] = hidden[:, -1]
    if network.output_bias is not None and survey.error_sum is not None:
        found[network.output_bias.data_ptr()] = scale * survey.error_sum.cpu()
    return found


def _noise(parameters: list[Tensor]) -> Tensor:
    random = generator(0, "comparison")
    steps = []
    for parameter in parameters:
        size = float(parameter.detach().double().square().mean().sqrt()) + parameter.numel() ** -0.5
        steps.append(_STEP * size * torch.randn(parameter.numel(), generator=random))
    return torch.cat(steps).to(parameters[0])
