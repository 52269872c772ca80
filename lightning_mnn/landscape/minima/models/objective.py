"""The training objective of a model: the mean loss over samples, and bounds on its derivatives.

Shapes: N samples, K outputs; f are the outputs, (N, K).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

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
