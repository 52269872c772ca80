"""Tiers of evidence that a LocalMinimumDetector's verdict is based on, and the base class that gathers it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lightning_mnn.advice import advice_on
from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.trainer.weight_decay import has_decoupled_decay, weight_decays
from lightning_mnn.data.loaders.shards import NotEnumerableError, draws, num_samples
from lightning_mnn.utilities.errors import DivergenceError
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl

    from lightning_mnn.verdicts import Kind, Reason, ReasonCode

_EVAL_MODE_EFFECTS = {
    "batch norm is at its running statistics": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "dropout is off": (
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    ),
}


class Evidence(StrEnum):
    """Tiers of evidence, the strongest first.

    Attributes:
        CERTIFICATE: an exact minimum near the weights, proved up to stated rounding (piecewise-linear networks and
            ``nn.Sequential``, with the squared error, cross-entropy or logistic loss).
        SECOND_ORDER: gradient, distance to the nearest kink and smallest eigenvalue of the Hessian of the module's own
            loss over the whole training set.
        FIRST_ORDER: necessary conditions only.
        NONE: the detector met an error, or had too little time (``max_seconds``) and saw no gradient of training.
    """

    CERTIFICATE = "certificate"
    SECOND_ORDER = "second_order"
    FIRST_ORDER = "first_order"
    NONE = "none"


class Difference(StrEnum):
    """How the objective that training lowers differs from the loss over the training set, with all weights free."""

    WEIGHT_DECAY = "weight_decay"
    DECOUPLED_WEIGHT_DECAY = "decoupled_weight_decay"
    FROZEN_WEIGHTS = "frozen_weights"


_DIFFERENCES = {
    Difference.WEIGHT_DECAY: "this loss does not include the optimiser's weight_decay: training minimises another one",
    Difference.DECOUPLED_WEIGHT_DECAY: "the optimiser's weight decay is decoupled from the gradient (AdamW): training "
    "lowers no objective, and where it comes to rest the gradient of this loss is not zero",
    Difference.FROZEN_WEIGHTS: "frozen weights are constants: this is over the other weights",
}


def descriptions(differences: Sequence[Difference]) -> list[str]:
    """The differences as text."""
    return [_DIFFERENCES[difference] for difference in differences]


def decay_differences(trainer: pl.Trainer) -> list[Difference]:
    """What weight decay adds to the objective."""
    coupled, decoupled = bool(weight_decays(trainer)), has_decoupled_decay(trainer)
    return [Difference.WEIGHT_DECAY] * coupled + [Difference.DECOUPLED_WEIGHT_DECAY] * decoupled


class Finding(NamedTuple):
    """What a tier found for one replica.

    Attributes:
        kind: the verdict.
        reason_code: the fact that decided.
        reason: the same in words, with notes on what the verdict is about.
    """

    kind: Kind
    reason_code: ReasonCode
    reason: str

    @classmethod
    def of(cls, kind: Kind, because: Reason, notes: Sequence[str] = ()) -> Finding:
        """A verdict with notes on it."""
        return cls(kind, because.code, "; ".join([str(because), *notes]))

    def plain(self) -> dict[str, str | None]:
        """The same as plain text with advice, by the keys of a summary; None: a minimum needs no advice."""
        advice = advice_on(self.kind, self.reason_code)
        return {"kind": str(self.kind), "reason_code": str(self.reason_code), "reason": self.reason, "advice": advice}


class Tier(ABC):
    """Gathers the evidence of one tier; a :class:`LocalMinimumDetector` decides when.

    Every process calls the same methods in the same order, and gets the same results.

    Attributes:
        why: why there is no stronger evidence; None if no reason is needed.
    """

    why: str | None = None

    @property
    @abstractmethod
    def evidence(self) -> Evidence:
        """The tier."""

    @property
    @abstractmethod
    def passed(self) -> bool:
        """Whether the last cheap check found nothing against a minimum."""

    @property
    def can_certify(self) -> bool:
        """Whether there is an expensive check, which can decide."""
        return False

    def affordable(self, trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> bool:
        """Whether the expensive check is cheap beside so many steps of training, by counts of operations."""
        del trainer, pl_module, steps
        return True

    @property
    def moves(self) -> bool:
        """Whether it can move the weights to the exact minimum."""
        return False

    @abstractmethod
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the cheap check."""

    def certify_minimum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the expensive check, if there is one, after a cheap check at the same weights."""
        del trainer, pl_module

    def finalize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, polish: bool) -> bool:
        """Run the expensive check at the end of training, unless it was done at these weights.

        Returns:
            Whether anything was done.
        """
        del trainer, pl_module, polish
        return False

    def follow_descent(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the minimum that descent leads to from the final weights, where that is cheap; the weights stay."""
        del trainer, pl_module

    def run_out(self, why: str) -> None:
        """Continue without the expensive check, since the time was too short for it."""
        del why

    @abstractmethod
    def findings(self) -> list[Finding]:
        """The verdict on each replica."""

    @abstractmethod
    def scalars(self) -> dict[str, Any]:
        """The values to log, by name."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """The results, as plain values; empty before the first check."""

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs, as plain values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state, if there is any."""
        del state

    @property
    def found_minimum(self) -> bool:
        """Whether the verdict is that all replicas are at a minimum."""
        return all(found.kind.is_minimum for found in self.findings())


