"""Second-order evidence for any module: its loss over the training set, the nearest kink, extreme eigenvalues."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.float64_loss import DoubleBatch, in_double
from lightning_mnn.callbacks.evaluation.full_batch import FullBatch, Reduction
from lightning_mnn.callbacks.evaluation.isolation import trained_parameters
from lightning_mnn.callbacks.evaluation.run_module import LossNotEvaluableError
from lightning_mnn.callbacks.evidence.gradient_norms import GradientNorms
from lightning_mnn.callbacks.evidence.tiers import Evidence, Finding, Tier, check_weights, conditions, diverged
from lightning_mnn.data.loaders.shards import batch_size_of, draws, num_samples
from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.curvature.kink_conditions import check_kinks
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError
from lightning_mnn.landscape.curvature.second_order import SecondOrderVerdict, check_curvature, check_stationarity
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.curvature.loss_surface import LossSurface
    from lightning_mnn.landscape.kinks.distance import KinkDistance
    from lightning_mnn.landscape.kinks.tracing import Names


_ON_KINKS = "training may oscillate across kinks, where a gradient need not vanish, as with an L1 loss or penalty"


class SecondOrderTier(Tier):
    """Tests the weights with the module's own loss, in eval mode; the expensive check in float64 where possible.

    Args:
        loss_fn: ``loss_fn(module, batch)``; None: the module's ``training_step``.
        modules: layers whose kinks count; None: all.
        gradient_tolerance: largest ‖∇L‖, relative to the reference, of a stationary point.
        curvature_tolerance: largest −λ_min/λ_max of a minimum.
        max_products: maximal number of Hessian–vector products of each stage of an expensive check.
        why: why there is no stronger evidence.
        weight_decay: whether the penalty of the optimisers' weight decay is part of the objective; None: unless there
            is a ``loss_fn``, which is the whole objective.

    Attributes:
        verdict: the verdict on the weights of the last check.
        reference: the largest norm so far of a gradient that training followed; before the first step, and if that norm
            is zero up to rounding, |L|/‖θ‖.
        norms: norms of the gradients that training follows.
    """

    def __init__(
        self,
        loss_fn: ModelFunction | None,
        modules: Names,
        gradient_tolerance: float,
        curvature_tolerance: float,
        max_products: int,
        why: str | None = None,
        *,
        weight_decay: bool | None = None,
    ) -> None:
        self.verdict: SecondOrderVerdict | None = None
        self.reference: float | None = None
        self.norms = GradientNorms()
        self._loss_fn = loss_fn
        self._modules = modules
        self._gradient_tolerance = gradient_tolerance
        self._curvature_tolerance = curvature_tolerance
        self._max_products = max_products
        self._weight_decay = weight_decay
        self.why = why
        self._kinks: KinkDistance | None = None
        self._notes: list[str] = []
        self._reported: list[str] = []
        self._certified = False
        self._ran_out = False
        self._reduction: Reduction | None = None  # how the loss combines samples; None: not known yet

    @property
    @override
    def evidence(self) -> Evidence:
        return Evidence.FIRST_ORDER if self._ran_out else Evidence.SECOND_ORDER

    @property
    @override
    def passed(self) -> bool:
        return self.verdict is not None and self.verdict.kind in (Kind.UNDECIDED, Kind.DIFFERENTIABLE_MINIMUM)

    @property
    @override
    def can_certify(self) -> bool:
        return True

    @override
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_weights(trainer, pl_module)
        batch = self._full_batch(trainer, pl_module)
        with batch.open():
            surface, found = batch.surface(), batch.measure()
            loss = found.loss if self.verdict is None else self.verdict.loss
            self.reference = _reference(surface, loss, self.norms.largest())
            kinks = self._kinks = found.kinks
            read_again = trainer.global_step > 0 or batch.is_kept()  # before the first step the data are read once
            self.verdict = self._stationarity(surface, (found.loss, found.gradient), compare_sides=read_again)
            batch.check()
            if self._reduction is None:
                self._reduction = batch.reduction()
            batch.check_repeats(found.first)
        self._certified = self._ran_out = False
        if not math.isfinite(self.verdict.loss):
            raise diverged(trainer, "the loss over the training set is")
        self._note(trainer, pl_module, batch, kinks)

    @override
    def certify_minimum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.verdict is not None  # noqa: S101 (the cheap check runs first)
        self._certified = True
        batch = self._full_batch(trainer, pl_module)
        try:
            if self.verdict.kind is Kind.ON_KINK:
                self.verdict = self._on_kinks(trainer, pl_module)
                return
            self.verdict = self._verdict_in_float64(trainer, pl_module) or self._curvature(batch)
        except NoDerivativeError as error:
            self._without_eigenvalue(ReasonCode.NO_SECOND_DERIVATIVE, error)
        except FloatingPointError as error:
            self._without_eigenvalue(ReasonCode.PRODUCT_NOT_FINITE, error)
        except LossNotEvaluableError as error:
            self._without_eigenvalue(ReasonCode.LOSS_NOT_EVALUABLE, error)
        except torch.OutOfMemoryError as error:
            self._without_eigenvalue(ReasonCode.OUT_OF_MEMORY, error)

    @override
    def finalize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, polish: bool) -> bool:
        if self._certified or self.verdict is None:
            return False
        self.certify_minimum(trainer, pl_module)
        return True

    @override
    def run_out(self, why: str) -> None:
        self._ran_out = True
        self._without_eigenvalue(ReasonCode.TIME_LIMIT, why)

    @override
    def findings(self) -> list[Finding]:
        if self.verdict is None:
            return [Finding.of(Kind.UNDECIDED, Reason.of(ReasonCode.NOT_CHECKED))]
        moving = self.verdict.kind is Kind.NOT_STATIONARY
        close = self.verdict.relative_kink < tolerances.MAX_CLOSE_KINK_RATIO
        kinked = [_ON_KINKS] if moving and close and not self.verdict.kinks else []
        return [Finding.of(self.verdict.kind, self.verdict.because, [*kinked, *self._notes])]

    @override
    def scalars(self) -> dict[str, Any]:
        measures = self._measures()
        return {f"minimum/{name}": value for name, value in measures.items()}

    @override
    def summary(self) -> dict[str, Any]:
        if self.verdict is None:
            return {}
        (finding,) = self.findings()
        found = {"evidence": str(self.evidence), **finding.plain(), **self._measures()}
        return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in found.items()}

    @override
    def state(self) -> dict[str, Any]:
        return {"norms": self.norms.state()}

    @override
    def load(self, state: dict[str, Any]) -> None:
        self.norms.load(state.get("norms", {}))

    def _measures(self) -> dict[str, Any]:
        assert self.verdict is not None  # noqa: S101
        found = self.verdict
        return {
            "loss": found.loss,
            "gradient_norm": found.gradient_norm,
            "relative_gradient": found.relative_gradient,
            "min_preactivation": found.nearest_kink,
            "relative_preactivation": found.relative_kink,
            "kinks": found.kinks,
            "smallest_eigenvalue": found.smallest_eigenvalue,
            "eigenvalue_error": found.eigenvalue_error,
            "largest_eigenvalue": found.largest_eigenvalue,
            "newton_gain": found.newton_gain,
        }

    def _full_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> FullBatch:
        return FullBatch(trainer, pl_module, self._loss_fn, self._modules, weight_decay=self._weight_decay)

    def _stationarity(
        self, surface: LossSurface, known: tuple[float, Tensor] | None = None, *, compare_sides: bool = True
    ) -> SecondOrderVerdict:
        assert self._kinks is not None  # noqa: S101 (found by the same check)
        tolerance = self._gradient_tolerance  # also for its jumps: of millions of units in float32 a few are on kinks
        return check_stationarity(
            surface,
            self._kinks,
            self._compared,
            gradient_tolerance=tolerance,
            jump_tolerance=tolerance,
            known=known,
            compare_sides=compare_sides,
        )

    @property
    def _compared(self) -> float:
        """The reference as a number to divide by."""
        return self.reference if self.reference is not None and math.isfinite(self.reference) else 1.0

    def _verdict_in_float64(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> SecondOrderVerdict | None:
        """The verdict in float64, for weights of a lower precision; None if float64 does not apply or is impossible."""
        assert self.verdict is not None  # noqa: S101
        trained = trained_parameters(trainer, pl_module)
        if trained[0].dtype == torch.float64 or self.verdict.kind is not Kind.UNDECIDED:
            return None
        try:
            with in_double(pl_module) as double:
                decay = self._weight_decay
                batch = DoubleBatch(trainer, pl_module, double, self._loss_fn, self._modules, weight_decay=decay)
                return self._curvature(batch, double.of(trained))
        except NoDerivativeError:
            return None

    def _on_kinks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> SecondOrderVerdict:
        """The verdict by the first-order conditions on the kinks, in float64 if possible."""
        trained = trained_parameters(trainer, pl_module)
        if trained[0].dtype != torch.float64:
            with suppress(NoDerivativeError), in_double(pl_module) as double:
                decay = self._weight_decay
                batch = DoubleBatch(trainer, pl_module, double, self._loss_fn, self._modules, weight_decay=decay)
                return self._kink_verdict(batch, double.of(trained))
        return self._kink_verdict(self._full_batch(trainer, pl_module))

    def _kink_verdict(self, batch: FullBatch, parameters: Sequence[Tensor] | None = None) -> SecondOrderVerdict:
        assert self.verdict is not None  # noqa: S101
        assert self._kinks is not None  # noqa: S101
        with batch.open():
            found = check_kinks(
                batch.surface(parameters),
                self.verdict,
                batch.kink_passes,
                self._kinks.spacing,
                reference=self._compared,
                gradient_tolerance=self._gradient_tolerance,
            )
            batch.check()
        return found

    def _curvature(self, batch: FullBatch, parameters: Sequence[Tensor] | None = None) -> SecondOrderVerdict:
        assert self.verdict is not None  # noqa: S101
        with batch.open():
            surface, stationary = batch.surface(parameters), self.verdict
            if parameters is not None:
                stationary = self._stationarity(surface)
            found = check_curvature(
                surface,
                stationary,
                curvature_tolerance=self._curvature_tolerance,
                reference=self._compared,
                max_products=self._max_products,
            )
            batch.check()
        return found

    def _without_eigenvalue(self, code: ReasonCode, cause: Exception | str) -> None:
        """State why an undecided point stays undecided, or why the conditions on its kinks are not known."""
        assert self.verdict is not None  # noqa: S101
        if self.verdict.kind is Kind.ON_KINK and code is not ReasonCode.TIME_LIMIT:
            because = self.verdict.because
            fact = Reason.of(ReasonCode.KINKS_NOT_EVALUABLE, cause=str(cause))
            self.verdict = replace(self.verdict, because=replace(because, facts=(*because.facts, fact)))
        if self.verdict.kind is Kind.UNDECIDED:
            because = Reason.of(code, self.verdict.because, cause=str(cause))
            self.verdict = replace(self.verdict, because=because)

    def _note(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: FullBatch, kinks: KinkDistance) -> None:
        """Collect the notes that a reader of the reason needs; each is also logged once."""
        found = [] if self.why is None else [f"no certificate: {self.why}"]
        found += conditions(trainer, pl_module, penalised=bool(batch.decays))
        found += batch.notes()
        loader: Any = trainer.train_dataloader
        if self._reduction is Reduction.OTHER:
            found.append(
                "the loss of a batch is not a mean over its samples (a mean over tokens is not one, since a sample has "
                "several), and that of the training set is the mean over batches, weighted by their numbers of samples"
            )
        if self._reduction is Reduction.SUM and (draws(loader) or num_samples(loader) % batch_size_of(loader)):
            found.append(
                "the loss is a sum over the samples of a batch and is treated as their mean, so that the last batch, "
                "which is smaller, counts less; give a loss_fn(module, batch) that returns the mean"
            )
        if not kinks.units:
            found.append(
                f"no kink depends on a weight that is trained now ({', '.join(batch.met)} depend on none)"
                if batch.met
                else f"{type(pl_module).__name__} has no kink in its forward pass: its loss is treated as smooth"
            )
        self._notes = found
        for note in found:
            if note not in self._reported:
                self._reported.append(note)
                rank_zero_info(f"LocalMinimumDetector: {note}")


def _reference(surface: LossSurface, loss: float, largest: float | None) -> float:
    """The largest gradient norm in training; if there is none, or it is zero up to rounding, a typical one: |L|/‖θ‖."""
    weights = math.sqrt(sum(float(p.detach().double().square().sum()) for p in surface.parameters))
    typical = abs(loss) / (weights or 1.0)
    least = torch.finfo(surface.dtype).eps ** 0.5 * typical
    return largest if largest is not None and largest > least else typical or 1.0
