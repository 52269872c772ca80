"""The penalty that an optimiser's weight decay adds to the loss that training lowers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    Decays = Sequence[tuple[Tensor, float]]

_DECOUPLED = ("AdamW", "Muon", "Adafactor")
_FACTORS = ("weight_decay", "lambd")  # ASGD has both, and adds both to the gradient in the same way


def weight_decays(trainer: pl.Trainer) -> list[tuple[Tensor, float]]:
    """Parameters with the factor λ of the penalty ½ λ ‖θ‖² that the optimisers of torch add to the loss.

    Decoupled weight decay is left out, which is the gradient of no function, and so is that of other optimisers than
    torch's, of which it is not known.
    """
    return [
        (parameter, _factor(group))
        for group, decoupled in _decaying_groups(trainer)
        for parameter in group["params"]
        if not decoupled
    ]


def has_decoupled_decay(trainer: pl.Trainer) -> bool:
    """Whether weight decay is decoupled from the gradient, as AdamW's, or not known to be part of it.

    Then training lowers no function, or none that is known.
    """
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
        (group, bool(group.get("decoupled_weight_decay")) or not _adds_decay(optimizer))
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        if _factor(group)
    ]


def _factor(group: dict[str, Any]) -> float:
    return sum(float(group.get(name) or 0.0) for name in _FACTORS)


def _adds_decay(optimizer: Optimizer) -> bool:
    """Whether an optimiser is one of torch, or derived from one, that adds weight decay to the gradient."""
    kinds = [kind for kind in type(optimizer).__mro__ if issubclass(kind, Optimizer) and kind is not Optimizer]
    of_torch = any(kind.__module__.startswith("torch.optim.") for kind in kinds)
    return of_torch and not any(kind.__name__ in _DECOUPLED for kind in kinds)
