"""Does a module's step compute in training what its model computes in eval mode, in float64, on fixed samples?

Dropout, statistics of batches, random transforms and reduced precision are found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_mnn.callbacks.evaluation.isolation import isolated, trained_parameters
from lightning_mnn.callbacks.evaluation.run_module import (
    LossNotEvaluableError,
    as_in_training,
    loss_on,
    precision_context,
)
from lightning_mnn.callbacks.evaluation.snapshots import restoring_generators, seed_generators
from lightning_mnn.callbacks.evidence.models.reading import ModelAt, Recorder, Samples, tensors_of
from lightning_mnn.callbacks.evidence.models.sequential import found_sequential
from lightning_mnn.callbacks.trainer.weight_decay import has_decoupled_decay, weight_decays
from lightning_mnn.data.loaders.shards import draws, exact_shard, num_samples
from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.classification import MAX_UNKNOWNS
from lightning_mnn.utilities.compat.torch_internals import as_evaluated, changes_in_training
from lightning_mnn.utilities.distributed import gather, gather_results

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction

_READ_TWICE = 1024  # samples that are read twice, to see whether they change
_SEEDS = (1_000_003, 1_000_033)  # of the two steps in training mode, other than those of passes


def reason_in_settings(trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None) -> str | None:
    """Why certificates of models do not cover what training lowers, by its settings alone; None if they may."""
    trained = sum(parameter.numel() for parameter in trained_parameters(trainer, pl_module))
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    mixed = hasattr(trainer.precision_plugin, "autocast_context_manager")
    reasons = {
        f"{trained} trained numbers are more than the {MAX_UNKNOWNS} of dense linear algebra": trained > MAX_UNKNOWNS,
        f"training is in mixed precision ({trainer.precision})": mixed,
        "the optimiser maximises": any(group.get("maximize") for group in groups),
        "the optimiser's weight decay is decoupled from the gradient (AdamW)": has_decoupled_decay(trainer),
        "loss_fn does not include the optimiser's weight decay": loss_fn is not None and bool(weight_decays(trainer)),
        "its training set cannot be read sample by sample": draws(trainer.train_dataloader) is not None,
    }
    return changes_in_training(pl_module) or next((reason for reason, holds in reasons.items() if holds), None)


def samples_change(trainer: pl.Trainer) -> bool:
    """Whether samples of the training set differ when they are read twice; the same on every process."""
    few = torch.arange(min(_READ_TWICE, num_samples(trainer.train_dataloader)))
    with restoring_generators(trainer):
        passes = [exact_shard(trainer.train_dataloader, chosen=few) for _ in range(2)]
        first, again = ([tensor for batch in batches for tensor in tensors_of(batch)] for batches in passes)
    return any(gather(len(first) != len(again) or not all(map(_same, first, again))))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(a.allclose(b, 0, 0, equal_nan=True))


def reason_in_steps(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    expected: Callable[[ModelAt], tuple[Tensor, float, float] | None],
    loss_fn: ModelFunction | None,
) -> str | None:
    """Why steps in training mode, in training's precision, do not compute what a model does; None if they do.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        expected: of a model on a batch: its outputs, the loss of the step, and the size of the losses to compare with.
        loss_fn: the module's loss, if not what its ``training_step`` returns.
    """
    modes = [(module, module.training) for module in pl_module.modules()]
    sequential = found_sequential(trainer, pl_module)
    assert isinstance(sequential, nn.Sequential)  # noqa: S101 (the caller found it)
    free = {id(parameter) for parameter in trained_parameters(trainer, pl_module)}
    frozen = tuple(name for name, parameter in sequential.named_parameters() if id(parameter) not in free)
    recorder, outputs = Recorder(), list[Tensor]()
    evaluated = as_evaluated(sequential)
    handles = [
        sequential.register_forward_pre_hook(recorder.hook),
        sequential.register_forward_hook(lambda _, __, output: outputs.append(output)),
    ]

    def step(seed: int) -> str | None:
        batch = next(exact_shard(trainer.train_dataloader, trainer.global_rank, trainer.world_size, most=1), None)
        if batch is None:
            return None
        seed_generators(seed)
        batch = as_in_training(trainer, pl_module, batch)
        recorder.start(batch)
        outputs.clear()
        try:
            loss = float(loss_on(pl_module, batch, 0, loss_fn).detach())
        except LossNotEvaluableError as error:
            return f"a step in training mode fails: {error}"
        recorder.end()
        if recorder.failure is not None:
            return recorder.failure
        model = ModelAt(evaluated, frozen, Samples(*recorder.parts[-1]))  # type: ignore[arg-type]
        return _difference(expected(model), loss, outputs[0] if outputs else None)

    def found() -> str | None:
        for seed in _SEEDS:
            restart.batch()
            for module, mode in modes:
                module.training = mode
            if (reason := step(seed)) is not None:
                return reason
        inputs = [part[0] for part in recorder.parts]
        same = not inputs or _same(inputs[0], inputs[-1])
        return None if same else "the inputs of its nn.Sequential differ each time, as by random transforms"

    try:
        with isolated(trainer, pl_module) as restart, precision_context(trainer, autocast=True), torch.enable_grad():
            reasons = gather_results(found)
    finally:
        for handle in handles:
            handle.remove()
    return next((reason for reason in reasons if reason is not None), None)


def _difference(expected: tuple[Tensor, float, float] | None, loss: float, outputs: Tensor | None) -> str | None:
    """How a step differs from what is expected of it, beyond the rounding of float32."""
    if expected is None:
        return "its targets differ from batch to batch"
    exact, value, scale = expected
    off = abs(loss - value) / max(abs(loss), abs(value), scale, 1e-300)
    if outputs is not None:
        computed = outputs.detach().to("cpu", torch.float64).reshape(exact.shape)
        off = max(off, float((computed - exact).abs().max()) / max(float(exact.abs().max()), 1e-300))
    if off <= tolerances.MAX_TRAINING_DIFFERENCE_RATIO:
        return None
    return (
        f"in training its step computes something else than its nn.Sequential in eval mode (by {off:.1e}), as with "
        "dropout, batch statistics, random transforms or autocast"
    )
