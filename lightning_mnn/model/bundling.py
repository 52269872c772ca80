"""Bundling: several optimiser steps in one Lightning batch, and several epochs in one Lightning epoch.

Lightning's loop costs about 0.35 ms per batch and 1 ms per epoch, more than a step of a small network. A bundle pays
these costs once. Steps are bundled only if each is still executed, counted (``global_step``, ``current_epoch``),
scheduled and logged as without bundling; otherwise training does one step per batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging, Timer

from lightning_mnn.data.loaders.exact import STEPS
from lightning_mnn.utilities.compat.lightning_internals import (
    count_epochs,
    steps_between_checkpoints,
    time_between_checkpoints,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from lightning_mnn.data.loaders.exact import ExactLoader


class Bundle:
    """The batches of one Lightning batch: those that the loader hands out, then those of further epochs.

    Iterating over it counts the further epochs in the Trainer's progress.

    Args:
        trainer: the Trainer, which trains from an :class:`~lightning_mnn.data.loaders.exact.ExactLoader`.
        batches: the first batches.
        further_epochs: number of whole epochs after them.
    """

    def __init__(self, trainer: pl.Trainer, batches: Iterable[Any], further_epochs: int) -> None:
        self._trainer = trainer
        self._batches = batches
        self._further_epochs = further_epochs
        self._loader = cast("ExactLoader", trainer.train_dataloader)

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        yield from self._batches
        for _ in range(self._further_epochs):
            self._begin_epochs(1)
            yield from self._loader.batches(0, self._loader.num_steps, reuse=True)

    @property
    def num_steps(self) -> int:
        """Number of its batches, before the first of them is taken."""
        loader = self._loader
        first = min(loader.steps_per_batch, loader.num_steps - loader.state_dict()["next_batch"])
        return first + self._further_epochs * loader.num_steps

    def full_batch(self) -> Any:
        """The batch of all its steps; None: there are several, which iterating gives."""
        if not self._loader.repeats:
            return None
        (batch,) = self._batches
        return batch

    def count_repetitions(self, epochs: int) -> None:
        """Count further epochs in which the full batch was used again."""
        if epochs:
            self._loader.count_repetitions(epochs)
            self._begin_epochs(epochs)

    def _begin_epochs(self, epochs: int) -> None:
        count_epochs(self._trainer, epochs)
        self._loader.sampler.set_epoch(self._trainer.current_epoch)


_BATCH_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)

_EPOCH_HOOKS = ("on_train_epoch_start", "on_train_epoch_end")

_KNOWN = ("lightning_mnn.", "pytorch_lightning.callbacks.model_checkpoint", "pytorch_lightning.callbacks.timer")


def may_bundle(trainer: pl.Trainer) -> bool:
    """Whether several optimiser steps in one Lightning batch change nothing else in a run.

    This needs one process, one batch per step, no clipping, full precision, whole epochs, validation only between
    epochs, and no callback that acts on batches.
    """
    run: Any = trainer
    return (
        run.world_size == 1
        and run.accumulate_grad_batches == 1
        and not run.gradient_clip_val
        and run.precision in ("32-true", "64-true")
        and run.max_steps == -1
        and isinstance(run.limit_train_batches, float)  # 1 means one batch, and 1.0 all of them
        and run.limit_train_batches == 1.0
        and not run.overfit_batches
        and not run.fast_dev_run
        and not (run.enable_validation and (run.val_check_interval != 1.0 or run.check_val_every_n_epoch is None))
        and not any(looks_at_batches(callback) for callback in run.callbacks)
    )


def epochs_at_a_time(trainer: pl.Trainer) -> int:
    """Number of epochs, this one included, until a callback acts or validation runs at the end of one."""
    run: Any = trainer
    if run.reload_dataloaders_every_n_epochs:
        return 1
    done = run.current_epoch
    left = [_epochs_until_due(callback, done) for callback in run.callbacks]
    if run.enable_validation and run.val_dataloaders != []:  # None: not loaded yet
        left.append(run.check_val_every_n_epoch - done % run.check_val_every_n_epoch)
    if run.should_stop:  # min_epochs or min_steps may delay the stop
        left.append((run.min_epochs or 0) - done if not run.min_steps else 1)
    return int(max(1, min(*left, run.max_epochs - done if run.max_epochs > 0 else math.inf, STEPS)))


def _epochs_until_due(callback: pl.Callback, done: int) -> float:
    other: Any = callback
    if _acts(callback, _EPOCH_HOOKS):
        return 1
    if isinstance(callback, ModelCheckpoint):
        every = callback.every_n_epochs
        return float(every - done % every) if every else math.inf
    return float(other.epochs_until_due(done)) if hasattr(callback, "epochs_until_due") else math.inf


def looks_at_batches(callback: pl.Callback) -> bool:
    """Whether a callback acts on single batches or steps."""
    timer: Any = callback
    if _acts(callback, _BATCH_HOOKS) or isinstance(callback, GradientAccumulationScheduler | StochasticWeightAveraging):
        return True
    if isinstance(callback, ModelCheckpoint):
        return time_between_checkpoints(callback) is not None or steps_between_checkpoints(callback) > 0
    if isinstance(callback, Timer):
        return timer.time_remaining() is not None
    return bool(getattr(callback, "acts_within_epochs", False))


def _acts(callback: pl.Callback, hooks: Sequence[str]) -> bool:
    """Whether a callback has any of the hooks, with code for which it is not known here when it acts."""
    for hook in hooks:
        method = getattr(callback, hook)  # of the object, not the class: a LambdaCallback has its own
        code = getattr(method, "__func__", method)
        known = getattr(code, "__module__", "").startswith(_KNOWN)
        if code is not getattr(pl.Callback, hook) and not known:
            return True
    return False
