"""Train many small networks side by side until none of their training samples is wrong.

Shapes: R networks, N samples, D weights of a network.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import sent
from lightning_mnn.utilities.validation import ArgumentError, one_of, positive_integer, real_number

if TYPE_CHECKING:
    from lightning_mnn.landscape import Architecture

OPTIMIZERS = ("sgd", "adam")

_STEPS_PER_CHECK = 50  # between two looks at whether all networks are finished, for which the host waits


class ZeroError(NamedTuple):
    """Networks at the first step at which they made no training error.

    Attributes:
        weights: θ, (R, D); of networks that did not get there, the last ones.
        steps: number of steps to there, int64 (R,); −1 for networks that did not get there.
    """

    weights: Tensor
    steps: Tensor

    @property
    def reached(self) -> Tensor:
        """Which networks made no training error, bool (R,)."""
        return self.steps >= 0


def train_to_zero_error(
    network: Architecture,
    inputs: Tensor,
    signs: Tensor,
    *,
    optimizer: str = "sgd",
    lr: float = 0.1,
    batch_size: int | None = None,
    replicas: int = 20,
    max_steps: int = 10_000,
    seed: int = 0,
) -> ZeroError:
    """Minimise the mean logistic loss log(1 + exp(−y f(x))) until the sign of every output is right.

    The networks share data and nothing else: each has its own weights at the start, N(0, 2/fan-in) in hidden layers,
    N(0, 1/fan-in) in the last one and 0 for biases, and its own batches, drawn without replacement at each step.

    Args:
        network: the architecture.
        inputs: X, float64 (N, d0), on any device.
        signs: y, ±1, (N,).
        optimizer: "sgd" without momentum (gradient descent, if batches are full) or "adam".
        lr: learning rate.
        batch_size: samples in a batch; None: all of them.
        replicas: R.
        max_steps: steps after which the others are given up.
        seed: seed of weights and batches.

    Raises:
        ValueError: a number is out of its range, or there is no such optimiser.

    >>> from lightning_mnn.landscape import Architecture
    >>> x, y = torch.eye(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    >>> found = train_to_zero_error(Architecture(2, (8,)), x, y, lr=0.5, replicas=3)
    >>> bool(found.reached.all())
    True
    """
    one_of("optimizer", optimizer, OPTIMIZERS)
    real_number("lr", lr, above=0)
    num_samples, replicas = len(inputs), positive_integer("replicas", replicas)
    if batch_size is not None and positive_integer("batch_size", batch_size) > num_samples:
        raise ArgumentError("batch_size", batch_size, f"must be at most {num_samples}, the number of samples")
    draw = generator(seed, "zero error")
    weights = sent(_initial_weights(network, replicas, draw), inputs.device).requires_grad_()
    stepper = (torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam)([weights], lr=lr)
    kept, steps = weights.detach().clone(), torch.full((replicas,), -1, device=inputs.device)
    for step in range(positive_integer("max_steps", max_steps) + 1):
        margins = network.outputs(weights, inputs) * signs
        first = (margins > 0).all(1) & (steps < 0)
        steps = torch.where(first, step, steps)
        kept = torch.where((steps < 0)[:, None] | first[:, None], weights.detach(), kept)
        if step == max_steps or (step % _STEPS_PER_CHECK == 0 and bool((steps >= 0).all())):
            break
        losses = torch.nn.functional.softplus(-margins)
        if batch_size is not None and batch_size < num_samples:
            chosen = torch.rand(replicas, num_samples, generator=draw).argsort(1) < batch_size
            losses = losses * sent(chosen, inputs.device) * (num_samples / batch_size)
        (weights.grad,) = torch.autograd.grad(losses.mean(1).sum(), weights)
        stepper.step()
    return ZeroError(kept, steps)


def _initial_weights(network: Architecture, replicas: int, draw: torch.Generator) -> Tensor:
    """Weights (R, D) with the usual scales."""
    parts = []
    widths = (network.input_dim, *network.hidden_dims, 1)
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        scale = math.sqrt((1 if number == len(widths) - 2 else 2) / inputs)
        parts.append(scale * torch.randn(replicas, outputs * inputs, generator=draw, dtype=torch.float64))
        if network.bias:
            parts.append(torch.zeros(replicas, outputs, dtype=torch.float64))
    return torch.cat(parts, 1)
