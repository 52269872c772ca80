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
from lightning_mnn.callbacks.evidence.tiers import Evidence
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.long_pass import long_pass
from lightning_mnn.data.loaders.shards import NotEnumerableError, can_be_enumerated, draws
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.loggers.media import log_scalars
from lightning_mnn.utilities.interruption import TimeLimitError, time_limit
from lightning_mnn.utilities.validation import MisfitError, positive_integer, real_number, truth_value

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
    """Tests whether the weights are next to a local minimum, and stops training when they are, in any module.

    Each check is a cheap look at the whole training set. When it has found nothing against a minimum a few times in a
    row, and at the end of training whatever it found, a dear part decides. ``summary()["evidence"]`` says what the word
    rests on:

    ``certificate``: an exact minimum within ``max_distance``, differentiable or on kinks, or the reason why none could
    be told (see :func:`lightning_mnn.landscape.certify`). For networks with one hidden layer, biases included, that are
    trained on the squared error: an MNN, a module with a method ``network()``, or one around a single
    ``nn.Sequential(Linear, ReLU, Linear → 1)``, where ReLU may be LeakyReLU or a PReLU with one slope. Of the latter it
    is first tested, in float64, that the gradient of the module's own loss is parallel to that of the squared error,
    and again before a certificate that their values and gradients agree. The look is two first-order tests in float64:
    ‖G e‖ is zero relative to ‖G‖‖y‖, and no pre-activation is zero relative to ‖w‖‖x‖, within tolerances. The verdict
    is about the mean squared error: ``summary()["objective"]`` is "mse", and ``summary()["objective_differs_by"]`` says
    whether training lowers another objective ("weight_decay", "frozen_weights"). Then the verdict stops no training and
    moves no weights.

    ``second_order``: for any other module with ReLU, max-pooling and the like, by its own training loss: in eval mode
    (batch norm at its running statistics, no dropout), over all training samples, each once, in the weights' precision.
    The loss is ``loss_fn(module, batch)``, or what ``training_step`` returns, taken as the mean over the batch. (Where
    it is a sum and the last batch is smaller, or no mean over samples, the reason says so: ``loss_fn`` can return the
    mean. Last batches that ``drop_last`` drops are left out.) The look: the norm of the gradient is small relative to
    the largest that training has followed so far, whatever its batches (before the first step, to |L|/‖θ‖), and no
    unit is on a kink. The dear part, in float64 where the weights have fewer digits and the loss can be had so: the
    smallest eigenvalue of the Hessian with an error bound, which is of one side only, and left alone, on a kink; and a
    ``differentiable_minimum`` only where Newton's method leads to a stationary point next to the weights, as its
    quadratic model says, and gains next to nothing on the way, and where the Hessian is positive, or the loss is seen
    to stay the same along its flat directions, as symmetries make it (see
    :func:`lightning_mnn.landscape.check_curvature`). Flat directions that lead down, as those of a tail exp(−y) or of a
    saddle of fourth order, are no minimum, and stop no training. It is evidence, not a proof; and of the loss, to which
    the weight decay of an optimiser does not belong.

    ``first_order``: an MNN with two hidden layers, or a training set of more than 2.7e8 input numbers a process: the
    first-order tests only, which are necessary conditions. Where the loss of a module cannot be had (manual
    optimisation without a ``loss_fn``, a ``training_step`` that returns none, fails in eval mode, or depends on a state
    outside the module): the norm of the gradient of training's own last step relative to its first, and the nearest
    kink; these tell of no minimum, and never stop training.

    Logs on a network ``minimum/mse``, ``minimum/mce``, ``minimum/stationarity``, ``minimum/min_preactivation``
    (absolute), ``minimum/relative_preactivation``, ``minimum/kinks`` and, with one hidden layer, ``minimum/rank_cap``,
    all of the weights; with a certificate also ``minimum/certified`` and ``minimum/on_kinks`` (fractions of the
    replicas), ``minimum/certified_mse``, ``minimum/certified_mce``, ``minimum/certified_kinks``, ``minimum/distance``,
    ``minimum/margin_ratio`` and ``minimum/rank``. All are means over the replicas. On other modules ``minimum/loss``,
    ``minimum/gradient_norm``, ``minimum/relative_gradient``, ``minimum/min_preactivation`` (distance to the nearest
    kink), ``minimum/relative_preactivation`` (in units of its layer's root mean square), ``minimum/kinks`` and, where
    they were computed, ``minimum/smallest_eigenvalue``, ``minimum/eigenvalue_error``, ``minimum/largest_eigenvalue``
    and ``minimum/newton_gain`` (what a Newton step would still gain).

    Args:
        schedule: when to check, besides the start and the end; None: every 100 epochs.
        patience: consecutive checks at which every replica must pass the look.
        stop_training: stop the Trainer when every replica is certified (on second-order evidence, is at a minimum; with
            two hidden layers, has passed).
        polish: try to certify at every check; and at the end of training go to the exact minimum, where it lies within
            ``max_distance``, across kinks if need be (see :func:`lightning_mnn.landscape.polish`).
        max_distance: largest ‖W̃* − W̃‖/‖W̃‖ between the weights and a minimum that counts as theirs.
        stationarity_tolerance: largest ‖G e‖/(‖G‖_F ‖y‖) that counts as zero in the first-order tests; None: 10 times
            the spacing of floats at 1 in the weights' precision.
        preactivation_tolerance: smallest |w·x|/(‖w‖‖x‖) that counts as off the kink there; None: 1,000 times that
            spacing.
        loss_fn: the loss that training lowers, ``loss_fn(module, batch)``, the mean over the batch; None: what the
            module's ``training_step`` returns.
        modules: names or patterns of the layers whose kinks count in second-order evidence; None: all.
        gradient_tolerance: largest ‖∇L‖, relative to the largest norm of a gradient that training followed so far, of
            a stationary point there.
        curvature_tolerance: largest −λ_min/λ_max of a minimum there.
        max_products: Hessian–vector products there, at most, of each stage. Of a resnet18 on a CPU one took as long as
            3 to 5 epochs, and a look 2.7.
        max_seconds: that a check may take, those at the start and the end included; None: any time. What takes longer
            is left out: the evidence is that of the tier below, and the reason says so. Where a look takes longer,
            the training set is read no more: what is told is of the gradients of training alone, or ``none``.
        strict: let an error that the callback meets end the run; else it warns once, and training goes on without it.

    Attributes:
        verdicts: of a network the last check's first-order verdicts, one a replica.
        certificates: the last certificates, one a replica; empty where there are none.
        statistics: of a network the last check's pass.
        converged: whether training counts as converged.

    Raises:
        ValueError: ``patience`` or ``max_products`` < 1, ``max_distance`` < 0, a tolerance that is not positive.
        TypeError: (at the start of training) the module has no kinks, or its training set cannot be enumerated, or each
            process holds a part of the weights, or ``polish`` is asked for where there are no certificates.
        DivergenceError: (in training) the weights or the loss over the training set are not finite.

    >>> LocalMinimumDetector(Schedule(every=100), polish=True).converged
    False
    """

    missing = "of convergence nothing is told"
    remedy = (
        "loss_fn(module, batch), the loss that training lowers, where the module's training_step does not return it"
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
        self._saved: dict[str, Any] = {}  # of the judge of the run that is resumed
        self._passed = 0
        self._certified = False  # at the last check, beyond a look
        self._spent = (-1, 0.0)  # step of the last check, and seconds of it

    @property
    def verdicts(self) -> list[FirstOrderVerdict]:
        """First-order verdicts on a network, one a replica."""
        return self._tier.verdicts if isinstance(self._tier, CertificateTier) else []

    @property
    def certificates(self) -> list[Certificate]:
        """The last certificates, one a replica."""
        return self._tier.certificates if isinstance(self._tier, CertificateTier) else []

    @property
    def statistics(self) -> NetworkStatistics | None:
        """The last pass over a network's training set."""
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
                self._tier = self._chosen(trainer, pl_module)
        except TimeLimitError:
            self._tier = self._without_data()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        tier = self._tier
        if isinstance(tier, SecondOrderTier):
            tier.norms.take(trainer, optimizer)
        if isinstance(tier, FirstOrderTier) and (self._may_act_next(trainer) or not tier.knows(trainer, optimizer)):
            self.observe(lambda: tier.take_gradient(trainer, optimizer))

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
        for replica, (kind, reason) in enumerate(zip(*(kinds := tier.kinds()), strict=True)):
            name = f" (replica {replica})" if len(kinds[0]) > 1 else ""
            rank_zero_info(f"LocalMinimumDetector{name}: {kind}: {reason}")

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        if self.failure is not None:
            return {"evidence": str(Evidence.NONE), "kind": "undecided", "reason": self.failure}
        return {} if self._tier is None else self._tier.summary()

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"passed": self._passed, "converged": self.converged, "judge": self._saved}
        own |= {"concluded": self._certified}
        if self._tier is not None:
            own["judge"] = {"tier": str(_TIERS[type(self._tier)]), "why": self._tier.why} | self._tier.state()
        return super().state_dict() | own

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._passed, self.converged = state_dict.get("passed", 0), state_dict.get("converged", False)
        self._saved, self._certified = state_dict.get("judge", {}), state_dict.get("concluded", False)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        """The cheap part; if the loss proves not to be had, by the tier below."""
        assert self._tier is not None  # noqa: S101 (chosen at the start)
        try:
            with self._limited(trainer), self._announced(trainer, "a look at the whole training set"):
                return self._look_by_tiers(trainer, pl_module)
        except TimeLimitError:
            self._tier = self._without_data()
            self._tier.check(trainer, pl_module)
            return self._tier

    def _look_by_tiers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        assert self._tier is not None  # noqa: S101 (chosen at the start)
        try:
            self._tier.check(trainer, pl_module)
        except (NoDerivativeError, LossNotEvaluableError) as error:
            self._tier = self._first_order(str(error))
            self._tier.check(trainer, pl_module)
        return self._tier

    def _certify(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, end: bool = False) -> Tier:
        """The dear part; at the end of training, what is left of it."""
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

    def _chosen(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        """The judge of a run, as strong as its module, loss and data allow."""
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
            return self._first_order(f"the loss over the whole training set is not to be had: {error}")
        with batch.open():
            try:
                why = batch.reason_not_evaluable()
            except StepFailedError as error:
                if not self._waits:  # once more, at the first batch
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
            return self._second_order("its training set is not known sample by sample")
        try:
            found = squared_error_loss(trainer, pl_module, self.loss_fn)
        except LossNotEvaluableError as error:
            return self._first_order(str(error))
        return self._network(found) if isinstance(found, SquaredErrorLoss) else self._second_order(found)

    def _resumed(self) -> Tier:
        """The judge of the run that goes on."""
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
        """The judge where there is no time for the training set; with the gradients that another took note of."""
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
        return f"a check took longer than max_seconds={self.max_seconds:g}: give more, or max_seconds=None"

    @contextmanager
    def _limited(self, trainer: pl.Trainer) -> Iterator[None]:
        """What is left of the time for the check at this step."""
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
        """Whether the detector may act before this optimiser's next step."""
        run: Any = trainer
        last = trainer.global_step + len(trainer.optimizers)  # each optimiser's step counts
        within = self.acts_within_epochs and any(map(self.schedule.due, range(trainer.global_step + 1, last + 1)))
        return bool(trainer.is_last_batch or within or 0 < run.max_steps <= last)


def _check_weights_are_here(trainer: pl.Trainer) -> None:
    if any(kind.__name__ in _SHARDED for kind in type(trainer.strategy).__mro__):
        raise TypeError(
            f"LocalMinimumDetector needs all weights on each process, and the {type(trainer.strategy).__name__} splits "
            'them: train with strategy="ddp" or on one device'
        )


_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
