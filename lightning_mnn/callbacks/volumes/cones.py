"""Which layers' units have cones, which of these are worth measuring, and their volume or why there is none."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_mnn.callbacks.evaluation.choose_pass import restoring_parameters
from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.run_module import as_in_training, forward_on, forward_parts, step_for_its_passes
from lightning_mnn.data.loaders.shards import exact_shard, flat_batch, num_samples
from lightning_mnn.landscape.pattern import ActivationPattern
from lightning_mnn.landscape.regions.region import Region
from lightning_mnn.landscape.volumes.cone import predicted_samples
from lightning_mnn.landscape.volumes.region_volume import RegionVolume, region_log_volume
from lightning_mnn.utilities.compat.missing import ignored_errors
from lightning_mnn.utilities.compat.torch_internals import has_forward_hooks
from lightning_mnn.utilities.distributed import gather

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.network import Network

    VolumeOrReason = tuple[RegionVolume | None, str | None]

_MOST_SAMPLES = 2**20  # of a cone, however large the budget
_FEW = 8  # samples of a pass that tells what a module calls its network on


class OverBudgetError(ValueError):
    """Too few cones could be measured within a budget."""


@dataclass(frozen=True)
class ConePlan:
    """How the cones of each of some networks' layers are measured.

    Attributes:
        target_standard_error: of one cone's log measure.
        num_units: how many cones of each layer; None: all.
        max_samples: most samples of each.
    """

    target_standard_error: float
    num_units: int | None
    max_samples: int

    @classmethod
    def within(
        cls, budget: float, target_standard_error: float, *, replicas: int, num_samples: int, width: int, dim: int
    ) -> ConePlan:
        """As many cones as a budget of multiplications allows, of each of ``replicas`` layers of (width, dim) weights.

        Raises:
            OverBudgetError: it does not allow two of each (one, where there is only one).
        """
        sweep = replicas * num_samples * dim  # multiplications of one in each replica
        samples = predicted_samples(dim, target_standard_error)
        num_units = int(min(width, budget / (sweep * samples)))
        least = min(2, width)
        if num_units < least:
            needed = f"{least} cones a network would take {least * sweep * samples:.1e} multiplications"
            raise OverBudgetError(f"{needed}, above the budget of {budget:.1e}")
        return cls(
            target_standard_error,
            num_units if num_units < width else None,
            int(min(_MOST_SAMPLES, budget / (sweep * num_units))),
        )

    def measure(self, inputs: Tensor, rows: Tensor, seed: int) -> VolumeOrReason:
        """The volume of the region of rows (d1, d0) on inputs (N, d0), or why there is none.

        What is no reason to end the training is a reason here.
        """
        try:
            volume = region_log_volume(
                Region(inputs, ActivationPattern.from_preactivations(inputs @ rows.mT)),
                rows,
                target_standard_error=self.target_standard_error,
                num_units=self.num_units,
                max_samples=self.max_samples,
                seed=seed,
            )
        except (ValueError, ArithmeticError) as error:
            return None, str(error)
        return volume, None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a Linear whose weights are parameters and not computed, with torch's own forward."""
    parameters = dict(module.named_parameters(recurse=False))
    return type(module) is nn.Linear and parameters.keys() <= {"weight", "bias"} and "forward" not in vars(module)


def reason_not_alone(trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> str | None:
    """Why a module's regions are not those of its network on the training inputs; None where they are.

    The network is that of an ``nn.Sequential`` in the module, whose layers must run once in a pass, one after the
    other, the first on the flattened inputs of the batch: in the module's forward and in its ``training_step``, as far
    as these can be run. They are on a few samples, without a trace.
    """
    first = network.hidden_weights[0].data_ptr()
    layers = next(
        list(part) for part in pl_module.modules() if isinstance(part, nn.Sequential) and _begins(part, first)
    )
    layers = [layer for layer in layers if not isinstance(layer, nn.Flatten)]
    if any(map(has_forward_hooks, layers)):
        return "its nn.Sequential has layers with forward hooks, which may change what these give"
    few = torch.arange(min(_FEW, num_samples(trainer.train_dataloader)))

    def reason(run: ModelFunction) -> str | None:
        with isolated(trainer, pl_module), restoring_parameters(pl_module), warnings.catch_warnings(action="ignore"):
            (batch,) = exact_shard(trainer.train_dataloader, chosen=few, batch_size=len(few))
            inputs = flat_batch(batch)[0].clone()
            calls = _calls(layers, lambda: run(pl_module, as_in_training(trainer, pl_module, batch)))
            return _reason_not_plain(calls, layers, inputs)

    reasons: dict[str, str | None] = {}
    with torch.no_grad():
        if forward_parts(pl_module, [None, None]) is not None:
            with ignored_errors():  # of a wrong guess of what it takes
                reasons["forward"] = reason(forward_on)
        with ignored_errors():  # what cannot be run in eval mode, or by itself
            reasons["training_step"] = reason(step_for_its_passes)
    told = [f"its {what} {why}" for what, why in reasons.items() if why is not None]
    if not reasons:
        told = ["neither its forward nor its training_step can be run by itself"]
    return next((reason for part in gather(told) for reason in part), None)


def _begins(layers: nn.Sequential, weights: int) -> bool:
    """Whether the first Linear of an ``nn.Sequential`` is the one of some weights."""
    linear = next((layer for layer in layers if isinstance(layer, nn.Linear)), None)
    return linear is not None and linear.weight.data_ptr() == weights


def _calls(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[tuple[nn.Module, Any, Any]]:
    """Which of some layers are called, on what, and what they give."""
    calls: list[tuple[nn.Module, Any, Any]] = []

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        calls.append((layer, inputs[0] if inputs else None, output))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _reason_not_plain(
    calls: list[tuple[nn.Module, Any, Any]], layers: Sequence[nn.Module], inputs: Tensor
) -> str | None:
    """Why calls of layers are not one chain that begins with the inputs (n, d0); None where they are."""
    times = sum(layer is layers[0] for layer, _, _ in calls)
    if times != 1:
        return f"calls the first Linear of its nn.Sequential {times} times, and not once"
    chained = all(here[1] is before[2] for before, here in itertools.pairwise(calls))
    if [id(layer) for layer, _, _ in calls] != [id(layer) for layer in layers] or not chained:
        return "does not run the layers of its nn.Sequential one after the other"
    seen = calls[0][1]
    if not isinstance(seen, torch.Tensor) or not torch.equal(seen.reshape(-1, seen.shape[-1]), inputs.to(seen)):
        return "calls its nn.Sequential on something other than the inputs of a batch"
    return None
