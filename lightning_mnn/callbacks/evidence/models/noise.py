"""Noise on parameters, the same each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_mnn.utilities.seeding import generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def noise_like(parameters: Sequence[Tensor], step: float) -> Tensor:
    """Random moves of parameters, flat, by a step relative to their size."""
    random = generator(0, "comparison")
    steps = []
    for parameter in parameters:
        size = float(parameter.detach().square().mean().sqrt()) + parameter.numel() ** -0.5
        steps.append(step * size * torch.randn(parameter.numel(), generator=random, dtype=torch.float64))
    return torch.cat(steps).to(parameters[0])
