"""Cones of a layer's units: which exist, how many are measured, and their volume or why there is none."""

from __future__ import annotations

import itertools
import math
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
from lightning_mnn.landscape.volumes.cone import MIN_SAMPLES
from lightning_mnn.landscape.volumes.ep_sampling import MAX_CLOSED_DIM, predicted_samples
from lightning_mnn.landscape.volumes.expectation_propagation import ep_multiplications
from lightning_mnn.landscape.volumes.region_volume import RegionVolume, num_units_for, region_log_volume
from lightning_mnn.utilities.compat.missing import ignored_errors
from lightning_mnn.utilities.compat.torch_internals import has_forward_hooks
from lightning_mnn.utilities.distributed import gather
from lightning_mnn.utilities.validation import real_number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.network import Network

    VolumeOrReason = tuple[RegionVolume | None, str | None]

NOT_MEASURED = "not measured at the last weights"
_MAX_SAMPLES = 2**20  # samples of a cone, however large the budget
_FEW = 8  # samples of the pass that finds the inputs on which a module calls its network


class OverBudgetError(ValueError):
    """The budget allows too few cones."""


@dataclass(frozen=True)
class ConeSettings:
    """How precisely the log-volumes of regions are estimated, and at what cost.

    Expectation propagation (EP) gives the log measures of all units' cones approximately, and samples of some units
    correct their sum (see :func:`~lightning_mnn.landscape.region_log_volume`). As many units are sampled as the target
    needs and the budget allows. If it does not allow EP and two units of each replica, nothing is measured.

    Attributes:
        target_standard_error: of the log-volume, in nats per square root of the number of units.
        budget: maximal number of multiplications of a measurement, about 1 ns each on one processor core, all replicas
            together.
        check_share: what a measurement may cost at a scheduled check, where ``measure`` and ``measure_every`` do not
            ask for it, as a share of the multiplications of the training since the last measurement; one that costs
            more is left to a later check or the end.

    Raises:
        ValueError: a value is not positive.
    """

    target_standard_error: float = 0.5
    budget: float = 3e9
    check_share: float = 0.05

    def __post_init__(self) -> None:
        """Check the values."""
        real_number("target_standard_error", self.target_standard_error, above=0)
        real_number("budget", self.budget, above=0, remedy="measure=[] measures nothing")
        real_number("check_share", self.check_share, at_least=0, remedy="measure=[end] measures only at the end")


@dataclass(frozen=True)
class ConePlan:
    """Settings for measuring the cones of one layer, or of one layer of each replica.

    Attributes:
        target_standard_error: of the log-volume, per square root of the number of units.
        num_units: number of cones to sample in each layer.
        max_samples: maximal number of samples of each cone.
        cost: predicted number of multiplications, of all replicas.
    """

    target_standard_error: float
    num_units: int
    max_samples: int
    cost: float

    @classmethod
    def within(cls, settings: ConeSettings, *, replicas: int, num_samples: int, width: int, dim: int) -> ConePlan:
        """As many cones as the target needs and the budget allows, of each of ``replicas`` layers (width, dim).

        Raises:
            OverBudgetError: it does not allow two of each layer (one, if the layer has only one).
        """
        sweep = replicas * num_samples * dim  # multiplications of one sweep in each replica
        approximating = replicas * width * ep_multiplications(num_samples, dim)
        wanted = num_units_for(width, settings.target_standard_error)
        if dim <= MAX_CLOSED_DIM:  # closed forms, without a sample
            return cls(settings.target_standard_error, width, _MAX_SAMPLES, approximating)
        samples = predicted_samples(dim, settings.target_standard_error * math.sqrt(wanted / width))
        num_units = int(min(wanted, (settings.budget - approximating) / (sweep * samples)))
        least = min(2, width)
        if num_units < least:
            needed = f"{least} cones a network would take {approximating + least * sweep * samples:.1e} multiplications"
            raise OverBudgetError(f"{needed}, above the budget of {settings.budget:.1e}")
        left = (settings.budget - approximating) / (sweep * num_units)
        cost = approximating + num_units * sweep * samples
        return cls(settings.target_standard_error, num_units, int(max(MIN_SAMPLES, min(_MAX_SAMPLES, left))), cost)

    def measure(self, inputs: Tensor, rows: Tensor, seed: int) -> VolumeOrReason:
        """The volume of the region of rows (d1, d0) on inputs (N, d0), or why there is none.

        Errors of the measurement become the reason, since they must not end training.
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
    """Whether a module is a Linear with torch's own forward whose weights are parameters, not computed from others."""
    parameters = dict(module.named_parameters(recurse=False))
    return type(module) is nn.Linear and parameters.keys() <= {"weight", "bias"} and "forward" not in vars(module)


def reason_not_alone(trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> str | None:
    """Why a module's regions are not those of its network on the training inputs; None if they are.

    The network is that of an ``nn.Sequential`` in the module. In a pass its layers must run once, one after the other,
    the first on the flattened inputs of the batch. This must hold in the module's forward and in its ``training_step``,
    as far as these can be run; both are run on a few samples, isolated from training.
    """
    first = network.hidden_weights[0].data_ptr()
    layers = next(
        list(part) for part in pl_module.modules() if isinstance(part, nn.Sequential) and _begins(part, first)
    )
    layers = [layer for layer in layers if not isinstance(layer, nn.Flatten)]
    if any(map(has_forward_hooks, layers)):
        return "its nn.Sequential has layers with forward hooks, which may change their outputs"
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
            with ignored_errors():  # the guess of its arguments may be wrong
                reasons["forward"] = reason(forward_on)
        with ignored_errors():  # it may be impossible to run it in eval mode, or by itself
            reasons["training_step"] = reason(step_for_its_passes)
    problems = [f"its {method} {problem}" for method, problem in reasons.items() if problem is not None]
    if not reasons:
        problems = ["neither its forward nor its training_step can be run by itself"]
    return next((problem for part in gather(problems) for problem in part), None)


def _begins(layers: nn.Sequential, weights: int) -> bool:
    """Whether the first Linear of an ``nn.Sequential`` has these weights (their address in memory)."""
    linear = next((layer for layer in layers if isinstance(layer, nn.Linear)), None)
    return linear is not None and linear.weight.data_ptr() == weights


def _calls(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[tuple[nn.Module, Any, Any]]:
    """The calls of some layers in a run: the layer, its input and its output."""
    calls: list[tuple[nn.Module, Any, Any]] = []

    def record(layer: nn.Module, inputs: Any, output: Any) -> None:
        calls.append((layer, inputs[0] if inputs else None, output))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _reason_not_plain(
    calls: list[tuple[nn.Module, Any, Any]], layers: Sequence[nn.Module], inputs: Tensor
) -> str | None:
    """Why calls of layers are not one chain that begins with the inputs (n, d0); None if they are."""
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
