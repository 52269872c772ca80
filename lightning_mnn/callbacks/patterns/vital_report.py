"""VitalReport: the vital signs of a run, what is out of the ordinary in them, and what could not be measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_warn

from lightning_mnn.callbacks.patterns.vital_signs import VitalProbe, VitalSettings, VitalSigns
from lightning_mnn.findings import Fact, Finding
from lightning_mnn.landscape.kinks.tracing import PatternError
from lightning_mnn.landscape.vitals.out_of_ordinary import pattern_findings
from lightning_mnn.utilities.interruption import TimeLimitError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.kink_probe import KinkProbe
    from lightning_mnn.findings import Freeze
    from lightning_mnn.landscape.kinks.layers import KinkLayer
    from lightning_mnn.landscape.pattern import PackedPattern

_SIGNS = ("dormant_fraction", "effective_rank", "local_complexity")


class VitalReport:
    """Measures vital signs, and reports on them at the end.

    Args:
        settings: what they are measured on.
        seed: seed of the directions.
        memory_budget: bytes for them on the device.

    Attributes:
        findings: what is out of the ordinary at the last measurement, one list for each replica.
        freezes: when patterns and weights settled, one for each replica.
        missing: what could not be measured, and why.
    """

    def __init__(self, settings: VitalSettings, seed: int, memory_budget: int) -> None:
        self._settings = settings
        self._probe = VitalProbe(settings, seed, memory_budget)
        self.findings: list[list[Finding]] = []
        self.freezes: list[Freeze] = []
        self.missing: dict[str, str] = {}
        self._reason: str | None = None  # why they cannot be measured in this fit
        self._layers = 0

    def measure(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        kinks: KinkProbe | None,
        chosen: Tensor,
        *,
        strict: bool,
    ) -> VitalSigns:
        """The vital signs at this step, on every process; if they cannot be measured, none, with one warning.

        Args:
            trainer: the Trainer.
            pl_module: the module.
            kinks: where the layers of a module are; None: it defines its network.
            chosen: samples of a module that defines its network.
            strict: whether an error is raised, except a PatternError: that of the patterns themselves will tell.

        Raises:
            TimeLimitError: there was no time for them.
        """
        if self._reason is not None:
            return VitalSigns(missing=dict.fromkeys(_SIGNS, self._reason))
        if not (self._settings.samples or self._settings.centres):
            return VitalSigns()
        try:
            if kinks is not None:
                return self._probe.of_model(trainer, pl_module, kinks)
            return self._probe.of_network(trainer, pl_module, chosen)
        except PatternError as error:
            return VitalSigns(missing=dict.fromkeys(_SIGNS, str(error)))
        except TimeLimitError:
            raise
        except Exception as error:
            if strict:
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            rank_zero_warn(
                f"Activation patterns: dormant units, effective rank and local complexity are not measured: {reason}. "
                "Recording goes on"
            )
            self._reason = reason
            return VitalSigns(missing=dict.fromkeys(_SIGNS, reason))

    def take(
        self, signs: VitalSigns, patterns: Mapping[str, PackedPattern], layers: Mapping[str, KinkLayer]
    ) -> dict[str, Tensor | float | None]:
        """Classify the vital signs of a step, and return what is to be logged.

        Args:
            signs: the vital signs.
            patterns: the patterns at the same step, on the CPU.
            layers: the layers.
        """
        self._layers = len(patterns)
        self.missing = dict(signs.missing)
        dead = {
            name: layer.whole_channels(patterns[name].dead(layer.active_pieces)).double().mean(-1)
            for name, layer in layers.items()
            if layer.active_pieces is not None and layer.blocks and name in patterns
        }
        lead = next(iter(patterns.values())).lead
        self.findings = [
            pattern_findings(
                {name: _of(value, r) for name, value in dead.items()},
                {name: _of(value, r) for name, value in signs.dormant.items()},
                {name: (_of(value, r), min(signs.samples, signs.units[name])) for name, value in signs.rank.items()},
                None if signs.total_complexity is None else _of(signs.total_complexity, r),
                self._settings.radius,
            )
            for r in range(lead.numel() if lead else 1)
        ]
        return dict(signs.scalars())

    def take_freezes(self, found: list[Freeze] | str) -> None:
        """Take when patterns and weights settled, or why that is unknown."""
        if isinstance(found, str):
            self.missing["freeze_step"] = found
        else:
            self.freezes = found

    def freeze_scalars(self) -> dict[str, Tensor | float | None]:
        """What is logged of it."""
        if not self.freezes:
            return {}
        return {
            "pattern/freeze_step": torch.tensor([found.step for found in self.freezes]),
            "pattern/weights_freeze_step": torch.tensor([found.weights_step for found in self.freezes]),
        }

    def state(self) -> list[list[dict[str, Any]]]:
        """The findings as plain values."""
        return [[finding.plain() for finding in found] for found in self.findings]

    def load(self, state: list[list[dict[str, Any]]]) -> None:
        """Restore the findings."""
        self.findings = [[Finding.from_plain(finding) for finding in found] for found in state]

    def summary(self, *, replicated: bool) -> dict[str, Any]:
        """The results as plain values, lists over replicas; empty before the first snapshot."""
        if not self.findings:
            return {}
        unknown: list[tuple[int | None, int | None]] = [(None, None)] * len(self.findings)
        steps = [(found.step, found.weights_step) for found in self.freezes] or unknown
        values: dict[str, list[Any]] = {
            "freeze_step": [step for step, _ in steps],
            "weights_freeze_step": [step for _, step in steps],
            "findings": self.state(),
        }
        return values if replicated else {key: value[0] for key, value in values.items()}

    def facts(self) -> list[Fact]:
        """What was found; with replicas, of each one of them."""
        several = len(self.findings) > 1
        layers = "1 layer" if self._layers == 1 else f"{self._layers} layers"
        facts = []
        for r, findings in enumerate(self.findings):
            found = [Fact("freeze", str(self.freezes[r]))] if r < len(self.freezes) else []
            found += [Fact.of(finding) for finding in findings]
            if not findings:
                found.append(Fact("nothing_unusual", f"nothing out of the ordinary in {layers}"))
            facts += [replace(fact, text=f"(replica {r}) {fact.text}") if several else fact for fact in found]
        return facts

    def lines(self) -> list[str]:
        """What was found, and what could not be, as sentences."""
        unknown = [f"{name} is not known: {reason}" for name, reason in self.missing.items()]
        return [*(fact.text for fact in self.facts()), *unknown]


def _of(values: Tensor, replica: int) -> float:
    """The value of one replica."""
    return float(values if values.ndim == 0 else values.reshape(-1)[replica])
