"""``report.html`` of a run of any program: what the callbacks found, what they could not, pictures, and numbers."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml

from lightning_mnn.figures.model_panels import panels_of
from lightning_mnn.figures.report_page.render import filled, pairs, part
from lightning_mnn.figures.tables import read_events, read_metrics
from lightning_mnn.findings import FINDINGS, CallbackFindings, FindingCode
from lightning_mnn.utilities.files import DamagedFileError, read_json, relative, write_bytes
from lightning_mnn.verdicts import MINIMA

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lightning_mnn.findings import Fact, Unknown

    Series = Mapping[str, tuple[list[int], list[float]]]

PAGE = "report.html"

_DETECTOR = "LocalMinimumDetector"
_CALLBACKS = {  # what is unknown without one of them
    _DETECTOR: "whether training is at a minimum",
    "ActivationPatternRecorder": "which layers have dead units, and when patterns froze",
    "GradientStatistics": "whether gradients vanish or explode",
    "AngularVolumeMonitor": "how far the weights can move before patterns change",
}
_MAX_ALIKE = 3  # facts with the same code that are all shown; of more, only the worst
_WORSE_IF_SMALL = (FindingCode.FEW_DIRECTIONS, FindingCode.VANISHING_GRADIENT)
_SLICES = ("slice.png", "line.png")
_KEPT_TEXT = 300  # characters of a reason that are shown at once


@dataclass(frozen=True)
class Run:
    """A run of any program, as its folder has it.

    Attributes:
        folder: of its log.
        about: facts on the fit, from ``findings.json``.
        findings: of each callback.
        series: steps and values of what was logged.
        settings: hyperparameters.
        notes: what is missing in the folder.
    """

    folder: Path
    about: Mapping[str, Any]
    findings: Sequence[CallbackFindings]
    series: Series
    settings: Mapping[str, Any]
    notes: Sequence[str]


def has_model_run(folder: Path) -> bool:
    """Whether a folder has what the page needs: ``findings.json``, or a log of Lightning's ``CSVLogger``."""
    return any((folder / name).exists() for name in (FINDINGS, "metrics.csv"))


def read_model_run(folder: Path) -> Run:
    """Read a run of any program from its log folder; what is damaged or missing is in its notes."""
    notes: list[str] = []
    about, findings = _read_findings(folder, notes)
    return Run(folder, about, findings, _read_series(folder, notes), _read_settings(folder), notes)


def write_model_page(run: Run) -> Path:
    """Write ``report.html`` into the folder of a run, atomically.

    Returns:
        The path.
    """
    parts = {
        "title": escape(f"Run {relative(run.folder)}"),
        "style": part("report.css") + part("model.css"),
        "facts": pairs(_about(run)),
        "notes": "".join(f'<p class="error">{escape(note)}</p>' for note in run.notes),
        "found": _found(run),
        "unknown": _unknown(run),
        "pictures": _pictures(run),
        "numbers": _numbers(run),
    }
    path = run.folder / PAGE
    write_bytes(path, filled("model.html", parts).encode())
    return path


def _read_findings(folder: Path, notes: list[str]) -> tuple[dict[str, Any], list[CallbackFindings]]:
    path = folder / FINDINGS
    if not path.exists():
        notes.append(
            f"There is no {FINDINGS} here: the callbacks of lightning_mnn write it when training ends. Add them to the "
            "Trainer, as callbacks=[ActivationPatternRecorder(), GradientStatistics(), LocalMinimumDetector()]"
        )
        return {}, []
    try:
        about = read_json(path, ("callbacks",), "train again")
        return about, [CallbackFindings.from_plain(found) for found in about.pop("callbacks")]
    except DamagedFileError as error:
        notes.append(str(error))
    except (KeyError, TypeError, ValueError) as error:
        notes.append(f"{relative(path)} is of another version: {type(error).__name__}: {error}")
    return {}, []


def _read_series(folder: Path, notes: list[str]) -> Series:
    table = folder / "metrics.csv"
    try:
        if table.exists():
            return read_metrics(table)
        if any(folder.glob("events.out.tfevents.*")):
            return read_events(folder)
    except DamagedFileError as error:
        notes.append(str(error))
        return {}
    except ModuleNotFoundError:
        notes.append("There are no curves: this log of TensorBoard needs the package tensorboard to read it")
        return {}
    notes.append("There are no curves: this folder has no metrics.csv. Give the Trainer a CSVLogger")
    return {}


def _read_settings(folder: Path) -> dict[str, Any]:
    """Hyperparameters that Lightning saved; none if they are not plain values."""
    try:
        found = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _about(run: Run) -> list[tuple[str, str]]:
    names = ("module", "epochs", "steps", "seconds", "ended_by")
    known = [(name.replace("_", " "), run.about.get(name)) for name in names]
    now = datetime.now().astimezone()
    return [
        *((name, _text(value)) for name, value in known if value is not None),
        ("callbacks", ", ".join(found.callback for found in run.findings)),
        ("written", f"{now:%Y-%m-%d %H:%M:%S %Z} by lightning-mnn {version('lightning_mnn')}"),
    ]


# ---------- what was found, and what was not ----------


def _found(run: Run) -> str:
    """The verdict, then what is out of the ordinary, then the rest."""
    verdicts = [_verdict(found) for found in run.findings if found.callback == _DETECTOR]
    facts = [(found.callback, fact) for found in run.findings for fact in found.found]
    facts.sort(key=lambda one: (not one[1].unusual, one[0] != _DETECTOR))
    items = "".join(f"<li>{item}</li>" for item in _items(facts))
    if not items:
        return "<p>Nothing: no callback found anything.</p>"
    return "".join(verdicts) + f'<ul class="facts">{items}</ul>'


