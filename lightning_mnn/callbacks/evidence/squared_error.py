"""Is the loss that a module trains the squared error of its network? Certificates hold for that alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.callbacks.evaluation.float64_loss import DoubleBatch, in_double
from lightning_mnn.callbacks.evaluation.module_network import network_of
from lightning_mnn.callbacks.evaluation.training_set import (
    StatisticsReader,
    keep_survey,
    merged_parts,
    reason_not_evaluated,
    statistics_reader,
)
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.utilities.distributed import gather_results
from lightning_mnn.utilities.seeding import generator

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor, nn

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.network import Network
    from lightning_mnn.landscape.regions.statistics import NetworkStatistics

_FAR = 0.1  # of the weights, relative to their size: a step to where no gradient vanishes by chance
_NEAR = 1e-6  # a step off the kinks that the weights may lie on
_ROUNDING = 4e-10  # relative, up to which two numbers in float64 are equal: a power 0.6 of its spacing at 1


@dataclass(frozen=True)
class SquaredErrorLoss:
    """A module's loss that is its network's mean squared error but for constants: L = factor · MSE + offset.

    Attributes:
        factor: positive.
        offset: a constant.
        scale: of the losses seen, for comparison.
        gradient_scale: of their gradients.
    """

    factor: float
    offset: float
    scale: float
    gradient_scale: float


@dataclass(frozen=True)
class _Comparison:
    """The module's own loss and the mean squared error of its network at the same weights, and their gradients."""

    loss: float
    mse: float
    gradient: Tensor
    of_mse: Tensor


def squared_error_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None = None
) -> SquaredErrorLoss | str:
    """The constants, or why the loss is another than the squared error.

    The gradients of the module's loss and of the squared error by the network's weights and biases are compared at
    weights that are near the module's own, but for noise of a tenth of their size, since at a minimum both vanish; both
    are formed in float64, in which a penalty of 1e-9 would be seen. That they are parallel there, in as many directions
    as there are weights, and that losses and gradients agree where a certificate is asked for (:func:`still_fits`), is
    taken to mean that they agree between. The first batches tell of most other losses; the pass over all batches that
    the others need serves :func:`~lightning_mnn.callbacks.evaluation.training_set.training_set_statistics`, too.

    Raises:
        LossNotEvaluableError: the loss cannot be had.
    """
    why = _why_not_compared(trainer, pl_module)
    if why is not None:
        return why
    first = _compared(trainer, pl_module, loss_fn, _FAR, first=True)
    if isinstance(first, str):
        return first
    nothing = not (first.gradient.any() or first.of_mse.any())  # of a single sample that no unit is active on, say
    if not nothing and isinstance(other := _factor(first), str):
        return other
    found = _compared(trainer, pl_module, loss_fn, _FAR)
    if isinstance(found, str):
        return found
    factor = _factor(found)
    if isinstance(factor, str):
        return factor
    mse_part = factor * found.mse
    own = float(found.gradient.norm())
    return SquaredErrorLoss(factor, found.loss - mse_part, max(abs(found.loss), mse_part), own)


def _factor(found: _Comparison) -> float | str:
    """The positive number that the gradient is a multiple by, or why it is none."""
    size, own = found.of_mse.norm(), found.gradient.norm()
    factor = float(found.gradient @ found.of_mse / size.square().clamp(min=torch.finfo(torch.float64).tiny))
    distance = float((found.gradient - factor * found.of_mse).norm() / own)
    if not (factor > 0 and distance <= _ROUNDING):
        return (
            "the loss that it trains is not the mean squared error of its network: their gradients are not parallel "
            f"(their directions differ by {distance:.1e}), as with a penalty, a frozen layer, weights of the samples, "
            "predictions (N, 1) beside targets (N,), which are compared each with each, or a sum instead of the mean "
            "over batches of several sizes (for which loss_fn can return the mean)"
        )
    return factor


