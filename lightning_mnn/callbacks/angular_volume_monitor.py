"""AngularVolumeMonitor: how large is the region that training is in, compared with the paper's theorems?"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.kink_probe import checked_probe
from lightning_mnn.callbacks.evaluation.module_network import (
    NetworkModule,
    network_of,
    required_network,
    states_network,
)
from lightning_mnn.callbacks.evaluation.training_set import (
    reason_not_evaluated,
    training_samples,
    training_set_statistics,
)
from lightning_mnn.callbacks.local_minimum_detector import LocalMinimumDetector
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback, or_stop_here, weights_of
from lightning_mnn.callbacks.trainer.long_pass import long_pass
from lightning_mnn.callbacks.volumes.cones import ConePlan, OverBudgetError, reason_not_alone
from lightning_mnn.callbacks.volumes.local import (
    Found,
    ProbeSettings,
    check_kinks,
    log_local_volume,
    measure_local_volume,
)
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.landscape import bounds
from lightning_mnn.landscape.volumes.random_moves import check_sigmas
from lightning_mnn.landscape.volumes.region_volume import log_volume_bound_from_sines
from lightning_mnn.loggers.media import log_histogram, log_scalars
from lightning_mnn.utilities.distributed import on_first_process
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import plain, to_host
from lightning_mnn.utilities.validation import ArgumentError, MisfitError, positive_integer, real_number, seed_number

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.callbacks.volumes.cones import VolumeOrReason
    from lightning_mnn.landscape.kinks.tracing import Names
    from lightning_mnn.landscape.network import Network
    from lightning_mnn.landscape.regions.statistics import NetworkStatistics
    from lightning_mnn.landscape.volumes.region_volume import RegionVolume

MOMENTS = ("start", "certificate", "end")
_NOT_MEASURED = "not measured at the last weights"
_NOT_OF_REPLICAS = 'volumes of replicas are measured only if measure is given, as in measure=["end"]'
_ON_A_KINK = "a pre-activation is zero up to rounding: the weights lie on a kink"
_NO_PRODUCT = "with two hidden layers a region is not a product of cones"
_REPLICAS_APART = "replicas are several networks and have no common pattern: train them one by one"
_NO_NETWORK = "not a network with one hidden layer and one output, whose regions are products of cones"


class AngularVolumeMonitor(ScheduledCallback):
    """Logs how large the current region is.

    *For a network with one hidden layer and one output* (an MNN, a module with a method ``network()``, or one
    ``nn.Sequential`` that the module runs once on the unchanged inputs of a batch; see
    :func:`~lightning_mnn.callbacks.evaluation.module_network.network_of`) the size is the angular volume
    V(R) = P(W ∈ R) of the region of the whole training set, for i.i.d. normal W, as a logarithm in nats. With replicas
    all logged values are means.

    At every check it logs a rigorous lower bound, ``volume/log_lower_bound``: the sum over the units of the log measure
    of the spherical cap around w_i inside its cone (see :func:`lightning_mnn.landscape.log_volume_lower_bound`). At the
    start it also logs the paper's theorems at the run's sizes: ``volume/theorem_6_suboptimal`` (upper bound on
    log E V(L_ε)), ``volume/theorem_8_width`` (sufficient width), ``volume/theorem_9_global`` (lower bound on log V(G)),
    ``volume/theorem_9_failure`` (its δ) and ``volume/theorem_10_ratio`` (upper bound on log V(L_ε)/V(G)).

    At chosen moments it logs the volume itself and its standard error: ``volume/log_volume`` and
    ``volume/log_volume_standard_error``, that of the mean over the replicas (see
    :func:`lightning_mnn.landscape.region_log_volume`). For the log measures log γ_i of the measured units' cones it
    logs ``volume/unit_mean``, ``volume/unit_least``, ``volume/unit_most``, a histogram ``volume/units`` (in W&B and
    TensorBoard), and ``volume/log_ratio_to_average_cell``: their mean plus the log of Cover's number of cells (see
    :func:`~lightning_mnn.landscape.bounds.log_num_cells`), which is 0 if a unit's cone is as large as the average cell.
    Replicas whose weights lie on a kink, and so in no open region, are left out.

    The cost: a sample is one sweep of N·d0 multiplications, about 1 ns each on one processor core, and a unit's cone
    takes about 4,000 √d0 + 3 d0^1.3/s² samples for a standard error of s nats. As many units are measured as ``budget``
    allows: all, or a random subset, whose spread is then included in the standard error. If the budget does not allow
    two units of each replica, nothing is measured, and the summary states this: 784-89-1 on 70,000 samples would take
    hours.

    *For any other module* with kinks, including an MNN with two hidden layers, it measures at the same moments the
    local volume on a probe set (see :mod:`lightning_mnn.landscape.volumes.random_moves`): the probability P(σ) that a
    random move of all parameters that require a gradient, of relative size σ, keeps the pattern of the probe in eval
    mode. It logs ``volume/keep/<σ>``, as in ``volume/keep/1e-03``: P(σ) of all layers together; ``volume/half_sigma``:
    σ½ at which P(σ) falls to ½, with ``volume/half_sigma_low`` and ``volume/half_sigma_high``, a 95 % bracket of values
    of σ; ``volume/<layer>/half_sigma``: that of the layer's own pattern. Values outside the curve are not logged. The
    picture ``volume/local`` (in W&B and TensorBoard) shows the curves of all layers with exact 95 % intervals, which
    are also in the summary. If the first layer's kinks are at 0 and come after an ``nn.Linear`` whose inputs depend on
    no parameter, its units have cones, as above, but only for the samples of the probe:
    ``volume/<layer>/log_volume`` and ``volume/<layer>/log_volume_standard_error``. At checks between the moments
    nothing is done. At the start the module runs once on the probe, so that errors are raised then.

    The cost: at most ``len(sigmas) * num_draws`` forward passes over the probe (those of large moves end after its
    first four samples), and during the measurement twice the memory of the parameters in addition: about 10 s for
    resnet18 on 32 × 32 images with the defaults, on one core. The draws are divided among the processes.

    Args:
        schedule: when to check, besides the start and the end; None: every 100 epochs.
        epsilon: smallest classification error of the minima that the theorems count.
        measure: when to measure the volume, any of "start", "certificate" (the first time that a LocalMinimumDetector
            of the run has certified every replica, whether or not it stops training) and "end". None: at the end of a
            run of one network; volumes of replicas would cost many times the training of such small networks.
        measure_every: also measure it at every k-th check; None: do not.
        target_standard_error: standard error of the log measure of one unit's cone, in nats.
        budget: maximal number of multiplications of a measurement of cones, all replicas together.
        seed: seed of the random numbers; replica r at step t has its own.
        modules: names or patterns of the layers whose pattern counts (see
            :class:`~lightning_mnn.landscape.kinks.tracing.KinkTrace`); None: all that the module calls. If it is given,
            the local volume is measured.
        forward_fn: ``forward_fn(module, batch)`` runs the module; None: its forward on the leading parts of a batch, or
            its ``training_step`` if ``forward`` cannot be run or calls other layers (see
            :func:`~lightning_mnn.callbacks.evaluation.choose_pass.pass_of_training`). If it is given, the local volume
            is measured.
        probe: number of samples of the training set in the probe, drawn by the seed; or a batch as the training loader
            yields it, which an IterableDataset needs. If it is a batch, the local volume is measured.
        sigmas: sizes σ of the moves, ascending; None: half decades from 1e-6 to 1. Those below 8 spacings of the
            weights' floating-point numbers are left out, and the summary states this.
        num_draws: number of moves at each σ.
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
        target_standard_error: float = 0.5,
        budget: float = 3e9,
        seed: int = 0,
        modules: Names = None,
        forward_fn: ModelFunction | None = None,
        probe: Any = 32,
        sigmas: Sequence[float] | None = None,
        num_draws: int = 20,
        strict: bool = False,
    ) -> None:
        super().__init__(schedule or Schedule(every=100), strict=strict)
        if measure is not None and (isinstance(measure, str) or not set(measure) <= set(MOMENTS)):
            problem = f"must contain any of {', '.join(MOMENTS)}"
            raise ArgumentError("measure", measure, problem, "give a list of them, as [end]")
        if sigmas is not None:
            check_sigmas(sigmas)
        self.epsilon = real_number("epsilon", epsilon, at_least=0, at_most=1)
        self.measure = None if measure is None else tuple(measure)
        self.measure_every = None if measure_every is None else positive_integer("measure_every", measure_every)
        self.target_standard_error = real_number("target_standard_error", target_standard_error, above=0)
        self.budget = real_number("budget", budget, above=0, remedy="measure=[] measures nothing")
        self.seed = seed_number("seed", seed)
        self.settings = ProbeSettings(
            probe=checked_probe(probe),
            sigmas=None if sigmas is None else tuple(sigmas),
            num_draws=positive_integer("num_draws", num_draws),
            modules=modules,
            forward_fn=forward_fn,
            target_standard_error=target_standard_error,
            budget=budget,
            seed=seed,
        )
        self.log_lower_bound: Tensor | None = None
        self.volumes: list[RegionVolume | None] = [None]
        self.reasons: list[str | None] = [_NOT_MEASURED]
        self.local: Found | None = None
        self._checked = self.settings  # for other modules: completed with the forward pass to run
        self._no_volume: str | None = None  # why another module has no volume of a whole region
        self._statistics: NetworkStatistics | None = None  # at the weights that the results are for
        self._moment: Any = None  # for other modules: identifies these weights
        self._measured = False  # whether the volume was measured at these weights, or this was tried
        self._unlogged: dict[str, Tensor | float | None] = {}  # values for these weights
        self._logged_step: int | None = None  # the last step that was logged
        self._resumed: tuple[int | None, bool] = (None, False)  # that of the resumed run, and whether it had measured
        self._checks = 0
        self._certified = False

    def theorems(
        self, num_samples: int, input_dim: int, width: int, negative_slope: float
    ) -> dict[str, Tensor | float | None]:
        """Theorems 6, 8, 9 and 10 at the given sizes, by logged name; None where a theorem does not apply."""
        sizes = (num_samples, input_dim, width)
        wide = width >= 2 * num_samples / input_dim  # d1* of Theorem 9
        return {
            "volume/theorem_6_suboptimal": float(bounds.suboptimal_log_volume(*sizes, self.epsilon, negative_slope)),
            "volume/theorem_8_width": float(bounds.sufficient_width(*sizes[:2])) if input_dim > 1 else None,
            "volume/theorem_9_global": float(bounds.global_log_volume(*sizes)) if wide else None,
            "volume/theorem_9_failure": float(bounds.global_failure_probability(*sizes[:2])) if wide else None,
            "volume/theorem_10_ratio": float(bounds.log_volume_ratio(*sizes, self.epsilon, negative_slope)),
        }

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.log_lower_bound, self.volumes, self.reasons = None, [None], [_NOT_MEASURED]
            self._statistics, self._moment, self._measured, self._checks, self._certified = None, None, False, 0, False
            self._unlogged, self._logged_step, self._resumed = {}, None, (None, False)
            self.local = None if _has_cones(pl_module) else Found()
            self._checked, self._no_volume = self.settings, None
            _put_behind_detectors(trainer, self)

    @override
    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._no_volume = self._reason_no_volume(trainer, pl_module)
        if self._no_volume is not None:
            self.local = Found()
            if not _is_replicated(pl_module):
                self._checked = check_kinks(trainer, pl_module, self.settings)

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._update_bound(trainer, pl_module)
        if self._checks == 0:
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
            self._update_bound(trainer, pl_module)  # now: a detector may move the weights at this very step
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
        self._update_bound(trainer, pl_module)  # again: a detector may just have moved to the exact minimum
        self._measure_at_certificate(trainer, pl_module)
        if self._wanted("end"):
            self._measure(trainer, pl_module)
        elif self.measure is None and not self._measured and self.local is None:
            self.reasons = [_NOT_OF_REPLICAS] * len(self.reasons)
        self._log_bound(trainer)
        if not self._measured:
            return
        if self.local is not None:
            if self.local.volume is None:
                rank_zero_info(f"AngularVolumeMonitor: local volume not measured: {self.local.reason}")
            return
        for reason in dict.fromkeys(self.reasons):
            if reason is not None:
                rank_zero_info(f"AngularVolumeMonitor: log-volume not measured: {reason}")

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        if self.failure is not None:
            none = dict.fromkeys(("log_volume", "log_volume_standard_error", "log_volume_lower_bound"))
            local = {} if self.local is None else Found(reason=self.failure, cones_reason=self.failure).plain()
            return {**none, "log_volume_reason": self.failure, **local}
        bound = plain(self.log_lower_bound)
        found: dict[str, list[Any]] = {
            "log_volume": [volume and volume.value for volume in self.volumes],
            "log_volume_standard_error": [volume and volume.standard_error for volume in self.volumes],
            "log_volume_reason": self.reasons,
        }
        listed = found if isinstance(bound, list) else {key: value for key, (value, *_) in found.items()}
        local = {} if self.local is None else self.local.plain()
        return {**listed, "log_volume_lower_bound": bound, **local}

    @override
    def state_dict(self) -> dict[str, Any]:
        counts = {"checks": self._checks, "certified": self._certified}
        return super().state_dict() | counts | {"logged_step": self._logged_step, "measured": self._measured}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._checks, self._certified = state_dict.get("checks", 1), state_dict.get("certified", False)
        self._logged_step = state_dict.get("logged_step")
        self._resumed = self._logged_step, state_dict.get("measured", False)

    def _reason_no_volume(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        """Why a module's regions are not products of cones on the training set; None if they are."""
        network, given = network_of(pl_module), self.settings.forward_arguments
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

    def _update_bound(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bound the volume, once for the same weights, and drop what was measured at other weights."""
        if self.local is not None:
            moment = trainer.global_step, *map(int, to_host(weights_of(pl_module)))
            if moment != self._moment:
                self._moment, self._measured = moment, False
                self.local, self.reasons = Found(), [self._no_volume]
                self._recall(trainer, pl_module)
            return
        network = required_network(self, pl_module)
        what = f"AngularVolumeMonitor after {trainer.global_step} steps, a bound of the volume"
        with _isolated_if_foreign(trainer, pl_module), long_pass(trainer, what):
            statistics = training_set_statistics(trainer, pl_module)
        if statistics is self._statistics:
            return
        self._statistics, self._measured = statistics, False
        self.log_lower_bound = log_volume_bound_from_sines(statistics.layers[0].smallest_sines, network.rows.shape[-1])
        replicas = self.log_lower_bound.numel()
        self.volumes, self.reasons = [None] * replicas, [_NOT_MEASURED] * replicas
        scalars: dict[str, Tensor | float | None] = {"volume/log_lower_bound": self.log_lower_bound}
        biased = network.hidden_bias is not None or network.output_bias is not None
        if trainer.global_step == 0 and not biased:  # the theorems are for networks without biases
            scalars |= self.theorems(
                statistics.num_samples, network.input_dim, network.hidden_dims[0], network.negative_slope
            )
        self._unlogged = scalars
        self._recall(trainer, pl_module)

    def _recall(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume, compute again what the run had found at these weights, without logging it again."""
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
            return moment == "end" and len(self.volumes) == 1
        return moment in self.measure

    def _measure_if_certified(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure at a step from which the run can be resumed."""
        if self._awaits_certificate(trainer):
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
        self._update_bound(trainer, pl_module)
        if self._measured:
            return
        self._find(trainer, pl_module)
        self._log_bound(trainer)
        if self.local is not None:
            if not _is_replicated(pl_module):
                log_local_volume(trainer, pl_module, self.local, self._checked)
            return
        measured = [volume for volume in self.volumes if volume is not None]
        if measured:
            network = required_network(self, pl_module)
            assert self._statistics is not None  # noqa: S101 (for the type checker)
            _log(trainer, measured, float(bounds.log_num_cells(self._statistics.num_samples, network.rows.shape[-1])))

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the volume."""
        if self.local is not None:
            replicated = _is_replicated(pl_module)
            self.local = (
                Found(reason=_REPLICAS_APART, cones_reason=_REPLICAS_APART)
                if replicated
                else measure_local_volume(trainer, pl_module, self._checked)
            )
        else:
            network = required_network(self, pl_module)
            with _isolated_if_foreign(trainer, pl_module):
                found = on_first_process(trainer, lambda: self._found(trainer, network))
            self.volumes, self.reasons = [volume for volume, _ in found], [reason for _, reason in found]
        self._measured = True

    @torch.no_grad()
    def _found(self, trainer: pl.Trainer, network: Network) -> list[VolumeOrReason]:
        """The volume of each replica's region, or why there is none; run by one process, which reads all samples."""
        assert self._statistics is not None  # noqa: S101 (for the type checker)
        assert self.log_lower_bound is not None  # noqa: S101 (for the type checker)
        lower_bounds = self.log_lower_bound.reshape(-1).tolist()
        width, dim = network.rows.shape[-2:]
        try:
            plan = ConePlan.within(
                self.budget,
                self.target_standard_error,
                replicas=len(lower_bounds),
                num_samples=self._statistics.num_samples,
                width=width,
                dim=dim,
            )
        except OverBudgetError as error:
            return [(None, str(error))] * len(lower_bounds)
        inputs, _ = training_samples(trainer, network, whole=True)
        network = network.to(inputs.device).to(torch.float64)
        rows = network.rows.reshape(-1, width, dim)
        inputs = network.augment(inputs.to(torch.float64)).expand(len(rows), -1, -1)
        seeds = [generator(self.seed + r, "volume", trainer.global_step).initial_seed() for r in range(len(rows))]
        replicas = zip(inputs, rows, lower_bounds, seeds, strict=True)
        return [
            (None, _ON_A_KINK) if bound == -math.inf else plan.measure(x, w, seed) for x, w, bound, seed in replicas
        ]


def _has_cones(pl_module: pl.LightningModule) -> bool:
    """Whether regions of a module are products of cones."""
    network = network_of(pl_module)
    return network is not None and len(network.hidden_weights) == 1


def _isolated_if_foreign(trainer: pl.Trainer, pl_module: pl.LightningModule) -> AbstractContextManager[Any]:
    """Isolate a pass over a module that does not define its network: its data may draw random numbers."""
    return nullcontext() if states_network(pl_module) else isolated(trainer, pl_module)


def _is_replicated(pl_module: pl.LightningModule) -> bool:
    return isinstance(pl_module, NetworkModule) and pl_module.replicas > 1


def _log(trainer: pl.Trainer, volumes: list[RegionVolume], log_num_cells: float) -> None:
    values, errors = torch.tensor([(v.value, v.standard_error) for v in volumes], dtype=torch.float64).T
    units = torch.stack([volume.unit_values for volume in volumes])
    log_scalars(
        trainer,
        {
            "volume/log_volume": values,
            "volume/log_volume_standard_error": float(errors.norm()) / len(volumes),  # the replicas are independent
            "volume/unit_mean": units.mean(-1),
            "volume/unit_least": units.amin(-1),
            "volume/unit_most": units.amax(-1),
            "volume/log_ratio_to_average_cell": units.mean(-1) + log_num_cells,
        },
    )
    for logger in trainer.loggers:
        log_histogram(logger, "volume/units", units.flatten(), trainer.global_step)


def _put_behind_detectors(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Make the detectors act first at every hook; otherwise their certificate would be seen a step too late.

    The list is replaced, not changed: Lightning iterates over the old one while this is called.
    """
    run: Any = trainer
    others = [other for other in run.callbacks if other is not callback]
    behind = max((i + 1 for i, other in enumerate(others) if isinstance(other, LocalMinimumDetector)), default=0)
    place = max(behind, run.callbacks.index(callback))
    run.callbacks = [*others[:place], callback, *others[place:]]
