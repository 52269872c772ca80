"""Certificates of piecewise-linear models, with second-order evidence where they do not decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.evidence.models.objective import (
    CHECK_SHARE,
    MAX_CERTIFICATE_WORK,
    ModelObjective,
    steps_of_descent,
    work_of_a_certificate,
    work_of_a_step,
    work_of_descent,
    work_of_steps,
)
from lightning_mnn.callbacks.evidence.second_order import SecondOrderTier
from lightning_mnn.callbacks.evidence.tiers import Evidence, Finding
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.learning_coefficient import known_coefficient
from lightning_mnn.utilities.distributed import on_first_process
from lightning_mnn.utilities.interruption import time_limit
from lightning_mnn.verdicts import STATIONARY, Kind, Reason, ReasonCode

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.callbacks.evidence.models.source import ModelSource
    from lightning_mnn.landscape.kinks.tracing import Names
    from lightning_mnn.landscape.minima.models.model_certificate import ModelCertificate
    from lightning_mnn.landscape.minima.models.model_polishing import PolishedModel


class ModelTier(SecondOrderTier):
    """Certifies the model of a module; the cheap check is that of second-order evidence.

    A certificate decides, except where it proves nothing and the gradient is small off the kinks: then second-order
    evidence says more.

    Args:
        source: the module's model and objective.
        max_distance: largest relative distance at which a minimum still counts as the minimum of these weights.
        loss_fn: see :class:`SecondOrderTier`, as for the other arguments.
        modules: layers whose kinks count.
        gradient_tolerance: of the cheap check.
        curvature_tolerance: of second-order evidence.
        max_products: of second-order evidence.
        weight_decay: whether the penalty is part of the objective.

    Attributes:
        certificates: the last certificate; empty if there is none.
        descent: what descent leads to from the final weights; None for a minimum, or where it was not followed.
    """

    def __init__(
        self,
        source: ModelSource,
        max_distance: float,
        loss_fn: ModelFunction | None,
        modules: Names,
        *,
        gradient_tolerance: float,
        curvature_tolerance: float,
        max_products: int,
        weight_decay: bool | None = None,
    ) -> None:
        super().__init__(
            *(loss_fn, modules, gradient_tolerance, curvature_tolerance, max_products), weight_decay=weight_decay
        )
        self.certificates: list[ModelCertificate] = []
        self.descent: PolishedModel | None = None
        self._source = source
        self._max_distance = max_distance
        self._objective: ModelObjective | None = None  # at the weights of the certificate
        self._moved: float | None = None  # distance at which polishing found a minimum too far away
        self._moved_to = ""
        self._too_large: str | None = None

    @property
    @override
    def evidence(self) -> Evidence:
        return Evidence.CERTIFICATE if self._decides else super().evidence

    @property
    @override
    def passed(self) -> bool:
        if self.verdict is None:
            return False
        close = self.verdict.relative_kink <= tolerances.MAX_APPROACHED_KINK_RATIO
        return super().passed or close or self.verdict.kind is Kind.ON_KINK

    @property
    @override
    def moves(self) -> bool:
        return True

    @override
    def affordable(self, trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> bool:
        cost = work_of_a_certificate(_num_trained(trainer, pl_module), self._products(trainer, pl_module))
        too_large = cost > MAX_CERTIFICATE_WORK  # then there is only second-order evidence
        return too_large or cost <= CHECK_SHARE * self._training_work(trainer, pl_module, steps)

    @override
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.certificates, self.descent, self._moved, self._objective = [], None, None, None
        self._too_large = None
        super().check(trainer, pl_module)

    @override
    def certify_minimum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(trainer, pl_module)
        objective = self._objective
        if objective is not None:
            self.certificates = [on_first_process(trainer, lambda: objective.certify(self._max_distance))]
        if objective is None or not _is_definite(self.certificates[0]):
            super().certify_minimum(trainer, pl_module)
        self._certified = True

    @override
    def finalize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, polish: bool) -> bool:
        if self.verdict is None:
            return False
        if polish and self._polish(trainer, pl_module):
            return True
        if self._certified:
            return False
        self.certify_minimum(trainer, pl_module)
        return True

    @override
    def follow_descent(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        objective = self._objective
        if objective is None or not self.certificates or self.found_minimum or self.descent is not None:
            return
        work = self._training_work(trainer, pl_module, trainer.global_step)
        steps = steps_of_descent(_num_trained(trainer, pl_module), self._products(trainer, pl_module), work)
        if steps:
            self.descent = on_first_process(trainer, lambda: objective.polish(steps, work_of_descent(work)))

    @override
    def run_out(self, why: str) -> None:
        self.certificates, self._moved, self._too_large = [], None, f"no certificate: {why}"
        if self.verdict is None or self.verdict.kind is Kind.UNDECIDED:  # else the cheap check has decided
            super().run_out(why)

    @override
    def findings(self) -> list[Finding]:
        if not self._decides:
            (found,) = super().findings()
            notes = [] if self._too_large is None else [self._too_large]
            notes += [f"no certificate: {one.reason}" for one in self.certificates]
            return [found._replace(reason="; ".join([found.reason, *notes]))]
        (certificate,) = self.certificates
        if self._moved is not None:
            because = Reason.of(
                ReasonCode.POLISHED_TOO_FAR, distance=self._moved, to=self._moved_to, limit=self._max_distance
            )
            return [Finding.of(Kind.NOT_STATIONARY, because, self._notes)]
        return [Finding.of(certificate.kind, certificate.because, self._notes)]

    @override
    def scalars(self) -> dict[str, Any]:
        scalars = super().scalars()
        if self._decides:
            (certificate,), (found,) = self.certificates, self.findings()
            minimum = certificate if found.kind.is_minimum else None
            scalars |= {
                "minimum/certified": float(found.kind.is_minimum),
                "minimum/on_kinks": float(found.kind is Kind.KINK_MINIMUM),
                "minimum/certified_loss": None if minimum is None else self._value(minimum),
                "minimum/certified_kinks": None if minimum is None else minimum.kinks,
                "minimum/distance": None if minimum is None else minimum.distance,
                "minimum/radius": None if minimum is None else minimum.radius,
                "minimum/growth": None if minimum is None else minimum.growth,
                "minimum/learning_coefficient": None if minimum is None else known_coefficient(minimum),
            }
        return scalars

    @override
    def summary(self) -> dict[str, Any]:
        found = super().summary()
        return found | self.certified() if found else {}

    def certified(self) -> dict[str, Any]:
        """What the certificate adds to a summary, as plain values."""
        found: dict[str, Any] = {}
        if self._decides:
            (certificate,), (finding,) = self.certificates, self.findings()
            at_point = finding.kind in STATIONARY
            found = {name: getattr(certificate, name) if at_point else None for name in OF_POINT}
            found["tangential_eigenvalue"] = certificate.smallest_eigenvalue if at_point else None
            found["learning_coefficient"] = known_coefficient(certificate) if at_point else None
            found["minimum_loss"] = self._value(certificate) if at_point else None
            found["minimum_mse"] = self._mse(certificate) if at_point else None
            if at_point:
                found |= {"zero_error": certificate.zero_error, "kinks": certificate.kinks}
            if self._objective is not None:
                found |= self._described(self._objective)
        return found | self._descends_to()

    def _described(self, objective: ModelObjective) -> dict[str, Any]:
        """The objective by its parts."""
        name = "mse" if objective.loss == "squared_error" else objective.loss
        parts = {
            "weight_decay": ("with_weight_decay", any(objective.weight_decay.values())),
            "frozen_weights": ("of_trained_weights", bool(objective.frozen)),
        }
        return {
            "objective": "_".join([name, *(text for text, present in parts.values() if present)]),
            "objective_differs_by": [key for key, (_, present) in parts.items() if present],
        }

    def _descends_to(self) -> dict[str, Any]:
        if self.descent is None:
            return dict.fromkeys(_DESCENDS)
        to = self.descent.certificate
        return dict(
            zip(_DESCENDS, (str(to.kind), self._value(to), self._mse(to), to.distance, to.zero_error), strict=True)
        )

    @override
    def state(self) -> dict[str, Any]:
        return super().state() | self._source.state()

    @property
    def _decides(self) -> bool:
        """Whether the verdict is a certificate's."""
        if not self.certificates or self._ran_out:
            return False
        (certificate,), cheap = self.certificates, None if self.verdict is None else self.verdict.kind
        weaker = cheap in (None, Kind.ON_KINK) or (cheap, certificate.kind) == (Kind.NOT_STATIONARY,) * 2
        return _is_definite(certificate) or self._moved is not None or weaker

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the objective, unless a certificate would take too long."""
        if self._objective is not None:
            return
        work = work_of_a_certificate(_num_trained(trainer, pl_module), self._products(trainer, pl_module))
        if work > MAX_CERTIFICATE_WORK:
            self._too_large = (
                f"no certificate: {_num_trained(trainer, pl_module)} trained numbers and "
                f"{num_samples(trainer.train_dataloader)} samples would take more than about a minute"
            )
            return
        self._too_large = None
        self._objective = self._source.objective(trainer, pl_module)

    def _polish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Move the weights to the minimum that descent leads to, if it is near; whether there is a new verdict."""
        self._read(trainer, pl_module)
        objective = self._objective
        if objective is None:
            return False
        work = work_of_a_step(_num_trained(trainer, pl_module), self._products(trainer, pl_module))
        steps = min(300, MAX_CERTIFICATE_WORK // work)
        polished: PolishedModel = on_first_process(trainer, lambda: objective.polish(steps, MAX_CERTIFICATE_WORK))
        certificate = polished.certificate
        if not certificate.is_minimum:
            self.descent = polished
            return False
        if certificate.distance > self._max_distance:
            self.descent, self.certificates = polished, [certificate]
            self._moved, self._moved_to, self._certified = certificate.distance, str(certificate.kind), True
            return True
        self._source.move(trainer, pl_module, certificate.state_dict)
        with time_limit(None):  # the weights have moved: the measures must be those of the new weights
            super().check(trainer, pl_module)
        self.certificates, self._certified = [certificate], True
        return True

    def _training_work(self, trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> int:
        """The work of so many steps of training."""
        return work_of_steps(trainer, steps, self._source.products(pl_module))

    def _products(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        return num_samples(trainer.train_dataloader) * self._source.products(pl_module)

    def _value(self, certificate: ModelCertificate) -> float | None:
        return None if self._objective is None else self._objective.value(certificate.loss)

    def _mse(self, certificate: ModelCertificate) -> float | None:
        return None if self._objective is None else self._objective.mse_at(certificate)


OF_POINT = ("distance", "radius", "growth", "likq", "flat_directions", "symmetries", "inert")
_DESCENDS = ("descends_to", *(f"descends_to_{name}" for name in ("loss", "mse", "distance", "zero_error")))


def _is_definite(certificate: ModelCertificate) -> bool:
    """Whether a certificate proves something: a minimum, a saddle, or a way down off a kink."""
    return certificate.kind in STATIONARY or certificate.direction is not None


def _num_trained(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    return sum(parameter.numel() for parameter in trained_parameters(trainer, pl_module))
