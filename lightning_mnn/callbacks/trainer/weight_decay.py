"""The penalty that an optimiser's weight decay adds to the loss that training lowers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    Decays = Sequence[tuple[Tensor, float]]

_DECOUPLED = ("AdamW", "Muon", "Adafactor")


def weight_decays(trainer: pl.Trainer) -> list[tuple[Tensor, float]]:
    """Parameters with the factor λ of the penalty ½ λ ‖θ‖² that the optimisers of torch add to the loss.

    Decoupled weight decay is left out: it is the gradient of no function.
    """
    return [
        (parameter, float(group["weight_decay"]))
        for group, decoupled in _decaying_groups(trainer)
        for parameter in group["params"]
        if not decoupled
    ]


def has_decoupled_decay(trainer: pl.Trainer) -> bool:
    """Whether an optimiser shrinks the weights beside its steps, as AdamW does: then training lowers no function."""
    return any(decoupled for _, decoupled in _decaying_groups(trainer))


def penalty_of(decays: Decays) -> Tensor:
    """½ Σ λ ‖θ‖², differentiable.

    >>> float(penalty_of([(torch.tensor([1.0, 2.0]), 0.1), (torch.tensor([2.0]), 0.5)]))
    1.25
    """
    return 0.5 * torch.stack([decay * parameter.square().sum() for parameter, decay in decays]).sum()


def _decaying_groups(trainer: pl.Trainer) -> list[tuple[dict[str, Any], bool]]:
    """Parameter groups with weight decay, and whether it is decoupled."""
    return [
        (group, bool(group.get("decoupled_weight_decay")) or type(optimizer).__name__ in _DECOUPLED)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        if group.get("weight_decay", 0)
    ]
