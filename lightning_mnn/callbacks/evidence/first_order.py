"""First-order evidence from training's own gradients and a forward pass, if the loss cannot be evaluated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.full_batch import FullBatch
from lightning_mnn.callbacks.evaluation.run_module import LossNotEvaluableError
from lightning_mnn.callbacks.evidence.gradient_norms import index_of, numbers_of
from lightning_mnn.callbacks.evidence.tiers import Evidence, Finding, Tier, check_weights, conditions
from lightning_mnn.data.loaders.shards import NotEnumerableError
from lightning_mnn.utilities.distributed import gather
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch.optim import Optimizer

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.kinks.distance import KinkDistance
    from lightning_mnn.landscape.kinks.tracing import Names


class FirstOrderTier(Tier):
    """Reports the norm of the last step's gradient and the nearest kink; it never finds a minimum.

    The kind is ``not_stationary`` if training uses the full batch in each step and the norm of its gradient is above
    the tolerance, and ``undecided`` otherwise: a small gradient is only a necessary condition, and that of a mini-batch
    is not even necessary.

    Args:
        forward_fn: ``forward_fn(module, batch)`` whose kinks are checked; None: the module's ``forward``.
        modules: layers whose kinks count; None: all.
        gradient_tolerance: largest norm, relative to the first one seen, of a stationary point.
        why: why there is no stronger evidence.
        reads: False: there is no time to read the training set, and kinks are not reported.

    Attributes:
        reference: the first norm seen; None before a step.
        gradient_norm: the last norm seen.
    """

    def __init__(
        self,
        forward_fn: ModelFunction | None,
        modules: Names,
        gradient_tolerance: float,
        why: str,
        *,
        reads: bool = True,
    ) -> None:
        self.reference: float | None = None
        self.gradient_norm: float | None = None
        self._forward_fn = forward_fn
        self._modules = modules
        self._gradient_tolerance = gradient_tolerance
        self.why: str = why
        self._reads = reads
        self._first: dict[int, float] = {}  # squared norm of the first gradient, by optimiser
        self._last: dict[int, float] = {}  # squared norm of the last gradient, by optimiser
        self._kinks: KinkDistance | None = None
        self._full_batch_steps = False
        self._notes: list[str] = []

    @property
    @override
    def evidence(self) -> Evidence:
        return Evidence.FIRST_ORDER if self._reads or self.gradient_norm is not None else Evidence.NONE

    @property
    @override
    def passed(self) -> bool:
        return False

    def knows(self, trainer: pl.Trainer, optimizer: Optimizer) -> bool:
        """Whether a gradient of this optimiser was recorded."""
        return index_of(trainer, optimizer) in self._first

    def record_gradient(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Record the norm of the gradient that an optimiser is about to follow, unscaled."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        index = index_of(trainer, optimizer)
        self._last[index] = sum(
            float(torch.linalg.vector_norm(numbers_of(g), dtype=torch.float64)) ** 2 for g in gradients
        )
        self._first.setdefault(index, self._last[index])

    @override
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_weights(trainer, pl_module)
        if self._last:
            self.gradient_norm, self.reference = _mean_norm(self._last), _mean_norm(self._first)
        self._full_batch_steps = trainer.num_training_batches == 1
        self._kinks, notes = self._nearest_kink(trainer, pl_module)
        first, self._notes = not self._notes, [self.why, *conditions(trainer, pl_module), *notes]
        if first:
            rank_zero_info(f"LocalMinimumDetector: {'; '.join(self._notes)}")

    def _nearest_kink(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> tuple[KinkDistance | None, list[str]]:
        """The nearest kink over the training set, None if it is not known, and notes on it."""
        if not self._reads:
            return None, ["kinks were not checked"]
        try:
            batch = FullBatch(trainer, pl_module, self._forward_fn, self._modules, losses=False)
        except NotEnumerableError:  # ``why`` reports it
            return None, []
        with batch.open():
            try:
                kinks = batch.nearest_kink()
            except LossNotEvaluableError as error:
                return None, [*batch.notes(), f"kinks were not checked: {error}"]
        if kinks.units == 0:
            unknown = f"it is not known on which weights the kinks of {', '.join(batch.met)} depend"
            return None, [*batch.notes(), unknown if batch.met else "no kink was met"]
        return kinks, batch.notes()

    @override
    def findings(self) -> list[Finding]:
        relative, kind = self._relative(), Kind.UNDECIDED
        if relative is None:
            because = Reason.of(ReasonCode.NO_STEP_YET if self._reads else ReasonCode.NO_GRADIENT_SEEN)
        elif not self._full_batch_steps:
            because = Reason.of(ReasonCode.STEP_GRADIENT_OF_MINI_BATCH, relative=relative)
        elif relative > self._gradient_tolerance:
            kind, because = Kind.NOT_STATIONARY, Reason.of(ReasonCode.STEP_GRADIENT_ABOVE_TOLERANCE, relative=relative)
        else:
            because = Reason.of(ReasonCode.STEP_GRADIENT_SMALL, relative=relative)
        return [Finding.of(kind, because, self._notes)]

    @override
    def scalars(self) -> dict[str, Any]:
        return {f"minimum/{name}": value for name, value in self._measures().items()}

    @override
    def summary(self) -> dict[str, Any]:
        if not self._notes:
            return {}
        (finding,) = self.findings()
        found = {"evidence": str(self.evidence), **finding.plain(), **self._measures()}
        return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in found.items()}

    @override
    def state(self) -> dict[str, Any]:
        return {"first": dict(self._first), "last": dict(self._last), "reads": self._reads}

    @override
    def load(self, state: dict[str, Any]) -> None:
        self._first, self._last = dict(state.get("first", {})), dict(state.get("last", {}))
        self._reads = state.get("reads", True)

    def _relative(self) -> float | None:
        if self.gradient_norm is None or not self.reference:
            return None
        return self.gradient_norm / self.reference

    def _measures(self) -> dict[str, Any]:
        kinks = self._kinks
        return {
            "gradient_norm": self.gradient_norm,
            "relative_gradient": self._relative(),
            "min_preactivation": None if kinks is None else kinks.nearest,
            "relative_preactivation": None if kinks is None else kinks.relative,
            "kinks": None if kinks is None else kinks.count,
        }


def _mean_norm(squares: dict[int, float]) -> float:
    """Norm over all optimisers, the mean over the processes."""
    norms = gather(math.sqrt(sum(squares.values())))
    return float(sum(norms) / len(norms))
