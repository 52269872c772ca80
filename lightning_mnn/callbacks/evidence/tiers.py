"""What a LocalMinimumDetector's word rests on: tiers of evidence, and the judges that gather it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.data.loaders.shards import NotEnumerableError, draws, num_samples
from lightning_mnn.utilities.errors import DivergenceError
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    import pytorch_lightning as pl

_MINIMA = ("differentiable_minimum", "kink_minimum")
_MODAL = {
    "batch norm is at its running statistics": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "dropout is off": (
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    ),
}


class Evidence(StrEnum):
    """Tiers of evidence, the strongest first.

    Attributes:
        CERTIFICATE: an exact minimum near the weights, proved up to stated rounding (two-layer networks, squared
            error).
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
    """In what the objective of a verdict differs from what training lowers."""

    WEIGHT_DECAY = "weight_decay"
    FROZEN_WEIGHTS = "frozen_weights"


_DIFFERENCES = {
    Difference.WEIGHT_DECAY: "the optimiser's weight_decay is no part of this loss: what is trained is another",
    Difference.FROZEN_WEIGHTS: "frozen weights count as free in it: what is trained is the loss of the others",
}


def told(differences: list[Difference]) -> list[str]:
    """The sentences of differences."""
    return [_DIFFERENCES[difference] for difference in differences]


def has_weight_decay(trainer: pl.Trainer) -> bool:
    """Whether an optimiser takes weights down beside the loss."""
    return any(group.get("weight_decay", 0) for own in trainer.optimizers for group in own.param_groups)


class Tier(ABC):
    """Gathers the evidence of one tier; a :class:`LocalMinimumDetector` says when.

    Every process calls the same methods in the same order, and gets the same answers.

    Attributes:
        why: why there is no stronger evidence; None: that needs no reason.
    """

    why: str | None = None

    @property
    @abstractmethod
    def evidence(self) -> Evidence:
        """The tier."""

    @property
    @abstractmethod
    def passed(self) -> bool:
        """Whether the last look found nothing that speaks against a minimum."""

    @property
    def can_certify(self) -> bool:
        """Whether there is a dear part, which can decide."""
        return False

    @property
    def moves(self) -> bool:
        """Whether it can take the weights to the exact minimum."""
        return False

    @abstractmethod
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The cheap part, at each check."""

    def certify_minimum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The dear part, after a look at the same weights, where there is one."""
        del trainer, pl_module

    def finalize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, polish: bool) -> bool:
        """The dear part at the end of training, unless it was done at these weights; whether anything was done."""
        del trainer, pl_module, polish
        return False

    def run_out(self, why: str) -> None:
        """Go on without the dear part, for which there was too little time."""
        del why

    @abstractmethod
    def kinds(self) -> tuple[list[str], list[str]]:
        """Kind and reason of each replica."""

    @abstractmethod
    def scalars(self) -> dict[str, Any]:
        """What is logged."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """What was found, in plain values; empty before the first look."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, in plain values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state, if there is any."""
        del state

    @property
    def found_minimum(self) -> bool:
        """Whether the word is that all replicas are at a minimum."""
        return all(kind in _MINIMA for kind in self.kinds()[0])


def check_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that the weights that are trained are numbers; a frozen mask may hold infinities.

    Raises:
        DivergenceError: one is not.
    """
    if not all(fetched(*(parameter.isfinite().all() for parameter in trained_parameters(trainer, pl_module)))):
        raise diverged(trainer, "weights are")


def diverged(trainer: pl.Trainer, what: str) -> DivergenceError:
    """The error for ``what`` are not finite numbers."""
    return DivergenceError(
        f"training diverged: {what} not finite after {trainer.global_step} steps. Lower the learning rate"
    )


def unseen_batches(trainer: pl.Trainer) -> list[str]:
    """That training sees a part of its data only, in words, where it does."""
    try:
        seen, there = trainer.num_training_batches, len(trainer.train_dataloader)  # type: ignore[arg-type]
    except TypeError:  # an IterableDataset has no length
        return []
    if seen >= there:
        return []
    of = "limit_train_batches, overfit_batches or fast_dev_run"
    return [f"an epoch of training sees {seen} of {there} batches ({of}), and this is of the whole training set"]


def seen_data(trainer: pl.Trainer) -> list[str]:
    """What stands for the training set, in words, where that is not each of its samples once."""
    loader: Any = trainer.train_dataloader
    drawn = draws(loader)
    if drawn is not None:
        return [f"this is of one epoch as drawn by {drawn}"]
    try:
        chosen, there = num_samples(loader), len(getattr(loader, "dataset", ()))
    except NotEnumerableError:  # which is told as the reason of weaker evidence
        return []
    return [f"this is of the {chosen} of {there} samples that the sampler chooses from"] if chosen < there else []


def conditions(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """What the loss over the training set leaves out of what training does, in words."""
    found = [*unseen_batches(trainer), *seen_data(trainer)]
    if has_weight_decay(trainer):
        found += told([Difference.WEIGHT_DECAY])
    for text, kind in _MODAL.items():
        if any(isinstance(module, kind) for module in pl_module.modules()):
            found.append(text)
    return found
