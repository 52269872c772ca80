"""A module's own loss in float64, whatever the precision of its weights."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.full_batch import FullBatch
from lightning_mnn.callbacks.evaluation.run_module import SERIOUS, LossNotEvaluableError
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.kinks.tracing import Names


class Double:
    """Access to a module's float64 copies within :func:`in_double`.

    Attributes:
        mode: the mode of torch in which the module must run.
    """

    def __init__(self, copies: dict[int, nn.Parameter]) -> None:
        self.mode: TorchFunctionMode = _Double(set(copies))
        self._copies = copies

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The copies of parameters.

        Raises:
            NoDerivativeError: one is not found through the module's submodules.
        """
        if not all(id(parameter) in self._copies for parameter in parameters):
            raise NoDerivativeError(_ELSEWHERE)
        return [self._copies[id(parameter)] for parameter in parameters]


@contextmanager
def in_double(pl_module: pl.LightningModule) -> Iterator[Double]:
    """A context in which the module's parameters are copies in float64.

    The parameters are replaced by copies. Their data are not converted in place, since torch may then round their
    gradients to the old precision.
    """
    copies: dict[int, nn.Parameter] = {}
    originals = [(part, name, parameter) for part in pl_module.modules() for name, parameter in _slots(part)]
    for _, _, parameter in originals:
        if id(parameter) not in copies:
            copies[id(parameter)] = nn.Parameter(
                _double(parameter.detach(), copy=True), requires_grad=parameter.requires_grad
            )
    try:
        for part, name, parameter in originals:
            part.register_parameter(name, copies[id(parameter)])
        yield Double(copies)
    finally:
        for part, name, parameter in originals:
            part.register_parameter(name, parameter)


class DoubleBatch(FullBatch):
    """The full batch, with the loss evaluated in float64; the data are loaded as in training.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module, within :func:`in_double`.
        double: the object that :func:`in_double` yielded.
        loss_fn: ``loss_fn(module, batch)``; None: the module's ``training_step``.
        modules: layers whose kinks count.
        read: called with each batch that is read, as it was collated; None: nothing is called.
        weight_decay: add the penalty of the optimisers' weight decay; None: unless there is a ``loss_fn``.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        double: Double,
        loss_fn: ModelFunction | None = None,
        modules: Names = None,
        *,
        read: Callable[[Any], object] | None = None,
        weight_decay: bool | None = None,
    ) -> None:
        super().__init__(trainer, pl_module, loss_fn, modules, read=read, weight_decay=weight_decay)
        self._mode = double.mode
        copies = double.of([parameter for parameter, _ in self.decays])
        self.decays = [(copy, decay) for copy, (_, decay) in zip(copies, self.decays, strict=True)]

    @override
    def _loss(self, index: int, batch: Any) -> Tensor:
        try:
            with self._mode:
                return super()._loss(index, batch)
        except Exception as error:
            if isinstance(error, SERIOUS) or type(error) is LossNotEvaluableError:
                raise
            raise NoDerivativeError(f"it cannot be evaluated in float64: {error}") from error


_ELSEWHERE = "it depends on weights that are not found through the module's submodules"


class _Double(TorchFunctionMode):
    """Makes torch calculate in float64: arguments and results of its functions are converted to float64.

    Args:
        replaced: ids of tensors that no function may use.
    """

    def __init__(self, replaced: set[int]) -> None:
        super().__init__()
        self._replaced = replaced

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = apply_to_collection((args, kwargs or {}), Tensor, self._converted, allow_frozen=True)
        if func is Tensor.float and args[0].requires_grad:  # it depends on the weights; data are rounded as usual
            return args[0]
        return apply_to_collection(func(*args, **kwargs), Tensor, self._converted, allow_frozen=True)

    def _converted(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._replaced:
            raise NoDerivativeError(_ELSEWHERE)
        return _double(tensor) if tensor.is_floating_point() else tensor


def _double(tensor: Tensor, *, copy: bool = False) -> Tensor:
    device = "cpu" if tensor.device.type == "mps" else tensor.device  # MPS has no float64
    return tensor.to(device, torch.float64, copy=copy)


def _slots(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters with their names; a parameter with two names appears twice."""
    return module.named_parameters(recurse=False, remove_duplicate=False)
