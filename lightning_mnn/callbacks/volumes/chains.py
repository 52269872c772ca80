"""The training loss of any module at many points at once, for chains that sample around its weights.

Shapes: C points, P trained parameters; points are (C, P) in the order of the parameters.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.float64_loss import DoubleBatch, in_double
from lightning_mnn.callbacks.evaluation.full_batch import FullBatch
from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.evaluation.run_module import SERIOUS, LossNotEvaluableError
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.utilities.distributed import gather, share_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction

_MAX_DIFFERENCE = 1e-4  # relative, of a loss or a gradient by vmap from that of one point; also that of rounding


class PointsBatch(FullBatch):
    """The full batch, with its loss at any points of its trained parameters.

    Points are evaluated together by ``torch.func.functional_call`` and ``torch.vmap`` if the module's step allows this
    and gives the same numbers, and otherwise one after another.

    Attributes:
        is_batched: whether they are evaluated together; None before the first evaluation.
    """

    is_batched: bool | None = None
    _weight_sum = 0.0

    def at(self, parameters: Sequence[Tensor]) -> AtPoints:
        """The loss as a function of points of these parameters."""
        self.surface(parameters)  # it notes that they move
        return AtPoints(self, parameters)

    def evaluate(self, points: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The losses at points (C, P), (C,), and their gradients (C, P), over all processes."""
        if self.is_batched is None:
            self.is_batched = all(gather(self._batches_well(points, parameters)))
        sums: list[Tensor] = []
        share_errors(lambda: sums.extend(self._local(points, parameters, together=bool(self.is_batched))))
        self.check()
        return self._summed(*sums)

    def _batches_well(self, points: Tensor, parameters: Sequence[Tensor]) -> bool:
        """Whether vmap gives, on this process's part, the numbers of single points."""
        two = points[:1] + torch.tensor([[0.0], [1e-3]], dtype=points.dtype, device=points.device)
        try:
            loss, gradient = self._local(two, parameters, together=False)
            batched, slopes = self._local(two, parameters, together=True)
        except Exception as error:
            if isinstance(error, SERIOUS) and not isinstance(error, NoDerivativeError):
                raise
            return False  # vmap refuses in many ways; an error of single points is raised again by the evaluation
        finally:
            self._failure = None
        pairs = (loss, batched), (gradient, slopes)
        return all(bool((a - b).norm() <= _MAX_DIFFERENCE * a.norm()) for a, b in pairs)

    def _summed(self, losses: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the processes, divided by the sum of the weights."""
        total = self._process_group().sum(torch.cat([losses[:, None], gradients], 1))
        if self._drawn:
            total = total / self._process_group().sum(torch.full_like(total[:1, 0], self._weight_sum))
        return total[:, 0], total[:, 1:]

    def _local(self, points: Tensor, parameters: Sequence[Tensor], *, together: bool) -> tuple[Tensor, Tensor]:
        """The weighted sums over this process's batches."""
        losses, gradients = torch.zeros_like(points[:, 0]), torch.zeros_like(points)
        self._weight_sum = 0.0
        for index, batch, size in self._batches():
            weight = self._weight(size)
            self._weight_sum += weight
            if together:
                parts = self._batch_together(index, batch, points, parameters)
            else:
                parts = self._batch_apart(index, batch, points, parameters)
            losses += weight * parts[0]
            gradients += weight * parts[1]
        return losses, gradients

    def _batch_together(
        self, index: int, batch: Any, points: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        runner = _Runner(self._module, partial(self._part, index, batch))
        names = _names(runner, parameters)
        decays, self.decays = self.decays, ()  # of the parameters themselves, not of points
        try:
            points = points.detach().requires_grad_(True)  # noqa: FBT003 (torch's own)

            def one(point: Tensor) -> Tensor:
                pieces = dict(zip(names, _split(point, parameters), strict=True))
                loss: Tensor = functional_call(runner, pieces, ())
                return loss

            losses = torch.vmap(one, randomness="same")(points)
        finally:
            self.decays = decays
        factors = {id(parameter): factor for parameter, factor in decays}
        for parameter, piece in zip(parameters, _columns(points, parameters), strict=True):
            if id(parameter) in factors:
                losses = losses + factors[id(parameter)] / 2 * piece.square().sum(1)
        (gradients,) = torch.autograd.grad(losses.sum(), points)
        return losses.detach(), gradients

    def _batch_apart(
        self, index: int, batch: Any, points: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        losses, gradients = [], []
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            for point in points:
                _write(parameters, _split(point, parameters))
                loss = self._part(index, apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True))
                slopes = torch.autograd.grad(loss, list(parameters), allow_unused=True)
                found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, slopes, strict=True)]
                losses.append(loss.detach().to(points.dtype))
                gradients.append(torch.cat([part.reshape(-1) for part in found]).to(points.dtype))
        finally:
            _write(parameters, before)
        return torch.stack(losses), torch.stack(gradients)


