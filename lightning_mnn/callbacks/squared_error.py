"""Is the loss that a module trains the squared error of its network? Certificates hold for that alone."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_mnn.callbacks.full_batch import FullBatch
from lightning_mnn.callbacks.model_pass import SERIOUS, LossNotEvaluableError
from lightning_mnn.callbacks.training_set import network_of, survey_of, why_not_surveyed
from lightning_mnn.landscape.loss_surface import NoDerivativeError
from lightning_mnn.seeding import generator

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.model_pass import ModelFunction
    from lightning_mnn.landscape.survey import Network, Survey

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
    taken to mean that they agree between.

    Raises:
        LossNotEvaluableError: the loss cannot be had.
    """
    found = _compared(trainer, pl_module, loss_fn, _FAR)
    if isinstance(found, str):
        return found
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
    mse_part = factor * found.mse
    return SquaredErrorLoss(factor, found.loss - mse_part, max(abs(found.loss), mse_part), float(own))


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
    found = _compared(trainer, pl_module, loss_fn, _NEAR)
    if isinstance(found, str):
        return False
    expected = fitted.factor * found.mse + fitted.offset
    off = float((found.gradient - fitted.factor * found.of_mse).norm())
    scale = max(fitted.scale, abs(found.loss), abs(expected))
    return abs(found.loss - expected) <= _ROUNDING * scale and off <= _ROUNDING * fitted.gradient_scale


def _compared(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None, step: float
) -> _Comparison | str:
    """Both at weights beside the present ones, in float64; or why they cannot be had."""
    network = network_of(pl_module)
    assert network is not None  # noqa: S101 (the caller found it)
    why, dtype = why_not_surveyed(trainer, network), network.output_weights.dtype
    if why is not None:
        return f"its loss cannot be compared with the squared error: {why}"
    with _in_double(pl_module) as mode:
        network = network_of(pl_module)
        assert network is not None  # noqa: S101
        batch = _DoubleBatch(trainer, pl_module, loss_fn, mode)
        with batch.open():
            parameters = _parameters(pl_module, network)
            surface = batch.surface(parameters)
            with surface.moved(_noise(parameters, step)):
                survey = survey_of(trainer, network, dtype)
                expected = torch.cat([_gradient_of(network, survey)[p.data_ptr()].flatten() for p in parameters])
                try:
                    loss, gradient = surface.value_and_gradient()
                except NoDerivativeError as error:
                    batch.check()
                    return f"its loss cannot be compared with the squared error: {error}"
            batch.check()
    return _Comparison(loss, float(survey.mse), gradient.cpu(), expected.cpu())


@contextmanager
def _in_double(pl_module: pl.LightningModule) -> Iterator[TorchFunctionMode]:
    """Inside, the module's parameters are copies in float64; yields the mode in which it is to be run.

    Copies instead of other data for the parameters themselves, whose gradients torch may round to their old precision.
    """
    copies: dict[int, nn.Parameter] = {}
    originals = [(part, name, own) for part in pl_module.modules() for name, own in _slots(part)]
    for _, _, own in originals:
        if id(own) not in copies:
            copies[id(own)] = nn.Parameter(_double(own.detach(), copy=True), requires_grad=own.requires_grad)
    try:
        for part, name, own in originals:
            part.register_parameter(name, copies[id(own)])
        yield _Double(set(copies))
    finally:
        for part, name, own in originals:
            part.register_parameter(name, own)


def _slots(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters by their names, one that has two names twice."""
    return module.named_parameters(recurse=False, remove_duplicate=False)


class _DoubleBatch(FullBatch):
    """The full batch, on which the loss is evaluated in a mode; the data are loaded outside of it."""

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None, mode: TorchFunctionMode
    ) -> None:
        super().__init__(trainer, pl_module, loss_fn)
        self._mode = mode

    @override
    def _loss(self, index: int, batch: Any) -> Tensor:
        try:
            with self._mode:
                return super()._loss(index, batch)
        except Exception as error:
            if isinstance(error, SERIOUS) or type(error) is LossNotEvaluableError:
                raise
            raise NoDerivativeError(f"it cannot be had in float64: {error}") from error


class _Double(TorchFunctionMode):
    """Lets torch calculate in float64: what it is called on and what it returns are in float64.

    Args:
        replaced: identities of tensors that nothing may be called on.
    """

    def __init__(self, replaced: set[int]) -> None:
        super().__init__()
        self._replaced = replaced

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = apply_to_collection((args, kwargs or {}), Tensor, self._converted, allow_frozen=True)
        if func is Tensor.float and args[0].requires_grad:  # of what depends on the weights; data are rounded first
            return args[0]
        return apply_to_collection(func(*args, **kwargs), Tensor, self._converted, allow_frozen=True)

    def _converted(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._replaced:
            raise NoDerivativeError("it depends on weights that are not found through the module's submodules")
        return _double(tensor) if tensor.is_floating_point() else tensor


def _double(tensor: Tensor, *, copy: bool = False) -> Tensor:
    device = "cpu" if tensor.device.type == "mps" else tensor.device  # which has no float64
    return tensor.to(device, torch.float64, copy=copy)


def _parameters(pl_module: pl.LightningModule, network: Network) -> list[nn.Parameter]:
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


def _noise(parameters: list[nn.Parameter], step: float) -> Tensor:
    random = generator(0, "comparison")
    steps = []
    for parameter in parameters:
        size = float(parameter.detach().square().mean().sqrt()) + parameter.numel() ** -0.5
        steps.append(step * size * torch.randn(parameter.numel(), generator=random, dtype=torch.float64))
    return torch.cat(steps).to(parameters[0])
