"""The network that a module defines: by its method ``network()``, or by its layers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable
from weakref import WeakSet

import torch
from torch import nn

from lightning_mnn.callbacks.evaluation.snapshots import restoring_generators
from lightning_mnn.landscape.network import Network

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor


@runtime_checkable
class NetworkModule(Protocol):
    """A module that defines its network completely, as MNN does: the weights, the threshold and the replicas.

    Its ``forward`` has inputs of shape (N, d0), or (R, N, d0) for replicas with their own data.

    Attributes:
        replicas: R, the number of networks that are trained side by side.
        threshold: decision threshold between the two labels; None if the targets are not two labels.
    """

    @property
    def replicas(self) -> int: ...  # noqa: D102

    @property
    def threshold(self) -> float | None: ...  # noqa: D102

    def network(self) -> Network:
        """The weights in the form that :mod:`lightning_mnn.landscape` uses."""
        ...


other_methods: WeakSet[pl.LightningModule] = WeakSet()  # modules whose method network() returns something else


def network_of(pl_module: pl.LightningModule) -> Network | None:
    """The piecewise-linear network of a module, or None if there is no such network.

    A module can define it by a method ``network() -> Network``, as MNN does. Otherwise it is an ``nn.Sequential`` of
    the form ``Linear, ReLU or LeakyReLU or PReLU, …, Linear → 1`` that contains all parameters and buffers of the
    module; ``Flatten`` may come first. With one hidden layer its Linears may have biases. A PReLU must have a single
    slope, which is treated as fixed: the network is a function of the weights and biases alone. The network's tensors
    are views of the module's parameters, so a module whose weights are computed from parameters (``weight_norm`` and
    other parametrisations) has no such network.
    """
    stated = _stated(pl_module)
    if stated is not None:
        return stated
    tensors = {id(tensor) for tensor in (*pl_module.parameters(), *pl_module.buffers())}
    for part in pl_module.modules():
        if tensors != {id(tensor) for tensor in part.parameters()}:
            continue
        network = _sequential(part)
        slopes = {id(kink.weight) for kink in part.modules() if isinstance(kink, nn.PReLU)}
        weights = [parameter for parameter in part.parameters() if id(parameter) not in slopes]
        if network is not None and {*map(_place, network.tensors)} == {*map(_place, weights)}:
            return network
    return None


def states_network(pl_module: pl.LightningModule) -> bool:
    """Whether a module defines its network by a method ``network()``; it then trains it on the squared error."""
    return _stated(pl_module) is not None


def _stated(pl_module: pl.LightningModule) -> Network | None:
    """The result of a module's method ``network()``; None if there is none, or if it is a method for something else."""
    method = getattr(pl_module, "network", None)
    if getattr(method, "__module__", "").startswith("lightning_mnn.model."):  # it has no other effect
        return cast("Network", method())  # type: ignore[misc]
    if not inspect.ismethod(method) or pl_module in other_methods:
        return None
    annotated = "Network" in str(inspect.signature(method).return_annotation)  # if so, its errors are raised
    found = None
    try:
        inspect.signature(method).bind()
        with restoring_generators():
            found = method()
    except Exception:
        if annotated:
            raise
    if isinstance(found, Network):
        return found
    other_methods.add(pl_module)
    return None


def _place(tensor: Tensor) -> tuple[int, int]:
    """A tensor's address in memory, and its number of entries."""
    return tensor.data_ptr(), tensor.numel()


def _sequential(module: nn.Module) -> Network | None:
    if not isinstance(module, nn.Sequential):
        return None
    parts: list[Any] = [part for part in module if not isinstance(part, nn.Flatten)]
    linear, kinks = parts[::2], parts[1::2]
    fits = (
        len(parts) >= 3
        and len(linear) == len(kinks) + 1
        and all(isinstance(part, nn.Linear) for part in linear)
        and (len(linear) == 2 or all(part.bias is None for part in linear))
        and linear[-1].out_features == 1
    )
    slopes = {_slope(kink) for kink in kinks}
    if not fits or len(slopes) != 1 or (slope := slopes.pop()) is None:
        return None
    *hidden, output = (part.weight.detach() for part in linear)
    first, last = linear[0].bias, linear[-1].bias
    return Network(
        tuple(hidden),
        output[0],
        slope,
        unit_roundoff=torch.finfo(output.dtype).eps / 2,
        hidden_bias=None if first is None else first.detach(),
        output_bias=None if last is None else last.detach()[0],
    )


def _slope(kink: nn.Module) -> float | None:
    """ρ of a layer that applies f to every unit; None for other layers."""
    match kink:
        case nn.ReLU():
            return 0.0
        case nn.LeakyReLU():
            return float(kink.negative_slope)
        case nn.PReLU(num_parameters=1):
            return float(kink.weight.detach())
    return None
