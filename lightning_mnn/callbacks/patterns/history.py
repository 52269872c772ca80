"""PatternHistory: where the snapshots of a run are, and how far its weights moved between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.findings import Freeze
from lightning_mnn.landscape.vitals.freezing import freeze_step, weights_freeze_step
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import to_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.landscape.pattern import PackedPattern

    Digest = str | list[str]
    Read = Callable[[str, int, Digest], dict[str, PackedPattern]]  # of a store's path, a step and a digest

_MAX_WEIGHTS = 1 << 16  # that are compared from snapshot to snapshot, of each network


class PatternHistory:
    """The recorded steps of a run: the stores of their snapshots, and the moves of the weights between them.

    Of more than 65,536 weights a random subset is compared, so that checkpoints stay small. Its moves are an estimate
    of all weights' moves, up to a factor that does not matter here.

    Args:
        seed: seed of the subset.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._steps: list[int] = []
        self._stored: list[tuple[str, Digest] | None] = []  # path of the store, and the digest
        self._lengths: list[Tensor] = []  # of the moves, over replicas
        self._weights: Tensor | None = None

    @torch.no_grad()
    def record(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, replicas: int, stored: tuple[str, Digest] | None
    ) -> None:
        """Add the present step.

        Args:
            trainer: the Trainer.
            pl_module: the module.
            replicas: number of networks side by side, whose weights have an axis of that size first; 0: a single one.
            stored: path of the store with its snapshot, and the digest of the snapshot; None: it was not written.
        """
        now = self._some_weights(trainer, pl_module, replicas)
        if self._weights is not None:
            same = now.shape == self._weights.shape
            self._lengths.append(
                (now - self._weights).norm(dim=-1).double() if same else torch.tensor(torch.nan, dtype=torch.float64)
            )
        self._weights = now
        self._steps.append(trainer.global_step)
        self._stored.append(stored)

    def freeze(self, read: Read) -> list[Freeze] | str:
        """When patterns and weights settled, of each replica; or why that is unknown.

        Args:
            read: reads a snapshot; a LookupError says why it cannot be read.
        """
        if len(self._steps) < 3:
            return f"{len(self._steps)} snapshots were recorded; three or more are needed"
        try:
            patterns = freeze_step(self._snapshots(read)).reshape(-1)
        except LookupError as error:
            return str(error)
        if any(length.shape != self._lengths[-1].shape for length in self._lengths):
            return "the module has other weights than before"
        lengths = torch.stack(self._lengths, dim=-1)
        if not lengths.isfinite().all():
            return "the weights are not finite"
        weights = weights_freeze_step(torch.tensor(self._steps), lengths).reshape(-1)
        pairs = zip(patterns.tolist(), weights.tolist(), strict=True)
        return [Freeze(step, of_weights, self._steps[-1]) for step, of_weights in pairs]

    def state(self) -> dict[str, Any]:
        """The state, of plain values and tensors."""
        lengths = [length.tolist() for length in self._lengths]
        return {"steps": list(self._steps), "stored": list(self._stored), "lengths": lengths, "weights": self._weights}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state; an empty one, of an earlier version, forgets all."""
        self._steps, self._stored = list(state.get("steps", [])), list(state.get("stored", []))
        self._lengths = [torch.tensor(length, dtype=torch.float64) for length in state.get("lengths", [])]
        self._weights = state.get("weights")

    def _snapshots(self, read: Read) -> Iterator[tuple[int, dict[str, PackedPattern]]]:
        for step, stored in zip(reversed(self._steps), reversed(self._stored), strict=True):
            if stored is None:
                raise LookupError("no patterns.zarr was written")
            path, digest = stored
            yield step, read(path, step, digest)

    def _some_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule, replicas: int) -> Tensor:
        """Weights (R, m) or (m,), on the CPU: all that are trained, or a random subset."""
        lead = (replicas,) if replicas else ()
        flat = [p.detach().reshape(*lead, -1) for p in trained_parameters(trainer, pl_module) if _is_plain(p, replicas)]
        total = sum(part.shape[-1] for part in flat)
        if total <= _MAX_WEIGHTS:
            chosen = flat
        else:
            drawn = torch.randint(total, (_MAX_WEIGHTS,), generator=generator(self._seed, "weights")).sort().values
            chosen, start = [], 0
            for part in flat:
                own = drawn[(drawn >= start) & (drawn < start + part.shape[-1])] - start
                chosen.append(part[..., own.to(part.device)])
                start += part.shape[-1]
        parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in to_host(chosen)]
        return torch.cat(parts, dim=-1) if parts else torch.zeros(*lead, 0)


def _is_plain(parameter: Tensor, replicas: int) -> bool:
    """Whether all numbers of a parameter are here, and with replicas, those of each one of them."""
    whole = parameter.layout is torch.strided and not parameter.is_meta
    return whole and (replicas == 0 or (parameter.ndim > 0 and parameter.shape[0] == replicas))