class DoublePoints(PointsBatch, DoubleBatch):
    """The same in float64, within :func:`~lightning_mnn.callbacks.evaluation.float64_loss.in_double`."""


class AtPoints:
    """A loss of points (C, P), (C,), that autograd can differentiate once.

    Args:
        batch: evaluates it.
        parameters: those that move.

    Attributes:
        point: the parameters themselves, (P,).
    """

    def __init__(self, batch: PointsBatch, parameters: Sequence[Tensor]) -> None:
        self.point = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        self._batch, self._parameters = batch, parameters

    def __call__(self, points: Tensor) -> Tensor:
        """The losses."""
        losses: Tensor = _Losses.apply(points, self._batch, self._parameters)
        return losses


@contextmanager
def loss_at_points(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None = None
) -> Iterator[tuple[PointsBatch, AtPoints]]:
    """A context with the training loss of a module at any points; in float64 if its step allows this.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        loss_fn: ``loss_fn(module, batch)``; None: the module's ``training_step``.

    Raises:
        LossNotEvaluableError: the module's loss cannot be evaluated.
    """
    trained = trained_parameters(trainer, pl_module)
    with in_double(pl_module) as double:
        try:
            doubled = DoublePoints(trainer, pl_module, double, loss_fn)
            with doubled.open():
                doubled.first_surface(double.of(trained)).loss()
                doubled.check()
        except (NoDerivativeError, LossNotEvaluableError):
            pass
        else:
            with doubled.open():
                yield doubled, doubled.at(double.of(trained))
            return
    batch = PointsBatch(trainer, pl_module, loss_fn)
    with batch.open():
        reason = batch.reason_not_evaluable()
        if reason is not None:
            raise LossNotEvaluableError(reason)
        yield batch, batch.at(trained)


class _Runner(nn.Module):
    """Makes the loss of a batch the forward pass of a module, whose parameters ``functional_call`` can replace."""

    def __init__(self, inner: nn.Module, run: Any) -> None:
        super().__init__()
        self.inner = inner
        self.run = run

    @override
    def forward(self) -> Tensor:
        loss: Tensor = self.run()
        return loss


class _Losses(torch.autograd.Function):
    """Losses whose gradients are computed together with them."""

    @staticmethod
    @override
    def forward(ctx: Any, points: Tensor, batch: PointsBatch, parameters: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            losses, gradients = batch.evaluate(points.detach(), parameters)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @override
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return outer[0][:, None] * gradients, None, None


def _names(runner: nn.Module, parameters: Sequence[Tensor]) -> list[str]:
    known = {id(parameter): name for name, parameter in runner.named_parameters()}
    return [known[id(parameter)] for parameter in parameters]


def _split(point: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    pieces = point.split([parameter.numel() for parameter in parameters])  # type: ignore[no-untyped-call]
    return [piece.reshape(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def _columns(points: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    pieces: list[Tensor] = points.split([p.numel() for p in parameters], 1)  # type: ignore[no-untyped-call]
    return pieces


def _write(parameters: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.copy_(piece)
