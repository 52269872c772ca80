"""LocalMinimumDetector: has training converged to a local minimum, and to which?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_mnn.callbacks.certification import (
    certify_training_set,
    move_to,
    polish_on_training_set,
    why_not_certified,
)
from lightning_mnn.callbacks.schedule import Schedule, ScheduledCallback, plain
from lightning_mnn.callbacks.training_set import input_rank, required_network, survey_training_set
from lightning_mnn.landscape.judgement import Kind
from lightning_mnn.landscape.minimum import Certificate, FirstOrderVerdict, first_order_verdicts
from lightning_mnn.landscape.survey import Survey, rank_cap
from lightning_mnn.loggers import log_scalars

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.landscape.survey import Network


class LocalMinimumDetector(ScheduledCallback):
    """Tests whether the weights are next to a local minimum, certifies it, and stops training when they are.

    Each check is one exact pass over the whole training set in float64, with two cheap first-order tests: ‖G e‖ is zero
    relative to ‖G‖‖y‖, and no pre-activation is zero relative to ‖w‖‖x‖, both within tolerances. When every replica
    has passed a few times in a row, and at the end of training whatever they say, a two-layer network is certified: an
    exact minimum within ``max_distance``, differentiable or on kinks, or the reason why none could be told (see
    :func:`lightning_mnn.landscape.certify`). With two hidden layers, and on training sets of more than 2.7e8 input
    numbers a process, there are the first-order tests only, which are necessary conditions.

    Logs ``minimum/mse``, ``minimum/mce``, ``minimum/stationarity``, ``minimum/min_preactivation`` (absolute),
    ``minimum/relative_preactivation``, ``minimum/kinks`` and, with one hidden layer, ``minimum/rank_cap``, all of the
    weights; with a certificate also ``minimum/certified`` and ``minimum/on_kinks`` (fractions of the replicas),
    ``minimum/certified_mse``, ``minimum/certified_mce``, ``minimum/certified_kinks``, ``minimum/distance``,
    ``minimum/margin_ratio`` and ``minimum/rank``. All are means over the replicas.

    Args:
        schedule: when to check, besides the start and the end; None: every 100 epochs.
        patience: consecutive checks at which every replica must pass the first-order tests.
        stop_training: stop the Trainer when every replica is certified (with two hidden layers, has passed).
        polish: try to certify at every check; and at the end of training go to the exact minimum, where it lies within
            ``max_distance``, across kinks if need be (see :func:`lightning_mnn.landscape.polish`).
        max_distance: largest ‖W̃* − W̃‖/‖W̃‖ between the weights and a minimum that counts as theirs.
        stationarity_tolerance: largest ‖G e‖/(‖G‖_F ‖y‖) that counts as zero in the first-order tests; None: 10 times
            the spacing of floats at 1 in the weights' precision.
        preactivation_tolerance: smallest |w·x|/(‖w‖‖x‖) that counts as off the kink there; None: 1,000 times that
            spacing.

    Attributes:
        verdicts: the last check's first-order verdicts, one a replica.
        certificates: the last certificates, one a replica; empty where there are none.
        survey: the last check's pass.
        converged: whether training counts as converged.

    Raises:
        ValueError: ``patience`` < 1, ``max_distance`` < 0.
        TypeError: (in setup) the module holds no network that can be judged.

    >>> LocalMinimumDetector(Schedule(every=100), polish=True).converged
    False
    """

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
    ) -> None:
        super().__init__(schedule or Schedule(every=100))
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if not max_distance >= 0:
            raise ValueError(f"max_distance must be at least 0, got {max_distance}")
        self.patience = patience
        self.stop_training = stop_training
        self.polish = polish
        self.max_distance = max_distance
        self.stationarity_tolerance = stationarity_tolerance
        self.preactivation_tolerance = preactivation_tolerance
        self.verdicts: list[FirstOrderVerdict] = []
        self.certificates: list[Certificate] = []
        self.survey: Survey | None = None
        self.converged = False
        self._moved: list[float] = []  # relative distances of replicas that polishing took too far; else 0
        self._passed = 0
        self._not_certified: str | None = None  # why
        self._rank_cap: Tensor | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            required_network(self, pl_module)
            self._passed, self.converged, self.certificates, self._moved = 0, False, [], []

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = required_network(self, pl_module)
        self._look(trainer, pl_module, network)
        passed = all(verdict.kind is Kind.DIFFERENTIABLE_MINIMUM for verdict in self.verdicts)
        self._passed = self._passed + 1 if passed else 0
        self.certificates = []
        known, self.converged = self.converged, self._passed >= self.patience
        certifiable = self._is_certifiable(trainer, network)
        if certifiable and (self.polish or (self.converged and not known)):  # once, and again at the end
            self.certificates = certify_training_set(trainer, pl_module, network, self.max_distance)
            self.converged = all(certificate.is_minimum for certificate in self.certificates)
        self._log(trainer)
        self.converged = trainer.strategy.reduce_boolean_decision(self.converged, all=True)
        if self.converged and self.stop_training:
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        network = required_network(self, pl_module)
        if self._is_certifiable(trainer, network):
            self._certify_the_end(trainer, pl_module, network)
        for replica, (kind, reason) in enumerate(zip(*self._kinds(), strict=True)):
            name = f" (replica {replica})" if len(self.verdicts) > 1 else ""
            rank_zero_info(f"LocalMinimumDetector{name}: {kind}: {reason}")

    @override
    def summary(self) -> dict[str, Any]:
        if self.survey is None:
            return {}
        kinds, reasons = self._kinds()
        found = {
            "mse": plain(self.survey.mse),
            "mce": plain(self.survey.mce),
            "wrong": plain(self.survey.wrong),
            "kind": kinds,
            "reason": reasons,
            "zero_error": plain(self.survey.zero_error),
            "rounding_bound": plain(self.survey.rounding_bound),
            "stationarity": plain(self.survey.stationarity),
            "min_preactivation": plain(self.survey.smallest_preactivation),
            "relative_preactivation": plain(self.survey.smallest_sine),
            "kinks": plain(self.survey.kinks),
            "rank_cap": plain(self._rank_cap),
        }
        stood = [kind in (Kind.DIFFERENTIABLE_MINIMUM, Kind.KINK_MINIMUM, Kind.SADDLE) for kind in kinds]
        for name in ("zero_error", "kinks", "rank_cap"):  # of the minimum, where there is one
            values = found[name] if isinstance(found[name], list) else [found[name]] * len(kinds)
            pairs = zip(self.certificates, stood, values, strict=False)
            found[name] = [getattr(c, name) if yes else value for c, yes, value in pairs] or values
        for name in ("mse", "mce"):
            found[f"minimum_{name}"] = [
                getattr(c, name) if yes else None for c, yes in zip(self.certificates, stood, strict=False)
            ]
        for name in ("distance", "weight_distance", "margin_ratio", "rank"):
            found[name] = [getattr(certificate, name) for certificate in self.certificates]
        several = bool(self.survey.mse.ndim)
        return {key: _one(value, several=several) for key, value in found.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"passed": self._passed, "converged": self.converged}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._passed, self.converged = state_dict.get("passed", 0), state_dict.get("converged", False)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> None:
        """One exact pass and its first-order tests."""
        self.survey = survey_training_set(trainer, pl_module)
        spacing = 2 * network.unit_roundoff
        self.verdicts = first_order_verdicts(
            self.survey,
            10 * spacing if self.stationarity_tolerance is None else self.stationarity_tolerance,
            1000 * spacing if self.preactivation_tolerance is None else self.preactivation_tolerance,
        )
        if len(network.hidden_weights) == 1:
            self._rank_cap = rank_cap(self.survey, input_rank(trainer, pl_module, network), network.negative_slope)

    def _certify_the_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: Network) -> None:
        if self.polish:
            polished = polish_on_training_set(trainer, pl_module, network, self.max_distance)
            self.certificates = [found.certificate for found in polished]
            self._moved = [found.distance if found.moved else 0.0 for found in polished]
            reached = [found.certificate.is_minimum and not found.moved for found in polished]
            move_to(network, self.certificates, reached)
            self._look(trainer, pl_module, network)
        elif not self.certificates:
            self.certificates = certify_training_set(trainer, pl_module, network, self.max_distance)
        else:
            return  # the last check did, at these weights
        kinds, _ = self._kinds()
        self.converged = all(kind in (Kind.DIFFERENTIABLE_MINIMUM, Kind.KINK_MINIMUM) for kind in kinds)
        self._log(trainer)

    def _is_certifiable(self, trainer: pl.Trainer, network: Network) -> bool:
        """Whether there is one hidden layer, and a training set that a certificate can have in memory."""
        self._not_certified = why_not_certified(trainer, network)
        return len(network.hidden_weights) == 1 and self._not_certified is None

    def _kinds(self) -> tuple[list[str], list[str]]:
        """Kind and reason of each replica: a certificate's where there is one."""
        if not self.certificates:
            more = "" if self._not_certified is None else f"; {self._not_certified}"
            return [str(verdict.kind) for verdict in self.verdicts], [found.reason + more for found in self.verdicts]
        kinds, reasons = [], []
        for replica, found in enumerate(self.certificates):
            moved = self._moved[replica] if self._moved else 0.0
            kinds.append(str(Kind.NOT_STATIONARY if moved else found.kind))
            to = found.kind if found.is_minimum else "no minimum yet"
            far = f"moved: polishing led a relative distance of {moved:.1e} away, to {to}; "
            reasons.append(far + f"max_distance = {self.max_distance:g}" if moved else found.reason)
        return kinds, reasons

    def _log(self, trainer: pl.Trainer) -> None:
        assert self.survey is not None  # noqa: S101 (there has been a look)
        scalars: dict[str, Any] = {
            "minimum/mse": self.survey.mse,
            "minimum/mce": self.survey.mce,
            "minimum/stationarity": self.survey.stationarity,
            "minimum/min_preactivation": self.survey.smallest_preactivation,
            "minimum/relative_preactivation": self.survey.smallest_sine,
            "minimum/kinks": self.survey.kinks,
            "minimum/rank_cap": self._rank_cap,
        }
        if self.certificates:
            kinds, _ = self._kinds()
            certified = [kind in (Kind.DIFFERENTIABLE_MINIMUM, Kind.KINK_MINIMUM) for kind in kinds]
            scalars["minimum/certified"] = sum(certified) / len(certified)
            scalars["minimum/on_kinks"] = kinds.count(Kind.KINK_MINIMUM) / len(kinds)
            found = [c for c, yes in zip(self.certificates, certified, strict=True) if yes]
            for name, key in _CERTIFIED.items():
                values = [getattr(certificate, name) for certificate in found]
                known = [value for value in values if value is not None]
                scalars[f"minimum/{key}"] = sum(known) / len(known) if known else None
        log_scalars(trainer, scalars)


# What is logged of certified minima, and under which name.
_CERTIFIED = {
    "mse": "certified_mse",
    "mce": "certified_mce",
    "kinks": "certified_kinks",
    "distance": "distance",
    "margin_ratio": "margin_ratio",
    "rank": "rank",
}


def _one(values: Any, *, several: bool) -> Any:
    """A list over the replicas, or the only value; None where there is none."""
    if not isinstance(values, list):
        return values
    return (values or None) if several else (values[0] if values else None)