def _verdict(found: CallbackFindings) -> str:
    kinds = found.numbers.get("kind")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    names = {kind: kinds.count(kind) for kind in kinds if kind is not None}
    if not names:
        return ""
    words = [f"{count} × {kind}" if len(kinds) > 1 else str(kind) for kind, count in names.items()]
    look = "verdict minimum" if all(kind in MINIMA for kind in kinds) else "verdict"
    evidence = str(found.numbers.get("evidence", "")).replace("_", "-")
    text = f"Training ended: {', '.join(words).replace('_', ' ')}"
    return f'<p class="{look}">{escape(text)} <span class="note">({escape(evidence)} evidence)</span></p>'


def _items(facts: Sequence[tuple[str, Fact]]) -> Iterator[str]:
    """The facts; of many with the same code the worst one, and the rest folded."""
    groups: dict[tuple[str, str], list[Fact]] = {}
    for callback, fact in facts:
        groups.setdefault((callback, fact.code), []).append(fact)
    for (callback, _), alike in groups.items():
        if len(alike) <= _MAX_ALIKE:
            yield from (_fact(callback, fact) for fact in alike)
            continue
        worst, *others = sorted(alike, key=_severity, reverse=True)
        rest = "".join(f"<p>{escape(fact.text)}</p>" for fact in others)
        yield _fact(callback, worst, f"<details><summary>and {len(others)} more like this</summary>{rest}</details>")


def _severity(fact: Fact) -> float:
    value = 0.0 if fact.value is None else fact.value
    return -value if fact.code in _WORSE_IF_SMALL else value


def _fact(callback: str, fact: Fact, more: str = "") -> str:
    advice = f'<p class="advice">{escape(fact.advice)}</p>' if fact.advice else ""
    look = ' class="unusual"' if fact.unusual else ""
    return f'<div class="of">{escape(callback)}</div><div{look}>{_folded(fact.text)}{advice}{more}</div>'


def _unknown(run: Run) -> str:
    unknown = [(found.callback, one) for found in run.findings for one in found.unknown]
    items = [_unknown_item(callback, one) for callback, one in unknown]
    present = {found.callback for found in run.findings}
    for callback, what in _CALLBACKS.items() if run.findings else ():
        if callback not in present:
            text = f"{what}: {callback} was not in the Trainer"
            items.append(f'<div class="of">{escape(callback)}</div><div>{escape(text)}</div>')
    if not items:
        return "<p>Nothing: the callbacks found all that they look for.</p>" if run.findings else "<p>See above.</p>"
    return f'<ul class="facts">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _unknown_item(callback: str, unknown: Unknown) -> str:
    remedy = f'<p class="advice">{escape(unknown.remedy)}</p>' if unknown.remedy else ""
    text = f"<b>{escape(unknown.what)}</b>: {_folded(unknown.reason)}"
    return f'<div class="of">{escape(callback)}</div><div>{text}{remedy}</div>'


def _folded(text: str) -> str:
    """A text; of a long one, the rest of its clauses is folded.

    >>> _folded("short <")
    'short &lt;'
    """
    if len(text) <= _KEPT_TEXT:
        return escape(text)
    cut = text.rfind("; ", 0, _KEPT_TEXT)
    cut = cut if cut > 0 else text.rfind(" ", 0, _KEPT_TEXT)
    cut = cut if cut > 0 else _KEPT_TEXT
    rest = escape(text[cut:].lstrip("; "))
    return f"{escape(text[:cut])}<details><summary>more</summary><p>{rest}</p></details>"


# ---------- pictures and numbers ----------


def _pictures(run: Run) -> str:
    pictures = [*panels_of(run.series)]
    pictures += [(name, path.read_bytes()) for name in _SLICES if (path := run.folder / name).exists()]
    if not pictures:
        return "<p>Nothing was logged that can be drawn.</p>"
    figures = [
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for title, png in pictures
    ]
    return f'<div class="grid">{"".join(figures)}</div>'


def _numbers(run: Run) -> str:
    rows = []
    for name, (steps, values) in sorted(run.series.items()):
        finite = [value for value in values if math.isfinite(value)]
        ends = (min(finite), max(finite)) if finite else (None, None)
        rows.append([name, *map(_text, (values[-1], *ends, len(values), steps[-1]))])
    tables = [_table("Logged", ("name", "last", "smallest", "largest", "values", "last step"), rows)] if rows else []
    for found in run.findings:
        plain = [[name, _text(value)] for name, value in found.numbers.items() if _is_plain(value)]
        if plain:
            tables.append(_table(found.callback, ("summary", "value"), plain))
    if run.settings:
        settings = [[str(name), _text(value)] for name, value in run.settings.items()]
        tables.append(_table("Hyperparameters", ("name", "value"), settings))
    return "".join(tables) or "<p>There are none.</p>"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    look = ' class="n"' if len(heads) > 2 else ' class="text"'  # of all columns but the first
    head = "".join(f'<th scope="col"{look if k else ""}>{escape(name)}</th>' for k, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{look if k else ''}>{escape(text)}</td>" for k, text in enumerate(row)) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    label = escape(title)
    return f'<h3>{label}</h3><div class="wide" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _is_plain(value: Any) -> bool:
    """Whether a value can stand in a table: no nested values, and no empty list."""
    if isinstance(value, list):
        return bool(value) and not any(isinstance(item, list | dict) for item in value)
    return not isinstance(value, dict)


def _text(value: Any) -> str:
    """A value in a table.

    >>> _text(None), _text(0.123456), _text(12345), _text([1.0, None]), _text("a_b")
    ('–', '0.1235', '12,345', '1, –', 'a_b')
    """
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
