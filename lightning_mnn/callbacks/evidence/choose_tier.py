"""Which tier of evidence a run allows, with the settings of its detector."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_mnn.callbacks.evaluation.full_batch import FullBatch
from lightning_mnn.callbacks.evaluation.module_network import network_of, states_network
from lightning_mnn.callbacks.evaluation.run_module import LossNotEvaluableError, StepFailedError
from lightning_mnn.callbacks.evidence.certificate import CertificateTier
from lightning_mnn.callbacks.evidence.first_order import FirstOrderTier
from lightning_mnn.callbacks.evidence.model_tier import ModelTier
from lightning_mnn.callbacks.evidence.models.loss import ModelLoss, model_loss
from lightning_mnn.callbacks.evidence.models.source import NetworkSource, SequentialSource
from lightning_mnn.callbacks.evidence.models.squared_error import SquaredErrorLoss, squared_error_loss
from lightning_mnn.callbacks.evidence.second_order import SecondOrderTier
from lightning_mnn.callbacks.evidence.tiers import Evidence
from lightning_mnn.data.loaders.shards import NotEnumerableError, can_be_enumerated, draws, flat_batch
from lightning_mnn.utilities.validation import MisfitError, positive_integer, real_number

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.callbacks.evidence.tiers import Tier
    from lightning_mnn.landscape.kinks.tracing import Names

_MODEL = "model"
_TIERS: dict[type[Tier], str] = {  # by which checkpoints name them
    CertificateTier: Evidence.CERTIFICATE,
    ModelTier: _MODEL,
    SecondOrderTier: Evidence.SECOND_ORDER,
    FirstOrderTier: Evidence.FIRST_ORDER,
}
_OF_VERSION_0_1 = {  # whose checkpoints named classes
    "NetworkJudge": Evidence.CERTIFICATE,
    "SecondOrderJudge": Evidence.SECOND_ORDER,
    "FirstOrderJudge": Evidence.FIRST_ORDER,
}
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


@dataclass(frozen=True)
class FirstOrderTolerances:
    """Tolerances of the first-order tests on a network, the cheap check before a certificate.

    Attributes:
        stationarity_tolerance: largest ‖G e‖/(‖G‖_F ‖y‖) that counts as zero; None: 10 times the spacing of floats at 1
            in the weights' precision.
        preactivation_tolerance: smallest |w·x|/(‖w‖‖x‖) that counts as off the kink; None: 1,000 times that spacing.

    Raises:
        ValueError: a tolerance is not positive.
    """

    stationarity_tolerance: float | None = None
    preactivation_tolerance: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name, tolerance in vars(self).items():
            if tolerance is not None:
                real_number(name, tolerance, above=0)


@dataclass(frozen=True)
class SecondOrderSettings:
    """Tolerances and cost of second-order evidence.

    Attributes:
        gradient_tolerance: largest ‖∇L‖ of a stationary point, relative to the largest gradient norm that training has
            followed so far. (In first-order evidence of modules whose loss cannot be evaluated: relative to the first.)
        curvature_tolerance: largest −λ_min/λ_max of a minimum.
        max_products: maximal number of Hessian–vector products of each stage.

    Raises:
        ValueError: a value is not positive.
    """

    gradient_tolerance: float = 1e-3
    curvature_tolerance: float = 1e-3
    max_products: int = 128

    def __post_init__(self) -> None:
        """Check the values."""
        real_number("gradient_tolerance", self.gradient_tolerance, above=0)
        real_number("curvature_tolerance", self.curvature_tolerance, above=0)
        positive_integer("max_products", self.max_products)


@dataclass(frozen=True)
class Tiers:
    """The tiers of one detector.

    Attributes:
        max_distance: see :class:`CertificateTier`.
        loss_fn: the loss that training minimises; None: what the module's ``training_step`` returns.
        modules: layers whose kinks count; None: all.
        first_order: of the tests on networks.
        second_order: of the second-order evidence.
    """

    max_distance: float
    loss_fn: ModelFunction | None
    modules: Names
    first_order: FirstOrderTolerances
    second_order: SecondOrderSettings

    def choose(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        saved: dict[str, Any],
        *,
        polish: bool,
        last_attempt: bool,
    ) -> Tier:
        """The strongest tier that the module, loss and data of a run allow.

        Args:
            trainer: the Trainer that trains the module.
            pl_module: the module.
            saved: the state of the tier of the run that is resumed; empty for a new run.
            polish: whether the tier must be able to move the weights to a minimum.
            last_attempt: whether a ``training_step`` that fails only leads to weaker evidence.

        Raises:
            StepFailedError: a ``training_step`` failed, and this is not the last attempt.
            MisfitError: there is no network to polish.
            TypeError: each process has only a part of the weights.
        """
        if states_network(pl_module) and can_be_enumerated(trainer.train_dataloader):
            return self.certificate_tier()
        _check_weights_are_here(trainer)
        tier = self.resumed(saved) if saved else self._strongest(trainer, pl_module, last_attempt=last_attempt)
        if polish and not tier.moves:
            raise MisfitError(
                "polish=True needs a network that can be certified: an MNN, a module with a method network(), or one "
                "piecewise-linear nn.Sequential trained on the squared error, cross-entropy or logistic loss; "
                f"{type(pl_module).__name__} has none{f': {tier.why}' if tier.why else ''}. Use polish=False"
            )
        return tier

    def resumed(self, saved: dict[str, Any]) -> Tier:
        """The tier whose :func:`state_of` is saved."""
        state = dict(saved)
        evidence, why = state.pop("tier", None) or _OF_VERSION_0_1[state.pop("name")], state.pop("why")
        if evidence == Evidence.CERTIFICATE:
            return self.certificate_tier(SquaredErrorLoss(**state["fitted"]))
        tier: Tier
        if evidence == _MODEL:
            tier = self.model_tier(ModelLoss(**state["fitted"]), whole=state["whole"])
        else:
            tier = self.second_order_tier(why) if evidence == Evidence.SECOND_ORDER else self.first_order_tier(why)
        tier.load(state)
        return tier

    def certificate_tier(self, fitted: SquaredErrorLoss | None = None) -> CertificateTier:
        """The tier for a network that is trained on the squared error."""
        tolerances = self.first_order.stationarity_tolerance, self.first_order.preactivation_tolerance
        other = self._of_network if fitted is None else partial(self.second_order_tier, None)
        return CertificateTier(self.max_distance, *tolerances, fitted, self.loss_fn, other)

    def model_tier(self, fitted: ModelLoss, *, whole: bool = False) -> ModelTier:
        """The tier for an ``nn.Sequential`` that is trained on a loss that certificates of models cover."""
        source = SequentialSource(fitted, self.loss_fn, whole=whole)
        return ModelTier(source, self.max_distance, self.loss_fn, self.modules, **asdict(self.second_order))

    def second_order_tier(self, why: str | None) -> SecondOrderTier:
        """The tier for a loss that can be evaluated."""
        return SecondOrderTier(self.loss_fn, self.modules, **asdict(self.second_order), why=why)

    def _of_network(self) -> ModelTier:
        """The tier for the squared error of a network that is deep, or with weight decay or frozen weights."""
        source, settings = NetworkSource(), asdict(self.second_order)
        return ModelTier(source, self.max_distance, _squared_error, self.modules, **settings, weight_decay=True)

    def first_order_tier(self, why: str, *, reads: bool = True) -> FirstOrderTier:
        """The tier for a loss that cannot be evaluated."""
        return FirstOrderTier(self.loss_fn, self.modules, self.second_order.gradient_tolerance, why, reads=reads)

    def tier_without_data(self, before: Tier | None, why: str) -> FirstOrderTier:
        """The tier if there is no time to read the training set; with the gradients that the last one recorded."""
        if before is not None and before.why is not None:
            why = f"{before.why}; {why}"
        tier = self.first_order_tier(why, reads=False)
        if isinstance(before, FirstOrderTier):
            tier.load(before.state() | {"reads": False})
        elif isinstance(before, SecondOrderTier):
            tier.load(before.norms.ends() | {"reads": False})
        return tier

    def _strongest(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last_attempt: bool) -> Tier:
        try:
            batch = FullBatch(trainer, pl_module, self.loss_fn, self.modules)
        except NotEnumerableError as error:
            return self.first_order_tier(f"the loss over the whole training set cannot be evaluated: {error}")
        with batch.open():
            try:
                why = batch.reason_not_evaluable()
            except StepFailedError as error:
                if not last_attempt:
                    raise
                why = str(error)
            try:
                batch.surface()
            except ValueError as error:
                why = why or str(error)
        if why is not None:
            return self.first_order_tier(why)
        try:
            return self._certificate_of(trainer, pl_module)
        except LossNotEvaluableError as error:
            return self.first_order_tier(str(error))

    def _certificate_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tier:
        """The tier of certificates that cover the loss of a module; if there is none, that of second-order evidence.

        Raises:
            LossNotEvaluableError: the loss cannot be evaluated.
        """
        network, why = network_of(pl_module), None
        if network is not None and len(network.hidden_weights) == 1:
            if draws(trainer.train_dataloader):
                return self.second_order_tier("its training set cannot be read sample by sample")
            found = squared_error_loss(trainer, pl_module, self.loss_fn)
            if isinstance(found, SquaredErrorLoss):
                return self.certificate_tier(found)
            why = found
        model = model_loss(trainer, pl_module, self.loss_fn)
        return self.model_tier(model) if isinstance(model, ModelLoss) else self.second_order_tier(why or model)


def _squared_error(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    """The mean squared error of a batch."""
    inputs, targets = flat_batch(batch)
    return nn.functional.mse_loss(pl_module(inputs), targets.to(inputs.dtype))


def state_of(tier: Tier) -> dict[str, Any]:
    """What a resumed run needs to continue with a tier, as plain values."""
    return {"tier": str(_TIERS[type(tier)]), "why": tier.why} | tier.state()


def _check_weights_are_here(trainer: pl.Trainer) -> None:
    if any(kind.__name__ in _SHARDED for kind in type(trainer.strategy).__mro__):
        raise TypeError(
            f"LocalMinimumDetector needs all weights on each process, but {type(trainer.strategy).__name__} splits "
            'them: train with strategy="ddp" or on one device'
        )
