"""FullBatch: any module's training loss over its whole training set, and its nearest kink."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_mnn.callbacks.model_pass import (
    LossNotEvaluableError,
    batch_size,
    forward_on,
    loss_on,
    model_batches,
    precision_context,
)
from lightning_mnn.callbacks.training_set import gather
from lightning_mnn.callbacks.undisturbed import seed_generators, undisturbed
from lightning_mnn.data.loader import part_of
from lightning_mnn.data.shards import num_samples
from lightning_mnn.landscape.kink_distance import KinkDistance, kink_distance
from lightning_mnn.landscape.kink_patterns import NoKinksError
from lightning_mnn.landscape.kink_trace import Kink, KinkTrace, Names
from lightning_mnn.landscape.loss_surface import LossSurface
from lightning_mnn.landscape.team import ProcessTeam, Team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.model_pass import ModelFunction

_KEPT = 1 << 28  # bytes of batches up to which they are kept for the next pass


class FullBatch:
    """L(θ) = Σ_b (n_b / N) L_b(θ) over the batches b of n_b samples, in eval mode, in the weights' own precision.

    L_b is the module's own loss of a batch, taken as the mean over its samples. Each pass sees the same batches with
    the same augmentations. Processes have parts of the training set of their own, or none, so that a loss must not ask
    the other processes for anything (metrics of torchmetrics do not here). Use it within :meth:`open`.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        loss_fn: ``loss_fn(module, batch)``; None: the module's ``training_step``.
        modules: layers whose kinks count (see :class:`lightning_mnn.landscape.kink_trace.KinkTrace`).
        losses: False: there is no loss to be had, and kinks are those of the module's forward pass, or of ``loss_fn``.

    Attributes:
        met: layers whose kinks :meth:`nearest_kink` met, whether they depend on the weights or not.
        smooth: smooth nonlinear functions met by :meth:`nearest_kink`.
        opaque: calls whose kinks it could not see.
        left_out: layers that ``modules`` left out.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loss_fn: ModelFunction | None = None,
        modules: Names = None,
        *,
        losses: bool = True,
    ) -> None:
        self.met: list[str] = []
        self.smooth: list[str] = []
        self.opaque: list[str] = []
        self.left_out: list[str] = []
        self._trainer = trainer
        self._module = pl_module
        self._loss_fn = loss_fn
        self._modules = modules
        self._run: Callable[[int, Any], Any] = self._loss_or_none if losses else self._forward
        self._num_samples = num_samples(trainer.train_dataloader)
        self._own = part_of(self._num_samples, trainer.global_rank, trainer.world_size)
        self._kept: list[Any] | None = None
        self._failure: str | None = None
        metrics = [name for name, part in pl_module.named_modules() if isinstance(part, Metric)]
        self._metrics = tuple(f"{name}." for name in metrics)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the module may be run, without a trace in its training."""
        trainer = self._trainer
        with undisturbed(trainer, self._module), precision_context(trainer, autocast=False), torch.enable_grad():
            try:
                yield
            finally:
                self._kept = None

    def why_not_evaluable(self) -> str | None:
        """Why the module's loss cannot be had, the same on every process; None where it can."""
        own = None
        for index, batch, _ in self._batches():
            try:
                self._loss(index, batch)
            except LossNotEvaluableError as error:
                own = str(error)
            break
        return next((reason for reason in gather(own) if reason is not None), None)

    def surface(self, parameters: list[Tensor] | None = None) -> LossSurface:
        """The loss as a function of parameters; None: of all that are trained.

        Raises:
            ValueError: they are not of one precision and on one device, or in less than 32 bits.
        """
        trained = [p for p in self._module.parameters() if p.requires_grad]
        return LossSurface(trained if parameters is None else parameters, self._parts, self._team())

    def nearest_kink(self) -> KinkDistance:
        """How far the weights are from the nearest kink of the forward passes and the loss.

        Raises:
            NoKinksError: there is none that depends on the weights.
            LossNotEvaluableError: a batch gave no loss.
        """
        passes = (partial(self._trace, index, batch) for index, batch, _ in self._batches())
        found = kink_distance(passes, [*self._module.parameters()], self._team())
        parts = gather((self.met, self.smooth, self.opaque, self.left_out))
        unions = (sorted(set().union(*names)) for names in zip(*parts, strict=True))
        self.met, self.smooth, self.opaque, self.left_out = unions
        self.check()
        if found.units == 0:
            raise NoKinksError(self._no_kinks())
        return found

    def notes(self) -> list[str]:
        """What :meth:`nearest_kink` could not tell, in words."""
        told = {
            "kinks of {} cannot be seen": self.opaque,
            "kinks of {} are left out": self.left_out,
            "of smooth functions, not piecewise linear: {}": self.smooth,
        }
        return [text.format(", ".join(names)) for text, names in told.items() if names]

    def check(self) -> None:
        """Check that each batch gave a loss; to be called by all processes after a pass.

        Raises:
            LossNotEvaluableError: one did not.
        """
        reason = next((reason for reason in gather(self._failure) if reason is not None), None)
        if reason is not None:
            raise LossNotEvaluableError(reason)

    def _parts(self) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        for index, batch, size in self._batches():
            yield size / self._num_samples, partial(self._loss_or_none, index, batch)

    def _loss(self, index: int, batch: Any) -> Tensor:
        seed_generators(index)
        return loss_on(self._trainer, self._module, batch, index, self._loss_fn)

    def _loss_or_none(self, index: int, batch: Any) -> Tensor:
        try:
            return self._loss(index, batch)
        except LossNotEvaluableError as error:  # the other processes go on, and hear of it in check
            self._failure = str(error)
            return torch.zeros(())

    def _forward(self, index: int, batch: Any) -> None:
        seed_generators(index)
        try:
            forward_on(self._trainer, self._module, batch, self._loss_fn)
        except LossNotEvaluableError as error:
            self._failure = str(error)

    def _trace(self, index: int, batch: Any, on_kink: Callable[[Kink], None]) -> None:
        def look(kink: Kink) -> None:
            if not kink.name.startswith(self._metrics or "\0"):
                on_kink(kink)

        with KinkTrace(self._module, look, self._modules) as trace:
            self._run(index, _cloned(batch))
        self.met = sorted({*self.met, *trace.names})
        self.smooth, self.opaque = sorted({*self.smooth, *trace.smooth}), sorted({*self.opaque, *trace.opaque})
        self.left_out = sorted({*self.left_out, *trace.left_out})

    def _batches(self) -> Iterator[tuple[int, Any, int]]:
        """Index, content and number of samples of this process's batches."""
        loader = self._trainer.train_dataloader
        left = self._own[1] - self._own[0]
        kept: list[Any] | None = []
        for index, batch in enumerate(self._kept or model_batches(self._trainer, self._module)):
            # of a DataLoader it is known, however the samples are laid out in the batch
            size = min(loader.batch_size or 256, left) if isinstance(loader, DataLoader) else batch_size(batch)
            left -= size
            if kept is not None and self._kept is None:
                kept.append(_cloned(batch))
                kept = kept if _bytes(kept) <= _KEPT else None
            yield index, _cloned(batch) if self._kept else batch, size
        if self._kept is None:
            self._kept = kept

    def _team(self) -> Team:
        return Team() if self._trainer.world_size == 1 else ProcessTeam(self._own[1] - self._own[0])

    def _no_kinks(self) -> str:
        name = type(self._module).__name__
        if self.left_out and self._modules is not None:
            return f"modules={self._modules!r} matches none of the layers that {name} met: {', '.join(self.left_out)}"
        unseen = f"; the kinks of {', '.join(self.opaque)} cannot be seen" if self.opaque else ""
        smooth = f"; its nonlinear functions are {', '.join(self.smooth)}" if self.smooth else ""
        return (
            f"{name} met no kink that depends on its weights, that is no ReLU, LeakyReLU, clamp, max-pooling or the "
            f"like{smooth}{unseen}: LocalMinimumDetector judges piecewise-linear networks, take it out of this one"
        )


def _cloned(batch: Any) -> Any:
    """A copy, as a step may work in place on what it is given."""
    return apply_to_collection(batch, Tensor, torch.clone)


def _bytes(batches: list[Any]) -> int:
    sizes: list[int] = []
    apply_to_collection(batches, Tensor, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
    return sum(sizes)
