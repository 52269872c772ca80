"""The volume of the region of the whole training set, for networks whose regions are products of cones."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info

from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.module_network import network_of, states_network
from lightning_mnn.callbacks.evaluation.training_set import (
    reason_not_evaluated,
    training_samples,
    training_set_statistics,
)
from lightning_mnn.callbacks.trainer.long_pass import long_pass
from lightning_mnn.callbacks.volumes.cones import NOT_MEASURED, ConePlan, OverBudgetError, reason_not_alone
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.landscape import bounds
from lightning_mnn.landscape.pattern import ActivationPattern
from lightning_mnn.landscape.volumes.region_volume import log_volume_bound_from_sines
from lightning_mnn.loggers.media import log_histogram, log_scalars
from lightning_mnn.utilities.distributed import on_first_process
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import MisfitError

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.volumes.cones import ConeSettings, VolumeOrReason
    from lightning_mnn.callbacks.volumes.probe import LocalVolumeSettings
    from lightning_mnn.landscape.network import Network
    from lightning_mnn.landscape.regions.statistics import NetworkStatistics
    from lightning_mnn.landscape.volumes.region_volume import RegionVolume

_NOT_OF_REPLICAS = 'volumes of replicas are measured only if measure is given, as in measure=["end"]'
_ON_A_KINK = "a pre-activation is zero up to rounding: the weights lie on a kink"
_NO_PRODUCT = "with more than one hidden layer a region is not a product of cones"
_NO_NETWORK = "not a network with one hidden layer and one output, whose regions are products of cones"


class RegionMonitor:
    """The region of a network's weights: a bound on its volume, the theorems, and the volume itself.

    Args:
        settings: of the cones.
        epsilon: smallest classification error of the minima that the theorems count.
        seed: seed of the random numbers; replica r at step t has its own.

    Attributes:
        log_lower_bound: the bound, (...); None before training.
        volumes: the volumes at the present weights, one per replica; None where there is none.
        reasons: why there is no volume, one per replica; None where there is one.
        regions: of each replica, the digest of the region that was measured last, and the step at which it was.
    """

    def __init__(self, settings: ConeSettings, epsilon: float, seed: int) -> None:
        self.log_lower_bound: Tensor | None = None
        self.volumes: list[RegionVolume | None] = [None]
        self.reasons: list[str | None] = [NOT_MEASURED]
        self.regions: list[tuple[str, int]] = []
        self._settings, self._epsilon, self._seed = settings, epsilon, seed
        self._last: list[VolumeOrReason] = []  # what was found in these regions; empty in a resumed run
        self._statistics: NetworkStatistics | None = None  # at the present weights

    @property
    def measured_by_default(self) -> bool:
        """Whether the volume is measured at the end of a run that does not ask for it: not that of replicas."""
        return len(self.volumes) == 1

    def fits_checks(self, pl_module: pl.LightningModule, epochs: int) -> bool:
        """Whether a measurement now is cheap beside the training of so many epochs."""
        assert self._statistics is not None  # noqa: S101 (for the type checker)
        width, dim = _network(pl_module).rows.shape[-2:]
        sizes = {"num_samples": self._statistics.num_samples, "width": width, "dim": dim}
        training = 3.0 * epochs * self._statistics.num_samples * width * (dim + 1)
        try:
            return ConePlan.within(self._settings, replicas=1, **sizes).cost <= self._settings.check_share * training
        except OverBudgetError:
            return False

    def leave_out(self) -> None:
        """Record that the volumes are not measured, as they are not asked for."""
        self.reasons = [_NOT_OF_REPLICAS] * len(self.reasons)

    def run_out(self, why: str, *, bounded: bool) -> None:
        """Record that there was no time for the volumes, or not even for the bound."""
        self.volumes, self.reasons = [None] * len(self.volumes), [why] * len(self.reasons)
        if not bounded:
            self.log_lower_bound, self._statistics = None, None

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor | float | None] | None:
        """Bound the volume, once for the same weights, and drop what was measured at other weights.

        Returns:
            The values to log; None if the weights are still the same.
        """
        network = _network(pl_module)
        what = f"AngularVolumeMonitor after {trainer.global_step} steps, a bound of the volume"
        with _isolated_if_foreign(trainer, pl_module), long_pass(trainer, what):
            statistics = training_set_statistics(trainer, pl_module)
        if statistics is self._statistics:
            return None
        self._statistics = statistics
        self.log_lower_bound = log_volume_bound_from_sines(statistics.layers[0].smallest_sines, network.rows.shape[-1])
        replicas = self.log_lower_bound.numel()
        self.volumes, self.reasons = [None] * replicas, [NOT_MEASURED] * replicas
        scalars: dict[str, Tensor | float | None] = {"volume/log_lower_bound": self.log_lower_bound}
        biased = network.hidden_bias is not None or network.output_bias is not None
        if trainer.global_step == 0 and not biased:  # the theorems are for networks without biases
            sizes = statistics.num_samples, network.input_dim, network.hidden_dims[0]
            scalars |= theorems(*sizes, network.negative_slope, self._epsilon)
        return scalars

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the volume of each replica's region; that of a region that was measured last is known."""
        network = _network(pl_module)
        with _isolated_if_foreign(trainer, pl_module):
            self._last, self.regions = on_first_process(trainer, lambda: self._found(trainer, network))
        self.volumes, self.reasons = [volume for volume, _ in self._last], [reason for _, reason in self._last]
        failed = [volume.fallbacks.tolist() for volume in self.volumes if volume and len(volume.fallbacks)]
        if failed:
            units = ", ".join(str(units) for units in failed)
            rank_zero_info(f"AngularVolumeMonitor: expectation propagation failed for units {units}: they are sampled")

    def log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the volume: means over the replicas that have one."""
        volumes = [volume for volume in self.volumes if volume is not None]
        if not volumes:
            return
        assert self._statistics is not None  # noqa: S101 (for the type checker)
        dim = _network(pl_module).rows.shape[-1]
        values, errors = torch.tensor([(v.value, v.standard_error) for v in volumes], dtype=torch.float64).T
        units = torch.stack([volume.unit_values for volume in volumes])
        log_num_cells = float(bounds.log_num_cells(self._statistics.num_samples, dim))
        log_scalars(
            trainer,
            {
                "volume/log_volume": values,
                "volume/log_volume_standard_error": float(errors.norm()) / len(volumes),  # replicas are independent
                "volume/unit_mean": units.mean(-1),
                "volume/unit_least": units.amin(-1),
                "volume/unit_most": units.amax(-1),
                "volume/log_ratio_to_average_cell": units.mean(-1) + log_num_cells,
                "volume/units_without_ep": sum(float(len(volume.fallbacks)) for volume in volumes) / len(volumes),
            },
        )
        for logger in trainer.loggers:
            log_histogram(logger, "volume/units", units.flatten(), trainer.global_step)

    def report(self) -> None:
        """Say why replicas have no volume."""
        for reason in dict.fromkeys(self.reasons):
            if reason is not None:
                rank_zero_info(f"AngularVolumeMonitor: log-volume not measured: {reason}")

    @torch.no_grad()
    def _found(self, trainer: pl.Trainer, network: Network) -> tuple[list[VolumeOrReason], list[tuple[str, int]]]:
        """The volume of each replica's region, or why there is none, and the regions with the steps of their seeds.

        Run by one process, which reads all samples.
        """
        assert self._statistics is not None  # noqa: S101 (for the type checker)
        assert self.log_lower_bound is not None  # noqa: S101 (for the type checker)
        lower_bounds = self.log_lower_bound.reshape(-1).tolist()
        width, dim = network.rows.shape[-2:]
        sizes = {"num_samples": self._statistics.num_samples, "width": width, "dim": dim}
        try:
            plan = ConePlan.within(self._settings, replicas=len(lower_bounds), **sizes)
        except OverBudgetError as error:
            return [(None, str(error))] * len(lower_bounds), []
        inputs, _ = training_samples(trainer, network, whole=True)
        network = network.to(inputs.device).to(torch.float64)
        rows = network.rows.reshape(-1, width, dim)
        inputs = network.augment(inputs.to(torch.float64)).expand(len(rows), -1, -1)
        found: list[VolumeOrReason] = []
        regions = []
        for r, (x, w, bound) in enumerate(zip(inputs, rows, lower_bounds, strict=True)):
            digest = str(ActivationPattern.from_preactivations(x @ w.mT).digest())
            before, step = self.regions[r] if r < len(self.regions) else ("", 0)
            if digest != before:
                step = trainer.global_step
            regions.append((digest, step))
            if bound == -math.inf:
                found.append((None, _ON_A_KINK))
            elif digest == before and self._last and self._last[r][0] is not None:
                found.append(self._last[r])
            else:
                found.append(plan.measure(x, w, generator(self._seed + r, "volume", step).initial_seed()))
        return found, regions


def theorems(
    num_samples: int, input_dim: int, width: int, negative_slope: float, epsilon: float
) -> dict[str, Tensor | float | None]:
    """Theorems 6, 8, 9 and 10 at the given sizes, by logged name; None where a theorem does not apply."""
    sizes = (num_samples, input_dim, width)
    wide = width >= 2 * num_samples / input_dim  # d1* of Theorem 9
    return {
        "volume/theorem_6_suboptimal": float(bounds.suboptimal_log_volume(*sizes, epsilon, negative_slope)),
        "volume/theorem_8_width": float(bounds.sufficient_width(*sizes[:2])) if input_dim > 1 else None,
        "volume/theorem_9_global": float(bounds.global_log_volume(*sizes)) if wide else None,
        "volume/theorem_9_failure": float(bounds.global_failure_probability(*sizes[:2])) if wide else None,
        "volume/theorem_10_ratio": float(bounds.log_volume_ratio(*sizes, epsilon, negative_slope)),
    }


def has_cones(pl_module: pl.LightningModule) -> bool:
    """Whether regions of a module's network are products of cones."""
    network = network_of(pl_module)
    return network is not None and len(network.hidden_weights) == 1


