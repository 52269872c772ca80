"""Certificates of replicas whose objective only the general certificate covers: deep, penalised or partly frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.evaluation.module_network import network_of
from lightning_mnn.callbacks.evidence.model_tier import OF_POINT
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
from lightning_mnn.callbacks.evidence.models.source import move_replica, products_of_network, replica_objectives
from lightning_mnn.callbacks.evidence.tiers import Evidence, Finding, Tier
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.landscape.minima.learning_coefficient import known_coefficient
from lightning_mnn.utilities.distributed import on_first_process
from lightning_mnn.verdicts import STATIONARY, Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl

    from lightning_mnn.landscape.minima.models.model_certificate import ModelCertificate
    from lightning_mnn.landscape.minima.models.model_polishing import PolishedModel


class ReplicaModelTier(Tier):
    """Certifies each replica of a network by itself, one after the other. There is no cheap check.

    Args:
        max_distance: largest relative distance at which a minimum still counts as the minimum of these weights.
        replicas: R.

    Attributes:
        certificates: the last certificates, one per replica; empty if there are none.
        descents: what descent leads to from the final weights; None for a minimum, or where it was not followed.
    """

    def __init__(self, max_distance: float, replicas: int) -> None:
        self.certificates: list[ModelCertificate] = []
        self.descents: list[PolishedModel | None] = []
        self._max_distance, self._replicas = max_distance, replicas
        self._objectives: list[ModelObjective] = []
        self._moved: list[bool] = []  # whether polishing found a minimum too far away
        self._over_time: str | None = None

    @property
    @override
    def evidence(self) -> Evidence:
        return Evidence.CERTIFICATE if self.certificates else Evidence.NONE

    @property
    @override
    def passed(self) -> bool:
        return True

    @property
    @override
    def can_certify(self) -> bool:
        return True

    @property
    @override
    def moves(self) -> bool:
        return True

    @override
    def affordable(self, trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> bool:
        return work_of_replicas(trainer, pl_module) <= CHECK_SHARE * _training_work(trainer, pl_module, steps)

    @override
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.certificates, self.descents, self._objectives = [], [], []
        self._moved, self._over_time = [], None

    @override
    def certify_minimum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        objectives = self._read(trainer, pl_module)
        self.certificates = on_first_process(
            trainer, lambda: [objective.certify(self._max_distance) for objective in objectives]
        )
        self._moved = [False] * len(objectives)

    @override
    def finalize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, polish: bool) -> bool:
        if polish:
            self._polish(trainer, pl_module)
        elif self.certificates:
            return False
        else:
            self.certify_minimum(trainer, pl_module)
        return True

    @override
    def follow_descent(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.certificates or any(self.descents):
            return
        ahead = [not found.kind.is_minimum for found in self.findings()]
        training = _training_work(trainer, pl_module, trainer.global_step)
        steps = steps_of_descent(*_sizes(trainer, pl_module), training)
        if not steps or not any(ahead):
            return
        objectives, limit = self._objectives, work_of_descent(training)
        self.descents = on_first_process(trainer, lambda: _in_turn(objectives, ahead, steps, limit))

    @override
    def run_out(self, why: str) -> None:
        self.certificates, self._moved, self._over_time = [], [], why

    @override
    def findings(self) -> list[Finding]:
        if not self.certificates:
            because = Reason.of(ReasonCode.NOT_CHECKED)
            notes = [] if self._over_time is None else [f"no certificate: {self._over_time}"]
            return [Finding.of(Kind.UNDECIDED, because, notes)] * self._replicas
        return [Finding.of(*self._verdict(number)) for number in range(len(self.certificates))]

    def _verdict(self, number: int) -> tuple[Kind, Reason]:
        found = self.certificates[number]
        if not self._moved[number]:
            return found.kind, found.because
        words = {"distance": found.distance, "to": str(found.kind), "limit": self._max_distance}
        return Kind.NOT_STATIONARY, Reason.of(ReasonCode.POLISHED_TOO_FAR, **words)

    @override
    def scalars(self) -> dict[str, Any]:
        if not self.certificates:
            return {}
        kinds = [found.kind for found in self.findings()]
        minima = [c for c, kind in zip(self.certificates, kinds, strict=True) if kind.is_minimum]
        return {
            "minimum/certified": len(minima) / len(kinds),
            "minimum/on_kinks": kinds.count(Kind.KINK_MINIMUM) / len(kinds),
            "minimum/certified_loss": _mean([found.loss for found in minima]),
            "minimum/certified_kinks": _mean([found.kinks for found in minima]),
            "minimum/distance": _mean([found.distance for found in minima]),
            "minimum/learning_coefficient": _mean([known_coefficient(found) for found in minima]),
        }

    @override
    def summary(self) -> dict[str, Any]:
        plain = [found.plain() for found in self.findings()]
        return {
            "evidence": str(self.evidence),
            **{key: [found[key] for found in plain] for key in plain[0]},
            **self.certified(),
        }

    def certified(self) -> dict[str, Any]:
        """What the certificates add to a summary, as plain values: a list over the replicas for each."""
        if not self.certificates:
            return {}
        at_points = [found.kind in STATIONARY for found in self.findings()]
        pairs = list(zip(self.certificates, at_points, strict=True))
        found: dict[str, Any] = {name: [getattr(c, name) if at else None for c, at in pairs] for name in OF_POINT}
        found |= {
            "tangential_eigenvalue": [c.smallest_eigenvalue if at else None for c, at in pairs],
            "learning_coefficient": [known_coefficient(c) if at else None for c, at in pairs],
            "minimum_loss": [c.loss if at else None for c, at in pairs],
            "minimum_mse": [
                objective.mse_at(c) if at else None for objective, (c, at) in zip(self._objectives, pairs, strict=True)
            ],
        }
        return found | self._descends_to()

    def _descends_to(self) -> dict[str, Any]:
        to = [None if found is None else found.certificate for found in self.descents or [None] * len(self._objectives)]
        return {
            "descends_to": [None if c is None else str(c.kind) for c in to],
            **{f"descends_to_{name}": [getattr(c, name, None) for c in to] for name in ("loss", "distance")},
            "descends_to_mse": [
                None if c is None else objective.mse_at(c) for objective, c in zip(self._objectives, to, strict=True)
            ],
            "descends_to_zero_error": [None if c is None else c.zero_error for c in to],
        }

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[ModelObjective]:
        if not self._objectives:
            self._objectives = replica_objectives(trainer, pl_module)
        return self._objectives

    def _polish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move each replica to the minimum that descent leads to, if it is near; the others are certified as they are.

        The replicas share a limit of work.
        """
        objectives, far = self._read(trainer, pl_module), self._max_distance
        steps = min(300, MAX_CERTIFICATE_WORK // (len(objectives) * work_of_a_step(*_sizes(trainer, pl_module))))
        everyone = [True] * len(objectives)
        polished: list[PolishedModel | None] = on_first_process(
            trainer, lambda: _in_turn(objectives, everyone, max(1, steps), MAX_CERTIFICATE_WORK)
        )
        self.certify_minimum(trainer, pl_module)
        self.descents = [None] * len(objectives)
        for number, found in enumerate(polished):
            if found is None or self.certificates[number].is_minimum:
                continue
            if not found.certificate.is_minimum or found.certificate.distance > far:
                self.descents[number] = found
            if found.certificate.is_minimum:
                self.certificates[number] = found.certificate
                self._moved[number] = found.certificate.distance > far
        for number, (kind, _) in enumerate(map(self._verdict, range(len(objectives)))):
            if kind.is_minimum:
                move_replica(pl_module, number, self.certificates[number].state_dict)


def work_of_replicas(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """The work of certificates of all replicas."""
    parameters, products = _sizes(trainer, pl_module)
    return _num_replicas(pl_module) * work_of_a_certificate(parameters, products)


def _sizes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[int, int]:
    """The trained numbers of a replica, and the multiplications of its forward pass on the training set."""
    trained = sum(parameter.numel() for parameter in trained_parameters(trainer, pl_module))
    products = num_samples(trainer.train_dataloader) * products_of_network(pl_module)
    return trained // _num_replicas(pl_module), products


def _num_replicas(pl_module: pl.LightningModule) -> int:
    network = network_of(pl_module)
    assert network is not None  # noqa: S101 (known since setup)
    return network.replicas


def _training_work(trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> int:
    """The work of so many steps of training all replicas."""
    return work_of_steps(trainer, steps, products_of_network(pl_module) * _num_replicas(pl_module))


def _in_turn(
    objectives: Sequence[ModelObjective], chosen: Sequence[bool], steps: int, limit: int
) -> list[PolishedModel | None]:
    """Where descent leads to from the chosen replicas, which share a limit of work."""
    share = max(1, limit // max(1, sum(chosen)))
    return [
        objective.polish(steps, share) if wanted else None for objective, wanted in zip(objectives, chosen, strict=True)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
