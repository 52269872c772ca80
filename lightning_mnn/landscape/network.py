"""Network: the weights of a piecewise-linear network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


def smallest_sines(preactivations: Tensor, sample_norms: Tensor, weight_norms: Tensor) -> Tensor:
    """Smallest |w_i·x_n| / (‖w_i‖‖x_n‖) over the samples, for each unit: the sine of its angle to the nearest kink.

    Samples x_n = 0 constrain no unit and are left out. A row w_i = 0 lies on every kink, so its sine is 0.

    Args:
        preactivations: x_n·w_i, (..., N, d1).
        sample_norms: ‖x_n‖, (..., N).
        weight_norms: ‖w_i‖, (..., d1).

    Returns:
        Sines (..., d1); 1 where no sample constrains the unit.
    """
    ratios = (preactivations.abs() / sample_norms[..., None]).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(dim=-2)
    return torch.where(weight_norms > 0, ratios / weight_norms, 0.0).clamp(max=1.0)


@dataclass(frozen=True)
class Network:
    """The weights of a piecewise-linear network.

    ŷ = z · f(W_L f(… f(W_1 x))), with f(u) = u where u > 0 and ρ u elsewhere. With one hidden layer there may be
    biases, ŷ = z · f(W x + b) + b₂: b is the weight of one more input, which is always 1 (see ``rows``, ``augment``).

    Attributes:
        hidden_weights: W_l, (..., d_l, d_{l−1}), first layer first.
        output_weights: z, (..., d_L).
        negative_slope: ρ.
        unit_roundoff: half the spacing of floats at 1 in the precision that the weights were trained in.
        hidden_bias: b, (..., d1); None: no hidden bias.
        output_bias: b₂, (...); None: no output bias.

    Raises:
        ValueError: a bias in a network with several hidden layers.
    """

    hidden_weights: tuple[Tensor, ...]
    output_weights: Tensor
    negative_slope: float
    unit_roundoff: float = 2.0**-53
    hidden_bias: Tensor | None = None
    output_bias: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that only a network with one hidden layer has biases."""
        biases = {"hidden_bias": self.hidden_bias, "output_bias": self.output_bias}
        given = [name for name, bias in biases.items() if bias is not None]
        if given and len(self.hidden_weights) > 1:
            raise ValueError(
                f"{' and '.join(given)} given with {len(self.hidden_weights)} hidden layers: biases are supported with "
                "one hidden layer only, leave them out"
            )

    @property
    def rows(self) -> Tensor:
        """The rows (w_i, b_i) that multiply augmented inputs, (..., d1, d0 + 1).

        Without a hidden bias they are the first layer's weights, (..., d1, d0).
        """
        weights = self.hidden_weights[0]
        return weights if self.hidden_bias is None else torch.cat([weights, self.hidden_bias[..., None]], dim=-1)

    def augment(self, inputs: Tensor) -> Tensor:
        """Inputs (x_n, 1), (..., N, d0 + 1), with a hidden bias; otherwise the inputs (..., N, d0).

        >>> biased = Network((torch.eye(2),), torch.ones(2), 0.0, hidden_bias=torch.tensor([3.0, 4.0]))
        >>> biased.augment(torch.tensor([[5.0, 6.0]])), biased.rows
        (tensor([[5., 6., 1.]]), tensor([[1., 0., 3.],
                [0., 1., 4.]]))
        """
        return inputs if self.hidden_bias is None else torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All weights and biases."""
        biases = (bias for bias in (self.hidden_bias, self.output_bias) if bias is not None)
        return (*self.hidden_weights, self.output_weights, *biases)

    def to(self, target: torch.device | torch.dtype) -> Network:
        """The same network on another device or in another precision (its ``unit_roundoff`` stays)."""
        return replace(
            self,
            hidden_weights=tuple(weights.to(target) for weights in self.hidden_weights),
            output_weights=self.output_weights.to(target),
            hidden_bias=None if self.hidden_bias is None else self.hidden_bias.to(target),
            output_bias=None if self.output_bias is None else self.output_bias.to(target),
        )

    @property
    def replicas(self) -> int:
        """R; 1 for a single network."""
        return len(self.output_weights) if self.output_weights.ndim > 1 else 1

    def replica(self, number: int) -> Network:
        """A single network that shares the weights of a replica; a network without replicas is its own.

        >>> Network((torch.ones(3, 5, 2),), torch.ones(3, 5), 0.0).replica(1).hidden_weights[0].shape
        torch.Size([5, 2])
        """
        if self.output_weights.ndim == 1:
            return self
        return replace(
            self,
            hidden_weights=tuple(weights[number] for weights in self.hidden_weights),
            output_weights=self.output_weights[number],
            hidden_bias=None if self.hidden_bias is None else self.hidden_bias[number],
            output_bias=None if self.output_bias is None else self.output_bias[number],
        )

    @property
    def input_dim(self) -> int:
        """d0, without the input of ones for a hidden bias."""
        return self.hidden_weights[0].shape[-1]

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """Widths (d1, …, d_L)."""
        return tuple(weights.shape[-2] for weights in self.hidden_weights)

    def preactivations(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Pre-activations of every layer, (..., N, d_l), for inputs (..., N, d0)."""
        found = []
        inputs = self.augment(inputs)
        for weights in (self.rows, *self.hidden_weights[1:]):
            preactivations = inputs @ weights.mT
            found.append(preactivations)
            inputs = torch.where(preactivations > 0, preactivations, self.negative_slope * preactivations)
        return tuple(found)

    def predict(self, inputs: Tensor) -> Tensor:
        """Predictions ŷ, (..., N), for inputs (..., N, d0).

        >>> Network((torch.eye(2),), torch.tensor([1.0, -1.0]), 0.5).predict(torch.tensor([[2.0, -4.0]]))
        tensor([4.])
        """
        last = self.preactivations(inputs)[-1]
        hidden = torch.where(last > 0, last, self.negative_slope * last)
        found = (hidden @ self.output_weights[..., None])[..., 0]
        return found if self.output_bias is None else found + self.output_bias[..., None]

    def to_sequential(self) -> nn.Sequential:
        """The network as an ``nn.Sequential`` of copies of its weights, with outputs (N, 1), for one without replicas.

        >>> network = Network((torch.eye(2),), torch.tensor([1.0, -1.0]), 0.5)
        >>> network.to_sequential()(torch.tensor([[2.0, -4.0]]))
        tensor([[4.]], grad_fn=<MmBackward0>)
        """
        layers: list[nn.Module] = []
        for weights in self.hidden_weights:
            activation = nn.ReLU() if self.negative_slope == 0 else nn.LeakyReLU(self.negative_slope)
            layers += [_linear(weights, self.hidden_bias), activation]
        output_bias = None if self.output_bias is None else self.output_bias.reshape(1)
        return nn.Sequential(*layers, _linear(self.output_weights[None], output_bias))


def _linear(weights: Tensor, bias: Tensor | None) -> nn.Linear:
    options: dict[str, Any] = {"device": weights.device, "dtype": weights.dtype}
    layer = nn.Linear(weights.shape[1], weights.shape[0], bias=bias is not None, **options)
    with torch.no_grad():
        layer.weight.copy_(weights)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
