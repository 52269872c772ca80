"""The figure of a sweep: the results of its jobs against the swept values."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lightning_mnn.figures.scales import (
    MAX_NAMED_VALUES,
    MIN_LOG_RATIO,
    REPETITION,
    Row,
    Scale,
    colors_of,
    distinct,
    draw_places,
    identity,
    label_of,
    name_places,
    number_in,
    numbers_of,
    scale_of,
)
from lightning_mnn.figures.style import ENDS, KINDS, literal, look_of, mark_zeros, save, tidy
from lightning_mnn.verdicts import class_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes


_MAX_BARS = 48
_MAX_FOREIGN_PANELS = 8  # panels of values that another program logged


@dataclass(frozen=True)
class Measure:
    """A measure of the table and its panel.

    Attributes:
        title: of the panel.
        unit: of its axis.
        value: the measure of a row.
        log: whether the axis is logarithmic; None: it is if the values span about a decade and a half or more.
        limits: of the axis; None: the range of the values.
        of_job: whether it belongs to the job, and is the same for all its replicas.
    """

    title: str
    unit: str
    value: Callable[[Row], float | None]
    log: bool | None = None
    limits: tuple[float, float] | None = None
    of_job: bool = False

    def known(self, rows: Sequence[Row]) -> list[tuple[Row, float]]:
        """The rows for which the measure is known, with its values; one row per job if it belongs to the job."""
        counted = [row for row in rows if not (self.of_job and row["replica"])]
        values = [(row, self.value(row)) for row in counted]
        return [(row, float(value)) for row, value in values if value is not None and math.isfinite(value)]


def _rank_share(row: Row) -> float | None:
    rank, total = row.get("rank"), row.get("num_samples")
    return None if rank is None or not total else rank / total


def _percent(row: Row, key: str = "mce") -> float | None:
    error = row.get(key)
    return None if error is None else 100 * error


_VOLUME = Measure("Angular volume of the region", "log-volume (nats)", lambda row: row.get("log_volume"), log=False)
MEASURES = (
    Measure("Final loss", "MSE", lambda row: row.get("mse"), log=True),
    Measure("Classification error", "MCE (%)", _percent, log=False),
    Measure("Test loss", "MSE on the test set", lambda row: row.get("test_mse")),
    Measure("Test error", "MCE on the test set (%)", lambda row: _percent(row, "test_mce"), log=False),
    Measure(
        "Distance to the nearest kink", "smallest |pre-activation|", lambda row: row.get("min_preactivation"), log=True
    ),
    Measure("Rank", "rank(A∘X) / N", _rank_share, log=False, limits=(0, 1.05)),
    _VOLUME,
    Measure(
        "Local learning coefficient",
        "λ of the certified minimum",
        lambda row: row.get("learning_coefficient"),
        log=False,
    ),
    Measure("Regions seen", "activation patterns", lambda row: row.get("regions_visited")),
    Measure("Length of training", "optimiser steps", lambda row: row.get("steps"), of_job=True),
    Measure("Time", "seconds of training", lambda row: row.get("seconds"), of_job=True),
)
_BOUND = replace(
    _VOLUME,
    unit="lower bound of the log-volume (nats)",
    value=lambda row: row.get("log_volume_lower_bound"),
)


def sweep_figure(folder: Path) -> Path | None:
    """Draw ``figure.png`` of a sweep from its ``sweep.parquet``: a panel for each measure, a dot for each network.

    The first swept key is the axis and the second one the colour; lines connect the medians. If more keys were swept,
    the two that explain most of the measures' variance are shown, and the title names the pooled ones. `seed` counts as
    a repetition, unless nothing else was swept. The classes of the networks are drawn as shares. Only
    finished jobs are drawn, and jobs of other programs whose status is unknown. For other programs, the first columns
    with numbers are drawn.

    Returns:
        The path of the figure; None if no finished job has a number to draw.
    """
    table = pq.read_table(folder / "sweep.parquet")
    jobs = table.to_pylist()
    rows = [row for row in jobs if row["status"] in ("finished", "unrecorded")]
    swept, logged = (json.loads(table.schema.metadata[key]) for key in (b"swept", b"logged"))
    measures = [measure for measure in _measures(rows) if measure.known(rows)]
    measures += [measure for measure in map(_logged, logged) if measure.known(rows)][:_MAX_FOREIGN_PANELS]
    if not measures:
        return None
    x_key, color_key = choose_axes(rows, swept, measures)
    x, color = scale_of(rows, x_key), scale_of(rows, color_key)
    classified = any(row.get("kind") is not None for row in rows)
    panels = len(measures) + classified
    columns = min(3, panels)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(max(5.2 * columns, 8), 1.6 + 3.9 * lines), dpi=110, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)  # type: ignore[union-attr, call-arg]
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    if classified:
        _draw_ends(axes[0], rows, x, color)
    for ax, measure in zip(axes[classified:], measures, strict=False):
        _draw_measure(ax, rows, measure, x, color)
    for ax in axes[panels:]:
        ax.remove()
    _legend(figure, rows, color, classified=classified)
    figure.suptitle(literal(_title(rows, len({row["folder"] for row in jobs}), swept, x, color)), fontsize=12)
    return save(figure, folder / "figure.png")


def choose_axes(rows: Sequence[Row], swept: Sequence[str], measures: Sequence[Measure]) -> tuple[str, str]:
    """The keys of the axis and of the colour; an empty string if there is none.

    >>> mse = MEASURES[:1]
    >>> rows = [{"seed": s, "a": a, "b": b, "mse": 10.0**b} for s in (1, 2) for a in (1, 2) for b in (1, 2, 3)]
    >>> choose_axes(rows, ["seed"], mse), choose_axes(rows, ["a", "seed"], mse), choose_axes(rows, ["a", "b"], mse)
    (('seed', ''), ('a', ''), ('b', 'a'))
    """
    keys = [key for key in swept if key != REPETITION and _count(rows, key) > 1]
    if not keys:
        return (REPETITION if REPETITION in swept else ""), ""
    if len(keys) > 2:
        known = [measure.known(rows) for measure in measures]
        shares = {
            key: sum(_explained([(identity(row[key]), v) for row, v in pairs]) for pairs in known) for key in keys
        }
        keys.sort(key=lambda key: -shares[key])
    first, second, *_ = [*keys, ""]
    if second and _axis_fitness(rows, second) > _axis_fitness(rows, first):
        first, second = second, first
    return first, second


def _axis_fitness(rows: Sequence[Row], key: str) -> tuple[bool, int]:
    """How suitable a key is for the axis: numbers before names, many values before few."""
    return numbers_of(rows, key) is not None, _count(rows, key)


def _count(rows: Sequence[Row], key: str) -> int:
    return len(distinct(rows, key))


def _explained(pairs: Sequence[tuple[str, float]]) -> float:
    """The share of the variance of the values' ranks that lies between the groups of equal labels."""
    rank_of = {value: float(rank) for rank, value in enumerate(sorted({value for _, value in pairs}))}
    ranks = np.array([rank_of[value] for _, value in pairs])
    if len(rank_of) < 2:
        return 0.0
    labels = np.array([label for label, _ in pairs])
    groups = [ranks[labels == label] for label in np.unique(labels)]
    return float(sum(len(group) * (group.mean() - ranks.mean()) ** 2 for group in groups) / (len(ranks) * ranks.var()))