def still_fits(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    fitted: SquaredErrorLoss,
    loss_fn: ModelFunction | None = None,
) -> bool:
    """Whether the module's loss and its gradient at the present weights are the squared error's, as was found before.

    They are compared a relative step of 1e-6 beside the weights, where torch's gradients are not those of one side of
    a kink.
    """
    if _why_not_compared(trainer, pl_module) is not None:
        return False
    found = _compared(trainer, pl_module, loss_fn, _NEAR)
    if isinstance(found, str):
        return False
    expected = fitted.factor * found.mse + fitted.offset
    off = float((found.gradient - fitted.factor * found.of_mse).norm())
    scale = max(fitted.scale, abs(found.loss), abs(expected))
    return abs(found.loss - expected) <= _ROUNDING * scale and off <= _ROUNDING * fitted.gradient_scale


def _why_not_compared(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    network = network_of(pl_module)
    assert network is not None  # noqa: S101 (the caller found it)
    why = reason_not_evaluated(trainer, network)
    return None if why is None else f"its loss cannot be compared with the squared error: {why}"


def _compared(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loss_fn: ModelFunction | None,
    step: float,
    *,
    first: bool = False,
) -> _Comparison | str:
    """Both at weights beside the present ones, in float64; or why they cannot be had.

    One pass over the training set, or over the first batch of each process, forms both. A whole one surveys the network
    at its present weights, too.
    """
    present = network_of(pl_module)
    assert present is not None  # noqa: S101 (the caller found it)
    with in_double(pl_module) as double:
        network = network_of(pl_module)
        assert network is not None  # noqa: S101
        readers = [StatisticsReader(network, present.output_weights.dtype)]
        if not first:
            readers.append(statistics_reader(trainer, pl_module, present, ranked=True))
        batch = DoubleBatch(
            trainer, pl_module, double, loss_fn, read=lambda read: [reader.take(read) for reader in readers]
        )
        with batch.open():
            parameters = _parameters(pl_module, network)
            surface = batch.first_surface(parameters) if first else batch.surface(parameters)
            with surface.moved(_noise(parameters, step)):
                try:
                    loss, gradient = surface.value_and_gradient()
                except NoDerivativeError as error:
                    batch.check()
                    return f"its loss cannot be compared with the squared error: {error}"
                parts = gather_results(lambda: [reader.part() for reader in readers])
                statistics = merged_parts([own[0] for own in parts])[0]
                expected = torch.cat([_gradient_of(network, statistics)[p.data_ptr()].flatten() for p in parameters])
            batch.check()
    if not first:
        keep_survey(trainer, pl_module, present, [own[1] for own in parts])
    return _Comparison(loss, float(statistics.mse), gradient.cpu(), expected.cpu())


def _parameters(pl_module: pl.LightningModule, network: Network) -> list[nn.Parameter]:
    """The module's parameters that are the network's weights and biases."""
    known = {tensor.data_ptr() for tensor in network.tensors}
    return [parameter for parameter in pl_module.parameters() if parameter.data_ptr() in known]


def _gradient_of(network: Network, statistics: NetworkStatistics) -> dict[int, Tensor]:
    """Gradient of the mean squared error by each tensor of a two-layer network, by the tensor's place in memory."""
    correlation, scale = statistics.layers[0].correlation, -2.0 / statistics.num_samples
    rows, output = network.rows.cpu().double(), network.output_weights.cpu().double()
    hidden = scale * output[:, None] * correlation.cpu()
    found = {
        network.hidden_weights[0].data_ptr(): hidden[:, : network.input_dim],
        network.output_weights.data_ptr(): scale * (rows * correlation.cpu()).sum(-1),
    }
    if network.hidden_bias is not None:
        found[network.hidden_bias.data_ptr()] = hidden[:, -1]
    if network.output_bias is not None and statistics.error_sum is not None:
        found[network.output_bias.data_ptr()] = scale * statistics.error_sum.cpu()
    return found


def _noise(parameters: list[nn.Parameter], step: float) -> Tensor:
    random = generator(0, "comparison")
    steps = []
    for parameter in parameters:
        size = float(parameter.detach().square().mean().sqrt()) + parameter.numel() ** -0.5
        steps.append(step * size * torch.randn(parameter.numel(), generator=random, dtype=torch.float64))
    return torch.cat(steps).to(parameters[0])
