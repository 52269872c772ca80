"""LocalMinimumDetector: has training converged to a local minimum, and to which?"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.full_batch import FullBatch
from lightning_mnn.callbacks.evaluation.module_network import network_of, states_network
from lightning_mnn.callbacks.evaluation.run_module import LossNotEvaluableError, StepFailedError
from lightning_mnn.callbacks.evidence.certificate import CertificateTier, NotSquaredErrorError
from lightning_mnn.callbacks.evidence.first_order import FirstOrderTier
from lightning_mnn.callbacks.evidence.second_order import SecondOrderTier
from lightning_mnn.callbacks.evidence.squared_error import SquaredErrorLoss, squared_error_loss
from lightning_mnn.callbacks.evidence.tiers import Evidence, Finding
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.long_pass import long_pass
from lightning_mnn.data.loaders.shards import NotEnumerableError, can_be_enumerated, draws
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.loggers.media import log_scalars
from lightning_mnn.utilities.interruption import TimeLimitError, time_limit
from lightning_mnn.utilities.validation import MisfitError, positive_integer, real_number, truth_value
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl
    from torch.optim import Optimizer

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.callbacks.evidence.tiers import Tier
    from lightning_mnn.landscape.kinks.tracing import Names
    from lightning_mnn.landscape.minima.certificate import Certificate
    from lightning_mnn.landscape.minima.first_order import FirstOrderVerdict
    from lightning_mnn.landscape.regions.statistics import NetworkStatistics


_TIERS: dict[type[Tier], Evidence] = {  # by which checkpoints name them
    CertificateTier: Evidence.CERTIFICATE,
    SecondOrderTier: Evidence.SECOND_ORDER,
    FirstOrderTier: Evidence.FIRST_ORDER,
}
_OF_VERSION_0_1 = {  # whose checkpoints named classes
    "NetworkJudge": Evidence.CERTIFICATE,
    "SecondOrderJudge": Evidence.SECOND_ORDER,
    "FirstOrderJudge": Evidence.FIRST_ORDER,
}


class LocalMinimumDetector(ScheduledCallback):
    """Tests whether the weights are next to a local minimum, and stops training when they are; for any module.

    Each check is a cheap test on the whole training set. When it has found nothing against a minimum a few times in a
    row, and always at the end of training, an expensive check decides. ``summary()["evidence"]`` names the evidence
    that the verdict is based on:

    ``certificate``: an exact minimum within ``max_distance``, differentiable or on kinks, or the reason why none was
    found (see :func:`lightning_mnn.landscape.certify`). This is for networks with one hidden layer, with or without
    biases, that are trained on the squared error: an MNN, a module with a method ``network()``, or a module around a
    single ``nn.Sequential(Linear, ReLU, Linear → 1)``, where ReLU may be LeakyReLU or a PReLU with one slope. In the
    last case, the detector first tests, in float64, that the gradient of the module's own loss is parallel to that of
    the squared error; before a certificate, it tests again that their values and gradients agree. The cheap check is
    two first-order tests in float64: ‖G e‖ is zero relative to ‖G‖‖y‖, and no pre-activation is zero relative to
    ‖w‖‖x‖, within tolerances. The verdict is about the mean squared error: ``summary()["objective"]`` is "mse", and
    ``summary()["objective_differs_by"]`` names the ways in which training minimises a different objective
    ("weight_decay", "frozen_weights"). In that case the verdict does not stop training and does not change weights.

    ``second_order``: for any other module with ReLU, max-pooling and similar functions, based on its own training loss:
    in eval mode (batch norm with its running statistics, no dropout), over all training samples, each once, in the
    weights' precision. The loss is ``loss_fn(module, batch)``, or what ``training_step`` returns, and is interpreted as
    the mean over the batch. (If it is a sum and the last batch is smaller, or if it is not a mean over samples, the
    reason states this: ``loss_fn`` can return the mean. Last batches that ``drop_last`` drops are left out.) The cheap
    check: the norm of the gradient is small relative to the largest norm that training has followed so far, whatever
    its batches (before the first step: relative to |L|/‖θ‖), and no unit is on a kink. The expensive check, in float64
    if the weights have a lower precision and the loss can be evaluated in float64: the smallest eigenvalue of the
    Hessian with an error bound. (On a kink it is not computed, since it would be that of one side only.) The verdict
    is ``differentiable_minimum`` only if Newton's method leads to a stationary point next to the weights, as its
    quadratic model predicts, and gains almost nothing on the way; and if the Hessian is positive, or the loss was found
    to be constant along its flat directions, as symmetries make it (see
    :func:`lightning_mnn.landscape.check_curvature`). Flat directions along which the loss decreases, such as those of a
    tail exp(−y) or of a saddle of fourth order, are not a minimum and do not stop training. This is evidence, not a
    proof. It is about the loss, without the weight decay of an optimiser.

    ``first_order``: for an MNN with two hidden layers, or a training set of more than 2.7e8 input numbers per process:
    only the first-order tests, which are necessary conditions. If the loss of a module cannot be evaluated (manual
    optimisation without a ``loss_fn``, or a ``training_step`` that returns no loss, fails in eval mode, or depends on a
    state outside the module): the norm of the gradient of training's own last step relative to that of its first, and
    the nearest kink. These never show a minimum and never stop training.

    Logs for a network: ``minimum/mse``, ``minimum/mce``, ``minimum/stationarity``, ``minimum/min_preactivation``
    (absolute), ``minimum/relative_preactivation``, ``minimum/kinks`` and, with one hidden layer, ``minimum/rank_cap``,
    all at the current weights; with a certificate also ``minimum/certified`` and ``minimum/on_kinks`` (fractions of the
    replicas), ``minimum/certified_mse``, ``minimum/certified_mce``, ``minimum/certified_kinks``, ``minimum/distance``,
    ``minimum/margin_ratio`` and ``minimum/rank``. All are means over the replicas. Logs for other modules:
    ``minimum/loss``, ``minimum/gradient_norm``, ``minimum/relative_gradient``, ``minimum/min_preactivation`` (distance
    to the nearest kink), ``minimum/relative_preactivation`` (in units of its layer's root mean square),
    ``minimum/kinks`` and, where they were computed, ``minimum/smallest_eigenvalue``, ``minimum/eigenvalue_error``,
    ``minimum/largest_eigenvalue`` and ``minimum/newton_gain`` (what a Newton step would still gain).

    Args:
        schedule: when to check, besides the start and the end; None: every 100 epochs.
        patience: number of consecutive cheap checks that every replica must pass.
        stop_training: stop the Trainer when every replica is certified (with second-order evidence: is at a minimum;
            with two hidden layers: has passed).
        polish: try to certify at every check; and at the end of training move the weights to the exact minimum, if it
            lies within ``max_distance``, across kinks if necessary (see :func:`lightning_mnn.landscape.polish`).
        max_distance: largest ‖W̃* − W̃‖/‖W̃‖ at which a minimum still counts as the minimum of these weights.
        stationarity_tolerance: largest ‖G e‖/(‖G‖_F ‖y‖) that counts as zero in the first-order tests; None: 10 times
            the spacing of floats at 1 in the weights' precision.
        preactivation_tolerance: smallest |w·x|/(‖w‖‖x‖) that counts as off the kink in the first-order tests; None:
            1,000 times that spacing.
        loss_fn: the loss that training minimises, ``loss_fn(module, batch)``, the mean over the batch; None: what the
            module's ``training_step`` returns.
        modules: names or patterns of the layers whose kinks count in second-order evidence; None: all.
        gradient_tolerance: second-order evidence: largest ‖∇L‖ of a stationary point, relative to the largest gradient
            norm that training has followed so far.
        curvature_tolerance: second-order evidence: largest −λ_min/λ_max of a minimum.
        max_products: second-order evidence: maximal number of Hessian–vector products of each stage. For a resnet18 on
            a CPU, one took as long as 3 to 5 epochs, and a cheap check as long as 2.7.
        max_seconds: time limit of a check, including those at the start and the end; None: no limit. A part that takes
            longer is left out: the evidence is that of the next weaker tier, and the reason states this. If a cheap
            check takes longer, the training set is not read any more: the evidence is from the gradients of training
            alone, or ``none``.
        strict: if true, an error in the callback ends the run; otherwise it warns once, and training goes on without
            the callback.

    Attributes:
        verdicts: for a network: the first-order verdicts of the last check, one per replica.
        certificates: the last certificates, one per replica; empty if there are none.
        statistics: for a network: the training-set statistics of the last check.
        converged: whether training counts as converged.

    Raises:
        ValueError: ``patience`` or ``max_products`` < 1, ``max_distance`` < 0, a tolerance that is not positive.
        TypeError: (at the start of training) the module has no kinks, or its training set cannot be enumerated, or each
            process has only a part of the weights, or ``polish`` is requested where there are no certificates.
        DivergenceError: (in training) the weights or the loss over the training set are not finite.

    >>> LocalMinimumDetector(Schedule(every=100), polish=True).converged
    False
    """

    missing = "convergence is not reported"
    remedy = (
        "loss_fn(module, batch), the loss that training minimises, if the module's training_step does not return it"
    )

    def __init__(
        self,
        schedule: Schedule | None = None,
        patience: int = 2,
        *,
        stop_training: bool = True,
        polish: bool = False,
        max_distance: float = 1e-3,
        stationarity_tolerance: float | None = None,
        preactivation_tolerance: float | None = None,
        loss_fn: ModelFunction | None = None,
        modules: Names = None,
        gradient_tolerance: float = 1e-3,
        curvature_tolerance: float = 1e-3,
        max_products: int = 128,
        max_seconds: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(schedule or Schedule(every=100), strict=strict)
        tolerances = {
            "stationarity_tolerance": stationarity_tolerance,
            "preactivation_tolerance": preactivation_tolerance,
        }
        for name, tolerance in tolerances.items():
            if tolerance is not None:
                real_number(name, tolerance, above=0)
        self.patience = positive_integer("patience", patience)
        self.stop_training = truth_value("stop_training", stop_training)
        self.polish = truth_value("polish", polish)
        unlimited = max_distance == math.inf
        self.max_distance = math.inf if unlimited else real_number("max_distance", max_distance, at_least=0)
        self.stationarity_tolerance = stationarity_tolerance
        self.preactivation_tolerance = preactivation_tolerance
        self.loss_fn = loss_fn
        self.modules = modules
        self.gradient_tolerance = real_number("gradient_tolerance", gradient_tolerance, above=0)
        self.curvature_tolerance = real_number("curvature_tolerance", curvature_tolerance, above=0)
        self.max_products = positive_integer("max_products", max_products)
        self.max_seconds = None if max_seconds is None else real_number("max_seconds", max_seconds, above=0)
        self.converged = False
        self._tier: Tier | None = None
        self._saved: dict[str, Any] = {}  # state of the tier of the run that is resumed
        self._passed = 0
        self._certified = False  # whether the last check included the expensive one
        self._spent = (-1, 0.0)  # step of the last check, and the seconds that it took

    @property
    def verdicts(self) -> list[FirstOrderVerdict]:
        """First-order verdicts on a network, one per replica."""
        return self._tier.verdicts if isinstance(self._tier, CertificateTier) else []

    @property
    def certificates(self) -> list[Certificate]:
        """The last certificates, one per replica."""
        return self._tier.certificates if isinstance(self._tier, CertificateTier) else []

    @property
    def statistics(self) -> NetworkStatistics | None:
        """Statistics of the last pass over a network's training set."""
        return self._tier.statistics if isinstance(self._tier, CertificateTier) else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._tier, self._saved, self._passed, self.converged = None, {}, 0, False
            self._certified, self._spent = False, (-1, 0.0)

    @override
    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            with self._limited(trainer), self._announced(trainer, "the preparation"):
                self._tier = self._choose_tier(trainer, pl_module)
        except TimeLimitError:
            self._tier = self._without_data()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        tier = self._tier
        if isinstance(tier, SecondOrderTier):
            tier.norms.record(trainer, optimizer)
        if isinstance(tier, FirstOrderTier) and (self._may_act_next(trainer) or not tier.knows(trainer, optimizer)):
            self.observe(lambda: tier.record_gradient(trainer, optimizer))

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checked = tier = self._check(trainer, pl_module)
        passed = self._passed + 1 if tier.passed else 0
        converged = passed >= self.patience
        certifies = tier.can_certify and (self.polish or (converged and not self.converged))  # and again at the end
        if certifies:
            tier = self._certify(trainer, pl_module)
            converged = tier.found_minimum
        self._passed, self._certified = passed if tier is checked else 0, certifies
        log_scalars(trainer, tier.scalars())
        self.converged = trainer.strategy.reduce_boolean_decision(converged, all=True)
        if self.converged and self.stop_training:
            trainer.should_stop = True

    @override
    def recall(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, pl_module)
        if self._certified:
            self._certify(trainer, pl_module)

    @override
    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().finish(trainer, pl_module)
        tier = self._certify(trainer, pl_module, end=True)
        findings = tier.findings()
        for replica, found in enumerate(findings):
            name = f" (replica {replica})" if len(findings) > 1 else ""
            rank_zero_info(f"LocalMinimumDetector{name}: {found.kind}: {found.reason}")

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        if self.failure is not None:
            finding = Finding.of(Kind.UNDECIDED, Reason.of(ReasonCode.ERROR, cause=self.failure))
            return {"evidence": str(Evidence.NONE), **finding.plain()}
        return {} if self._tier is None else self._tier.summary()

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {"passed": self._passed, "converged": self.converged, "judge": self._saved}
        state |= {"concluded": self._certified}
        if self._tier is not None:
            state["judge"] = {"tier": str(_TIERS[type(self._tier)]), "why": self._tier.why} | self._tier.state()
        return super().state_dict() | state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._passed, self.converged = state_dict.get("passed", 0), state_dict.get("converged", False)
        self._saved, self._certified = state_dict.get("judge", {}), state_dict.get("concluded", False)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        """Run the cheap check; if the loss turns out not to be evaluable, that of a weaker tier."""
        assert self._tier is not None  # noqa: S101 (chosen at the start)
        try:
            with self._limited(trainer), self._announced(trainer, "a check on the whole training set"):
                return self._check_or_weaken(trainer, pl_module)
        except TimeLimitError:
            self._tier = self._without_data()
            self._tier.check(trainer, pl_module)
            return self._tier

    def _check_or_weaken(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        assert self._tier is not None  # noqa: S101 (chosen at the start)
        try:
            self._tier.check(trainer, pl_module)
        except (NoDerivativeError, LossNotEvaluableError) as error:
            self._tier = self._first_order(str(error))
            self._tier.check(trainer, pl_module)
        return self._tier

    def _certify(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, end: bool = False) -> Tier:
        """Run the expensive check; at the end of training, the part of it that is not done yet."""
        assert self._tier is not None  # noqa: S101
        tier = self._tier
        if not tier.can_certify:
            return tier
        try:
            with self._limited(trainer), self._announced(trainer, "the expensive check", self.max_products):
                if not end:
                    tier.certify_minimum(trainer, pl_module)
                    return tier
                done = tier.finalize(trainer, pl_module, polish=self.polish)
        except TimeLimitError:
            tier.run_out(self._over_time)
            done = end
        except (NotSquaredErrorError, LossNotEvaluableError) as error:
            self._tier = self._second_order(str(error))
            self._check(trainer, pl_module)
            return self._certify(trainer, pl_module, end=end)
        if done:
            self.converged = tier.found_minimum
            log_scalars(trainer, tier.scalars())
        return tier

    def _choose_tier(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        """The strongest tier that the module, loss and data of a run allow."""
        if states_network(pl_module) and can_be_enumerated(trainer.train_dataloader):
            return self._network()
        _check_weights_are_here(trainer)
        tier = self._resumed() if self._saved else self._strongest(trainer, pl_module)
        if self.polish and not tier.moves:
            raise MisfitError(
                "polish=True needs a network that can be certified: an MNN, a module with a method network(), or one "
                "nn.Sequential(Linear, ReLU, Linear → 1) trained on the squared error; "
                f"{type(pl_module).__name__} has none{f': {tier.why}' if tier.why else ''}. Use polish=False"
            )
        return tier

    def _strongest(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        try:
            batch = FullBatch(trainer, pl_module, self.loss_fn, self.modules)
        except NotEnumerableError as error:
            return self._first_order(f"the loss over the whole training set cannot be evaluated: {error}")
        with batch.open():
            try:
                why = batch.reason_not_evaluable()
            except StepFailedError as error:
                if not self._waits:  # it is prepared once more, at the first batch
                    raise
                why = str(error)
            try:
                batch.surface()
            except ValueError as error:
                why = why or str(error)
        if why is not None:
            return self._first_order(why)
        network = network_of(pl_module)
        if network is None or len(network.hidden_weights) > 1:
            return self._second_order(None)
        if draws(trainer.train_dataloader):
            return self._second_order("its training set cannot be read sample by sample")
        try:
            found = squared_error_loss(trainer, pl_module, self.loss_fn)
        except LossNotEvaluableError as error:
            return self._first_order(str(error))
        return self._network(found) if isinstance(found, SquaredErrorLoss) else self._second_order(found)

    def _resumed(self) -> Tier:
        """The tier of the run that is resumed."""
        saved = dict(self._saved)
        tier_of_run, why = saved.pop("tier", None) or _OF_VERSION_0_1[saved.pop("name")], saved.pop("why")
        if tier_of_run == Evidence.CERTIFICATE:
            return self._network(SquaredErrorLoss(**saved["fitted"]))
        tier = self._second_order(why) if tier_of_run == Evidence.SECOND_ORDER else self._first_order(why)
        tier.load(saved)
        return tier

    def _network(self, fitted: SquaredErrorLoss | None = None) -> CertificateTier:
        tolerances = self.stationarity_tolerance, self.preactivation_tolerance
        return CertificateTier(self.max_distance, *tolerances, fitted, self.loss_fn)

    def _second_order(self, why: str | None) -> Tier:
        tolerances = self.gradient_tolerance, self.curvature_tolerance
        return SecondOrderTier(self.loss_fn, self.modules, *tolerances, self.max_products, why)

    def _first_order(self, why: str) -> Tier:
        return FirstOrderTier(self.loss_fn, self.modules, self.gradient_tolerance, why)

    def _without_data(self) -> Tier:
        """The tier if there is no time to read the training set; with the gradients that the last one recorded."""
        before, why = self._tier, self._over_time
        if before is not None and before.why is not None:
            why = f"{before.why}; {why}"
        tier = FirstOrderTier(self.loss_fn, self.modules, self.gradient_tolerance, why, reads=False)
        if isinstance(before, FirstOrderTier):
            tier.load(before.state() | {"reads": False})
        elif isinstance(before, SecondOrderTier):
            tier.load(before.norms.ends() | {"reads": False})
        return tier

    @property
    def _over_time(self) -> str:
        return f"a check took longer than max_seconds={self.max_seconds:g}: increase it, or use max_seconds=None"

    @contextmanager
    def _limited(self, trainer: pl.Trainer) -> Iterator[None]:
        """Limit the time to what is left for the check at this step."""
        step, spent = self._spent
        spent, start = spent if step == trainer.global_step else 0.0, time.monotonic()
        try:
            with time_limit(None if self.max_seconds is None else self.max_seconds - spent):
                yield
        finally:
            self._spent = trainer.global_step, spent + time.monotonic() - start

    def _announced(self, trainer: pl.Trainer, what: str, passes: int = 1) -> AbstractContextManager[None]:
        several = passes > 1 and isinstance(self._tier, SecondOrderTier)
        sentence = f"LocalMinimumDetector after {trainer.global_step} steps, {what}"
        return long_pass(trainer, sentence, passes if several else 1, at_most=several)

    def _may_act_next(self, trainer: pl.Trainer) -> bool:
        """Whether the detector may act between the coming step of this optimiser and its next one."""
        run: Any = trainer
        last = trainer.global_step + len(trainer.optimizers)  # each optimiser's step counts
        within = self.acts_within_epochs and any(map(self.schedule.due, range(trainer.global_step + 1, last + 1)))
        return bool(trainer.is_last_batch or within or 0 < run.max_steps <= last)


def _check_weights_are_here(trainer: pl.Trainer) -> None:
    if any(kind.__name__ in _SHARDED for kind in type(trainer.strategy).__mro__):
        raise TypeError(
            f"LocalMinimumDetector needs all weights on each process, but {type(trainer.strategy).__name__} splits "
            'them: train with strategy="ddp" or on one device'
        )


_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
