"""The figure of a census: measured volumes compared with the bounds of the theorems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from lightning_mnn.figures.style import save
from lightning_mnn.figures.tables import Row, read_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes


_FONT_SIZE = 10

_LIMIT_SHIFT = 0.013  # between upper limits at one size, as a fraction of the axis, so that they do not overlap

_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]  # makes text legible where a line crosses it

_MIN_SIZES_FOR_RATE = 4  # with fewer sizes, no decay rate is written


@dataclass(frozen=True)
class Curve:
    """A proportion of the table, and how it is drawn.

    Attributes:
        column: prefix of the names of its columns.
        color: of the palette of Okabe and Ito, which colour-blind readers can distinguish.
        marker: of its points.
        dodge: number of steps by which its upper limits are shifted.
    """

    column: str
    color: str
    marker: str
    dodge: int = 0


RANK = Curve("rank_deficient", "#7f7f7f", "s", dodge=1)

GLOBAL = Curve("global_minimum", "#0072b2", "o")

LENIENT = Curve("suboptimal_minimum", "#e69f00", "^", dodge=-1)  # at the smallest ε

STRICT = Curve("suboptimal_minimum", "#d55e00", "v")  # at the largest ε


def census_figure(run_dir: Path) -> Path:
    """Draw ``figure.png`` of a census from its ``census.csv`` and ``splitting.csv``.

    There is a column for each slope. Top: proportions of the scan `width` against d0·d1/N, with 95 % intervals, and
    arrows down from the upper limit if there were no hits. Bottom: volumes of the scan `samples` against N, with the
    estimates of multilevel splitting on single data sets. Broken lines are the upper bounds of Theorem 6. The lower
    bound of Theorem 9 is far below the axis, so it is written as text.

    Returns:
        The path of the figure.
    """
    rows, rare = read_table(run_dir / "census.csv"), read_table(run_dir / "splitting.csv")
    slopes = sorted({row["negative_slope"] for row in rows})
    figure = Figure(figsize=(1 + 5.2 * len(slopes), 9.6), dpi=120, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, hspace=0.04)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(2, len(slopes), squeeze=False, sharex="row", sharey="row")
    for column, slope in enumerate(slopes):
        same = [row for row in rows if row["negative_slope"] == slope]
        name = "ReLU" if slope == 0 else "leaky ReLU"
        axes[0, column].set_title(f"{name}, ρ = {slope:g}", fontsize=13, fontweight="bold", pad=22)
        _draw_widths(axes[0, column], [row for row in same if row["scan"] == "width"])
        _draw_samples(
            axes[1, column],
            [row for row in same if row["scan"] == "samples"],
            [row for row in rare if row["negative_slope"] == slope],
        )
    for ax in axes[:, 0]:
        ax.set_ylabel("share of random weights W: angular volume V", fontsize=11)
    return save(figure, run_dir / "figure.png")


def _draw_widths(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw the proportions against d0·d1/N, and mark their transitions."""
    if not rows:
        return
    x, epsilons = "parameters_per_sample", sorted({row["epsilon"] for row in rows})
    lenient, strict = ([row for row in rows if row["epsilon"] == end] for end in (epsilons[0], epsilons[-1]))
    first, last = strict[0], strict[-1]
    lowest = min(row["suboptimal_minimum_high"] for row in strict)
    ax.set(xscale="log", yscale="log", xlim=(first[x] / 1.2, last[x] * 1.2), ylim=(min(lowest / 15, 0.01), 3))
    _draw_any(ax, strict, x)
    for table, curve in ((strict, RANK), (strict, GLOBAL), (lenient, LENIENT), (strict, STRICT)):
        _draw_curve(ax, table, x, curve)
    _draw_theorem_6(ax, strict, x)
    _write(ax, "Theorem 6", STRICT.color, (first[x], math.exp(first["log_theorem_6_suboptimal"])), (0, -4))
    _mark(ax, 1.0, "d0·d1 = N")
    _mark(ax, _half(strict, x), "V(G) = ½")

    _write(ax, "rank(A∘X) < N", RANK.color, (first[x], 1), (0, 7))
    _write(ax, "V(G): a global minimum", GLOBAL.color, (last[x], 1), (0, 7), ha="right")
    _write_with_line(ax, "any differentiable minimum", "black", _peak(strict, x, "any_minimum", below=0.5), 0.64)
    if epsilons[0] < epsilons[-1]:
        _write_with_line(ax, f"V(L$_ε$), ε = {epsilons[0]:g}", LENIENT.color, _peak(lenient, x, LENIENT.column), 0.57)
    _write_with_line(ax, f"V(L$_ε$), ε = {epsilons[-1]:g}", STRICT.color, _peak(strict, x, STRICT.column), 0.49)
    _write(ax, "↓ none met: upper limits", "0.3", (0.02, 0.085), coordinates="axes fraction")
    _write_theorem_9(ax, strict[-1:], "from d0·d1 = 2 N on, ")
    ax.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(-3, 8)]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    _tidy(ax, f"weights per sample, d0·d1/N   (N = {first['num_samples']:g}, d0 = {first['input_dim']:g})")


