"""The piecewise-linear ``nn.Sequential`` of a module: the one that holds all its trained parameters."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.evaluation.module_network import network_of
from lightning_mnn.callbacks.evaluation.snapshots import restoring_generators
from lightning_mnn.landscape.minima.models.equations.layers import read_layers
from lightning_mnn.utilities.compat.torch_internals import as_evaluated
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl


def found_sequential(trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Sequential | str | None:
    """The ``nn.Sequential`` of a module that certificates of models can read, or why they cannot read it; None: none.

    It holds every parameter that the Trainer's optimisers train, and consists of layers of torch itself. A module can
    offer one by a method ``network()``; otherwise it is a submodule. Of several that are nested it is the outermost.
    """
    trained = {id(parameter) for parameter in trained_parameters(trainer, pl_module)}
    reason = None
    for part in _candidates(pl_module):
        if not trained or not trained <= {id(parameter) for parameter in part.parameters()}:
            continue
        foreign = [layer for layer in part.modules() if not type(layer).__module__.startswith("torch.nn.modules.")]
        if foreign:
            reason = f"its nn.Sequential has layers that are not torch's own: {type(foreign[0]).__name__}"
            continue
        try:
            slopes = read_layers(as_evaluated(part)).fixed_slopes
        except ArgumentError as error:
            reason = f"its nn.Sequential cannot be certified: {error}"
            continue
        parameters = dict(part.named_parameters())
        if any(id(parameters[name]) in trained for name in slopes):
            reason = "the slope of a PReLU is trained, which certificates do not cover"
            continue
        return part
    return reason


def _candidates(pl_module: pl.LightningModule) -> Iterator[nn.Sequential]:
    method = getattr(pl_module, "network", None)
    if inspect.ismethod(method) and network_of(pl_module) is None:
        offered: Any = None
        try:
            inspect.signature(method).bind()
            with restoring_generators():
                offered = method()
        except Exception:  # noqa: BLE001 (a method for something else can raise anything)
            offered = None
        if isinstance(offered, nn.Sequential):
            yield offered
    yield from (part for part in pl_module.modules() if type(part) is nn.Sequential)
