"""Figures of a scan over sizes: the error against #parameters / N, and the points that training ends in against d."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lightning_mnn.figures.style import COLORS, KINDS, NOTE, mark_zeros, save, tidy
from lightning_mnn.figures.tables import read_table
from lightning_mnn.utilities.files import DamagedFileError, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

Row = dict[str, Any]

# The ranges of values in the paper's Figure 5.2.
_PAPER = {"min_preactivation": (1e-3, 1e0), "mse": (1e-31, 1e-7)}

_LAYERS = {1: "one hidden layer", 2: "two hidden layers"}


def scan_figure(run_dir: Path) -> Path:
    """Draw ``figure.png`` of a scan from its ``scan.csv``, as the kind of figure that its ``summary.json`` names.

    Returns:
        The path of the figure.
    """
    path = run_dir / "summary.json"
    figure = read_json(path, ("figure", "sizes"))["figure"]
    if figure not in FIGURES:
        raise DamagedFileError(path, f"it names no figure: {figure!r}")
    return FIGURES[figure](run_dir)


def error_figure(run_dir: Path) -> Path:
    """Draw the final training error against #parameters / N, mean ± standard deviation over the replicas.

    There is a panel for each number of hidden layers, as in the paper's Figure 5.1, and a curve for each width, along
    which N decreases. A broken line marks as many parameters as samples.

    Returns:
        The path of the figure.
    """
    summary = read_json(run_dir / "summary.json", ("sizes",))
    panels = _by(summary["sizes"], "hidden_layers")
    figure = Figure(figsize=(1 + 6 * len(panels), 6.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (layers, sizes) in zip(axes, panels.items(), strict=True):
        for (width, curve), color in zip(_by(sizes, "input_dim").items(), _cycle(len(sizes)), strict=False):
            _draw_errors(ax, width, curve, color)
        ax.set_title(f"{_LAYERS[layers]}, d0 = {' = '.join(f'd{k + 1}' for k in range(layers))} = d", fontsize=12)
        ax.axvline(1, color="black", ls="--", lw=1.2, zorder=1)
        ax.set(xscale="log", xlabel="parameters for each sample, #parameters / N")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        tidy(ax)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}  # where it covers no data
        words = "mean ± standard deviation; broken line: N = #parameters"
        ax.legend(ncols=2, title=words, frameon=False, **below)
    axes[0].set(ylabel="final training error MCE (%)", ylim=(-1, None))
    figure.suptitle(f"Training error against parameters for each sample\n{_conditions(summary)}", fontsize=12)
    return save(figure, run_dir / "figure.png")


def minima_figure(run_dir: Path) -> Path:
    """Draw the smallest |w·x|, the final MSE and the kinds of the points that training ended in, against the width.

    There is a dot for each network, coloured by its kind, and a bar at the median. The ranges of the paper's Figure 5.2
    are shaded.

    Returns:
        The path of the figure.
    """
    summary, rows = read_json(run_dir / "summary.json", ("sizes",)), read_table(run_dir / "scan.csv")
    groups = [[row for row in rows if _size(row) == _size(size)] for size in summary["sizes"]]
    figure = Figure(figsize=(16, 6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    _draw_dots(axes[0], groups, "min_preactivation")
    axes[0].set(title="Smallest pre-activation", ylabel="smallest |w·x| over units and samples")
    _draw_dots(axes[1], groups, "mse")
    axes[1].set(title="Final loss", ylabel="MSE")
    _draw_kinds(axes[2], groups)
    axes[2].set(title="Certified kinds", ylabel=f"networks of {max(len(group) for group in groups)}")
    for ax in axes:
        _name_places(ax, groups)
        tidy(ax)
    present = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    handles = [axes[0].plot([], [], KINDS[kind][2], color=KINDS[kind][1], label=KINDS[kind][0])[0] for kind in present]
    handles.append(axes[0].plot([], [], "-", color="black", lw=2, label="median")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"What training ends in\n{_conditions(summary)}", fontsize=12)
    return save(figure, run_dir / "figure.png")


FIGURES: dict[str, Callable[[Path], Path]] = {"error": error_figure, "minima": minima_figure}


def _draw_errors(ax: Axes, width: int, curve: Sequence[Row], color: str) -> None:
    """Draw mean ± standard deviation of the MCE, in per cent, against the parameters per sample."""
    curve = sorted(curve, key=lambda size: size["num_samples"])
    spread = [100 * (size["mce_std"] or 0.0) for size in curve]
    ax.errorbar(
        [size["parameters_per_sample"] for size in curve],
        [100 * size["mce_mean"] for size in curve],
        spread,
        color=color,
        marker="o",
        ms=4.5,
        lw=1.4,
        capsize=3,
        elinewidth=1,
        label=f"d = {width} ({curve[0]['parameters']:,} parameters)",
    )


def _draw_dots(ax: Axes, groups: Sequence[Sequence[Row]], column: str) -> None:
    """Draw a dot for each network and a bar at the median; values that are exactly zero are at the foot of the axis."""
    ax.set_yscale("log")
    values = [row[column] for group in groups for row in group]
    positive = [value for value in values if value > 0]
    low, high = _PAPER[column]
    ax.axhspan(low, high, color="0.92", zorder=0)
    ax.text(0.985, high, "paper's range", ha="right", va="top", transform=ax.get_yaxis_transform(), **NOTE)
    foot = 10.0 ** (math.floor(math.log10(min(positive, default=low))) - 2)
    for place, group in enumerate(groups):
        heights = [max(row[column], foot) for row in group]
        for row, height, shift in zip(group, heights, _shifts(len(group)), strict=True):
            _, color, marker = KINDS[row["kind"]]
            ax.plot(place + shift, height, marker, color=color, ms=5, alpha=0.75, zorder=3)
        ax.hlines(float(np.median(heights)), place - 0.38, place + 0.38, color="black", lw=2, zorder=4)
    if len(positive) < len(values):
        mark_zeros(ax, foot)
    ax.yaxis.set_major_locator(LogLocator(numticks=9))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_kinds(ax: Axes, groups: Sequence[Sequence[Row]]) -> None:
    """Draw counts of the kinds, as a stacked bar for each size."""
    for place, group in enumerate(groups):
        below = 0
        for kind, (_, color, _) in KINDS.items():
            count = sum(row["kind"] == kind for row in group)
            if count:
                ax.bar(place, count, 0.7, below, color=color, alpha=0.85)
                ax.text(place, below + count / 2, str(count), ha="center", va="center", color="white", fontsize=10)
            below += count
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _name_places(ax: Axes, groups: Sequence[Sequence[Row]]) -> None:
    deep = any(group[0]["hidden_layers"] > 1 for group in groups)
    names = [
        f"{group[0]['input_dim']:g}\nN = {group[0]['num_samples']:,.0f}"
        + (f"\n{group[0]['hidden_layers']:g} layers" if deep else "")
        for group in groups
    ]
    ax.set_xticks(range(len(groups)), names, fontsize=8.5)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.set_xlabel("width d = d0 = d1" + (" (= d2)" if deep else ""))


def _conditions(summary: Row) -> str:
    """A description of the training, in two lines."""
    settings, slope = summary["scan"], summary["scan"]["negative_slope"]
    labels = {"plus_minus": "±1 labels", "zero_one": "0/1 labels"}[settings["labels"]]
    unit = "ReLU" if slope == 0 else f"leaky ReLU, ρ = {slope:g}"
    rate = summary["optimizer"].get("lr")
    optimizer = summary["optimizer"]["name"] + ("" if rate is None else f", rate {rate:g}")
    data = f"Gaussian data, random {labels}, {unit}, {summary['replicas']} replicas"
    return f"{data}\n{settings['max_epochs']:,} epochs of {optimizer}, {summary['dtype']}"


def _shifts(count: int) -> list[float]:
    """Horizontal shifts, so that dots do not cover each other."""
    return [0.0] if count == 1 else np.linspace(-0.3, 0.3, count).tolist()


def _by(sizes: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    return {value: list(same) for value, same in groupby(sorted(sizes, key=lambda s: s[key]), key=lambda s: s[key])}


def _size(row: Row) -> tuple[int, ...]:
    return tuple(int(row[name]) for name in ("hidden_layers", "input_dim", "num_samples"))


def _cycle(count: int) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(count)]
