"""Evidence for a piecewise-linear network that is trained on the squared error: first-order tests, and certificates."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.evaluation.module_network import network_of, states_network
from lightning_mnn.callbacks.evaluation.snapshots import restoring_generators
from lightning_mnn.callbacks.evaluation.training_set import input_rank, training_set_statistics
from lightning_mnn.callbacks.evidence.certification import (
    certify_training_set,
    descents_on_training_set,
    move_to,
    polish_on_training_set,
    reason_not_certified,
)
from lightning_mnn.callbacks.evidence.model_tier import ModelTier
from lightning_mnn.callbacks.evidence.models.loss import ModelLoss
from lightning_mnn.callbacks.evidence.models.objective import MAX_CERTIFICATE_WORK
from lightning_mnn.callbacks.evidence.models.sequential import found_sequential
from lightning_mnn.callbacks.evidence.models.squared_error import SquaredErrorLoss, still_fits
from lightning_mnn.callbacks.evidence.models.training_mode import reason_in_steps
from lightning_mnn.callbacks.evidence.replica_tier import ReplicaModelTier, work_of_replicas
from lightning_mnn.callbacks.evidence.tiers import (
    Difference,
    Evidence,
    Finding,
    Tier,
    conditions,
    decay_differences,
    descriptions,
    unseen_batches,
)
from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.first_order import FirstOrderVerdict, first_order_verdicts
from lightning_mnn.landscape.minima.learning_coefficient import known_coefficient
from lightning_mnn.landscape.regions.statistics import NetworkStatistics, rank_cap
from lightning_mnn.utilities.interruption import time_limit
from lightning_mnn.utilities.transfer import plain
from lightning_mnn.verdicts import STATIONARY, Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.callbacks.evidence.second_order import SecondOrderTier
    from lightning_mnn.landscape.minima.certificate import Certificate
    from lightning_mnn.landscape.minima.polishing import Polished
    from lightning_mnn.landscape.network import Network


class NotSquaredErrorError(Exception):
    """A module's loss turned out to differ from the squared error of its network."""


