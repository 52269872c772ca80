"""What the callbacks found in a training, and what they could not find: codes, sentences and numbers.

Programs compare codes, layers and values. Sentences are for people: those of findings are made here. This module
imports neither torch nor the rest of the package, so that tables and pages of saved results can use it quickly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FINDINGS = "findings.json"  # in the folder of a logger


class FindingCode(StrEnum):
    """What is out of the ordinary in a layer, or in the whole network.

    Attributes:
        DEAD_UNITS: channels that are inactive on all recorded samples; the value is their share of the layer.
        DORMANT_UNITS: units that are active, but hardly; the value is their share of the layer.
        FEW_DIRECTIONS: the activations have few independent directions; the value is their effective rank.
        LINEAR_AROUND_DATA: no unit changes its piece around the samples; the value is the radius.
        VANISHING_GRADIENT: of one layer beside the others; the value is the ratio to the layer with the largest.
        EXPLODING_GRADIENT: the gradient's norm; the value is the ratio to its median so far.
        NON_FINITE_GRADIENT: infinite or NaN; the value is the share of the measurements in which it was.
    """

    DEAD_UNITS = auto()
    DORMANT_UNITS = auto()
    FEW_DIRECTIONS = auto()
    LINEAR_AROUND_DATA = auto()
    VANISHING_GRADIENT = auto()
    EXPLODING_GRADIENT = auto()
    NON_FINITE_GRADIENT = auto()


_SENTENCES = {
    FindingCode.DEAD_UNITS: (
        "{percent} of {layer}'s units are dead: they get no gradient; lower the learning rate or re-initialise them"
    ),
    FindingCode.DORMANT_UNITS: (
        "{percent} of {layer}'s units are dormant: they hardly add to its output; a smaller layer may do as well, or "
        "lower the learning rate"
    ),
    FindingCode.FEW_DIRECTIONS: (
        "the activations of {layer} have an effective rank of {value:.1f}: nearly all samples look alike to it; check "
        "the scale of its weights and the learning rate"
    ),
    FindingCode.LINEAR_AROUND_DATA: (
        "no unit changes its piece within a relative distance of {value:g} of the samples: there the network is linear "
        "between its smooth functions"
    ),
    FindingCode.VANISHING_GRADIENT: (
        "the gradient of {layer}, relative to its weights, is {value:.0e} of that of the layer with the largest: it "
        "hardly learns; use normalisation, residual connections or another initialisation"
    ),
    FindingCode.EXPLODING_GRADIENT: (
        "the gradient of {layer} grew to {value:.0f} times its median: clip gradients or lower the learning rate"
    ),
    FindingCode.NON_FINITE_GRADIENT: (
        "the gradient of {layer} was infinite or NaN in {percent} of the measurements: lower the learning rate, and "
        "check the data and the loss"
    ),
}


@dataclass(frozen=True)
class Finding:
    """Something out of the ordinary.

    Attributes:
        code: what it is.
        layer: name of the layer; None: the whole network.
        value: the number that decided, in the meaning of the code.

    >>> str(Finding(FindingCode.DEAD_UNITS, "conv2", 0.41))
    "41 % of conv2's units are dead: they get no gradient; lower the learning rate or re-initialise them"
    """

    code: FindingCode
    layer: str | None
    value: float

    def __str__(self) -> str:
        """The finding in one sentence."""
        percent = f"{100 * self.value:.0f} %"
        return _SENTENCES[self.code].format(layer=self.layer or "the network", value=self.value, percent=percent)

    def plain(self) -> dict[str, Any]:
        """The finding as plain values, for JSON."""
        return {"code": str(self.code), "layer": self.layer, "value": self.value}

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> Finding:
        """The finding of plain values.

        >>> Finding.from_plain({"code": "dormant_units", "layer": None, "value": 0.5}).code
        <FindingCode.DORMANT_UNITS: 'dormant_units'>
        """
        return cls(FindingCode(found["code"]), found["layer"], found["value"])


@dataclass(frozen=True)
class Freeze:
    """When the patterns and the weights of a training settled, in optimiser steps; both are recorded steps.

    Attributes:
        step: first recorded step after which fewer than 1 % of all (sample, unit) pairs still change.
        weights_step: first recorded step after which the weights move less than 1 % of their path.
        last_step: the last recorded step.
    """

    step: int
    weights_step: int
    last_step: int

    @property
    def ratio(self) -> float | None:
        """``weights_step / step``; None if the patterns never changed."""
        return self.weights_step / self.step if self.step else None

    def __str__(self) -> str:
        """The result in one sentence.

        >>> str(Freeze(1200, 4680, 10_000))
        'patterns froze at step 1,200 of 10,000; the weights moved on for 3.9 times as long'
        >>> str(Freeze(10_000, 10_000, 10_000))
        'patterns still changed at the last recorded step, 10,000'
        """
        if self.step == self.last_step:
            return f"patterns still changed at the last recorded step, {self.last_step:,}"
        froze = f"patterns froze at step {self.step:,} of {self.last_step:,}"
        if self.ratio is None:
            return f"{froze}: hardly any ever changed; the weights moved until step {self.weights_step:,}"
        if self.ratio <= 1:
            return f"{froze}; the weights had settled by step {self.weights_step:,}"
        return f"{froze}; the weights moved on for {self.ratio:.1f} times as long"


class UnknownCode(StrEnum):
    """Why something is not known.

    Attributes:
        ERROR: the callback met an error, after which it does nothing more.
        NOT_MEASURED: this model, its data or the settings do not allow it.
        NOT_DUE: training reached no scheduled time.
    """

    ERROR = auto()
    NOT_MEASURED = auto()
    NOT_DUE = auto()


@dataclass(frozen=True)
class Fact:
    """Something that a callback found.

    Attributes:
        code: what it is: that of a :class:`FindingCode` or of a reason, or a name of its own such as ``"freeze"``.
        text: the same as a sentence, with its numbers.
        unusual: whether it is out of the ordinary.
        layer: name of the layer; None: the whole network.
        value: the number that decided; None: there is no single one.
        advice: what to do about it; None: nothing, or the sentence says it.
    """

    code: str
    text: str
    unusual: bool = False
    layer: str | None = None
    value: float | None = None
    advice: str | None = None

    @classmethod
    def of(cls, finding: Finding) -> Fact:
        """A finding as a fact."""
        return cls(str(finding.code), str(finding), unusual=True, layer=finding.layer, value=finding.value)


@dataclass(frozen=True)
class Unknown:
    """Something that a callback could not find.

    Attributes:
        what: what is not known.
        code: why.
        reason: the same in words.
        remedy: what may help; None: nothing is known to, or the reason says it.
    """

    what: str
    code: UnknownCode
    reason: str
    remedy: str | None = None


@dataclass(frozen=True)
class CallbackFindings:
    """What one callback found in a training, and what it could not find.

    Attributes:
        callback: name of its class.
        found: what it found.
        unknown: what it could not find.
        numbers: its summary, as plain values.

    >>> found = CallbackFindings("A", (Fact("freeze", "it froze"),), (Unknown("b", UnknownCode.ERROR, "a bug"),))
    >>> CallbackFindings.from_plain(found.plain()) == found
    True
    """

    callback: str
    found: tuple[Fact, ...] = ()
    unknown: tuple[Unknown, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "callback": self.callback,
            "found": [asdict(fact) for fact in self.found],
            "unknown": [asdict(unknown) | {"code": str(unknown.code)} for unknown in self.unknown],
            "numbers": dict(self.numbers),
        }

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> CallbackFindings:
        """The findings of plain values.

        Raises:
            KeyError, TypeError, ValueError: they are not such values.
        """
        return cls(
            str(found["callback"]),
            tuple(Fact(**fact) for fact in found["found"]),
            tuple(Unknown(**unknown | {"code": UnknownCode(unknown["code"])}) for unknown in found["unknown"]),
            dict(found["numbers"]),
        )
