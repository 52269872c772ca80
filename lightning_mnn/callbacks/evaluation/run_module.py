"""How to run any LightningModule on its training set: batches, forward passes, losses.

Use them within :func:`lightning_mnn.callbacks.evaluation.isolation.isolated`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_mnn.callbacks.evaluation.snapshots import seed_generators
from lightning_mnn.data.loaders.shards import draws, exact_shard, one_epoch
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.landscape.kinks.tracing import PatternError
from lightning_mnn.utilities.compat.lightning_internals import hooks_before_transfer
from lightning_mnn.utilities.compat.missing import MissingPartError
from lightning_mnn.utilities.errors import DivergenceError
from lightning_mnn.utilities.interruption import TimeLimitError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl

# Errors that do not mean that a module cannot be run in a pass.
SERIOUS = (
    *(DivergenceError, NoDerivativeError, PatternError, MissingPartError),
    *(torch.OutOfMemoryError, MemoryError, TimeLimitError),
)
ModelFunction = Callable[[Any, Any], Any]  # a function of a module and a batch; LightningCLI reads the type, too

_Kind = inspect.Parameter
_FORWARD_FN = "forward_fn(module, batch)"


class LossNotEvaluableError(TypeError):
    """A module's own training loss cannot be evaluated by its ``training_step``."""


class StepFailedError(LossNotEvaluableError):
    """A module's ``training_step`` raised an error in a pass; before the first batch, something may not exist yet."""


def model_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    chosen: Tensor | None = None,
    *,
    most: int | None = None,
    read: Callable[[Any], object] | None = None,
) -> Iterator[Any]:
    """This process's part of the training set, each sample once, in batches as the module gets them in training.

    If the samples of the loader cannot be enumerated, they are those of one of its epochs, as it draws and combines
    them (see :func:`lightning_mnn.data.loaders.shards.draws`). Batches are collated by the training loader, in the
    precision and on the device of training, and the hooks of the module and the data module for batches have run. The
    generators of torch, numpy and random are seeded before each batch, so that every pass draws the same augmentations.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        chosen: indices of the samples to read; None: all of them.
        most: maximal number of batches of this process; None: all.
        read: called with each batch as it was collated, before the conversions of training; None: nothing is called.

    Raises:
        TypeError: the samples cannot be enumerated (see :func:`lightning_mnn.data.loaders.shards.exact_shard`).
    """
    seed_generators(0)
    loader = trainer.train_dataloader
    drawn = chosen is None and draws(loader)
    part = trainer.global_rank, trainer.world_size
    batches = islice(one_epoch(trainer), most) if drawn else exact_shard(loader, *part, chosen, most=most)
    for index, batch in enumerate(batches, start=1):
        if read is not None:
            read(batch)
        yield as_in_training(trainer, pl_module, batch)
        seed_generators(index)


