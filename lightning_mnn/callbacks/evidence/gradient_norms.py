"""The norms of the gradients that training follows, kept on their device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.utilities.distributed import gather

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytorch_lightning as pl
    from torch import Tensor
    from torch.optim import Optimizer


class GradientNorms:
    """The largest norm so far of the gradients that each optimiser was about to follow.

    The gradients are those of training: of its batches, in its mode, unscaled, before any clipping. Norms stay on the
    device, so that training does not wait for it. Norms that are not finite do not count, such as those of steps that a
    gradient scaler skips.
    """

    def __init__(self) -> None:
        self._largest: dict[int, Tensor] = {}
        self._ends: dict[int, tuple[Tensor, Tensor]] = {}  # the first and the last norm
        self._loaded: dict[int, float] = {}

    @torch.no_grad()
    def record(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Record the norm of the gradient that an optimiser is about to follow."""
        groups = optimizer.param_groups
        found = [numbers_of(p.grad) for group in groups for p in group["params"] if p.grad is not None]
        if not found:
            return
        index = index_of(trainer, optimizer)
        norm = _norm(found)
        norm = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
        self._ends[index] = self._ends.get(index, (norm, norm))[0], norm
        before = self._largest.get(index)
        self._largest[index] = norm if before is None else torch.maximum(before, norm.to(before.device))

    def knows(self, trainer: pl.Trainer, optimizer: Optimizer) -> bool:
        """Whether a gradient of this optimiser was recorded."""
        return index_of(trainer, optimizer) in self._ends

    def largest(self) -> float | None:
        """√Σ of the squares over the optimisers, the largest over the processes; None before a step."""
        local = self.state()
        norms = [norm for norm in gather(sum(norm**2 for norm in local.values()) ** 0.5 if local else None) if norm]
        return max(norms, default=None)

    def ends(self) -> dict[str, dict[int, float]]:
        """The squares of each optimiser's first and last norm, as a tier of first order notes them."""
        found = {index: [float(norm) ** 2 for norm in both] for index, both in self._ends.items()}
        return {name: {index: both[k] for index, both in found.items()} for k, name in enumerate(("first", "last"))}

    def state(self) -> dict[int, float]:
        """The largest norm of each optimiser, as plain values."""
        here = {index: float(norm) for index, norm in self._largest.items()}
        known = here.keys() | self._loaded.keys()
        return {index: max(here.get(index, 0.0), self._loaded.get(index, 0.0)) for index in sorted(known)}

    def load(self, state: dict[int, float]) -> None:
        """Restore the state of the run that is resumed."""
        self._loaded = dict(state)


def index_of(trainer: pl.Trainer, optimizer: Any) -> int:
    """Index of an optimiser among the Trainer's, whether Lightning wrapped it or not."""
    unwrapped = [getattr(known, "optimizer", known) for known in trainer.optimizers]
    return unwrapped.index(getattr(optimizer, "optimizer", optimizer))


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, in at least 32 bits."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, widest) for norm in norms]))
    return total


def numbers_of(gradient: Tensor) -> Tensor:
    """A gradient's numbers; those of a sparse one (of embeddings) without the zeros that it does not store."""
    return gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient
