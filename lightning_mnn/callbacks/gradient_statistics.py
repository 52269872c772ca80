"""GradientStatistics: how large are the gradients that training follows, layer by layer?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.run_module import batch_size
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.cost import CostTier
from lightning_mnn.findings import Fact, Unknown, UnknownCode
from lightning_mnn.landscape.vitals.gradients import (
    GradientSizes,
    gradient_noise_scale,
    gradient_sizes,
    joined,
    squared_norm,
)
from lightning_mnn.landscape.vitals.out_of_ordinary import gradient_findings
from lightning_mnn.loggers.media import log_scalars
from lightning_mnn.utilities.transfer import fetched
from lightning_mnn.utilities.validation import truth_value

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_mnn.findings import Finding

_NOISE_STEPS = 8  # successive steps whose gradients are compared
_QUANTITIES = ("norm", "relative_norm", "near_zero_fraction")


class GradientStatistics(ScheduledCallback):
    """Measures the gradients that training follows, as they are: after accumulation, unscaling and all-reduce.

    It reads them when an optimiser is about to step, before Lightning clips them, at scheduled steps only. At other
    steps nothing waits for the device. It computes no gradient itself. A layer is a module with parameters of its own,
    such as a Linear or a convolution.

    By layer and in total it logs the norm ‖g‖, the norm relative to that of the weights, ‖g‖/‖θ‖, and the share of
    entries near zero: at most 1e-3 of the root mean square of the layer's gradient (see
    :func:`lightning_mnn.landscape.gradient_sizes`). At the end it reports what is out of the ordinary:

    - a vanishing gradient: a layer's ‖g‖/‖θ‖ at the last measurement is below 1e-4 of that of the layer with the
      largest, so that a step of gradient descent moves it ten thousand times less;
    - an exploding gradient: at some measurement the norm of all gradients was 100 times the median of those before;
    - an infinite or NaN gradient; not with a gradient scaler ("16-mixed"), which skips such steps and goes on.

    With a strategy that splits the weights over processes, the numbers are those of the first process's part.

    Args:
        schedule: at which optimiser steps to measure, in steps; None: after 1, 2, 4, 8, … steps, and with "full" every
            50 steps.
        noise_scale: also estimate the gradient noise scale, the batch size from which larger ones hardly help (see
            :func:`lightning_mnn.landscape.gradient_noise_scale`), from the gradients of up to 8 successive steps that
            end at a scheduled one. How far the weights move in these steps is neglected. It needs memory for one more
            gradient.
        strict: if true, an error in the callback ends the run; otherwise it warns once, and training goes on without
            the callback.
        tier: "light": at most 1 % of training's time; "standard": at most 5 %; "full": no limit. A scheduled step
            beyond the limit is left out, by the clock, so two runs may measure different steps.

    Raises:
        ValueError: a schedule in epochs.

    >>> GradientStatistics(Schedule(every=10, unit="step")).findings
    []
    """

    missing = "gradients are not measured"

    acts_at_start = False

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        noise_scale: bool = False,
        strict: bool = False,
        tier: str = "full",
    ) -> None:
        default = Schedule(every=50, unit="step") if tier == CostTier.FULL else Schedule(growth=2.0, unit="step")
        super().__init__(schedule or default, strict=strict, tier=tier)
        if self.schedule.unit != "step":
            raise ValueError('schedule must count steps, as Schedule(every=50, unit="step"): gradients are of one step')
        self.noise_scale = truth_value("noise_scale", noise_scale)
        self._reset()

    def _reset(self) -> None:
        self._sizes: dict[str, GradientSizes] = {}  # of the batch in progress
        self._measures: bool | None = None  # whether to measure it; None: not decided yet
        self._norms: list[float] = []
        self._relative: dict[str, float] = {}
        self._scaled = False  # whether a gradient scaler skips steps
        self._noise = NoiseWindow()
        self._reported = False

    @property
    def findings(self) -> list[Finding]:
        """What is out of the ordinary so far."""
        return gradient_findings(self._relative, self._norms)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._reset()
            self._scaled = getattr(trainer.precision_plugin, "scaler", None) is not None

    @override
    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: there is no gradient yet."""

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._measures = None
        if self.noise_scale:
            self._noise.count(batch)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.failure is not None:
            return
        several = len(trainer.optimizers)
        if self.noise_scale:
            self._noise.step(optimizer, several, self.schedule.until_due(trainer.global_step))
        if self._measures is None:  # one decision for all optimisers of a batch, whose steps all count
            coming = range(trainer.global_step + 1, trainer.global_step + several + 1)
            self._measures = any(map(self.schedule.due, coming)) and self._affordable(trainer)
        if self._measures:
            self.observe(lambda: self._read(pl_module, optimizer))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._measures:
            self.observe(lambda: self._act_once(trainer, pl_module))

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sizes, self._sizes = self._sizes, {}
        if not sizes:
            return
        rows = {"": joined(list(sizes.values())), **sizes}
        numbers = iter(fetched(*(getattr(row, name) for row in rows.values() for name in _QUANTITIES)))
        found = {layer: {name: next(numbers) for name in _QUANTITIES} for layer in rows}
        scalars: dict[str, Tensor | float | None] = {
            "/".join(filter(None, ("gradient", layer, name))): value
            for layer, values in found.items()
            for name, value in values.items()
        }
        scalars["gradient/noise_scale"] = self._noise.scale(trainer.world_size) if self.noise_scale else None
        norm = found.pop("")["norm"]
        if math.isfinite(norm) or not self._scaled:
            self._norms.append(norm)
            self._relative = {layer: values["relative_norm"] for layer, values in found.items()}
            log_scalars(trainer, scalars)

    @override
    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what was found, once."""
        if self._reported:
            return
        self._reported = True
        lines = [fact.text for fact in self.facts()]
        lines += [f"{unknown.what}: {unknown.reason}" for unknown in self.unknowns()]
        for line in lines:
            rank_zero_info(f"GradientStatistics: {line}")

    @override
    def facts(self) -> list[Fact]:
        if not self._norms:
            return []
        counts = f"{len(self._relative)} layer(s), measured {len(self._norms)} time(s)"
        usual = Fact("nothing_unusual", f"nothing out of the ordinary in the gradients of {counts}")
        return [Fact.of(finding) for finding in self.findings] or [usual]

    @override
    def unknowns(self) -> list[Unknown]:
        unknown = []
        if not self._norms:
            reason = "no optimiser made a step at a scheduled time"
            remedy = 'schedule=Schedule(growth=2.0, unit="step") measures after 1, 2, 4, 8, … steps'
            unknown.append(Unknown("no gradient was measured", UnknownCode.NOT_DUE, reason, remedy))
        if self.noise_scale and self._noise.reason is not None:
            unknown.append(Unknown("noise_scale is not known", UnknownCode.NOT_MEASURED, self._noise.reason))
        return unknown

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        found: dict[str, Any] = {"gradient_findings": [finding.plain() for finding in self.findings]}
        return found if self.failure is None else {**found, "gradient_reason": self.failure}

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"norms": list(self._norms), "relative": dict(self._relative)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._norms, self._relative = list(state_dict.get("norms", [])), dict(state_dict.get("relative", {}))

    def _read(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Read the gradients that an optimiser is about to follow; nothing waits for them."""
        with self.cost.measured(pl_module.device, completes=False):
            self._sizes |= {
                layer: gradient_sizes(gradients, weights)
                for layer, (gradients, weights) in layers_of(pl_module, optimizer).items()
            }