def reason_no_cones(trainer: pl.Trainer, pl_module: pl.LightningModule, local: LocalVolumeSettings) -> str | None:
    """Why a module's regions are not products of cones on the training set; None if they are.

    Raises:
        MisfitError: settings of the local volume are given that do not go with a module that defines its network.
    """
    network, given = network_of(pl_module), local.forward_arguments
    if network is None:
        return _NO_NETWORK
    if len(network.hidden_weights) > 1:
        return _NO_PRODUCT
    if states_network(pl_module):
        if given:
            raise MisfitError(
                f"{', '.join(given)} are for modules without a method network(); {type(pl_module).__name__} has "
                "one, with one hidden layer, and its volume is that of the whole training set: leave them out"
            )
        return None
    reason: str | None = None
    if given:
        reason = f"{', '.join(given)} are given, which are arguments of the local volume"
    else:
        try:
            num_samples(trainer.train_dataloader)
        except TypeError as error:
            reason = str(error)
    with _isolated_if_foreign(trainer, pl_module):
        reason = reason or reason_not_evaluated(trainer, network) or reason_not_alone(trainer, pl_module, network)
    if reason is not None:
        rank_zero_info(f"AngularVolumeMonitor: the local volume is measured, and not that of the region: {reason}")
    return reason


def _network(pl_module: pl.LightningModule) -> Network:
    network = network_of(pl_module)
    assert network is not None  # noqa: S101 (known since training began)
    return network


def _isolated_if_foreign(trainer: pl.Trainer, pl_module: pl.LightningModule) -> AbstractContextManager[Any]:
    """Isolate a pass over a module that does not define its network: its data may draw random numbers."""
    return nullcontext() if states_network(pl_module) else isolated(trainer, pl_module)
