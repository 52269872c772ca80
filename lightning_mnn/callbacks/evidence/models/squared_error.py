"""Is the loss that a module trains the squared error of its network? Certificates hold only for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.callbacks.evaluation.float64_loss import DoubleBatch, in_double
from lightning_mnn.callbacks.evaluation.module_network import network_of
from lightning_mnn.callbacks.evaluation.training_set import (
    StatisticsReader,
    merged_parts,
    reason_not_evaluated,
    statistics_reader,
    store_statistics,
)
from lightning_mnn.callbacks.evidence.models.noise import noise_like
from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.utilities.distributed import gather_results

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor, nn

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.network import Network
    from lightning_mnn.landscape.regions.statistics import NetworkStatistics


@dataclass(frozen=True)
class SquaredErrorLoss:
    """A module's loss that is its network's mean squared error up to constants: L = factor · MSE + offset.

    Attributes:
        factor: positive.
        offset: a constant.
        scale: size of the losses seen, for comparison.
        gradient_scale: size of their gradients.
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
    """The constants, or the reason why the loss is not the squared error.

    The gradients of the module's loss and of the squared error with respect to the network's weights and biases are
    compared at the module's weights plus noise of a tenth of their size, since at a minimum both gradients vanish. Both
    are computed in float64, in which a penalty of 1e-9 would be detected. If they are parallel there, in as many
    directions as there are weights, and if losses and gradients agree where a certificate is requested
    (:func:`still_fits`), they are assumed to agree in between. The first batches are enough to reject most other
    losses. The pass over all batches, which the remaining ones need, also computes the
    :func:`~lightning_mnn.callbacks.evaluation.training_set.training_set_statistics`.

    Raises:
        LossNotEvaluableError: the loss cannot be evaluated.
    """
    reason = _reason_not_compared(trainer, pl_module)
    if reason is not None:
        return reason
    first = _compared(trainer, pl_module, loss_fn, tolerances.FAR_STEP_RATIO, first=True)
    if isinstance(first, str):
        return first
    both_zero = not (first.gradient.any() or first.of_mse.any())  # for example for one sample without an active unit
    if not both_zero and isinstance(mismatch := _factor(first), str):
        return mismatch
    found = _compared(trainer, pl_module, loss_fn, tolerances.FAR_STEP_RATIO)
    if isinstance(found, str):
        return found
    factor = _factor(found)
    if isinstance(factor, str):
        return factor
    mse_part = factor * found.mse
    norm = float(found.gradient.norm())
    return SquaredErrorLoss(factor, found.loss - mse_part, max(abs(found.loss), mse_part), norm)


def _factor(found: _Comparison) -> float | str:
    """The positive number c with gradient = c · (gradient of the MSE), or the reason why there is none."""
    mse_norm, norm = found.of_mse.norm(), found.gradient.norm()
    factor = float(found.gradient @ found.of_mse / mse_norm.square().clamp(min=torch.finfo(torch.float64).tiny))
    distance = float((found.gradient - factor * found.of_mse).norm() / norm)
    if not (factor > 0 and distance <= tolerances.MAX_EQUAL_DIFFERENCE_RATIO):
        return (
            "the loss that it trains is not the mean squared error of its network: their gradients are not parallel "
            f"(their directions differ by {distance:.1e}), as with a penalty, a frozen layer, weights of the samples, "
            "predictions (N, 1) with targets (N,), which broadcast to (N, N), or a sum instead of the mean over "
            "batches of several sizes (for which loss_fn can return the mean)"
        )
    return factor


def still_fits(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    fitted: SquaredErrorLoss,
    loss_fn: ModelFunction | None = None,
) -> bool:
    """Whether the module's loss and its gradient still agree with the squared error at the present weights.

    They are compared at a relative distance of 1e-6 from the weights, where torch's gradients are not those of one side
    of a kink.
    """
    if _reason_not_compared(trainer, pl_module) is not None:
        return False
    found = _compared(trainer, pl_module, loss_fn, tolerances.NEAR_STEP_RATIO)
    if isinstance(found, str):
        return False
    expected = fitted.factor * found.mse + fitted.offset
    off = float((found.gradient - fitted.factor * found.of_mse).norm())
    scale = max(fitted.scale, abs(found.loss), abs(expected))
    equal = tolerances.MAX_EQUAL_DIFFERENCE_RATIO
    return abs(found.loss - expected) <= equal * scale and off <= equal * fitted.gradient_scale


def _reason_not_compared(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    network = network_of(pl_module)
    assert network is not None  # noqa: S101 (the caller found it)
    reason = reason_not_evaluated(trainer, network)
    return None if reason is None else f"its loss cannot be compared with the squared error: {reason}"


def _compared(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loss_fn: ModelFunction | None,
    step: float,
    *,
    first: bool = False,
) -> _Comparison | str:
    """Both losses and gradients at weights near the present ones, in float64; or the reason why this is impossible.

    One pass over the training set, or over the first batch of each process, computes both. A pass over the whole set
    also computes the training-set statistics at the present weights.
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
            with surface.moved(noise_like(parameters, step)):
                try:
                    loss, gradient = surface.value_and_gradient()
                except NoDerivativeError as error:
                    batch.check()
                    return f"its loss cannot be compared with the squared error: {error}"
                parts = gather_results(lambda: [reader.part() for reader in readers])
                statistics = merged_parts([part[0] for part in parts])[0]
                expected = torch.cat([_gradient_of(network, statistics)[p.data_ptr()].flatten() for p in parameters])
            batch.check()
    if not first:
        store_statistics(trainer, pl_module, present, [part[1] for part in parts])
    return _Comparison(loss, float(statistics.mse), gradient.cpu(), expected.cpu())


def _parameters(pl_module: pl.LightningModule, network: Network) -> list[nn.Parameter]:
    """The module's parameters that are the network's weights and biases."""
    known = {tensor.data_ptr() for tensor in network.tensors}
    return [parameter for parameter in pl_module.parameters() if parameter.data_ptr() in known]


def _gradient_of(network: Network, statistics: NetworkStatistics) -> dict[int, Tensor]:
    """Gradient of the MSE with respect to each tensor of a two-layer network, by the tensor's address in memory."""
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
