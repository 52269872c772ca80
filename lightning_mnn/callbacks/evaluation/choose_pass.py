"""Which pass of a module has the kinks of its training: its ``forward``, or its whole ``training_step``?"""

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
    """The function to run on a batch so that the kinks of training are found, the same on every process.

    If a module has a forward that can be run on a batch, both the forward and its ``training_step`` run once on a few
    samples, isolated from training. If they call the same layers, the forward is chosen; kinks of the loss do not
    count, which are those outside of all submodules that are trained. Otherwise the ``training_step`` is chosen, as for
    an autoencoder whose forward is the encoder alone, or takes something other than a batch. If the ``training_step``
    cannot be run, the forward is chosen. A choice that may be unexpected, or wrong in some way, is logged.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        batch: returns a few samples as in training, the same each time; called within ``isolated``.
        modules: names or patterns of the layers that count; None: all.
        who: prefix of the log messages.

    Returns:
        A ``forward_fn(module, batch)``; None: what
        :func:`~lightning_mnn.callbacks.evaluation.run_module.forward_on` does.

    Raises:
        Exception: the error of the forward, if the ``training_step`` cannot be run either, or meets no kink.
    """
    name = type(pl_module).__name__
    parts: list[Any] = []

    def forward() -> Any:
        samples = batch()
        parts.append(forward_parts(pl_module, samples))
        return forward_on(pl_module, samples)

    in_forward: dict[str, tuple[Tensor | None, bool]] = {}
    failed: Exception | None = None
    try:
        in_forward = _met(trainer, pl_module, forward, modules)
    except (LossNotEvaluableError, *SERIOUS):  # from a training_step, or not caused by the arguments
        raise
    except Exception as error:  # noqa: BLE001 (user code can raise anything)
        failed = error
    if not parts:
        raise cast("Exception", failed)  # there was no batch
    if parts[0] is None:
        return None
    in_step = {}
    with ignored_errors():  # it may be impossible to run it in eval mode, or by itself
        in_step = _met(trainer, pl_module, lambda: step_for_its_passes(pl_module, batch()), modules)
    if failed is not None:
        if not in_step:
            raise failed
        rank_zero_info(
            f"{who}: {name}.forward fails on a batch of the training set ({type(failed).__name__}: {failed}): the "
            f"training_step is run; {_REMEDY}"
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
            f"calls {', '.join(others)}, which its forward does not"
            if others
            else (f"does not call {', '.join(absent)}, which its forward does")
        )
        rank_zero_info(f"{who}: {name}.training_step {what}: the training_step is run; {_REMEDY}")
        return step_for_its_passes
    _log_forward(who, pl_module, len(parts[0]), _different(in_forward, in_step))
    return None


def _log_forward(who: str, pl_module: pl.LightningModule, num_parts: int, different: list[str]) -> None:
    """Log what may be wrong in running a module's forward."""
    name = type(pl_module).__name__
    if num_parts > 1:
        names = list(inspect.signature(pl_module.forward).parameters)[:num_parts]
        rank_zero_info(
            f"{who}: {name}.forward is called with the first {num_parts} parts of a batch as {', '.join(names)}; "
            f"{_REMEDY}"
        )
    if different:
        rank_zero_info(
            f"{who}: {name}.forward has {', '.join(different)} on other pieces than training_step has for the same "
            f"samples (training_step computes the inputs of forward); the forward is run; {_REMEDY}"
        )


def _different(
    in_forward: dict[str, tuple[Tensor | None, bool]], in_step: dict[str, tuple[Tensor | None, bool]]
) -> list[str]:
    """Layers that are on different pieces in two passes."""
    return [layer for layer in in_forward if layer in in_step and not _agree(in_forward[layer][0], in_step[layer][0])]


def _met(
    trainer: pl.Trainer, pl_module: pl.LightningModule, run: Callable[[], Any], modules: Names
) -> dict[str, tuple[Tensor | None, bool]]:
    """By layer the pieces in one pass (None if they cannot be found), and whether they depend on the weights."""
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
        RuntimeError: the code inside changed one.
    """
    originals = [
        p.data for p in pl_module.parameters() if p.requires_grad and not is_lazy(p) and type(p.data) is torch.Tensor
    ]
    copies = [data.clone() for data in originals]
    try:
        yield
    finally:
        changed = [not data.allclose(copy, 0, 0, equal_nan=True) for data, copy in zip(originals, copies, strict=True)]
        for data, copy in zip(originals, copies, strict=True):
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
