"""The loss of a module at many points of weight space, many points at a time.

Shapes: N samples, P parameters, B points.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from lightning_mnn.landscape.kinks.tracing import KinkTrace
from lightning_mnn.landscape.minima.models.equations.layers import prepare_loss
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.compat.torch_internals import as_evaluated
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lightning_mnn.landscape.minima.models.equations.layers import LossName

MEMORY_BUDGET = 2**28  # bytes


class PointLosses:
    """The mean loss over all samples, in eval mode, at any point; without a gradient.

    Args:
        module: the network; its parameters stay as they are.
        inputs: (N, …), of the module's dtype, on its device.
        targets: y.
        loss: a name as in ``certify_model``, or a function of outputs and targets of some samples that returns the
            mean over them.
        weight_decay: wd of ½ wd ‖θ‖².
        memory_budget: bytes for the numbers of a pass.

    Raises:
        ArgumentError: the inputs and targets do not fit each other or the module.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        loss: LossName | Callable[[Tensor, Tensor], Tensor] = "squared_error",
        *,
        weight_decay: float = 0.0,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        self.module = as_evaluated(module)
        parameters = dict(module.named_parameters())
        self._slots = [(name, parameter.shape) for name, parameter in parameters.items()]
        first = next(iter(parameters.values()))
        if len(inputs) == 0:
            raise ArgumentError("inputs", tuple(inputs.shape), "must have at least one sample")
        if len(inputs) != len(targets):
            raise ArgumentError("targets", len(targets), f"must be as many as the {len(inputs)} inputs")
        self.inputs = inputs.to(first) if inputs.is_floating_point() else inputs.to(first.device)
        self._weight_decay, self._budget, self._item = weight_decay, memory_budget, first.element_size()
        units: list[int] = []
        with torch.no_grad(), KinkTrace(self.module, lambda kink: units.append(kink.input.numel())):
            outputs = self.module(self.inputs[:1])
        self._numbers = 4 * (self.inputs[0].numel() + sum(units) + outputs.numel())  # of a sample, some copies included
        if callable(loss):
            self._targets, self._samples = targets.to(first.device), None
            self._mean = loss
        else:
            prepared = prepare_loss(loss, targets, len(inputs), outputs.reshape(1, -1).shape[1])
            self._targets = prepared.targets.to(first)
            self._samples = prepared
        self._by_vmap = True

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """The parameters of a flat point (P,), or of points (B, P), by name."""
        pieces = torch.split(theta, [shape.numel() for _, shape in self._slots], dim=-1)
        return {
            name: piece.reshape(*theta.shape[:-1], *shape)
            for (name, shape), piece in zip(self._slots, pieces, strict=True)
        }

    def __call__(self, origin: Tensor, coordinates: Tensor, directions: Tensor) -> Tensor:
        """The losses (B,) at origin (P,) + coordinates (B, k) @ directions (k, P)."""
        numbers = max(self._numbers, 1)
        rows = max(1, min(len(self.inputs), self._budget // (numbers * self._item)))
        points = max(1, self._budget // (self._item * (numbers * rows + 4 * len(origin))))
        found = []
        with torch.no_grad(), full_precision():
            for part in torch.split(coordinates, points):
                safe_point()
                theta = origin + part @ directions
                total = 0.5 * self._weight_decay * theta.square().sum(1)
                for start in range(0, len(self.inputs), rows):
                    total = total + self._sums(theta, slice(start, start + rows)) / len(self.inputs)
                found.append(total)
        return torch.cat(found)

    def _sums(self, theta: Tensor, rows: slice) -> Tensor:
        """The sums of some samples' losses, (B,)."""
        inputs, targets = self.inputs[rows], self._targets[rows]

        def one(parameters: dict[str, Tensor]) -> Tensor:
            outputs: Any = functional_call(self.module, parameters, (inputs,))
            if self._samples is None:
                return self._mean(outputs, targets) * len(inputs)
            return replace(self._samples, targets=targets).samples(outputs.reshape(len(inputs), -1)).sum()

        if self._by_vmap and len(theta) > 1:
            try:
                return torch.vmap(one)(self.parameters(theta))
            except (RuntimeError, ValueError):  # operations that cannot be batched, such as ones that read numbers
                self._by_vmap = False
        return torch.stack([one(self.parameters(point)) for point in theta])