def _logged(name: str) -> Measure:
    """The measure that another program logged or returned under a name."""
    unit = "seconds of the job" if name == "seconds" else "at the end"
    return Measure(name, unit, lambda row: number_in(row.get(name)), of_job=True)


def _measures(rows: Sequence[Row]) -> list[Measure]:
    """The measures of this program's jobs, if there are any; the bound of the volume if no volume was measured."""
    if not any("hidden_dims" in row and row["hidden_dims"] for row in rows):
        return []
    measured = any(row.get("log_volume") is not None for row in rows)
    return [_BOUND if measure is _VOLUME and not measured else measure for measure in MEASURES]


def _draw_measure(ax: Axes, rows: Sequence[Row], measure: Measure, x: Scale, color: Scale) -> None:
    """Draw a dot for each network, and a line or bars at the medians of each colour."""
    known = measure.known(rows)
    foot = _set_heights(ax, measure, [value for _, value in known])
    side_by_side = draw_places(ax, x)
    size = 5 if len(known) <= 200 else 3
    colors = len(color.values)
    for number, hue in enumerate(colors_of(color)):
        groups: dict[int, list[float]] = {}
        for row, value in known:
            if color.index(row) == number:
                groups.setdefault(x.index(row), []).append(max(value, foot))
        shift = _color_shift(number, colors) if side_by_side else 0.0
        for index, heights in sorted(groups.items()):
            middle, half = x.places[index] + shift, 0.36 * _share(colors)
            spread = half if side_by_side and len(heights) > 1 else 0.0
            ax.plot(
                np.linspace(middle - spread, middle + spread, len(heights)), heights,
                "o", color=hue, ms=size, alpha=0.55, mew=0, zorder=3,
            )  # fmt: skip
            if spread and x.key != REPETITION:
                ax.hlines(float(np.median(heights)), middle - half, middle + half, color=hue, lw=2.2, zorder=4)
        if groups and not side_by_side:  # lower lines are wider, so that overlapping lines are all visible
            medians = [(x.places[index], float(np.median(heights))) for index, heights in sorted(groups.items())]
            width = 1.8 + (1.2 * (colors - 1 - number) if colors <= 3 else 0)
            ax.plot(*zip(*medians, strict=True), color=hue, lw=width, alpha=0.85, zorder=4)
    if x.key == REPETITION:
        ax.axhline(float(np.median([max(value, foot) for _, value in known])), color="0.3", lw=1.2, ls="--", zorder=2)
    ax.set_title(literal(measure.title), fontsize=11)
    ax.set_ylabel(measure.unit)
    ax.set_xlabel(x.key)
    tidy(ax)


