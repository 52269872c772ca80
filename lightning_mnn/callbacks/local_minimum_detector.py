"""LocalMinimumDetector: has training converged to a local minimum, and to which?"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Any, TypeVar

from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_mnn.advice import ADVICE
from lightning_mnn.callbacks.evaluation.module_network import states_network
from lightning_mnn.callbacks.evaluation.run_module import LossNotEvaluableError
from lightning_mnn.callbacks.evidence.certificate import CertificateTier, NotSquaredErrorError
from lightning_mnn.callbacks.evidence.choose_tier import (
    FirstOrderTolerances,
    SecondOrderSettings,
    Tiers,
    state_of,
)
from lightning_mnn.callbacks.evidence.errors_on_test_set import errors_on_test_set
from lightning_mnn.callbacks.evidence.first_order import FirstOrderTier
from lightning_mnn.callbacks.evidence.gradient_norms import GradientNorms
from lightning_mnn.callbacks.evidence.model_tier import ModelTier
from lightning_mnn.callbacks.evidence.models.reading import NotModelLossError
from lightning_mnn.callbacks.evidence.replica_tier import ReplicaModelTier
from lightning_mnn.callbacks.evidence.second_order import SecondOrderTier
from lightning_mnn.callbacks.evidence.tiers import Evidence, Finding
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.cost import CostTier
from lightning_mnn.callbacks.trainer.long_pass import long_pass
from lightning_mnn.findings import Fact, Unknown, UnknownCode
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.loggers.media import log_scalars
from lightning_mnn.utilities.interruption import TimeLimitError, shorter_time_limit
from lightning_mnn.utilities.settings import accepts_fields_of, settings_or_defaults
from lightning_mnn.utilities.transfer import plain
from lightning_mnn.utilities.validation import positive_integer, real_number, truth_value
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.callbacks.evidence.tiers import Tier
    from lightning_mnn.landscape.kinks.tracing import Names
    from lightning_mnn.landscape.minima.certificate import Certificate
    from lightning_mnn.landscape.minima.first_order import FirstOrderVerdict
    from lightning_mnn.landscape.minima.models.model_certificate import ModelCertificate
    from lightning_mnn.landscape.regions.statistics import NetworkStatistics

Answer = TypeVar("Answer")


class Part(StrEnum):
    """Parts of a detector's work at the end of training, in their order.

    Attributes:
        CHECK: the cheap check, without which there is only the gradient of training's last step.
        TEST_SET: the errors on the test set.
        CERTIFICATE: the expensive check.
        DESCENT: what descent leads to.
    """

    CHECK = auto()
    TEST_SET = auto()
    CERTIFICATE = auto()
    DESCENT = auto()


@accepts_fields_of(first_order=FirstOrderTolerances, second_order=SecondOrderSettings)
class LocalMinimumDetector(ScheduledCallback):
    """Tests whether the weights are next to a local minimum, and stops training when they are; for any module.

    Each check is a cheap test on the whole training set. When it has found nothing against a minimum a few times in a
    row, and always at the end of training, an expensive check decides. ``summary()["evidence"]`` names the evidence
    that the verdict is based on, the strongest that the module, its loss and its data allow:

    - ``certificate``: an exact minimum within ``max_distance``, differentiable or on kinks, or the reason why none was
      found (see :func:`lightning_mnn.landscape.certify` and :func:`lightning_mnn.landscape.certify_model`). This is for
      an MNN, a module with a method ``network()``, and one whose trained weights are all in a piecewise-linear
      ``nn.Sequential``, if its loss is found to be the squared error, the cross-entropy or the logistic loss; with
      weight decay of SGD or Adam, and with frozen weights.
    - ``second_order``: for any other module with ReLU, max-pooling and similar functions: the gradient of its own loss
      over the training set, the nearest kink, and the smallest eigenvalue of the Hessian with an error bound.
    - ``first_order``: necessary conditions only.

    If the data module of a network has a test set, each check also logs ``test/mse`` and ``test/mce``.

    Each tier, its conditions and its verdicts are described in Tiers of evidence, what it logs in Logged names.

    Args:
        schedule: when to check, besides the start and the end; None: every 100 epochs.
        patience: number of consecutive cheap checks that every replica must pass.
        stop_training: stop the Trainer when every replica is certified (with second-order evidence: is at a minimum).
        polish: try to certify at every check; and at the end of training move the weights to the exact minimum, if it
            lies within ``max_distance``, across kinks if necessary (see :func:`lightning_mnn.landscape.polish` and
            :func:`lightning_mnn.landscape.polish_model`).
        max_distance: largest ‖W̃* − W̃‖/‖W̃‖ at which a minimum still counts as the minimum of these weights.
        follow_descent: where the end of training is at no certified minimum, find the minimum that descent leads to, as
            information (``descends_to``): by :func:`lightning_mnn.landscape.polish`, or
            :func:`lightning_mnn.landscape.polish_model`, at any distance, with a limit of work. The weights stay.
        first_order: tolerances of the cheap check of networks; None: the defaults.
        second_order: tolerances and cost of second-order evidence; None: the defaults.
        loss_fn: the loss that training minimises, ``loss_fn(module, batch)``, the mean over the batch; None: what the
            module's ``training_step`` returns.
        modules: names or patterns of the layers whose kinks count, where there is no certificate; None: all.
        max_seconds: time limit of a check, including those at the start and the end; None: no limit. A part that takes
            longer is left out: the evidence is that of the next weaker tier, and the reason states this.
        tier: "light": at most 1 % of training's time, "standard": at most 5 %, "full": no limit. What does not fit, by
            the clock, is left out, so two runs may check, and stop, at different steps.
        end_seconds: time limit of the work at the end of training; None: what the tier leaves, and with "full" 30 s or
            5 % of training's time, whichever is more, unless ``max_seconds`` is given, and for an MNN no limit;
            ``math.inf``: no limit.
        strict: if true, an error in the callback ends the run; otherwise it warns once, and training goes on without
            the callback.

    Attributes:
        verdicts: for a network: the first-order verdicts of the last check, one per replica.
        certificates: the last certificates, one per replica; empty if there are none.
        statistics: for a network: the training-set statistics of the last check.
        converged: whether training counts as converged.
        out_of_time: the first part of the work at the end for which there was no time; None: there was time for all.

    Raises:
        ValueError: an argument is out of range.
        TypeError: (at the start of training) each process has only a part of the weights, or ``polish`` is requested
            where there are no certificates.
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
        follow_descent: bool = True,
        first_order: FirstOrderTolerances | None = None,
        second_order: SecondOrderSettings | None = None,
        loss_fn: ModelFunction | None = None,
        modules: Names = None,
        max_seconds: float | None = None,
        tier: str = "full",
        end_seconds: float | None = None,
        strict: bool = False,
    ) -> None:
        if max_seconds is not None and end_seconds is None and tier == CostTier.FULL:
            end_seconds = math.inf
        super().__init__(schedule or Schedule(every=100), strict=strict, tier=tier, end_seconds=end_seconds)
        self.patience = positive_integer("patience", patience)
        self.stop_training = truth_value("stop_training", stop_training)
        self.polish = truth_value("polish", polish)
        unlimited = max_distance == math.inf
        self.max_distance = math.inf if unlimited else real_number("max_distance", max_distance, at_least=0)
        self.follow_descent = truth_value("follow_descent", follow_descent)
        self.first_order = settings_or_defaults("first_order", first_order, FirstOrderTolerances)
        self.second_order = settings_or_defaults("second_order", second_order, SecondOrderSettings)
        self.loss_fn = loss_fn
        self.modules = modules
        self.max_seconds = None if max_seconds is None else real_number("max_seconds", max_seconds, above=0)
        self.converged = False
        self.out_of_time: Part | None = None
        self._tier: Tier | None = None
        self._saved: dict[str, Any] = {}  # state of the tier of the run that is resumed
        self._passed = 0
        self._attempted = 0  # step of the last expensive check
        self._certified = False  # whether the last check included the expensive one
        self._test_errors: dict[str, Tensor] = {}  # of a network's data module with a test set
        self._spent = (-1, 0.0)  # step of the last check, and the seconds that it took
        self._early = GradientNorms()  # before there was time to choose the tier: the first, and those before checks

    @property
    def verdicts(self) -> list[FirstOrderVerdict]:
        """First-order verdicts on a network, one per replica."""
        return self._tier.verdicts if isinstance(self._tier, CertificateTier) else []

    @property
    def certificates(self) -> list[Certificate] | list[ModelCertificate]:
        """The last certificates, one per replica."""
        tier: Tier | None = self._tier
        if isinstance(tier, CertificateTier) and tier.other is not None:
            tier = tier.other
        return tier.certificates if isinstance(tier, CertificateTier | ModelTier | ReplicaModelTier) else []

    @property
    def statistics(self) -> NetworkStatistics | None:
        """Statistics of the last pass over a network's training set."""
        return self._tier.statistics if isinstance(self._tier, CertificateTier) else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._tier, self._saved, self._passed, self.converged = None, {}, 0, False
            self._certified, self._attempted, self._spent, self._test_errors = False, 0, (-1, 0.0), {}
            self.out_of_time, self._early = None, GradientNorms()

    @override
    def least_seconds(self, trainer: pl.Trainer) -> float:
        """Those of an epoch, since a check needs the gradient of the whole training set."""
        known = self._tier is not None and not isinstance(self._tier, SecondOrderTier)
        if known or states_network(trainer.lightning_module):
            return 0.0
        return self._epoch_seconds

    @override
    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            with self._limited(trainer), self._announced(trainer, "the preparation"):
                self._tier = self._tiers.choose(
                    trainer, pl_module, self._saved, polish=self.polish, last_attempt=self._waits
                )
        except TimeLimitError:
            self._tier = self._without_data(self._no_time_for(Part.CHECK, self._tier))
        if isinstance(self._tier, SecondOrderTier) and self.cost.share is not None:
            self._early.load(self._tier.norms.state())
            self._tier.norms = self._early

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        tier = self._tier
        if self._deferred and (self._may_act_next(trainer) or not self._early.knows(trainer, optimizer)):
            self.observe(lambda: self._early.record(trainer, optimizer))
        if isinstance(tier, SecondOrderTier):
            tier.norms.record(trainer, optimizer)
        if isinstance(tier, FirstOrderTier) and (self._may_act_next(trainer) or not tier.knows(trainer, optimizer)):
            self.observe(lambda: tier.record_gradient(trainer, optimizer))

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checked = tier = self._check(trainer, pl_module)
        passed = self._passed + 1 if tier.passed else 0
        converged = passed >= self.patience
        wanted = tier.can_certify and (self.polish or (converged and not self.converged))  # and again at the end
        certifies = wanted and tier.affordable(trainer, pl_module, trainer.global_step - self._attempted)
        if certifies:
            self._attempted = trainer.global_step
            tier = self._certify(trainer, pl_module)
            converged = tier.found_minimum
        elif wanted:  # it waits for the certificate
            converged = converged and self.converged
        self._passed, self._certified = passed if tier is checked else 0, certifies
        log_scalars(trainer, tier.scalars())
        self._test(trainer, pl_module)
        self.converged = trainer.strategy.reduce_boolean_decision(converged, all=True)
        if self.converged and self.stop_training:
            trainer.should_stop = True

    @override
    def recall(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, pl_module)
        if self._certified:
            self._certify(trainer, pl_module)
        self._test_errors = errors_on_test_set(trainer, pl_module)

    @override
    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().finish(trainer, pl_module)
        self._certify(trainer, pl_module, end=True)
        if self.polish:  # the weights may have moved
            self._test(trainer, pl_module)
        tier = self._follow(trainer, pl_module)
        findings = tier.findings()
        for replica, found in enumerate(findings):
            name = f" (replica {replica})" if len(findings) > 1 else ""
            rank_zero_info(f"LocalMinimumDetector{name}: {found.kind}: {found.reason}")

    @override
    def facts(self) -> list[Fact]:
        tier = self._tier
        if tier is None or self.failure is not None or not (summary := tier.summary()):
            return []
        findings, several = tier.findings(), isinstance(summary["kind"], list)
        apart = [f"; {unknown.reason}" for unknown in self.unknowns()]
        facts = []
        for replica, verdict in enumerate(findings):
            name = f"(replica {replica}) " if len(findings) > 1 else ""
            reason = verdict.reason.replace(apart[0], "") if apart else verdict.reason
            text = f"{name}{str(verdict.kind).replace('_', ' ')}: {reason}"
            facts.append(Fact(str(verdict.reason_code), text, advice=verdict.plain()["advice"]))
            ahead = summary.get("descends_to")
            if ahead := ahead[replica] if several and ahead else ahead:
                text = f"{name}descent leads from here to a {str(ahead).replace('_', ' ')}"
                facts.append(Fact("descends_to", text))
        return facts

    @override
    def unknowns(self) -> list[Unknown]:
        tier = self._tier
        if tier is None or tier.why is None or tier.evidence in (Evidence.CERTIFICATE, Evidence.SECOND_ORDER):
            return []
        return [Unknown("whether this is a minimum", UnknownCode.NOT_MEASURED, tier.why)]

    @override
    def run_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the gradient of training's last step: there was no time for anything else."""
        self.out_of_time = self.out_of_time or Part.CHECK
        self._tier = self._without_data(self._tier)
        self._tier.check(trainer, pl_module)
        log_scalars(trainer, self._tier.scalars())

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        if self.failure is not None:
            finding = Finding.of(Kind.UNDECIDED, Reason.of(ReasonCode.ERROR, cause=self.failure))
            return {"evidence": str(Evidence.NONE), **finding.plain()}
        found = {} if self._tier is None else self._tier.summary()
        if found:
            found["out_of_time"] = self.out_of_time and str(self.out_of_time)
        if self.out_of_time in (Part.CHECK, Part.CERTIFICATE):
            advice, several = ADVICE[ReasonCode.TIME_LIMIT], isinstance(found["kind"], list)
            found["advice"] = [advice] * len(found["kind"]) if several else advice
        return found | {f"test_{name}": plain(value) for name, value in self._test_errors.items()}

    def _test(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate and log the errors on the test set, if there is one."""
        try:
            self._test_errors = errors_on_test_set(trainer, pl_module)
        except TimeLimitError:
            self._test_errors = self._no_time_for(Part.TEST_SET, {})
        if self._test_errors:
            log_scalars(trainer, self._test_scalars())

    def _test_scalars(self) -> dict[str, Any]:
        return {f"test/{name}": value.mean() for name, value in self._test_errors.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {"passed": self._passed, "converged": self.converged, "judge": self._saved}
        state |= {"concluded": self._certified, "attempted": self._attempted}
        if self._tier is not None:
            state["judge"] = state_of(self._tier)
        return super().state_dict() | state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._passed, self.converged = state_dict.get("passed", 0), state_dict.get("converged", False)
        self._saved, self._certified = state_dict.get("judge", {}), state_dict.get("concluded", False)
        self._attempted = state_dict.get("attempted", 0)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        """Run the cheap check; if the loss turns out not to be evaluable, that of a weaker tier."""
        assert self._tier is not None  # noqa: S101 (chosen at the start)
        try:
            with self._limited(trainer), self._announced(trainer, "a check on the whole training set"):
                return self._check_or_weaken(trainer, pl_module)
        except TimeLimitError:
            self._tier = self._without_data(self._no_time_for(Part.CHECK, self._tier))
            self._tier.check(trainer, pl_module)
            return self._tier

    def _check_or_weaken(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        assert self._tier is not None  # noqa: S101 (chosen at the start)
        try:
            self._tier.check(trainer, pl_module)
        except (NoDerivativeError, LossNotEvaluableError) as error:
            self._tier = self._tiers.first_order_tier(str(error))
            self._tier.check(trainer, pl_module)
        return self._tier

    def _certify(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, end: bool = False) -> Tier:
        """Run the expensive check; at the end of training, the part of it that is not done yet."""
        assert self._tier is not None  # noqa: S101
        tier = self._tier
        if not tier.can_certify:
            return tier
        try:
            with (
                self._limited(trainer),
                self._announced(trainer, "the expensive check", self.second_order.max_products),
            ):
                if not end:
                    tier.certify_minimum(trainer, pl_module)
                    return tier
                done = tier.finalize(trainer, pl_module, polish=self.polish)
        except TimeLimitError:
            self._no_time_for(Part.CERTIFICATE, tier).run_out(self._over_time)
            done = end
        except (NotSquaredErrorError, NotModelLossError, LossNotEvaluableError) as error:
            self._tier = self._tiers.second_order_tier(str(error))
            if isinstance(tier, ModelTier):
                self._tier.load(tier.state())  # the norms of gradients
            self._check(trainer, pl_module)
            return self._certify(trainer, pl_module, end=end)
        if done:
            self.converged = tier.found_minimum
            log_scalars(trainer, tier.scalars())
        return tier

    def _follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        """Find what descent leads to; if there is no time for it, the verdict stays."""
        assert self._tier is not None  # noqa: S101
        if self.follow_descent:
            try:
                with self._limited(trainer):
                    self._tier.follow_descent(trainer, pl_module)
            except TimeLimitError:
                self._no_time_for(Part.DESCENT, self._tier)
        return self._tier

    def _without_data(self, before: Tier | None) -> Tier:
        """The tier if there is no time to read the training set."""
        tier = self._tiers.tier_without_data(before, self._over_time)
        if before is None:
            tier.load(self._early.ends() | {"reads": False})
        return tier

    def _no_time_for(self, part: Part, otherwise: Answer) -> Answer:
        """Note a part that was stopped, and what to continue with.

        Raises:
            TimeLimitError: the tier leaves no time for a scheduled check, which is left out.
        """
        if self._ending:
            self.out_of_time = self.out_of_time or part
            self.over_time = self.over_time or self._over_time
        elif self.cost.share is not None and not self._used_up:
            raise TimeLimitError
        return otherwise

    @property
    def _tiers(self) -> Tiers:
        return Tiers(self.max_distance, self.loss_fn, self.modules, self.first_order, self.second_order)

    @property
    def _used_up(self) -> bool:
        """Whether a check at this step has taken ``max_seconds``."""
        return self.max_seconds is not None and self._spent[1] >= self.max_seconds

    @property
    def _over_time(self) -> str:
        of_check = self._used_up or (self.max_seconds is not None and math.isinf(self._seconds_at_end))
        return self._over_max_seconds if of_check else self._over_end(self._seconds_at_end)

    @property
    def _over_max_seconds(self) -> str:
        return f"a check took longer than max_seconds={self.max_seconds:g}: increase it, or use max_seconds=None"

    @contextmanager
    def _limited(self, trainer: pl.Trainer) -> Iterator[None]:
        """Limit the time to what is left for the check at this step."""
        step, spent = self._spent
        spent, start = spent if step == trainer.global_step else 0.0, time.monotonic()
        try:
            with shorter_time_limit(None if self.max_seconds is None else self.max_seconds - spent):
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