def check_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that the trained weights are finite; a frozen mask may contain infinities.

    Raises:
        DivergenceError: a trained weight is not finite.
    """
    if not all(fetched(*(parameter.isfinite().all() for parameter in trained_parameters(trainer, pl_module)))):
        raise diverged(trainer, "weights are")


def diverged(trainer: pl.Trainer, what: str) -> DivergenceError:
    """The error for numbers that are not finite; ``what`` names them with their verb."""
    return DivergenceError(
        f"training diverged: {what} not finite after {trainer.global_step} steps. Lower the learning rate"
    )


def unseen_batches(trainer: pl.Trainer) -> list[str]:
    """A note if training sees only a part of its data."""
    try:
        seen, total = trainer.num_training_batches, len(trainer.train_dataloader)  # type: ignore[arg-type]
    except TypeError:  # an IterableDataset has no length
        return []
    if seen >= total:
        return []
    flags = "limit_train_batches, overfit_batches or fast_dev_run"
    return [f"an epoch of training sees {seen} of {total} batches ({flags}), but this is for the whole training set"]


def seen_data(trainer: pl.Trainer) -> list[str]:
    """A note on the samples that were evaluated, if they are not each sample of the training set once."""
    loader: Any = trainer.train_dataloader
    drawn = draws(loader)
    if drawn is not None:
        return [f"this is for one epoch as drawn by {drawn}"]
    try:
        chosen, total = num_samples(loader), len(getattr(loader, "dataset", ()))
    except NotEnumerableError:  # it is reported as the reason for weaker evidence
        return []
    return [f"this is for the {chosen} of {total} samples that the sampler chooses from"] if chosen < total else []


def conditions(trainer: pl.Trainer, pl_module: pl.LightningModule, *, penalised: bool = False) -> list[str]:
    """Notes on how the objective that was tested differs from the loss in training.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        penalised: whether the objective includes the penalty of weight decay.
    """
    found = [*unseen_batches(trainer), *seen_data(trainer)]
    for difference in decay_differences(trainer):
        if penalised and difference is Difference.WEIGHT_DECAY:
            found.append("the loss includes the optimiser's weight decay, ½ · weight_decay · ‖θ‖²")
        else:
            found += descriptions([difference])
    for text, kind in _EVAL_MODE_EFFECTS.items():
        if any(isinstance(module, kind) for module in pl_module.modules()):
            found.append(text)
    return found