@dataclass(frozen=True)
class _Part:
    """A part of the bars that show what the networks ended in: its name, and the look of its bars."""

    name: str
    look: Mapping[str, Any]


def _parts(rows: Sequence[Row]) -> tuple[str, list[_Part], list[_Part]]:
    """What the bars show: the title, the parts of a bar from below, and the part of each row.

    They are the classes of certificates, those ahead hatched; or the kinds, where only weaker evidence exists.
    """
    if any(row.get("evidence") in (None, "certificate") for row in rows if row["kind"] is not None):
        classes = {
            end: _Part(look_of(end).name, {"color": look_of(end).color} | ({"hatch": "///"} if end.ahead else {}))
            for end in ENDS
        }
        return "What training ended in", list(classes.values()), [classes[class_of(row)] for row in rows]
    kinds = {kind: _Part(name, {"color": hue}) for kind, (name, hue, _) in KINDS.items()}
    return "Kinds", list(kinds.values()), [kinds[row["kind"]] for row in rows]


def _draw_ends(ax: Axes, rows: Sequence[Row], x: Scale, color: Scale) -> None:
    """Draw shares of classes: a stacked bar for each axis value and colour; if too many, for each axis value."""
    crowded = len(x.values) * len(color.values) > _MAX_BARS
    title, parts, known = _parts(rows)
    title += f", pooled over {color.key}" if crowded and color.key else ""
    color = scale_of(rows, "") if crowded else color
    hues, share = colors_of(color), _share(len(color.values))
    places = [(x.index(row), color.index(row)) for row in rows]
    for index in range(len(x.values)):
        for number in range(len(color.values)):
            same = [part for part, place in zip(known, places, strict=True) if place == (index, number)]
            place, below = index + _color_shift(number, len(color.values)), 0.0
            for part in parts:
                height = 100 * same.count(part) / len(same) if same else 0.0
                ax.bar(place, height, 0.92 * share, below, alpha=0.85, edgecolor="white", lw=0, **part.look)
                below += height
            if color.key:  # marks the colour of the bar
                ax.bar(place, 3.5, 0.92 * share, -5, color=hues[number])
    name_places(ax, list(map(float, range(len(x.values)))), x.names)
    ax.set_xlim(-0.6, len(x.values) - 0.4)
    ax.set(xlabel=x.key, ylim=(-6 if color.key else 0, 100))
    ax.yaxis.set_major_locator(MaxNLocator(steps=[2, 5, 10]))
    ax.set_title(title, fontsize=11)
    ax.set_ylabel("share of networks (%)")
    tidy(ax)


