"""Which pass of a module meets the kinks of its training: its ``forward``, or its whole ``training_step``?"""

from __future__ import annotations

import inspect
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.run_module import (
    SERIOUS,
    LossNotEvaluableError,
    forward_on,
    forward_parts,
    precision_context,
    step_for_its_passes,
)
from lightning_mnn.landscape.kinks.tracing import KINK_MODULES, Kink, KinkTrace, PatternError
from lightning_mnn.utilities.compat.missing import ignored_errors
from lightning_mnn.utilities.distributed import gather

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.kinks.tracing import Names

_REMEDY = "for another choice give a forward_fn(module, batch)"


@torch.no_grad()
def pass_of_training(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Callable[[], Any],
    modules: Names = None,
    who: str = "Activation patterns",
) -> ModelFunction | None:
    """What to run on a batch so that the kinks of training are met, the same on every process.

    Where a module has a forward that can be run on a batch, both that and its ``training_step`` run once on a few
    samples, without a trace. If they meet the same layers, it is the forward; kinks of the loss do not count, which are
    those outside of all submodules that are trained. Otherwise it is the ``training_step``, as of an autoencoder
    whose forward is the encoder alone, or takes something else than a batch. Where that cannot be run, it is the
    forward. What was chosen, and what may be wrong in it, is said.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        batch: gives a few samples as in training, the same each time; called within ``isolated``.
        modules: names or patterns of the layers that count; None: all.
        who: begins what is said.

    Returns:
        A ``forward_fn(module, batch)``; None: what
        :func:`~lightning_mnn.callbacks.evaluation.run_module.forward_on` does.

    Raises:
        Exception: what the forward raised, where the ``training_step`` cannot be run either, or meets no kink.
    """
    name = type(pl_module).__name__
    parts: list[Any] = []

    def forward() -> Any:
        own = batch()
        parts.append(forward_parts(pl_module, own))
        return forward_on(pl_module, own)

    in_forward: dict[str, tuple[Tensor | None, bool]] = {}
    failed: Exception | None = None
    try:
        in_forward = _met(trainer, pl_module, forward, modules)
    except (LossNotEvaluableError, *SERIOUS):  # of a training_step, or no matter of the arguments
        raise
    except Exception as error:  # noqa: BLE001 (of whatever its user wrote)
        failed = error
    if not parts:
        raise cast("Exception", failed)  # there was no batch
    if parts[0] is None:
        return None
    in_step = {}
    with ignored_errors():  # what cannot be run in eval mode, or by itself
        in_step = _met(trainer, pl_module, lambda: step_for_its_passes(pl_module, batch()), modules)
    if failed is not None:
        if not in_step:
            raise failed
        rank_zero_info(
            f"{who}: {name}.forward fails on a batch of the training set ({type(failed).__name__}: {failed}): the "
            f"training_step is what is run; {_REMEDY}"
        )
        return step_for_its_passes
    others = [
        layer
        for layer, (_, moves) in in_step.items()
        if moves and layer not in in_forward and not _of_loss(pl_module, layer)
    ]
    absent = [layer for layer in in_forward if layer not in in_step] if in_step else []
    if all(gather(bool(others or absent))):
        what = (
            f"meets {', '.join(others)}, which its forward does not"
            if others
            else (f"does not meet {', '.join(absent)}, which its forward does")
        )
        rank_zero_info(f"{who}: {name}.training_step {what}: the training_step is what is run; {_REMEDY}")
        return step_for_its_passes
    _print_forward(who, pl_module, len(parts[0]), _apart(in_forward, in_step))
    return None


def _print_forward(who: str, pl_module: pl.LightningModule, taken: int, apart: list[str]) -> None:
    """Say of a module's forward, which is what is run, what may be wrong in that."""
    name = type(pl_module).__name__
    if taken > 1:
        names = list(inspect.signature(pl_module.forward).parameters)[:taken]
        rank_zero_info(
            f"{who}: {name}.forward is called with the first {taken} parts of a batch as {', '.join(names)}; {_REMEDY}"
        )
    if apart:
        rank_zero_info(
            f"{who}: {name}.forward has {', '.join(apart)} on other pieces than training_step has for the same samples "
            f"(what it is called on is made there); the forward is what is run; {_REMEDY}"
        )


def _apart(
    in_forward: dict[str, tuple[Tensor | None, bool]], in_step: dict[str, tuple[Tensor | None, bool]]
) -> list[str]:
    """Layers that two passes have on other pieces."""
    return [layer for layer in in_forward if layer in in_step and not _agree(in_forward[layer][0], in_step[layer][0])]


def _met(
    trainer: pl.Trainer, pl_module: pl.LightningModule, run: Callable[[], Any], modules: Names
) -> dict[str, tuple[Tensor | None, bool]]:
    """By layer the pieces that one pass meets, None where there are none, and whether they depend on the weights."""
    found: dict[str, tuple[Tensor | None, bool]] = {}

    def take(kink: Kink) -> None:
        if kink.num_pieces > 1:
            found[kink.name] = None, kink.depends_on_weights
            with suppress(PatternError):
                found[kink.name] = kink.pieces(), kink.depends_on_weights

    with (
        isolated(trainer, pl_module),
        restoring_parameters(pl_module),
        precision_context(trainer, autocast=True),
        warnings.catch_warnings(action="ignore"),
        KinkTrace(pl_module, take, modules),
    ):
        run()
    return found


@contextmanager
def restoring_parameters(pl_module: pl.LightningModule) -> Iterator[None]:
    """A context after which the parameters are as before.

    Raises:
        RuntimeError: what ran inside changed one.
    """
    own = [
        p.data for p in pl_module.parameters() if p.requires_grad and not is_lazy(p) and type(p.data) is torch.Tensor
    ]
    kept = [data.clone() for data in own]
    try:
        yield
    finally:
        changed = [not data.allclose(copy, 0, 0, equal_nan=True) for data, copy in zip(own, kept, strict=True)]
        for data, copy in zip(own, kept, strict=True):
            data.copy_(copy)
    if any(changed):
        raise RuntimeError("the pass changed a parameter")


def _of_loss(pl_module: pl.LightningModule, layer: str) -> bool:
    """Whether a layer of a training_step is outside of all submodules that are trained."""
    part = dict(pl_module.named_children()).get(layer.partition(".")[0])
    if isinstance(part, KINK_MODULES):
        return isinstance(part, nn.L1Loss)
    return part is None or not any(parameter.requires_grad for parameter in part.parameters())


def _agree(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.shape == b.shape and torch.equal(a, b)
