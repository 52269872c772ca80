"""Local volumes in any LightningModule: the pattern of a probe set, under random moves of all parameters.

:class:`~lightning_mnn.callbacks.AngularVolumeMonitor` uses it if a module's regions are not products of cones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import rank_zero_info

from lightning_mnn.callbacks.evaluation.choose_pass import pass_of_training
from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.module_network import NetworkModule
from lightning_mnn.callbacks.evaluation.snapshots import weights_of
from lightning_mnn.callbacks.volumes.cones import NOT_MEASURED, ConePlan, OverBudgetError
from lightning_mnn.callbacks.volumes.probe import ProbePasses, are_plain, probe_parts
from lightning_mnn.findings import Fact, Unknown, UnknownCode
from lightning_mnn.landscape.perturbation import finest_sigma
from lightning_mnn.landscape.volumes.random_moves import ALL_LAYERS, SIGMAS, LocalVolume, count_kept
from lightning_mnn.loggers.media import log_image, log_scalars, shows_images
from lightning_mnn.utilities.distributed import gather_results, on_first_process
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import to_host

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.volumes.cones import ConeSettings, VolumeOrReason
    from lightning_mnn.callbacks.volumes.probe import FirstLayer, LayersOfProbe, LocalVolumeSettings
    from lightning_mnn.landscape.volumes.region_volume import RegionVolume

_REPLICAS_APART = "replicas are several networks and have no common pattern: train them one by one"


@dataclass(frozen=True)
class Found:
    """Results at some weights; the default is that nothing was measured there.

    Attributes:
        volume: keep probabilities; None if there are none.
        reason: why there are none, or none for some σ.
        first_layer: name of the layer whose cones were to be measured.
        cones: their volume; None if there is none.
        cones_reason: why there is none.
    """

    volume: LocalVolume | None = None
    reason: str | None = NOT_MEASURED
    first_layer: str | None = None
    cones: RegionVolume | None = None
    cones_reason: str | None = NOT_MEASURED

    def plain(self) -> dict[str, Any]:
        """Plain values for ``summary.json``."""
        curves = None
        if self.volume is not None:
            both = {ALL_LAYERS: self.volume.total} | self.volume.layers
            curves = {name: curve.plain() for name, curve in both.items()}
        return {
            "local_volume": curves,
            "local_volume_reason": self.reason,
            "first_layer": {
                "layer": self.first_layer,
                "log_volume": self.cones and self.cones.value,
                "log_volume_standard_error": self.cones and self.cones.standard_error,
                "log_volume_reason": self.cones_reason,
            },
        }

    def facts(self) -> list[Fact]:
        """What was found, as sentences."""
        half = None if self.volume is None else self.volume.total.half_sigma
        facts = []
        if self.volume is not None and half is not None:
            low, high = self.volume.total.half_sigma_low, self.volume.total.half_sigma_high
            sides = "" if low is None or high is None else f" (95 %: {low:.2g} to {high:.2g})"
            text = (
                f"a random move of all weights by {half:.2g} of their size{sides} keeps every pattern of the probe in "
                "half of the cases"
            )
            facts.append(Fact("local_volume", text, value=half))
        if self.cones is not None:
            text = (
                f"the cones of {self.first_layer} have a log-volume of {self.cones.value:.4g} ± "
                f"{self.cones.standard_error:.2g} nats"
            )
            facts.append(Fact("log_volume", text, layer=self.first_layer, value=float(self.cones.value)))
        return facts

    def unknowns(self) -> list[Unknown]:
        """What could not be measured, and why."""
        part = "the local volume" if self.volume is None else "a part of the local volume"
        reasons = {part: self.reason, "the cones of the first layer": self.cones_reason}
        code = UnknownCode.NOT_MEASURED
        return [Unknown(what, code, reason) for what, reason in reasons.items() if reason is not None]

    def scalars(self) -> dict[str, Tensor | float | None]:
        """The values to log."""
        scalars: dict[str, Tensor | float | None] = {}
        if self.volume is not None:
            total = self.volume.total
            sides = ("", "_low", "_high")
            scalars |= {f"volume/half_sigma{side}": getattr(total, f"half_sigma{side}") for side in sides}
            scalars |= {f"volume/{name}/half_sigma": curve.half_sigma for name, curve in self.volume.layers.items()}
            names = keep_names(total.sigmas)
            scalars |= {name: kept.value for name, kept in zip(names, total.kept, strict=True)}
        if self.cones is not None:
            scalars[f"volume/{self.first_layer}/log_volume"] = self.cones.value
            scalars[f"volume/{self.first_layer}/log_volume_standard_error"] = self.cones.standard_error
        return scalars


class LocalVolumeMonitor:
    """The local volume of a module, and the cones of its first layer, at its present weights.

    Args:
        settings: of the probe and the moves.
        cones: of the cones of the first layer.
        seed: seed of the probe, the moves and the cones.
        reason: why there is no volume of a whole region.

    Attributes:
        found: the results at the present weights.
        log_lower_bound, volumes, reasons: of a whole region: none, and why.
    """

    log_lower_bound: Tensor | None = None
    measured_by_default = True
    regions: tuple[()] = ()

    def fits_checks(self, pl_module: pl.LightningModule, epochs: int) -> bool:  # noqa: ARG002 (as of a region)
        """A local volume takes seconds: it is measured only where that is asked for, and at the end."""
        return False

    def __init__(
        self, settings: LocalVolumeSettings, cones: ConeSettings, seed: int, reason: str | None = None
    ) -> None:
        self.found = Found()
        self.volumes: list[RegionVolume | None] = [None]
        self.reasons: list[str | None] = [NOT_MEASURED]
        self._settings, self._cones, self._seed, self._reason = settings, cones, seed, reason
        self._moment: tuple[int, ...] | None = None  # identifies the weights

    def leave_out(self) -> None:
        """Do nothing: the local volume of a run that does not ask for it is measured at the end."""

    def run_out(self, why: str, *, bounded: bool) -> None:  # noqa: ARG002 (as of a region)
        """Record that there was no time for the volume."""
        self.found = Found(reason=why, cones_reason=why)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the module once on its probe, so that errors are raised before training.

        Raises:
            NoKinksError: no kink was met, or none that ``modules`` names.
            TypeError: the samples of the training set cannot be enumerated, or the module cannot be run.
        """
        if _is_replicated(pl_module):
            return
        if self._settings.forward_fn is None and not isinstance(pl_module, NetworkModule):

            def batch() -> Any:
                parts = probe_parts(trainer, pl_module, self._settings, self._seed)
                return apply_to_collection(parts[0], torch.Tensor, torch.clone)

            chosen = pass_of_training(trainer, pl_module, batch, self._settings.modules, "AngularVolumeMonitor")
            self._settings = replace(self._settings, forward_fn=chosen)
        with isolated(trainer, pl_module):
            ProbePasses(trainer, pl_module, self._settings, self._seed).find_layers()

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor | float | None] | None:
        """Drop what was found at other weights.

        Returns:
            The values to log, which are none; None if the weights are still the same.
        """
        moment = trainer.global_step, *map(int, to_host(weights_of(pl_module)))
        if moment == self._moment:
            return None
        self._moment, self.found, self.reasons = moment, Found(), [self._reason]
        return {}

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the keep probabilities and the first layer's cones, the same on every process.

        The draws are divided among the processes.
        """
        if _is_replicated(pl_module):
            self.found = Found(reason=_REPLICAS_APART, cones_reason=_REPLICAS_APART)
            return
        with isolated(trainer, pl_module):
            passes = ProbePasses(trainer, pl_module, self._settings, self._seed)
            layers = passes.find_layers()
            volume, reason = _keep_probabilities(trainer, self._settings, passes, layers, self._seed)
        seed = generator(self._seed, "volume", trainer.global_step).initial_seed()
        cones = on_first_process(trainer, lambda: _first_cones(layers.first, self._cones, seed))
        self.found = Found(volume, reason, layers.first.name if layers.first else None, *cones)

    def log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the results, and a picture of them to loggers that can show pictures."""
        if _is_replicated(pl_module):
            return
        volume, scalars = self.found.volume, self.found.scalars()
        log_scalars(trainer, scalars)
        if volume is None or not trainer.is_global_zero or not any(map(shows_images, trainer.loggers)):
            return
        from lightning_mnn.figures.volumes import local_volume_figure  # noqa: PLC0415 (matplotlib is slow)

        draws = f"{self._settings.num_draws} draws"
        title = f"{type(pl_module).__name__} after {trainer.global_step} steps, {draws}"
        with TemporaryDirectory() as folder:
            picture = local_volume_figure(volume, Path(folder) / "local_volume.png", title)
            for logger in trainer.loggers:
                log_image(logger, "volume/local", picture, trainer.global_step)

    def report(self) -> None:
        """Say why there is no local volume, if there is none."""
        if self.found.volume is None:
            rank_zero_info(f"AngularVolumeMonitor: local volume not measured: {self.found.reason}")