def _draw_samples(ax: Axes, rows: Sequence[Row], rare: Sequence[Row]) -> None:
    """Draw the volumes against N, including small ones that only splitting can estimate."""
    if not rows:
        return
    x, epsilon = "num_samples", max(row["epsilon"] for row in (rare or rows))
    table = [row for row in rows if row["epsilon"] == epsilon]
    if not table:
        return
    ax.set(yscale="log")
    _draw_curve(ax, table, x, GLOBAL)
    _draw_curve(ax, table, x, STRICT)
    _draw_theorem_6(ax, table, x)
    for row in rare:
        _draw_estimate(ax, row)
    known = [row for row in rare if row["log_suboptimal_minimum"] is not None]
    lowest = min([row["log_suboptimal_minimum"] for row in known], default=math.log(1e-4))
    ax.set_ylim(min(math.exp(lowest) * 1e-3, ax.get_ylim()[0]), 100)  # shared by all panels of the row
    first, last = table[0], table[-1]
    named = table[-2:][0]
    _write(ax, "V(G)", GLOBAL.color, (last[x], 1), (0, 6), ha="right")
    _write(ax, "Theorem 6", STRICT.color, (named[x], math.exp(named["log_theorem_6_suboptimal"])), (8, 0))
    note = f"V(L$_ε$), ε = {epsilon:g}\n▼ independent draws\n◇ splitting, single data sets"
    if len({row[x] for row in known}) >= _MIN_SIZES_FOR_RATE:
        rate = np.polyfit([row[x] for row in known], [row["log_suboptimal_minimum"] for row in known], 1)[0]
        note += f"\nabout e$^{{{rate:.2f} N}}$"
    right = bool(known) and 2 * max(row[x] for row in known) < first[x] + last[x]  # the side without data
    place, side = (0.97, "right") if right else (0.03, "left")
    _write(ax, note, STRICT.color, (place, 0.12), ha=side, coordinates="axes fraction")
    _write_theorem_9(ax, [row for row in table if row["log_theorem_9_global"] is not None])
    _tidy(ax, f"samples N   (d0 = d1, d0·d1 ≈ {table[0]['parameters_per_sample']:.0f} N)")
    ax.yaxis.set_major_locator(LogLocator(numticks=8))


def _draw_any(ax: Axes, rows: Sequence[Row], x: str) -> None:
    """Draw the shares of regions with any minimum as rings, which surround the points of other curves."""
    hit = [row for row in rows if row["any_minimum_hits"]]
    shares = [_share(row, "any_minimum") for row in hit]
    ax.plot([row[x] for row in hit], shares, "o", ms=10, mfc="none", mec="black", mew=0.9)


def _draw_curve(ax: Axes, rows: Sequence[Row], x: str, curve: Curve) -> None:
    """Draw shares of hits with their intervals, and upper limits if there were no hits."""
    look = _look(curve)
    values = [_share(row, curve.column) or math.nan for row in rows]  # NaN interrupts the line if there were no hits
    below = [value - row[f"{curve.column}_low"] for value, row in zip(values, rows, strict=True)]
    above = [row[f"{curve.column}_high"] - value for value, row in zip(values, rows, strict=True)]
    places = [row[x] for row in rows]
    ax.errorbar(places, values, np.abs([below, above]), lw=1.4, marker=curve.marker, **look)
    missed = [row for row in rows if not row[f"{curve.column}_hits"]]
    limits = np.array([row[f"{curve.column}_high"] for row in missed])
    ax.errorbar(
        _shifted(ax, [row[x] for row in missed], curve.dodge), limits, limits / 2, uplims=True, ls="none", **look
    )


def _look(curve: Curve) -> dict[str, Any]:
    return {"color": curve.color, "elinewidth": 1, "ms": 5.5, "zorder": 3}


def _shifted(ax: Axes, places: Sequence[float], steps: int) -> list[float]:
    """Places shifted right by a few steps on a logarithmic axis; unchanged on a linear one."""
    if ax.get_xscale() != "log":
        return list(places)
    low, high = ax.get_xlim()
    return [place * (high / low) ** (_LIMIT_SHIFT * steps) for place in places]