def as_in_training(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """A collated batch in the precision and on the device of training, after the hooks for batches."""
    converted = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(hooks_before_transfer(pl_module, converted))


def precision_context(trainer: pl.Trainer, *, autocast: bool) -> AbstractContextManager[Any]:
    """The context of the Trainer's precision in which its forward passes run.

    Args:
        trainer: the Trainer.
        autocast: False leaves out the rounding of mixed precision, so that results are those of the unrounded weights;
            it has no effect on "64-true" and "bf16-true".
    """
    plugin = trainer.precision_plugin
    mixed = hasattr(plugin, "autocast_context_manager")
    return nullcontext() if mixed and not autocast else plugin.forward_context()


def batch_size(batch: Any) -> int:
    """Number of samples of a batch: the length of the first tensor in it, in the order of its dicts and sequences.

    Raises:
        TypeError: there is no tensor with an axis of samples.

    >>> import torch
    >>> batch_size({"ids": [torch.zeros(7, 3)], "labels": torch.zeros(7)})
    7
    """
    for tensor in _tensors(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise TypeError(
        f"the number of samples of a batch is not known: there is no tensor with a sample axis in a "
        f"{type(batch).__name__}"
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | Sequence) and not isinstance(batch, str | bytes):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def forward_on(
    pl_module: pl.LightningModule,
    batch: Any,
    forward_fn: ModelFunction | None = None,
    remedy: str = _FORWARD_FN,
) -> Any:
    """Run a module on a batch as training does.

    This calls ``forward_fn(module, batch)`` if it is given. Otherwise it calls the module's own ``forward``, if it has
    one and the batch is a tensor or a sequence: on as many leading parts of the batch as ``forward`` has required
    arguments (at least one). Otherwise, for example for a dict, it calls its ``training_step``.

    Args:
        pl_module: the module.
        batch: a batch as :func:`model_batches` yields it.
        forward_fn: called instead.
        remedy: for errors: the argument of the callback by which its user can choose what to run.

    Raises:
        LossNotEvaluableError: ``training_step`` would have to run, and does optimiser steps itself, or fails.
    """
    if forward_fn is not None:
        return forward_fn(pl_module, batch)
    parts = forward_parts(pl_module, batch)
    if parts is None:
        return step_for_its_passes(pl_module, batch, remedy)
    try:
        return pl_module(*parts)
    except PatternError:
        raise
    except Exception as error:
        error.add_note(
            f"{type(pl_module).__name__}.forward was called with the first {len(parts)} part(s) of a batch of the "
            f"training set; if it takes something else, give the callback a {remedy}"
        )
        raise


def forward_parts(pl_module: pl.LightningModule, batch: Any) -> Sequence[Any] | None:
    """The leading parts of a batch that a module's own forward takes; None if it cannot be run on a batch."""
    required = _required_arguments(pl_module)
    parts = [batch] if isinstance(batch, Tensor) else batch
    if required is None or not isinstance(parts, Sequence) or len(parts) < required:
        return None
    return parts[:required]


def step_for_its_passes(pl_module: pl.LightningModule, batch: Any, remedy: str = _FORWARD_FN) -> Any:
    """Run a module's ``training_step`` for the forward passes in it; its result is detached.

    Raises:
        LossNotEvaluableError: see :func:`training_step_on`.
    """
    with torch.enable_grad():  # a penalty on gradients computes some itself
        found = training_step_on(pl_module, batch, 0, remedy)
    return apply_to_collection(found, Tensor, Tensor.detach)


def loss_on(
    pl_module: pl.LightningModule,
    batch: Any,
    batch_idx: int = 0,
    loss_fn: ModelFunction | None = None,
) -> Tensor:
    """The training loss of a batch, treated as the mean over its samples; a number with its graph.

    It is computed by ``loss_fn(module, batch)`` if that is given, otherwise by the module's ``training_step``, which
    may return the loss or a dict with the key "loss".

    Raises:
        LossNotEvaluableError: ``training_step`` does optimiser steps itself, reads the loader itself, fails, or returns
            no loss.
        TypeError: ``loss_fn`` returns something other than a tensor with one number.
    """
    if loss_fn is not None:
        loss = loss_fn(pl_module, batch)
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise TypeError(
                f"loss_fn must return a tensor with one number, the mean over the batch, got {_described(loss)}"
            )
        return loss.reshape(())
    found = training_step_on(pl_module, batch, batch_idx)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not (isinstance(loss, Tensor) and loss.numel() == 1):
        raise LossNotEvaluableError(
            f"{type(pl_module).__name__}.training_step returned no loss but {_described(found)}: give the callback a "
            "loss_fn(module, batch)"
        )
    return loss.reshape(())


def training_step_on(
    pl_module: pl.LightningModule,
    batch: Any,
    batch_idx: int = 0,
    remedy: str = "loss_fn(module, batch)",
) -> Any:
    """The result of a module's own ``training_step`` for a batch, without the Trainer's work before and after it.

    Raises:
        LossNotEvaluableError: it does optimiser steps itself, or reads the loader itself.
        StepFailedError: it fails.
    """
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise LossNotEvaluableError(
            f"{name} optimises manually: its training_step cannot be called without optimiser steps. Give the callback "
            f"a {remedy}"
        )
    parameters = inspect.signature(pl_module.training_step).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if "dataloader_iter" in parameters:
        raise LossNotEvaluableError(f"{name}.training_step reads the loader itself: give the callback a {remedy}")
    second = len(kinds) > 1 and kinds[1] in (_Kind.POSITIONAL_ONLY, _Kind.POSITIONAL_OR_KEYWORD)
    by_place = (batch_idx,) if second or _Kind.VAR_POSITIONAL in kinds else ()
    by_name = {"batch_idx": batch_idx} if not by_place and "batch_idx" in parameters else {}
    try:
        with warnings.catch_warnings(action="ignore"):  # training gives them itself if they apply to it
            return pl_module.training_step(batch, *by_place, **by_name)
    except SERIOUS:
        raise
    except Exception as error:
        raise StepFailedError(
            f"{name}.training_step was run in eval mode on a batch of the training set and failed: "
            f"{type(error).__name__}: {error}. Give the callback a {remedy}"
        ) from error


def _required_arguments(pl_module: pl.LightningModule) -> int | None:
    """Number of positional arguments that a module's forward needs, at least one; None if it has no own forward."""
    forward = type(pl_module).forward
    lightnings = [vars(kind).get("forward") for kind in type(pl_module).__mro__ if kind.__name__ == "LightningModule"]
    if forward in (nn.Module.forward, *lightnings):
        return None
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        return None
    return max(1, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {sorted(map(str, value))}"
    return "None" if value is None else f"a {type(value).__name__}"