def keep_names(sigmas: Sequence[float]) -> list[str]:
    """The logged names of the probabilities at some σ, with as few digits as distinguish them.

    >>> keep_names([0.001, 0.00316]), keep_names([0.0010, 0.0011])
    (['volume/keep/1e-03', 'volume/keep/3e-03'], ['volume/keep/1.0e-03', 'volume/keep/1.1e-03'])
    """
    digits = 0
    while len({f"{sigma:.{digits}e}" for sigma in sigmas}) < len(sigmas):
        digits += 1
    return [f"volume/keep/{sigma:.{digits}e}" for sigma in sigmas]


def _keep_probabilities(
    trainer: pl.Trainer, settings: LocalVolumeSettings, passes: ProbePasses, found: LayersOfProbe, seed: int
) -> tuple[LocalVolume | None, str | None]:
    """The curves, or why there are none; with curves, what they leave out."""
    parameters = passes.parameters
    if not found.layers:
        return None, "no kink depends on a parameter that requires a gradient"
    if found.nan_layers:
        return None, f"the input of {found.nan_layers[0]} contains NaN"
    if not are_plain(parameters):
        return None, "the parameters are not plain tensors, each whole on its device"
    finest = finest_sigma(parameters)
    wanted = SIGMAS if settings.sigmas is None else tuple(settings.sigmas)
    sigmas = tuple(sigma for sigma in wanted if sigma >= finest)
    hidden = f"σ below {finest:.1e} would be lost in the rounding of the weights" if sigmas != wanted else None
    if not sigmas:
        return None, hidden
    unseen = f"kinks of {', '.join(found.opaque)} cannot be seen" if found.opaque else None
    runs = [lambda part=part: passes.pattern(part, found.layers) for part in passes.parts]
    draws = range(trainer.global_rank, settings.num_draws, trainer.world_size)
    step_seed = generator(seed, "local volume", trainer.global_step).initial_seed()

    def local_counts() -> Mapping[str, Tensor] | str:
        try:
            return count_kept(parameters, runs, sigmas, draws, seed=step_seed)
        except (ValueError, ArithmeticError) as error:
            return str(error)

    counts = gather_results(local_counts)
    errors = [part for part in counts if isinstance(part, str)]
    if errors:
        return None, errors[0]
    kept = [part for part in counts if not isinstance(part, str)]
    summed = {name: cast("Tensor", sum(part[name] for part in kept)) for name in kept[0]}
    return LocalVolume.of_counts(sigmas, summed, settings.num_draws), "; ".join(filter(None, (hidden, unseen))) or None


def _is_replicated(pl_module: pl.LightningModule) -> bool:
    return isinstance(pl_module, NetworkModule) and pl_module.replicas > 1


def _first_cones(first: FirstLayer | None, settings: ConeSettings, seed: int) -> VolumeOrReason:
    """The volume of the first layer's cones on the probe, or why there is none."""
    if first is None:
        return None, "no kink depends on a parameter that requires a gradient"
    if first.rows is None:
        return None, first.reason
    device = "cpu" if first.rows.device.type == "mps" else first.rows.device  # MPS has no float64
    rows, inputs = (tensor.to(device).double() for tensor in (first.rows, torch.cat(first.inputs)))
    if rows.shape[1] > inputs.shape[1]:  # a bias
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    try:
        plan = ConePlan.within(settings, replicas=1, num_samples=len(inputs), width=len(rows), dim=rows.shape[1])
    except OverBudgetError as error:
        return None, str(error)
    return plan.measure(inputs, rows, seed)