def _draw_estimate(ax: Axes, row: Row) -> None:
    """Draw the estimate of splitting on one data set, or its upper limit."""
    name, look = "log_suboptimal_minimum", _look(STRICT)
    high = math.exp(row[f"{name}_high"])
    if row[name] is None:
        ax.errorbar(row["num_samples"], high, high / 2, uplims=True, **look)
        return
    value = math.exp(row[name])
    low = 0.0 if row[f"{name}_low"] is None else math.exp(row[f"{name}_low"])
    ends = [[value - low], [high - value]]
    ax.errorbar(row["num_samples"], value, ends, marker="D", mfc="white", **look)


def _draw_theorem_6(ax: Axes, rows: Sequence[Row], x: str) -> None:
    """Draw the upper bound of Theorem 6 on the mean of V(L_ε) over the data."""
    bounds = [math.exp(row["log_theorem_6_suboptimal"]) for row in rows]
    ax.plot([row[x] for row in rows], bounds, "--", color=STRICT.color, lw=1.2)


def _write_theorem_9(ax: Axes, rows: Sequence[Row], where: str = "") -> None:
    """Write the lower bound of Theorem 9, which is below every axis, in the lower right corner."""
    powers = [round(row["log_theorem_9_global"] / math.log(10)) for row in rows if row["log_theorem_9_global"]]
    if powers:
        span = " … ".join(f"10$^{{{power}}}$" for power in dict.fromkeys((powers[0], powers[-1])))
        text = f"Theorem 9: {where}V(G) ≥ {span} ↓"
        _write(ax, text, GLOBAL.color, (0.98, 0.02), ha="right", coordinates="axes fraction")


def _write(
    ax: Axes,
    text: str,
    color: str,
    place: tuple[float, float],
    offset: tuple[float, float] = (0, 0),
    *,
    ha: str = "left",
    coordinates: str = "data",
) -> None:
    """Write text at a place, shifted by an offset in typographic points."""
    look: dict[str, Any] = {"color": color, "fontsize": _FONT_SIZE, "zorder": 5, "path_effects": _HALO}
    look |= {"ha": ha, "va": "bottom" if offset[1] >= 0 else "top"}
    ax.annotate(text, place, offset, xycoords=coordinates, textcoords="offset points", **look)


def _write_with_line(ax: Axes, text: str, color: str, point: tuple[float, float] | None, height: float) -> None:
    """Write text at the left, at a height in axes coordinates, with a thin line to a point of the data."""
    if point is not None:
        line: dict[str, Any] = {
            "arrowstyle": "-",
            "color": color,
            "lw": 0.7,
            "shrinkA": 1,
            "shrinkB": 5,
            "relpos": (1, 0.5),
        }
        ax.annotate(
            text, point, (0.03, height), textcoords="axes fraction", color=color, fontsize=_FONT_SIZE, arrowprops=line
        )


def _peak(rows: Sequence[Row], x: str, column: str, below: float = 1.0) -> tuple[float, float] | None:
    """The point with the largest share below a limit; None if there is none."""
    points = [(row[x], _share(row, column)) for row in rows if 0 < _share(row, column) < below]
    return max(points, key=lambda point: point[1], default=None)


def _mark(ax: Axes, place: float | None, text: str) -> None:
    """Mark a transition by a thin line through the panel, with its name above."""
    if place is not None:
        ax.axvline(place, color="0.6", lw=0.8, ls=(0, (1, 2)), zorder=1)
        coordinates = ax.get_xaxis_transform()
        ax.text(place, 1.01, text, transform=coordinates, ha="center", va="bottom", fontsize=_FONT_SIZE, color="0.3")


def _half(rows: Sequence[Row], x: str) -> float | None:
    """The place where V(G) first reaches ½, interpolated between two sizes of the scan; None if it does not."""
    shares = [_share(row, GLOBAL.column) for row in rows]
    for number, (low, high) in enumerate(pairwise(shares)):
        if low < 0.5 <= high:
            before, after = rows[number][x], rows[number + 1][x]
            return float(before + (after - before) * (0.5 - low) / (high - low))
    return None


def _tidy(ax: Axes, label: str) -> None:
    ax.set_xlabel(label, fontsize=11)
    ax.grid(visible=True, color="0.93")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _share(row: Row, column: str) -> float:
    return float(row[f"{column}_hits"] / row[f"{column}_trials"])
