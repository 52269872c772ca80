"""Gradient of the networks' squared error, written in place: the same as autograd's, without its graph and its memory.

Shapes: B samples of a batch, d0 inputs, d1 (d2) hidden units, R replicas. Units come before samples here, (R, d1, B):
batched products of small matrices are up to four times as fast in this order, and inputs that replicas share need a
single product for all of them.

Cost of a step: the products, 4 B d0 d1 operations per replica with one hidden layer and 4 B d0 d1 + 6 B d1 d2 with two,
about 10 passes over the B d1 activations, and about 40 µs to launch the operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

aten = torch.ops.aten


class SquaredErrorGradient:
    """Gradient of Σ_r ‖e_r‖²/B for networks ŷ = z · f(… f(W x)), e = ŷ − y, written into the weights' ``grad``.

    The memory of one batch is used again for the next of the same size, so the result of a call is valid until the
    next.

    Args:
        hidden_weights: one or more matrices W, (d_out, d_in), or with replicas (R, d_out, d_in).
        output_weights: z, (d1,) or (R, d1).
        negative_slope: ρ of f(u) = u where u > 0 and ρ u elsewhere; if replicas have different ones, runs of equal
            ones, each as the number of replicas and ρ.

    Attributes:
        gradients: the memory of the gradients, of each hidden matrix and of z.

    >>> w, z = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.ones(2))
    >>> predictions, residual = SquaredErrorGradient([w], z, 0.0)(torch.tensor([[1.0, 2.0]]), torch.tensor([0.0]))
    >>> predictions, z.grad
    (tensor([3.]), tensor([ 6., 12.]))
    """

    def __init__(
        self,
        hidden_weights: Sequence[Tensor],
        output_weights: Tensor,
        negative_slope: float | Sequence[tuple[int, float]],
    ) -> None:
        self._weights = [*hidden_weights, output_weights]
        self._slopes = _slices(negative_slope)
        self._is_relu = all(slope == 0 for _, slope in self._slopes)
        self._lead = output_weights.shape[:-1]
        self._hidden = [_with_replicas(w.detach(), 3) for w in hidden_weights]
        self._output = _with_replicas(output_weights.detach()[..., None], 3)
        gradients = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in self._weights]
        self.gradients = gradients
        self._hidden_gradients = [_with_replicas(g, 3) for g in gradients[:-1]]
        self._output_gradient = _with_replicas(gradients[-1][..., None], 3)
        self._memory: dict[int, _Memory] = {}  # by batch size: the last batch of an epoch may differ from the others

    def is_of(self, hidden_weights: Sequence[Tensor], output_weights: Tensor) -> bool:
        """Whether these are the weights of this gradient, at the same place in memory."""
        known = [*self._hidden, self._output]
        return all(w.data_ptr() == v.data_ptr() for w, v in zip([*hidden_weights, output_weights], known, strict=True))

    @torch.no_grad()
    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Write the gradients at the present weights.

        Args:
            inputs: (B, d0), or (R, B, d0) with a batch for each replica; any floating-point dtype.
            targets: (B,), or (R, B).

        Returns:
            Predictions ŷ and residuals e, (B,), with replicas (R, B).
        """
        samples = targets.shape[-1]
        memory = self._memory.get(samples) or self._memory.setdefault(
            samples, _Memory(self._hidden, samples, in_place=self._is_relu)
        )
        layer_inputs = [inputs.to(self._output.dtype).mT]  # they may be stored in a shorter dtype
        for weights, before, after in zip(self._hidden, memory.preactivations, memory.activations, strict=True):
            _multiply(weights, layer_inputs[-1], out=before)
            if self._is_relu:
                before.relu_()  # it is positive where the pre-activation is, so one tensor serves as both
            else:
                for part, slope in self._slopes:
                    aten.leaky_relu.out(before[part], slope, out=after[part])
            layer_inputs.append(after)
        torch.bmm(self._output.mT, layer_inputs[-1], out=memory.predictions)
        torch.sub(memory.predictions, _with_replicas(targets[..., None, :], 3), out=memory.residual)
        self._backward(layer_inputs, memory)
        for weights, gradient in zip(self._weights, self.gradients, strict=True):
            weights.grad = gradient if weights.requires_grad else None
        shape = (*self._lead, samples)
        return memory.predictions.view(shape), memory.residual.view(shape)

    def _backward(self, layer_inputs: list[Tensor], memory: _Memory) -> None:
        """Form the gradients from the last layer to the first; the inputs of each layer have units first."""
        torch.mul(memory.residual, 2 / memory.residual.shape[-1], out=memory.signal)
        torch.bmm(layer_inputs[-1], memory.signal.mT, out=self._output_gradient)
        # without the factor z of each unit: multiplying the few weights by it is cheaper
        signal = memory.signal.expand_as(layer_inputs[-1])
        factor: Tensor | None = self._output
        for layer in reversed(range(len(self._hidden))):
            back = self._through_kinks(signal, memory.preactivations[layer], memory.signals[layer])
            gradient, weights = self._hidden_gradients[layer], self._hidden[layer]
            _multiply(back, layer_inputs[layer].mT, out=gradient)
            if factor is not None:
                gradient.mul_(factor)
                weights = weights * factor if layer else weights
                factor = None
            if layer:
                signal = torch.bmm(weights.mT, back, out=memory.signals[layer - 1])

    def _through_kinks(self, signal: Tensor, preactivations: Tensor, out: Tensor) -> Tensor:
        if self._is_relu:
            return aten.threshold_backward.grad_input(signal, preactivations, 0, grad_input=out)  # type: ignore[no-any-return]
        for part, slope in self._slopes:
            before, into = preactivations[part], out[part]
            aten.leaky_relu_backward.grad_input(signal[part], before, slope, False, grad_input=into)  # noqa: FBT003
        return out


class _Memory:
    """Tensors (R, units, B) of one batch size."""

    def __init__(self, hidden: Sequence[Tensor], samples: int, *, in_place: bool) -> None:
        def empty(units: int) -> Tensor:
            return hidden[0].new_empty(len(hidden[0]), units, samples)

        widths = [weights.shape[1] for weights in hidden]
        self.preactivations = [empty(width) for width in widths]
        self.activations = self.preactivations if in_place else [empty(width) for width in widths]
        self.signals = [empty(width) for width in widths]
        self.predictions, self.residual, self.signal = empty(1), empty(1), empty(1)


def _slices(negative_slope: float | Sequence[tuple[int, float]]) -> list[tuple[slice, float]]:
    """The replicas of each ρ."""
    if isinstance(negative_slope, float | int):
        return [(slice(None), float(negative_slope))]
    found, first = [], 0
    for number, slope in negative_slope:
        found.append((slice(first, first + number), slope))
        first += number
    return found


def _with_replicas(tensor: Tensor, dimensions: int) -> Tensor:
    """The tensor, with an axis for one replica added if it has no replica axis."""
    return tensor if tensor.ndim == dimensions else tensor[None]


def _multiply(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """Left (R, m, k) times right (R, k, n), or (k, n) for all replicas at once."""
    if right.ndim == 3:
        torch.bmm(left, right, out=out)
    else:
        torch.mm(left.flatten(0, 1), right, out=out.view(-1, right.shape[-1]))