def layers_of(pl_module: nn.Module, optimizer: Optimizer) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Gradients and weights by layer, of the parameters that an optimiser trains and that have a gradient.

    A layer is a module with parameters of its own. The module itself, and lists of parameters, are none: there each
    parameter has its own name.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for path, part in pl_module.named_modules():
        alone = part is pl_module or isinstance(part, nn.ParameterList | nn.ParameterDict)
        for name, parameter in part.named_parameters(path, recurse=False):
            if id(parameter) in trained and parameter.grad is not None:
                gradients, weights = found.setdefault(name if alone else path, ([], []))
                gradients.append(parameter.grad)
                weights.append(parameter.detach())
    return found


class NoiseWindow:
    """Sums over the gradients of successive steps, for the noise scale; they stay on the device.

    Attributes:
        reason: why there is no noise scale; None: there is one, or it was not asked for yet.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._of_step: int | None = 0  # samples since the last step, on this process; None: unknown
        self._clear()

    def _clear(self) -> None:
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._samples = 0

    def count(self, batch: Any) -> None:
        """Count the samples of a batch."""
        try:
            self._of_step = None if self._of_step is None else self._of_step + batch_size(batch)
        except TypeError as error:
            self._of_step, self.reason = None, str(error)

    @torch.no_grad()
    def step(self, optimizer: Optimizer, num_optimizers: int, until_due: int) -> None:
        """Add the gradient of a coming step, if it is one of the last 8 before a scheduled one."""
        samples, self._of_step = self._of_step, 0
        if num_optimizers > 1:
            self.reason = "there are several optimisers, whose steps are of different losses"
        if until_due > _NOISE_STEPS or num_optimizers > 1 or samples is None:
            self._clear()
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.layout is not torch.strided for gradient in gradients):
            self.reason = "there are sparse gradients"
            return
        wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
        if [gradient.shape for gradient in wide] != [total.shape for total in self._sums]:
            self._clear()
            self._sums = [torch.zeros_like(gradient) for gradient in wide]
        for total, gradient in zip(self._sums, wide, strict=True):
            total.add_(gradient)
        self._squares.append(squared_norm(wide))
        self._samples += samples

    def scale(self, world_size: int) -> Tensor | None:
        """The noise scale in samples, from the steps since the last call; None from fewer than two."""
        steps, squares, sums, samples = len(self._squares), self._squares, self._sums, self._samples
        self._clear()
        if steps < 2 or not samples:
            return None
        of_mean = squared_norm(sums) / steps**2
        return gradient_noise_scale(torch.stack(squares).mean(), of_mean, steps, world_size * samples / steps)
