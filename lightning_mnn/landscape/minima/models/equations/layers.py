"""A piecewise-linear ``nn.Sequential`` as a list of operations on named parameters, and the loss of its outputs.

Shapes: N samples, K outputs; f are the outputs, (N, K).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn import functional

from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_REMEDY = (
    "use nn.Sequential of Linear, Conv1d, Conv2d, Flatten, average and max-pooling, BatchNorm and Dropout in eval "
    "mode, ReLU, LeakyReLU, ReLU6, Hardtanh, Identity, and PReLU whose slope is frozen"
)


@dataclass(frozen=True)
class Affine:
    """A linear map or a convolution, with or without a bias.

    Attributes:
        weight: name of the weight.
        bias: name of the bias, or None.
        apply: the function (h, weight, bias) -> output.
        groups: groups of a convolution; 0 for a linear map.
    """

    weight: str
    bias: str | None
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    groups: int


@dataclass(frozen=True)
class Scale:
    """Batch normalisation with fixed statistics: (h − mean) · scale · weight + bias for each channel.

    Attributes:
        weight: name of the weight, or None.
        bias: name of the bias, or None.
        mean: the mean of each channel.
        scale: 1/√(variance + ε) of each channel.
    """

    weight: str | None
    bias: str | None
    mean: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Average:
    """Average pooling."""

    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Largest:
    """Max-pooling over windows of the last axes.

    Attributes:
        kernel: sizes of a window, one or two.
        stride: as many.
        padding: as many.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def windows(self, h: Tensor, padding: float) -> tuple[Tensor, tuple[int, ...]]:
        """The numbers of each window (N, channels, window, places), and the shape of the result."""
        if len(self.kernel) == 1:
            found, shape = Largest((1, *self.kernel), (1, *self.stride), (0, *self.padding)).windows(
                h.unsqueeze(2), padding
            )
            return found, (*shape[:2], shape[3])
        rows, columns = self.padding
        padded = functional.pad(h, (columns, columns, rows, rows), value=padding)
        sizes = [(n - k) // s + 1 for n, k, s in zip(padded.shape[2:], self.kernel, self.stride, strict=True)]
        found = padded.unfold(2, self.kernel[0], self.stride[0]).unfold(3, self.kernel[1], self.stride[1])
        return found.flatten(4).flatten(2, 3).transpose(2, 3), (*h.shape[:2], *sizes)


@dataclass(frozen=True)
class Flatten:
    """All axes of a sample as one."""


@dataclass(frozen=True)
class Bends:
    """A continuous piecewise-linear function of one number, with g(u) = slope · u + offset on each piece.

    Attributes:
        kinks: the places of the kinks, in increasing order.
        slopes: the slope of each piece, one more than kinks; numbers, or one for each channel.
        offsets: the offset of each piece.
    """

    kinks: tuple[float, ...]
    slopes: tuple[float, ...]
    offsets: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The function at each kink."""
        return tuple(s * c + o for s, c, o in zip(self.slopes[1:], self.kinks, self.offsets[1:], strict=True))


Operation = Affine | Scale | Average | Largest | Flatten | Bends


@dataclass(frozen=True)
class Layers:
    """The operations of a module and its parameters.

    Attributes:
        operations: in their order.
        parameters: by name, float64 on the CPU.
    """

    operations: tuple[Operation, ...]
    parameters: dict[str, Tensor]

    @property
    def fixed_slopes(self) -> frozenset[str]:
        """Parameters that are slopes of a PReLU, which must be frozen."""
        used = {name for op in self.operations if isinstance(op, Affine | Scale) for name in (op.weight, op.bias)}
        return frozenset(set(self.parameters) - used)


def read_layers(module: nn.Module) -> Layers:
    """The operations of a module.

    Raises:
        ArgumentError: a layer has no such form, is in training mode, or uses the parameters of another layer.
    """
    parameters = {name: value.detach().to("cpu", torch.float64).clone() for name, value in module.named_parameters()}
    for name, value in parameters.items():
        if not bool(value.isfinite().all()):
            raise ArgumentError("module", name, "must have finite parameters")
    operations: list[Operation] = []
    for name, layer in module.named_modules(remove_duplicate=False):
        if not isinstance(layer, nn.Sequential):
            operations.extend(_operations(layer, f"{name}." if name else ""))
    used = Counter(name for op in operations if isinstance(op, Affine | Scale) for name in (op.weight, op.bias) if name)
    twice = [name for name, count in used.items() if count > 1 or name not in parameters]
    if twice:
        raise ArgumentError("module", ", ".join(twice), "must not use parameters twice")
    if not any(isinstance(op, Affine) for op in operations):
        raise ArgumentError("module", type(module).__name__, "must have a linear layer or a convolution", _REMEDY)
    return Layers(tuple(operations), parameters)


def _operations(layer: nn.Module, prefix: str) -> Iterator[Operation]:  # noqa: C901 (one case for each layer)
    match layer:
        case nn.Linear() | nn.Conv1d() | nn.Conv2d():
            yield _affine(layer, prefix)
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            yield _scale(layer, prefix)
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d():
            yield Average(layer)
        case nn.MaxPool1d() | nn.MaxPool2d():
            axes = 1 if isinstance(layer, nn.MaxPool1d) else 2
            sizes = [_tuple(value, axes) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]
            if layer.ceil_mode or max(sizes[3]) > 1 or layer.return_indices:
                raise ArgumentError("module", repr(layer), "has an option that certificates do not cover", _REMEDY)
            yield Largest(sizes[0], sizes[1], sizes[2])
        case nn.Flatten() if (layer.start_dim, layer.end_dim) == (1, -1):
            yield Flatten()
        case nn.Identity():
            pass
        case nn.Dropout() | nn.Dropout1d() | nn.Dropout2d() if not layer.training or layer.p == 0:
            pass
        case _:
            bends = _bends(layer)
            if bends is None:
                raise ArgumentError("module", repr(layer), "has a layer that certificates do not cover", _REMEDY)
            if bends.kinks:
                yield bends
            elif bends.slopes != (1.0,):
                raise ArgumentError("module", repr(layer), "has an activation without a kink", _REMEDY)


def _tuple(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _affine(layer: nn.Linear | nn.Conv1d | nn.Conv2d, prefix: str) -> Affine:
    bias = None if layer.bias is None else f"{prefix}bias"
    if isinstance(layer, nn.Linear):
        return Affine(f"{prefix}weight", bias, functional.linear, 0)
    if layer.padding_mode != "zeros":
        raise ArgumentError("module", repr(layer), "must pad with zeros", _REMEDY)
    apply = partial(
        functional.conv1d if isinstance(layer, nn.Conv1d) else functional.conv2d,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    return Affine(f"{prefix}weight", bias, apply, layer.groups)


def _scale(layer: nn.BatchNorm1d | nn.BatchNorm2d, prefix: str) -> Scale:
    mean, variance = layer.running_mean, layer.running_var
    if layer.training or mean is None or variance is None:
        raise ArgumentError("module", repr(layer), "must be in eval mode with running statistics", "call module.eval()")
    mean, variance = (value.detach().to("cpu", torch.float64) for value in (mean, variance))
    names = [f"{prefix}{name}" if layer.affine else None for name in ("weight", "bias")]
    return Scale(names[0], names[1], mean, (variance + layer.eps).rsqrt())


def _bends(layer: nn.Module) -> Bends | None:
    """The function of an activation; without kinks if it is the identity, None if it is no such function."""
    match layer:
        case nn.ReLU():
            return Bends((0.0,), (0.0, 1.0), (0.0, 0.0))
        case nn.Hardtanh() if layer.min_val < layer.max_val:  # ReLU6 is one
            low, high = float(layer.min_val), float(layer.max_val)
            return Bends((low, high), (0.0, 1.0, 0.0), (low, 0.0, high))
        case nn.LeakyReLU():
            slope = float(layer.negative_slope)
        case nn.PReLU() if layer.weight.numel() == 1:
            slope = float(layer.weight.detach().double())
        case _:
            return None
    if not math.isfinite(slope):
        return None
    return Bends((), (1.0,), (0.0,)) if slope == 1 else Bends((0.0,), (slope, 1.0), (0.0, 0.0))


LossName = Literal["squared_error", "cross_entropy", "logistic"]

_SECOND = {"squared_error": 2.0, "cross_entropy": 0.501, "logistic": 0.25}  # bounds on the second derivative's norm
_THIRD = {"squared_error": 0.0, "cross_entropy": 1.001, "logistic": 0.1}  # logistic: 1/(6√3) = 0.0962


@dataclass(frozen=True)
class Loss:
    """A loss, the mean over samples.

    Attributes:
        name: ``squared_error``: Σ_k (f_k − y_k)²; ``cross_entropy``: −Σ_k y_k log softmax(f)_k; ``logistic``:
            Σ_k log(1 + exp f_k) − y_k f_k.
        targets: y, float64 (N, K): numbers; probabilities of classes; probabilities.
    """

    name: LossName
    targets: Tensor

    @property
    def second(self) -> float:
        """A bound on the norm of the second derivative of one sample's loss in its outputs."""
        return _SECOND[self.name]

    @property
    def third(self) -> float:
        """A bound on the norm of the third derivative."""
        return _THIRD[self.name]

    def samples(self, f: Tensor) -> Tensor:
        """The loss of each sample, (N,)."""
        match self.name:
            case "squared_error":
                return (f - self.targets).square().sum(1)
            case "cross_entropy":
                return (self.targets * (f.logsumexp(1, keepdim=True) - f)).sum(1)
            case _:
                return (functional.softplus(f, threshold=700.0) - self.targets * f).sum(1)

    def __call__(self, f: Tensor) -> Tensor:
        """The mean."""
        return self.samples(f).mean()

    def slopes(self, f: Tensor) -> Tensor:
        """The derivative of each sample's loss in its outputs, (N, K)."""
        match self.name:
            case "squared_error":
                return 2 * (f - self.targets)
            case "cross_entropy":
                return self.targets.sum(1, keepdim=True) * f.softmax(1) - self.targets
            case _:
                return f.sigmoid() - self.targets

    def absolute(self, f: Tensor, at: Tensor) -> Tensor:
        """A quadratic function of f whose derivatives at a point f̄ ≥ |f| bound rounding errors.

        The errors of the loss's derivatives are at most its derivatives at f̄, in units of the relative error of one
        monomial of the outputs (§ Rounding in the module ``face``).
        """
        largest = at.amax(1, keepdim=True)
        match self.name:
            case "squared_error":
                first, second = 2 * (at + self.targets.abs()), torch.full_like(at, 2.0)
                quadratic = second * (f - at).square()
            case "cross_entropy":
                first = 2 + 2 * self.targets.abs() + largest
                quadratic = (0.25 + largest) * (f - at).sum(1, keepdim=True).square()
            case _:
                first = 2 + 2 * self.targets.abs() + at
                quadratic = (0.25 + at) * (f - at).square()
        return (first * (f - at)).sum(1).mean() + 0.5 * quadratic.sum(1).mean()

    def absolute_value(self, at: Tensor) -> float:
        """A bound on the loss's rounding error, in the same units."""
        match self.name:
            case "squared_error":
                values = 3 * (at + self.targets.abs()).square()
            case "cross_entropy":
                values = (2 * at.amax(1, keepdim=True) + math.log(at.shape[1]) + 2) / at.shape[1] + self.targets * at
            case _:
                values = 3 * at + 2
        return float(values.sum(1).mean())


def prepare_loss(name: LossName, targets: Tensor, num_samples: int, num_outputs: int) -> Loss:
    """A loss with checked targets.

    Raises:
        ArgumentError: there is no such loss, or the targets do not fit it or the outputs.
    """
    if name not in _SECOND:
        raise ArgumentError("loss", name, "must be squared_error, cross_entropy or logistic")
    shape, classes = (num_samples, num_outputs), name == "cross_entropy" and targets.ndim == 1
    if classes:
        if targets.is_floating_point() or len(targets) != num_samples:
            raise ArgumentError("targets", tuple(targets.shape), f"must be {num_samples} numbers of classes, integers")
        if int(targets.min()) < 0 or int(targets.max()) >= num_outputs:
            raise ArgumentError("targets", int(targets.max()), f"must be classes from 0 to {num_outputs - 1}")
        y = functional.one_hot(targets.long().cpu(), num_outputs).double()
    else:
        y = targets.detach().to("cpu", torch.float64)
        y = y[:, None] if y.ndim == 1 else y
    if tuple(y.shape) != shape:
        raise ArgumentError("targets", tuple(targets.shape), f"must have the shape {shape} of the outputs")
    if not bool(y.isfinite().all()):
        raise ArgumentError("targets", "NaN or infinity", "must be finite")
    if name == "logistic" and float(y.min()) == -1 and bool((y.abs() == 1).all()):
        y = (y + 1) / 2
    if name != "squared_error" and (float(y.min()) < 0 or float(y.max()) > 1):
        raise ArgumentError("targets", float(y.min()), f"must be probabilities or labels for the loss {name}")
    if name == "cross_entropy" and not classes and float((y.sum(1) - 1).abs().max()) > 1e-9:
        raise ArgumentError("targets", float(y.sum(1).max()), "must be probabilities that sum to 1")
    return Loss(name, y)