class CertificateTier(Tier):
    """Tests and certifies the network of a module in float64, each replica by itself.

    Args:
        max_distance: largest ‖W̃* − W̃‖/‖W̃‖ at which a minimum still counts as the minimum of these weights.
        stationarity_tolerance: of the first-order tests; None: 10 spacings of floats at 1.
        preactivation_tolerance: of the first-order tests; None: 1,000 spacings.
        fitted: the constants with which the module's own loss was found to be the squared error; None: it is known to
            be the squared error.
        loss_fn: that loss, if not the module's ``training_step``.
        of_objective: makes the tier for a deep network, and for the objective that training lowers if it is not the
            squared error with all weights free.

    Attributes:
        verdicts: the first-order verdicts of the last check, one per replica.
        certificates: the last certificates, one per replica; empty if there are none.
        statistics: the training-set statistics of the last check.
        descents: what descent leads to from the final weights, one per replica; None for a certified minimum, or where
            it was not followed; empty if nothing was followed.
        differences: how the objective that training lowers differs from the squared error with all weights free. If
            it does, the verdict is on that objective, and is that of the tier ``other``, as for a deep network.
        other: None: the verdict is on the squared error of two layers, or there is no evidence on the objective.
    """

    def __init__(
        self,
        max_distance: float,
        stationarity_tolerance: float | None,
        preactivation_tolerance: float | None,
        fitted: SquaredErrorLoss | None = None,
        loss_fn: ModelFunction | None = None,
        of_objective: Callable[[], SecondOrderTier] | None = None,
    ) -> None:
        self.verdicts: list[FirstOrderVerdict] = []
        self.certificates: list[Certificate] = []
        self.statistics: NetworkStatistics | None = None
        self.fitted = fitted
        self.other: SecondOrderTier | ReplicaModelTier | None = None
        self._other_checked = False  # whether it was checked at the weights of the last check
        self._of_objective = of_objective
        self._loss_fn = loss_fn
        self._max_distance = max_distance
        self._stationarity_tolerance = stationarity_tolerance
        self._preactivation_tolerance = preactivation_tolerance
        self.descents: list[Polished | None] = []
        self._moved: list[float] = []  # relative distances of replicas that polishing moved too far; 0 for the others
        self._certifiable = False
        self._too_many_replicas = False  # for certificates of models, all together
        self._reason_not_certified: str | None = None
        self._rank_cap: Tensor | None = None
        self.differences: list[Difference] = []
        self._notes: list[str] = []  # on how training differs from the objective of the verdicts

    @property
    @override
    def evidence(self) -> Evidence:
        if self.differences and self.other is None:
            return Evidence.NONE
        if self._checked is not None:
            return self._checked.evidence
        return Evidence.CERTIFICATE if self._certifiable else Evidence.FIRST_ORDER

    @property
    @override
    def passed(self) -> bool:
        if self.differences:
            return self.other is not None and self.other.passed
        if self.other is not None:  # of a deep network, which may be on its way to kinks
            assert self.statistics is not None  # noqa: S101 (there was a check)
            close = bool((self.statistics.smallest_sine <= tolerances.MAX_APPROACHED_KINK_RATIO).all())
            return close or all(verdict.kind is not Kind.NOT_STATIONARY for verdict in self.verdicts)
        return all(verdict.kind is Kind.DIFFERENTIABLE_MINIMUM for verdict in self.verdicts)

    @property
    @override
    def can_certify(self) -> bool:
        return self.other is not None or (self._certifiable and not self.differences)

    @override
    def affordable(self, trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> bool:
        return self.other is None or self.other.affordable(trainer, pl_module, steps)

    @property
    @override
    def moves(self) -> bool:
        return True

    @override
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = _network(pl_module)
        self.certificates, self.descents = [], []
        self._reason_not_certified = reason_not_certified(trainer, network)
        self._certifiable = len(network.hidden_weights) == 1 and self._reason_not_certified is None
        self.differences = _differences(trainer, pl_module, network)
        self._notes = _notes(trainer, pl_module, self.differences, fitted=self.fitted is not None)
        with _restoring_if_foreign(trainer, pl_module):
            self._statistics(trainer, pl_module, network)
        self._too_many_replicas = len(self.verdicts) > 1 and (
            self.fitted is not None or work_of_replicas(trainer, pl_module) > MAX_CERTIFICATE_WORK
        )
        self._check_other(trainer, pl_module)

    def _check_other(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """If the network is deep, or training lowers another objective than its squared error, check its model."""
        deep = len(_network(pl_module).hidden_weights) > 1
        if not (self.differences or deep) or self.reason_no_evidence() is not None:
            self.other, self._other_checked = None, False
            return
        if self.other is None:
            assert self._of_objective is not None  # noqa: S101 (else there is a reason)
            count = len(self.verdicts)
            self.other = ReplicaModelTier(self._max_distance, count) if count > 1 else self._of_objective()
        self._other_checked = False
        if self.differences:
            self._check_model(trainer, pl_module)

    def _check_model(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the other tier at the present weights; of a deep network only before the expensive check."""
        if self.other is not None and not self._other_checked:
            self.other.check(trainer, pl_module)
            self._other_checked = True

    @property
    def _checked(self) -> SecondOrderTier | ReplicaModelTier | None:
        """The other tier, if it was checked at the weights of the last check."""
        return self.other if self._other_checked else None

    def reason_no_evidence(self) -> Reason | None:
        """The reason why the objective that training lowers cannot be tested; None if it can."""
        if Difference.DECOUPLED_WEIGHT_DECAY in self.differences:
            return Reason.of(ReasonCode.NO_OBJECTIVE)
        if self._too_many_replicas:
            return Reason.of(ReasonCode.OBJECTIVE_OF_REPLICAS, replicas=len(self.verdicts))
        return Reason.of(ReasonCode.NOT_CHECKED) if self._of_objective is None else None

    @override
    def certify_minimum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.other is not None:
            self._check_model(trainer, pl_module)
            self.other.certify_minimum(trainer, pl_module)
        if self.differences or self.other is not None:
            return
        self._check_loss(trainer, pl_module)
        with _restoring_if_foreign(trainer, pl_module):
            network = _network(pl_module)
            self.certificates = certify_training_set(trainer, pl_module, network, self._max_distance)

    @override
    def finalize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, polish: bool) -> bool:
        network = _network(pl_module)
        if self.differences or self.other is not None:
            self._check_model(trainer, pl_module)
            if self.other is None or not self.other.finalize(trainer, pl_module, polish=polish):
                return False
            if polish:
                with time_limit(None), _restoring_if_foreign(trainer, pl_module):
                    self._statistics(trainer, pl_module, network)
            return True
        if polish:
            self._check_loss(trainer, pl_module)
            with _restoring_if_foreign(trainer, pl_module):
                polished = polish_on_training_set(trainer, pl_module, network, self._max_distance)
                self.certificates = [found.certificate for found in polished]
                self._moved = [found.distance if found.moved else 0.0 for found in polished]
                reached = [found.certificate.is_minimum and not found.moved for found in polished]
                move_to(network, self.certificates, reached)
                with time_limit(None):  # the weights have moved: the statistics must be those of the new weights
                    self._statistics(trainer, pl_module, network)
        elif not self.certificates:
            self.certify_minimum(trainer, pl_module)
        else:
            return False  # the last check has certified these weights
        return True

    @override
    def follow_descent(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.other is not None:
            self.other.follow_descent(trainer, pl_module)
        if not self.certificates:  # another objective, too large, or no time
            return
        ahead = [not found.kind.is_minimum for found in self.findings()]
        with _restoring_if_foreign(trainer, pl_module):
            self.descents = descents_on_training_set(trainer, pl_module, _network(pl_module), ahead)

    @override
    def run_out(self, why: str) -> None:
        if self._checked is not None:
            self._checked.run_out(why)
        self.certificates, self._moved = [], []
        self._certifiable, self._reason_not_certified = False, f"no certificate: {why}"

    @override
    def findings(self) -> list[Finding]:
        """The verdict on each replica: a certificate's where there is one."""
        notes = list(self._notes)
        if self._checked is not None:
            return self._checked.findings()
        if self.differences:
            because = self.reason_no_evidence() or Reason.of(ReasonCode.NOT_CHECKED)
            return [Finding.of(Kind.UNDECIDED, because)] * len(self.verdicts)
        if not self.certificates and self._reason_not_certified is not None:
            notes.append(self._reason_not_certified)
        results: Sequence[Certificate | FirstOrderVerdict] = self.certificates or self.verdicts
        return [Finding.of(*self._verdict(replica, found), notes) for replica, found in enumerate(results)]

    def _verdict(self, replica: int, found: Certificate | FirstOrderVerdict) -> tuple[Kind, Reason]:
        """The kind of one replica, and the reason; not stationary if polishing moved it too far."""
        moved = self._moved[replica] if self._moved else 0.0
        if not self.certificates or not moved:
            return found.kind, found.because
        to = found.kind if found.kind.is_minimum else "no minimum yet"
        code = ReasonCode.POLISHED_TOO_FAR
        return Kind.NOT_STATIONARY, Reason.of(code, distance=moved, to=to, limit=self._max_distance)

    @override
    def scalars(self) -> dict[str, Any]:
        assert self.statistics is not None  # noqa: S101 (there was a check)
        scalars: dict[str, Any] = {
            "minimum/mse": self.statistics.mse,
            "minimum/mce": self.statistics.mce,
            "minimum/stationarity": self.statistics.stationarity,
            "minimum/min_preactivation": self.statistics.smallest_preactivation,
            "minimum/relative_preactivation": self.statistics.smallest_sine,
            "minimum/kinks": self.statistics.kinks,
            "minimum/rank_cap": self._rank_cap,
        }
        if self._checked is not None:
            scalars = self._checked.scalars() | scalars
        if self.certificates:
            kinds = [found.kind for found in self.findings()]
            certified = [kind.is_minimum for kind in kinds]
            scalars["minimum/certified"] = sum(certified) / len(certified)
            scalars["minimum/on_kinks"] = kinds.count(Kind.KINK_MINIMUM) / len(kinds)
            found = [c for c, yes in zip(self.certificates, certified, strict=True) if yes]
            for name, key in _CERTIFIED.items():
                values = [getattr(certificate, name) for certificate in found]
                known = [value for value in values if value is not None]
                scalars[f"minimum/{key}"] = sum(known) / len(known) if known else None
            coefficients = [value for value in map(known_coefficient, found) if value is not None]
            if coefficients:
                scalars["minimum/learning_coefficient"] = sum(coefficients) / len(coefficients)
        return scalars

    @override
    def summary(self) -> dict[str, Any]:
        if self.statistics is None:
            return {}
        verdicts = self.findings()
        found = {
            "evidence": str(self.evidence),
            "objective": self._objective(),
            "objective_differs_by": [str(difference) for difference in self.differences],
            "mse": plain(self.statistics.mse),
            "mce": plain(self.statistics.mce),
            "wrong": plain(self.statistics.wrong),
            **{key: [verdict.plain()[key] for verdict in verdicts] for key in _VERDICT},
            "zero_error": plain(self.statistics.zero_error),
            "rounding_bound": plain(self.statistics.rounding_bound),
            "stationarity": plain(self.statistics.stationarity),
            "min_preactivation": plain(self.statistics.smallest_preactivation),
            "relative_preactivation": plain(self.statistics.smallest_sine),
            "kinks": plain(self.statistics.kinks),
            "rank_cap": plain(self._rank_cap),
        }
        stationary = [verdict.kind in STATIONARY for verdict in verdicts]
        of_models = self.other.certificates if isinstance(self.other, ReplicaModelTier) else []
        for name in ("zero_error", "kinks", "rank_cap"):  # of the certified point, if there is one
            values = found[name] if isinstance(found[name], list) else [found[name]] * len(verdicts)
            certificates = self.certificates or (of_models if name != "rank_cap" else [])
            pairs = zip(certificates, stationary, values, strict=False)
            found[name] = [getattr(c, name) if yes else value for c, yes, value in pairs] or values
        for name in ("mse", "mce"):
            found[f"minimum_{name}"] = [
                getattr(c, name) if yes else None for c, yes in zip(self.certificates, stationary, strict=False)
            ]
        for name in ("distance", "weight_distance", "margin_ratio", "rank"):
            found[name] = [getattr(certificate, name) for certificate in self.certificates]
        found["learning_coefficient"] = [known_coefficient(certificate) for certificate in self.certificates]
        found |= _descends_to(self.descents, len(verdicts))
        several, differs = bool(self.statistics.mse.ndim), found.pop("objective_differs_by")
        summary = {key: _one(value, several=several) for key, value in found.items()} | {
            "objective_differs_by": differs
        }
        return summary if self._checked is None else self._checked.summary() | summary | self._of_model()

    @override
    def state(self) -> dict[str, Any]:
        return {} if self.fitted is None else {"fitted": vars(self.fitted)}

    def _of_model(self) -> dict[str, Any]:
        """What the certificate of a model says, where it differs from measures of the network's weights."""
        if not isinstance(self.other, ModelTier | ReplicaModelTier):
            return {}
        names = ("objective", "objective_differs_by")
        return {key: value for key, value in self.other.certified().items() if key not in names}

    def _objective(self) -> str:
        """The objective that the verdict is on."""
        if Difference.DECOUPLED_WEIGHT_DECAY in self.differences:
            return "none"
        parts = {Difference.WEIGHT_DECAY: "with_weight_decay", Difference.FROZEN_WEIGHTS: "of_trained_weights"}
        return "_".join(["mse", *(part for kind, part in parts.items() if kind in self.differences)])

    def _statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> None:
        """Compute the statistics in one exact pass, and run the first-order tests."""
        self.statistics = training_set_statistics(trainer, pl_module, ranked=len(network.hidden_weights) == 1)
        spacing = 2 * network.unit_roundoff
        self.verdicts = first_order_verdicts(
            self.statistics,
            10 * spacing if self._stationarity_tolerance is None else self._stationarity_tolerance,
            1000 * spacing if self._preactivation_tolerance is None else self._preactivation_tolerance,
        )
        if len(network.hidden_weights) == 1:
            self._rank_cap = rank_cap(self.statistics, input_rank(trainer, pl_module, network), network.negative_slope)

    def _check_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.fitted is not None and not still_fits(trainer, pl_module, self.fitted, self._loss_fn):
            raise NotSquaredErrorError(
                "the loss that it trains is the mean squared error of its network at some weights only, and not here"
            )
        if self.fitted is not None and isinstance(found_sequential(trainer, pl_module), nn.Sequential):
            of_model = ModelLoss("squared_error", 1, one_hot=False, **vars(self.fitted), products=0)
            reason = reason_in_steps(trainer, pl_module, of_model.expected, self._loss_fn)
            if reason is not None:
                raise NotSquaredErrorError(reason)


_VERDICT = ("kind", "reason_code", "reason", "advice")

# What is logged of certified minima, and under which name.
_CERTIFIED = {
    "mse": "certified_mse",
    "mce": "certified_mce",
    "kinks": "certified_kinks",
    "distance": "distance",
    "margin_ratio": "margin_ratio",
    "rank": "rank",
}


def _descends_to(descents: Sequence[Polished | None], replicas: int) -> dict[str, list[Any]]:
    """What descent leads to, one value per replica; None where it was not followed."""
    values: list[tuple[Any, ...]] = [
        (None,) * 4
        if found is None
        else (str(found.certificate.kind), found.certificate.mse, found.distance, found.certificate.zero_error)
        for found in descents or [None] * replicas
    ]
    keys = ("descends_to", *(f"descends_to_{name}" for name in ("mse", "distance", "zero_error")))
    return {key: list(column) for key, column in zip(keys, zip(*values, strict=True), strict=True)}


def _differences(trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> list[Difference]:
    """How training's objective differs; without a penalty frozen output weights do not matter if none is zero.

    A minimum over all weights is one over the hidden weights. The converse holds where z_i ≠ 0, as the loss depends on
    z_i w_i only, and w_i alone can reach all its values of one sign.
    """
    places, trained = {tensor.data_ptr() for tensor in network.tensors}, trained_parameters(trainer, pl_module)
    weights = [parameter for parameter in pl_module.parameters() if parameter.data_ptr() in places]
    free = {id(parameter) for parameter in trained}
    frozen = [parameter for parameter in weights if id(parameter) not in free]
    output, decays = network.output_weights, decay_differences(trainer)
    harmless = len(network.hidden_weights) == 1 and all(
        parameter.data_ptr() == output.data_ptr() for parameter in frozen
    )
    differs = frozen and not (harmless and not decays and bool((output != 0).all()))
    return decays + ([Difference.FROZEN_WEIGHTS] if differs else [])


def _notes(
    trainer: pl.Trainer, pl_module: pl.LightningModule, differences: list[Difference], *, fitted: bool
) -> list[str]:
    """Notes on what the verdict is about."""
    if not fitted:
        return unseen_batches(trainer) + descriptions(differences)
    found = conditions(trainer, pl_module)  # includes weight decay
    return found + [text for text in descriptions(differences) if text not in found]


def _network(pl_module: pl.LightningModule) -> Network:
    network = network_of(pl_module)
    assert network is not None  # noqa: S101 (known since setup)
    return network


def _restoring_if_foreign(trainer: pl.Trainer, pl_module: pl.LightningModule) -> AbstractContextManager[None]:
    """Restore the generators if a module does not define its network: its data may draw random numbers."""
    return nullcontext() if states_network(pl_module) else restoring_generators(trainer)


def _one(values: Any, *, several: bool) -> Any:
    """A list over the replicas, or the only value; None if there is none."""
    if not isinstance(values, list):
        return values
    return (values or None) if several else (values[0] if values else None)