def _set_heights(ax: Axes, measure: Measure, values: Sequence[float]) -> float:
    """Choose the scale of a panel's vertical axis; exact zeros are drawn at the foot of a logarithmic one.

    Returns:
        The height at which zeros are drawn; minus infinity if they need no special height.
    """
    positive = [value for value in values if value > 0]
    wide_range = bool(positive) and max(positive) / min(positive) >= MIN_LOG_RATIO
    if not positive or not (wide_range if measure.log is None else measure.log):
        low, high = min(values), max(values)
        room = 0.1 * (high - low) or 0.5 * abs(high) or 1.0
        ax.set_ylim(measure.limits or ((low - room, high + room) if high or low else (-0.05, 1)))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=all(value == int(value) for value in values)))
        return -math.inf
    low, high = math.log10(min(positive)), math.log10(max(positive))
    foot, room = 10.0 ** (math.floor(low) - 2), max(0.1 * (high - low), 0.3)
    some_zero = len(positive) < len(values)
    ax.set(yscale="log", ylim=(foot / 3 if some_zero else 10 ** (low - room), 10 ** (high + room)))
    ax.yaxis.set_major_locator(LogLocator(numticks=8))
    if high - low + 2 * room > 1.5:  # labels at powers of ten are enough
        ax.yaxis.set_minor_formatter(NullFormatter())
    if not some_zero:
        return -math.inf
    mark_zeros(ax, foot)
    return foot


def _share(count: int) -> float:
    """The width of each of several items beside each other at one place."""
    return 0.8 / count


def _color_shift(number: int, count: int) -> float:
    """The horizontal shift of a colour, given its index and the number of colours."""
    return (number - (count - 1) / 2) * _share(count)


def _legend(figure: Figure, rows: Sequence[Row], color: Scale, *, classified: bool) -> None:
    """Draw legends for the colours of the values and of the kinds, below the panels."""
    ax = figure.axes[0]
    look: dict[str, Any] = {"frameon": False, "fontsize": 10}
    if classified:
        _, parts, known = _parts(rows)
        present = [part for part in parts if part in known]
        bars = [ax.bar(0, 0, label=part.name, alpha=0.85, edgecolor="white", lw=0, **part.look) for part in present]
        figure.legend(handles=bars, loc="outside lower right", ncols=min(len(bars), 4), **look)
    if color.key:
        hues = colors_of(color)
        last = len(hues) - 1
        chosen = range(len(hues)) if last < MAX_NAMED_VALUES else sorted({round(last * k / 4) for k in range(5)})
        handles = [ax.plot([], [], "o-", color=hues[k], label=literal(color.names[k]))[0] for k in chosen]
        title = color.key if last < MAX_NAMED_VALUES else f"{color.key} ({last + 1} values)"
        figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), 6), title=title, **look)


def _title(rows: Sequence[Row], jobs: int, swept: Sequence[str], x: Scale, color: Scale) -> str:
    """The title: the number of networks, the values that they have in common, and what is pooled."""
    finished = len({row["folder"] for row in rows})
    recorded = "" if any(row["status"] == "unrecorded" for row in rows) else "finished "
    counted = (
        f"{finished:,} {recorded}job{'s' * (finished > 1)}" if finished == jobs else f"{finished:,} of {jobs:,} jobs"
    )
    networks = "" if len(rows) == finished else f", {len(rows):,} networks"
    against = " and ".join(key for key in (x.key, color.key) if key)
    pooled = [
        f"{key} ({count} values)" for key in swept if key not in (x.key, color.key) and (count := _count(rows, key)) > 1
    ] + ["the networks of each job"] * (len(rows) > finished)
    if x.key == REPETITION:
        marks = "dots: networks; broken line: median of all"
    elif len(rows) == 1:
        marks = ""
    else:
        marks = "dots: networks; lines: medians" + (f", pooled over {' and '.join(pooled)}" if pooled else "")
    common = [
        f"{name} = {label_of(rows[0][key])}"
        for name, key in _COMMON.items()
        if key in rows[0] and _count(rows, key) == 1
    ]
    lines = (f"{counted}{networks}" + (f" against {against}" if against else ""), ", ".join(common), marks)
    return "\n".join(line for line in lines if line)


# Values that the title contains if they are the same for all networks.
_COMMON = {"N": "num_samples", "d0": "input_dim", "hidden units": "hidden_dims", "ρ": "negative_slope"}
