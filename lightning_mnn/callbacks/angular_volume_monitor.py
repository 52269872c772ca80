"""AngularVolumeMonitor: how large is the region that training is in, compared with the paper's theorems?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_mnn.callbacks.local_minimum_detector import LocalMinimumDetector
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.last_checkpoint import or_stop_here
from lightning_mnn.callbacks.volumes.cones import ConeSettings
from lightning_mnn.callbacks.volumes.local import Found, LocalVolumeMonitor
from lightning_mnn.callbacks.volumes.probe import LocalVolumeSettings
from lightning_mnn.callbacks.volumes.region import RegionMonitor, has_cones, reason_no_cones, theorems
from lightning_mnn.findings import Fact, Unknown, UnknownCode
from lightning_mnn.landscape.volumes.random_moves import SIGMAS
from lightning_mnn.loggers.media import log_scalars
from lightning_mnn.utilities.settings import accepts_fields_of, settings_or_defaults
from lightning_mnn.utilities.transfer import plain
from lightning_mnn.utilities.validation import ArgumentError, positive_integer, real_number, seed_number

if TYPE_CHECKING:
    from collections.abc import Collection

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.landscape.volumes.region_volume import RegionVolume

MOMENTS = ("start", "certificate", "end")


@accepts_fields_of(cones=ConeSettings, local_volume=LocalVolumeSettings)
class AngularVolumeMonitor(ScheduledCallback):
    """Logs how large the current region is.

    *For a network with one hidden layer and one output* (an MNN, a module with a method ``network()``, or one
    ``nn.Sequential`` that the module runs once on the unchanged inputs of a batch; see
    :func:`~lightning_mnn.callbacks.evaluation.module_network.network_of`) the size is the angular volume
    V(R) = P(W ∈ R) of the region of the whole training set, for i.i.d. normal W, as a logarithm in nats. Every check
    logs a rigorous lower bound, the first one also the paper's theorems at the run's sizes. The volume itself is
    estimated at every check too, if that is cheap, and at the end (see :class:`~lightning_mnn.callbacks.ConeSettings`).
    A region that has not changed since it was measured is not measured again.

    *For any other module* with kinks, including a deeper MNN, the size is the local volume on a probe set, at the end
    and where ``measure`` says: the probability P(σ) that a random move of all parameters that require a gradient, of
    relative size σ, keeps the pattern of the probe in eval mode. If the first layer's units have cones (its kinks are
    at 0 and come after an ``nn.Linear`` whose inputs depend on no parameter), their volume on the probe is estimated,
    too.

    What is logged is listed in the page Logged names.

    Args:
        schedule: when to check, besides the start and the end; None: every 100 epochs.
        epsilon: smallest classification error of the minima that the theorems count.
        measure: when to measure the volume, any of "start", "certificate" (the first time that a LocalMinimumDetector
            of the run has certified every replica, whether or not it stops training) and "end". None: for one network,
            at the end, and at every check if ``measure_every`` is not given and the cost is within
            ``cones.check_share`` of the training since; volumes of replicas would cost many times the training of such
            small networks. With a tier other than "full" there is no volume of the start, and "certificate" is the end.
        measure_every: also measure it at every k-th check.
        cones: precision and budget of the measures of cones; None: the defaults of
            :class:`~lightning_mnn.callbacks.ConeSettings`.
        local_volume: the probe, the moves, and how the module runs; None: the defaults of
            :class:`~lightning_mnn.callbacks.LocalVolumeSettings`. If it has ``modules``, ``forward_fn`` or a batch as
            ``probe``, the local volume is measured, also of an ``nn.Sequential`` with one hidden layer.
        seed: seed of the random numbers.
        tier: "light": at most 1 % of training's time, "standard": at most 5 %, "full": no limit. What does not fit, by
            the clock, is left out, so two runs may measure at different steps.
        end_seconds: time limit of the work at the end of training; None: what the tier leaves, and with "full" 30 s or
            5 % of training's time, whichever is more, for an MNN no limit; ``math.inf``: no limit.
        strict: if true, an error in the callback ends the run; otherwise it warns once, and training goes on without
            the callback.

    Attributes:
        log_lower_bound: the last bound, (...); None before training and for other modules.
        volumes: the volumes at the last check's weights, one per replica; None where there is none.
        reasons: why there is no volume, one per replica; None where there is one.
        local: for other modules: the local volume at the last check's weights, or why there is none; otherwise None.

    Raises:
        ValueError: an argument is out of range.
        NoKinksError: (at the start of training) the module met no kink, or none that ``modules`` names.
        TypeError: (at the start of training) the samples of the training set cannot be enumerated, or the module
            cannot be run on them without ``forward_fn``; or ``modules``, ``forward_fn`` or a batch as ``probe`` is
            given for a module whose method ``network()`` defines a network with one hidden layer.

    >>> AngularVolumeMonitor(epsilon=0.2).theorems(320, 40, 40, 0.0)["volume/theorem_8_width"]
    20.0
    """

    missing = "no volumes are measured"
    remedy = (
        "forward_fn(module, batch), if the module's forward takes something other than a batch; probe=batch, a batch "
        "of samples, if those of the training set cannot be enumerated; modules=, the layers whose pattern counts"
    )

    def __init__(
        self,
        schedule: Schedule | None = None,
        epsilon: float = 0.1,
        *,
        measure: Collection[str] | None = None,
        measure_every: int | None = None,
        cones: ConeSettings | None = None,
        local_volume: LocalVolumeSettings | None = None,
        seed: int = 0,
        tier: str = "full",
        end_seconds: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(schedule or Schedule(every=100), strict=strict, tier=tier, end_seconds=end_seconds)
        if measure is not None and (isinstance(measure, str) or not set(measure) <= set(MOMENTS)):
            problem = f"must contain any of {', '.join(MOMENTS)}"
            raise ArgumentError("measure", measure, problem, "give a list of them, as [end]")
        self.epsilon = real_number("epsilon", epsilon, at_least=0, at_most=1)
        self.measure = None if measure is None else tuple(measure)
        self.measure_every = None if measure_every is None else positive_integer("measure_every", measure_every)
        self.cones = settings_or_defaults("cones", cones, ConeSettings)
        self.local_volume = settings_or_defaults("local_volume", local_volume, LocalVolumeSettings)
        self.seed = seed_number("seed", seed)
        self._monitor: RegionMonitor | LocalVolumeMonitor = self._region_monitor()
        self._epochs_measured = 0  # epochs before the last measurement
        self._bounded: int | None = None  # the step after whose weights the bound is known
        self._measured = False  # whether the volume was measured at the present weights, or this was tried
        self._unlogged: dict[str, Tensor | float | None] = {}  # values for these weights
        self._logged_step: int | None = None  # the last step that was logged
        self._resumed: tuple[int | None, bool] = (None, False)  # that of the resumed run, and whether it had measured
        self._checks = 0
        self._certified = False
        self._regions: list[tuple[str, int]] = []  # those of the run that is resumed

    @property
    def log_lower_bound(self) -> Tensor | None:
        """The last bound."""
        return self._monitor.log_lower_bound

    @property
    def volumes(self) -> list[RegionVolume | None]:
        """The volumes at the last check's weights, one per replica."""
        return self._monitor.volumes

    @property
    def reasons(self) -> list[str | None]:
        """Why there is no volume, one per replica."""
        return self._monitor.reasons

    @property
    def local(self) -> Found | None:
        """The local volume at the last check's weights."""
        return self._monitor.found if isinstance(self._monitor, LocalVolumeMonitor) else None

    def theorems(
        self, num_samples: int, input_dim: int, width: int, negative_slope: float
    ) -> dict[str, Tensor | float | None]:
        """Theorems 6, 8, 9 and 10 at the given sizes, by logged name; None where a theorem does not apply."""
        return theorems(num_samples, input_dim, width, negative_slope, self.epsilon)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._monitor = self._region_monitor() if has_cones(pl_module) else self._local_monitor()
            self._measured, self._checks, self._certified = False, 0, False
            self._unlogged, self._logged_step, self._resumed, self._regions = {}, None, (None, False), []
            self._epochs_measured = 0
            _put_behind_detectors(trainer, self)

    @override
    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reason = reason_no_cones(trainer, pl_module, self.local_volume)
        if reason is None:
            self._monitor = regions = self._region_monitor()
            regions.regions = self._regions
        else:
            self._monitor = monitor = self._local_monitor(reason)
            monitor.prepare(trainer, pl_module)

    @override
    def least_seconds(self, trainer: pl.Trainer) -> float:
        """Those of the moves of a local volume at the end, each a pass forwards over the probe."""
        probe, sigmas = self.local_volume.probe, self.local_volume.sigmas or SIGMAS
        if not self._ending or has_cones(trainer.lightning_module) or not isinstance(probe, int) or self.measure == ():
            return 0.0
        return self._seconds_of_samples(trainer, probe * self.local_volume.num_draws * len(sigmas)) / 3

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._update(trainer, pl_module)
        if self.measure is None and self.measure_every is None:
            since = self.completed_epochs - self._epochs_measured
            due = self._monitor.measured_by_default and self._monitor.fits_checks(pl_module, since)
        elif self._checks == 0:
            due = self._wanted("start")
        else:
            due = self.measure_every is not None and self._checks % self.measure_every == 0
        if due:
            self._measure(trainer, pl_module)
        self._log_bound(trainer)
        self._checks += 1

    @override
    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumed = self._last_step is not None
        if self._resumed[0] == trainer.global_step:
            self._update(trainer, pl_module)  # now: a detector may move the weights at this very step
        super().start(trainer, pl_module)
        if resumed:  # if the measurement was interrupted; otherwise there is nothing to do
            self._measure_at_certificate(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._measure_if_certified(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._measure_if_certified(trainer, pl_module)

    @override
    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().finish(trainer, pl_module)
        self._update(trainer, pl_module)  # again: a detector may just have moved to the exact minimum
        self._measure_at_certificate(trainer, pl_module)
        if self._wanted("end"):
            self._measure(trainer, pl_module)
        elif self.measure is None and not self._measured:
            self._monitor.leave_out()
        self._log_bound(trainer)
        if self._measured:
            self._monitor.report()

    @override
    def facts(self) -> list[Fact]:
        if self.failure is not None:
            return []
        several, facts = len(self.volumes) > 1, []
        for replica, volume in enumerate(self.volumes):
            if volume is not None:
                name = f"(replica {replica}) " if several else ""
                text = f"{name}the log-volume of the region is {volume.value:.4g} ± {volume.standard_error:.2g} nats"
                facts.append(Fact("log_volume", text, value=float(volume.value)))
        return facts if self.local is None else self.local.facts()

    @override
    def unknowns(self) -> list[Unknown]:
        if self.failure is not None:
            return []
        if self.local is not None:
            return self.local.unknowns()
        reasons = dict.fromkeys(reason for reason in self.reasons if reason is not None)
        return [Unknown("the volume of the region", UnknownCode.NOT_MEASURED, reason) for reason in reasons]

    @override
    def run_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bounded = self._bounded == trainer.global_step
        if not (bounded and self._measured):
            self._monitor.run_out(f"not measured: {self.over_time}", bounded=bounded)

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        local = self.local
        if self.failure is not None:
            none = dict.fromkeys(("log_volume", "log_volume_standard_error", "log_volume_lower_bound"))
            of_local = {} if local is None else Found(reason=self.failure, cones_reason=self.failure).plain()
            return {**none, "log_volume_reason": self.failure, **of_local}
        bound = plain(self.log_lower_bound)
        found: dict[str, list[Any]] = {
            "log_volume": [volume and volume.value for volume in self.volumes],
            "log_volume_standard_error": [volume and volume.standard_error for volume in self.volumes],
            "log_volume_reason": self.reasons,
        }
        listed = found if isinstance(bound, list) else {key: value for key, (value, *_) in found.items()}
        return {**listed, "log_volume_lower_bound": bound, **({} if local is None else local.plain())}

    @override
    def state_dict(self) -> dict[str, Any]:
        counts = {"checks": self._checks, "certified": self._certified}
        regions = [list(region) for region in self._monitor.regions]
        logged = {"logged_step": self._logged_step, "measured": self._measured, "epochs": self._epochs_measured}
        return super().state_dict() | counts | logged | {"regions": regions}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._checks, self._certified = state_dict.get("checks", 1), state_dict.get("certified", False)
        self._logged_step = state_dict.get("logged_step")
        self._regions = [(str(digest), int(step)) for digest, step in state_dict.get("regions", [])]
        self._epochs_measured = state_dict.get("epochs", 0)
        self._resumed = self._logged_step, state_dict.get("measured", False)

    def _region_monitor(self) -> RegionMonitor:
        return RegionMonitor(self.cones, self.epsilon, self.seed)

    def _local_monitor(self, reason: str | None = None) -> LocalVolumeMonitor:
        return LocalVolumeMonitor(self.local_volume, self.cones, self.seed, reason)

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop what was found at other weights; after a resume, find it again without logging it again."""
        self._bounded = None
        scalars = self._monitor.update(trainer, pl_module)
        self._bounded = trainer.global_step
        if scalars is None:
            return
        self._measured, self._unlogged = False, scalars
        (step, measured), self._resumed = self._resumed, (None, False)
        if step == trainer.global_step:
            self._unlogged = {}
            if measured:
                self._find(trainer, pl_module)

    def _log_bound(self, trainer: pl.Trainer) -> None:
        if self._unlogged:
            log_scalars(trainer, self._unlogged)
        self._unlogged, self._logged_step = {}, trainer.global_step

    def _wanted(self, moment: str) -> bool:
        if self.measure is None:
            return moment == "end" and self._monitor.measured_by_default
        return moment in self.measure

    def _measure_if_certified(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure at a step from which the run can be resumed."""
        if self.cost.share is None and self._awaits_certificate(trainer):  # else there may be no time for it
            measure = lambda: self._measure_at_certificate(trainer, pl_module)  # noqa: E731
            or_stop_here(trainer, lambda: self.observe(measure))

    def _measure_at_certificate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._awaits_certificate(trainer):
            self._measure(trainer, pl_module)
            self._certified = True

    def _awaits_certificate(self, trainer: pl.Trainer) -> bool:
        """Whether the volume is to be measured now for the first certificate of the run's detectors."""
        if self._certified or not self._wanted("certificate"):
            return False
        detectors = [c for c in trainer.callbacks if isinstance(c, LocalMinimumDetector)]  # type: ignore[attr-defined]
        return bool(detectors) and all(detector.converged for detector in detectors)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the volume and log it, once for the same weights."""
        self._update(trainer, pl_module)
        if not self._measured:
            self._find(trainer, pl_module)
            self._log_bound(trainer)
            self._monitor.log(trainer, pl_module)

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.measure(trainer, pl_module)
        self._measured, self._epochs_measured = True, self.completed_epochs


def _put_behind_detectors(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Make the detectors act first at every hook; otherwise their certificate would be seen a step too late.

    The list is replaced, not changed: Lightning iterates over the old one while this is called.
    """
    run: Any = trainer
    others = [other for other in run.callbacks if other is not callback]
    behind = max((i + 1 for i, other in enumerate(others) if isinstance(other, LocalMinimumDetector)), default=0)
    place = max(behind, run.callbacks.index(callback))
    run.callbacks = [*others[:place], callback, *others[place:]]
