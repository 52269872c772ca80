"""How to run any LightningModule on its training set: batches, forward passes, losses.

Use them within :func:`lightning_mnn.callbacks.undisturbed.undisturbed`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_mnn.callbacks.undisturbed import seed_generators
from lightning_mnn.data.shards import exact_shard

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl

ModelFunction = Callable[[Any, Any], Any]  # of a module and a batch; LightningCLI reads it, too

_NO_FORWARD = ("pytorch_lightning.core.module", "lightning.pytorch.core.module", "torch.nn.modules.module")


class LossNotEvaluableError(TypeError):
    """A module's own training loss cannot be had from its ``training_step``."""


def model_batches(trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Tensor | None = None) -> Iterator[Any]:
    """This process's part of the training set, each sample once, in batches as the module gets them in training.

    They are collated by the training loader, in the precision and on the device of training; hooks of the module and
    the data module that act on batches have acted. The generators of torch, numpy and random are seeded before each,
    so that every pass draws the same augmentations.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        chosen: indices of the samples to pass over; None: all of them.

    Raises:
        TypeError: the samples cannot be enumerated (see :func:`lightning_mnn.data.shards.exact_shard`).
    """
    seed_generators(0)
    batches = exact_shard(trainer.train_dataloader, trainer.global_rank, trainer.world_size, chosen)
    for index, batch in enumerate(batches, start=1):
        yield as_in_training(trainer, pl_module, batch)
        seed_generators(index)


def as_in_training(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """A collated batch in the precision and on the device of training, as the hooks for batches leave it."""
    converted = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(pl_module._on_before_batch_transfer(converted))  # noqa: SLF001


def precision_context(trainer: pl.Trainer, *, autocast: bool) -> AbstractContextManager[Any]:
    """The context of the Trainer's precision in which its forward passes run.

    Args:
        trainer: the Trainer.
        autocast: False leaves out the rounding of mixed precision, so that what is computed is of the weights as they
            are; "64-true" and "bf16-true" stay as they are.
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
        f"how many samples a batch holds cannot be told: no tensor with an axis of samples in a {type(batch).__name__}"
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | Sequence) and not isinstance(batch, str | bytes):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def forward_on(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, forward_fn: ModelFunction | None = None
) -> Any:
    """Run a module on a batch as training does.

    By ``forward_fn(module, batch)`` where it is given. Otherwise by the module's own ``forward``, where it has one and
    the batch is a tensor or a sequence: on as many leading parts of the batch as ``forward`` has required arguments
    (at least one). Otherwise, for a dict say, by its ``training_step``.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        batch: a batch as :func:`model_batches` yields it.
        forward_fn: what to call instead.

    Raises:
        LossNotEvaluableError: ``training_step`` would have to run, and takes optimiser steps itself.
    """
    if forward_fn is not None:
        return forward_fn(pl_module, batch)
    taken = _required_arguments(pl_module)
    parts = [batch] if isinstance(batch, Tensor) else batch
    if taken is None or not isinstance(parts, Sequence) or len(parts) < taken:
        return training_step_on(trainer, pl_module, batch, 0, remedy="forward_fn(module, batch)")
    try:
        return pl_module(*parts[:taken])
    except Exception as error:
        error.add_note(
            f"{type(pl_module).__name__}.forward was called with the first {taken} part(s) of a batch of the training "
            "set; where it takes something else, give the callback a forward_fn(module, batch)"
        )
        raise


def loss_on(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    batch_idx: int = 0,
    loss_fn: ModelFunction | None = None,
) -> Tensor:
    """The training loss of a batch, which is taken as the mean over its samples; a number with its graph.

    By ``loss_fn(module, batch)`` where it is given, else by the module's ``training_step``, which may return the loss
    or a dict with the key "loss".

    Raises:
        LossNotEvaluableError: ``training_step`` takes optimiser steps itself, reads the loader itself, or returns no
            loss.
        TypeError: ``loss_fn`` returns something other than a tensor with one number.
    """
    if loss_fn is not None:
        loss = loss_fn(pl_module, batch)
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise TypeError(f"loss_fn must return a tensor with one number, the mean over the batch, got {_told(loss)}")
        return loss.reshape(())
    found = training_step_on(trainer, pl_module, batch, batch_idx)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not (isinstance(loss, Tensor) and loss.numel() == 1):
        raise LossNotEvaluableError(
            f"{type(pl_module).__name__}.training_step returned no loss but {_told(found)}: give the callback a "
            "loss_fn(module, batch)"
        )
    return loss.reshape(())


def training_step_on(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    batch_idx: int = 0,
    remedy: str = "loss_fn(module, batch)",
) -> Any:
    """What a module's own ``training_step`` returns for a batch, without anything that the Trainer does round it.

    Raises:
        LossNotEvaluableError: it takes optimiser steps itself, or reads the loader itself.
    """
    del trainer
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise LossNotEvaluableError(
            f"{name} optimises by hand: its training_step cannot be called for what it computes alone. Give the "
            f"callback a {remedy}"
        )
    parameters = inspect.signature(pl_module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise LossNotEvaluableError(f"{name}.training_step reads the loader itself: give the callback a {remedy}")
    takes_index = "batch_idx" in parameters or len(parameters) >= 2
    return pl_module.training_step(batch, batch_idx) if takes_index else pl_module.training_step(batch)


def _required_arguments(pl_module: pl.LightningModule) -> int | None:
    """Positional arguments that a module's forward needs, at least one; None where it has no forward of its own."""
    forward = type(pl_module).forward
    if forward.__module__ in _NO_FORWARD:
        return None
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        return None
    return max(1, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required))


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {sorted(map(str, value))}"
    return "None" if value is None else f"a {type(value).__name__}"
