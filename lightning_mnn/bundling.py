"""Several optimiser steps in one Lightning batch, where nothing in the run would notice.

Lightning's loop costs about 0.35 ms a batch, more than a step of a small network. A bundle spends it once. It is made
only where every step is still taken, counted (``global_step``), scheduled and logged as without it; otherwise training
falls back to one step a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint, Timer

if TYPE_CHECKING:
    from typing import Any

STEPS = 50  # of a bundle, at most: the interval at which checkpoints by time and signals are looked after

_BATCH_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


def may_bundle(trainer: pl.Trainer) -> bool:
    """Whether nothing in a run would notice that a Lightning batch holds several optimiser steps.

    One process, one batch a step, no clipping, full precision, whole epochs, and no callback that looks at batches.
    """
    run: Any = trainer
    return (
        run.world_size == 1
        and run.accumulate_grad_batches == 1
        and not run.gradient_clip_val
        and run.precision in ("32-true", "64-true")
        and run.max_steps == -1
        and run.limit_train_batches == 1.0
        and not run.overfit_batches
        and not run.fast_dev_run
        and not any(looks_at_batches(callback) for callback in run.callbacks)
    )


def looks_at_batches(callback: pl.Callback) -> bool:
    """Whether a callback acts on single batches or steps."""
    own: Any = callback
    if isinstance(callback, ModelCheckpoint):
        return bool(own._every_n_train_steps)  # noqa: SLF001 (nothing public says it)
    if isinstance(callback, Timer):
        return own.time_remaining() is not None
    if hasattr(callback, "acts_within_epochs"):
        return bool(own.acts_within_epochs)
    return any(getattr(type(callback), hook) is not getattr(pl.Callback, hook) for hook in _BATCH_HOOKS)
