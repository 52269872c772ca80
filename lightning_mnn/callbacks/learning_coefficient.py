"""LearningCoefficient: how singular is the minimum that any module converged to?"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.module_network import NetworkModule
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.cost import CostTier
from lightning_mnn.callbacks.trainer.long_pass import LONG, duration
from lightning_mnn.callbacks.volumes.chains import loss_at_points
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.findings import Fact, Unknown, UnknownCode
from lightning_mnn.landscape.curvature.langevin import gradients_at_start
from lightning_mnn.landscape.curvature.sampled_coefficient import SampledCoefficient, estimate_learning_coefficient
from lightning_mnn.loggers.media import log_image, log_scalars, shows_images
from lightning_mnn.utilities.distributed import gather
from lightning_mnn.utilities.interruption import TimeLimitError, seconds_left
from lightning_mnn.utilities.validation import MisfitError, positive_integer, real_number, seed_number, truth_value
from lightning_mnn.verdicts import ReasonCode

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction

_LEAPFROG_STEPS = 4
_MIN_MOVES = 10


class LearningCoefficient(ScheduledCallback):
    """Estimates the local learning coefficient λ̂ of the module's weights, by default at the end of training.

    The smaller λ is, the more singular the minimum, and the larger its share of the volume. It is estimated by chains
    around the weights that sample exp(−nβ L(w) − γ/2 ‖w − w*‖²) over all trained parameters: λ̂ = nβ (E[L] − L(w*)); see
    :func:`~lightning_mnn.landscape.estimate_learning_coefficient`. L is the module's own training loss over its whole
    training set, in eval mode, with the penalty of weight decay, and in float64 where its step allows this, as
    :class:`~lightning_mnn.callbacks.LocalMinimumDetector` evaluates it. Where the chains are not reliable, nothing but
    diagnostics is logged, and the summary says why. W&B and TensorBoard also get a picture of the traces of the chains,
    which takes about a second. It does not change training.

    It is meant for small networks and data: an estimate costs up to ``budget`` gradients of the loss over the training
    set. Those of all chains are computed together by ``torch.vmap``, if the module's step allows this (a metric that
    the step updates does not), and otherwise one after another. With 353 parameters and 256 samples a
    gradient took 23 ms one after another, and 1.2 ms together: give ``loss_fn`` if the step has metrics.

    Args:
        schedule: when to estimate it, besides the end; None: at the end only.
        inverse_temperature: nβ; None: n/log n for n samples. For the value of the nearest minimum alone use a large
            one, such as 1e8, with a large ``localisation``.
        localisation: γ.
        chains: number of chains.
        budget: largest number of gradients, of all chains together. Half of the moves are burn-in.
        max_seconds: time limit, by which fewer moves are made than the budget allows; none are made if 10 take longer.
        tier: "light": at most 1 % of training's time, "standard": at most 5 %, "full": no limit but ``max_seconds``. In
            less time there are fewer moves, or there is no estimate.
        adjusted: whether Metropolis' rule is used; False: SGLD.
        loss_fn: ``loss_fn(module, batch)``; None: the module's ``training_step``.
        seed: seed of the chains.
        strict: if true, an error in the callback ends the run; otherwise it warns once, and training goes on without
            the callback.

    Attributes:
        found: the last estimate; None before it.
        is_batched: whether the chains were evaluated together.

    Raises:
        ValueError: an argument is out of range.

    >>> LearningCoefficient(inverse_temperature=1e4, budget=20_000).summary()["sampled_learning_coefficient"] is None
    True
    """

    missing = "no learning coefficient is estimated"
    acts_at_start = False
    remedy = "loss_fn(module, batch), if the module's training_step cannot be evaluated by itself"

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        inverse_temperature: float | None = None,
        localisation: float = 1.0,
        chains: int = 16,
        budget: int = 50_000,
        max_seconds: float = 600.0,
        tier: str = "full",
        adjusted: bool = True,
        loss_fn: ModelFunction | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        end_seconds = math.inf if tier == CostTier.FULL else None
        super().__init__(schedule or Schedule(every=sys.maxsize), strict=strict, tier=tier, end_seconds=end_seconds)
        if inverse_temperature is not None:
            real_number("inverse_temperature", inverse_temperature, above=0)
        self.inverse_temperature = inverse_temperature
        self.localisation = real_number("localisation", localisation, at_least=0)
        self.chains = positive_integer("chains", chains)
        self.budget = positive_integer("budget", budget)
        self.max_seconds = real_number("max_seconds", max_seconds, above=0)
        self.adjusted = truth_value("adjusted", adjusted)
        self.loss_fn = loss_fn
        self.seed = seed_number("seed", seed)
        self.found: SampledCoefficient | None = None
        self.is_batched: bool | None = None

    @override
    def epochs_until_due(self, done: int) -> float:
        return math.inf if self.schedule.every == sys.maxsize else super().epochs_until_due(done)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.found, self.is_batched = None, None

    @override
    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, NetworkModule) and pl_module.replicas > 1:
            raise MisfitError(
                "LearningCoefficient is of one network, and replicas are several: train them one by one, replicas=1"
            )

    @override
    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pending:  # weights before training are at no minimum
            super().start(trainer, pl_module)

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recall(trainer, pl_module)
        assert self.found is not None  # noqa: S101 (just estimated)
        found = self.found
        values: dict[str, Tensor | float | None] = {
            "volume/learning_coefficient": found.value,
            "volume/learning_coefficient_standard_error": found.standard_error,
            "volume/learning_coefficient_reliable": float(found.is_reliable),
            "volume/learning_coefficient_r_hat": found.r_hat,
            "volume/learning_coefficient_effective_samples": found.effective_samples,
            "volume/learning_coefficient_acceptance": found.acceptance,
        }
        log_scalars(trainer, values)
        self._log_traces(trainer, pl_module)

    @override
    def run_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = None

    @override
    def recall(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        beta, began = self.inverse_temperature, time.monotonic()
        count = num_samples(trainer.train_dataloader) if beta is None else None
        with loss_at_points(trainer, pl_module, self.loss_fn) as (batch, loss):
            loss(loss.point.expand(self.chains, -1))  # it finds out how, and reads the data
            self.is_batched, once = batch.is_batched, time.monotonic()
            loss(loss.point.expand(self.chains, -1))
            moves = self._moves_within(max(gather(time.monotonic() - once)), len(loss.point))
            self.found = estimate_learning_coefficient(
                loss,
                loss.point,
                num_samples=count,
                inverse_temperature=beta,
                localisation=self.localisation,
                chains=self.chains,
                steps=moves,
                burn_in=moves,
                adjusted=self.adjusted,
                leapfrog_steps=_LEAPFROG_STEPS if self.adjusted else 1,
                seed=self.seed,
            )
        together = "together" if self.is_batched else "one after another"
        rank_zero_info(
            f"LearningCoefficient: {self.found.gradient_evaluations:,} gradients of {self.chains} chains, {together}, "
            f"in {time.monotonic() - began:.0f} s: {self.found.reason}"
        )

    def _log_traces(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a picture of the chains' traces to loggers that can show pictures."""
        if self.found is None or not trainer.is_global_zero or not any(map(shows_images, trainer.loggers)):
            return
        from lightning_mnn.figures.volumes import chains_figure  # noqa: PLC0415 (matplotlib is slow)

        title = f"{type(pl_module).__name__} after {trainer.global_step} steps"
        with TemporaryDirectory() as folder:
            picture = chains_figure(self.found, Path(folder) / "chains.png", title)
            for logger in trainer.loggers:
                log_image(logger, "volume/learning_coefficient_chains", picture, trainer.global_step)

    def _moves_within(self, seconds: float, size: int) -> int:
        """Moves after burn-in within the budget and the time limit, if all chains' gradients take some seconds.

        Long work is announced.

        Raises:
            TimeLimitError: there is time for too few moves.
        """
        # A move of SGLD has one gradient, and up to four runs with burn-in of 1, 1, 2 and 4 parts; of the other chains
        # a move has one more than its leapfrog steps.
        of_a_move = 2 * (_LEAPFROG_STEPS + 1) if self.adjusted else 12
        first = 4 + gradients_at_start(size) / self.chains
        limit = max(0.0, min(self.max_seconds, *gather(seconds_left())))
        affordable, in_time = self.budget / self.chains, limit / max(seconds, 1e-9)
        moves = max(_MIN_MOVES, int((min(affordable, in_time) - first) / of_a_move))
        passes = first + moves * of_a_move
        expected = (
            f"{moves:,} moves of {self.chains} chains after as many of burn-in, about {duration(passes * seconds)}"
        )
        if passes > in_time and moves == _MIN_MOVES:
            if limit == self.max_seconds:  # else the tier's limit is named
                self.over_time = f"{expected}, are more than max_seconds={limit:g}: raise it, or take fewer chains"
            raise TimeLimitError(self.over_time or "")
        if passes * seconds >= LONG:
            rank_zero_info(
                f"LearningCoefficient: {expected} for {passes * self.chains:,.0f} gradients of {size:,} parameters"
            )
        return moves

    @override
    def facts(self) -> list[Fact]:
        found = self.found
        if found is None or found.value is None:
            return []
        estimate = f"{found.value:.4g} ± {found.standard_error:.2g}"
        text = f"the learning coefficient of the chains is {estimate}: {found.reason}"
        return [Fact(str(found.reason_code), text, value=found.value)]

    @override
    def unknowns(self) -> list[Unknown]:
        found = self.found
        if found is None or found.value is not None:
            return []
        return [Unknown("the learning coefficient", UnknownCode.NOT_MEASURED, found.reason)]

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        found = self.found
        return {
            "sampled_learning_coefficient": found and found.value,
            "sampled_learning_coefficient_standard_error": found and found.standard_error,
            "sampled_learning_coefficient_reason": self.failure or self.over_time or (found and found.reason),
            "sampled_learning_coefficient_reason_code": str(ReasonCode.TIME_LIMIT)
            if self.over_time
            else found and str(found.reason_code),
        }
