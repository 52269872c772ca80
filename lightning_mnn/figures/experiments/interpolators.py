"""The figure of random interpolators: their test errors beside those of trained networks, and their probability."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_mnn.figures.style import COLORS, NOTE, save, tidy
from lightning_mnn.figures.tables import Row, read_table
from lightning_mnn.utilities.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_DODGE = 0.012  # between two curves at one N, as a fraction of the axis, so that their intervals do not overlap


def interpolators_figure(run_dir: Path) -> Path:
    """Draw ``figure.png`` from the ``interpolators.csv`` and ``summary.json`` of ``experiment=interpolators``.

    There is a column for each network and label noise. Top: mean test errors against N, with 95 % intervals over the
    data sets, of random and of trained networks without training errors. Bottom: ln P(no training error) of random
    networks, a dot for each data set, with their mean.

    Returns:
        The path of the figure.
    """
    rows = read_table(run_dir / "interpolators.csv")
    cases = read_json(run_dir / "summary.json", needs=("cases", "interpolators"))["cases"]
    trained = [key.removesuffix("_interpolating") for key in cases[0] if key.endswith("_interpolating")]
    columns = list(dict.fromkeys((case["hidden_dims"], case["label_noise"]) for case in cases))
    figure = Figure(figsize=(1 + 5.2 * len(columns), 8.6), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for number, column in enumerate(columns):
        same = [case for case in cases if (case["hidden_dims"], case["label_noise"]) == column]
        table = [row for row in rows if (_text(row["hidden_dims"]), row["label_noise"]) == column]
        hidden, noise = column
        widths = "no hidden layer" if hidden == "none" else f"hidden units {hidden.replace('x', ', ')}"
        title = f"d0 = {same[0]['input_dim']}, {widths}" + (f", {100 * noise:g} % label noise" if noise else "")
        axes[0, number].set_title(title, fontsize=12, fontweight="bold")
        _draw_errors(axes[0, number], same, trained)
        _draw_probabilities(axes[1, number], same, table)
    axes[0, 0].set_ylabel("test error, given no training error", fontsize=11)
    axes[1, 0].set_ylabel("ln P(no training error), random weights", fontsize=11)
    axes[0, 0].legend(frameon=False, fontsize=10)
    return save(figure, run_dir / "figure.png")


def _draw_errors(ax: Axes, cases: Sequence[Row], trained: Sequence[str]) -> None:
    names, sizes = ("random", *trained), [case["num_samples"] for case in cases]
    for number, name in enumerate(names):
        column = f"{name}_test_error"
        known = [case for case in cases if case[column] is not None]
        shift = (max(sizes) / min(sizes)) ** (_DODGE * (number - (len(names) - 1) / 2))
        places = [case["num_samples"] * shift for case in known]
        values = [case[column] for case in known]
        look = {"color": COLORS[number % len(COLORS)], "marker": "os^Dv"[number % 5], "ms": 5.5, "lw": 1.4}
        ax.errorbar(places, values, _ends(known, column), elinewidth=1, label=_name(name), **look)  # type: ignore[arg-type]
    left_out = sum(case[f"{name}_networks"] - case[f"{name}_interpolating"] for case in cases for name in trained)
    total = sum(case[f"{name}_networks"] for case in cases for name in trained)
    sets = sorted({case["data_sets"] for case in cases})
    note = f"means over {sets[-1]} data sets, 95 % intervals"
    if total:
        note += f"\n{left_out:,} of {total:,} trained networks kept training errors: left out"
    ax.text(0.03, 0.03, note, transform=ax.transAxes, ha="left", va="bottom", **NOTE)
    ax.set_ylim(bottom=0)
    _tidy(ax, cases)


def _draw_probabilities(ax: Axes, cases: Sequence[Row], rows: Sequence[Row]) -> None:
    known = [row for row in rows if row["log_probability"] is not None]
    ax.plot(
        [row["num_samples"] for row in known],
        [row["log_probability"] for row in known],
        "o",
        ms=4,
        mfc="none",
        mec="0.6",
        mew=0.8,
        label="a data set",
    )
    means = [case for case in cases if case["log_probability"] is not None]
    ends = _ends(means, "log_probability")
    places, values = [case["num_samples"] for case in means], [case["log_probability"] for case in means]
    ax.errorbar(places, values, ends, color=COLORS[0], marker="o", ms=5.5, lw=1.4, elinewidth=1, label="their mean")
    sizes = [case["num_samples"] for case in cases]
    grid = np.geomspace(min(sizes), max(sizes), 100)
    ax.plot(grid, -grid * math.log(2), "--", color="0.4", lw=1.2, label="$-N$ ln 2: coin flips")
    ax.legend(frameon=False, fontsize=10, loc="lower left")
    lost = sum(case["not_reached"] for case in cases)
    if lost:
        ax.text(0.97, 0.97, f"{lost} data sets: never met", transform=ax.transAxes, ha="right", va="top", **NOTE)
    ax.set_xlabel("training samples N", fontsize=11)
    _tidy(ax, cases)


def _ends(cases: Sequence[Row], column: str) -> list[list[float]]:
    """Lengths of the intervals below and above the values; 0 where there is none."""
    below = [0.0 if case[f"{column}_low"] is None else case[column] - case[f"{column}_low"] for case in cases]
    above = [0.0 if case[f"{column}_high"] is None else case[f"{column}_high"] - case[column] for case in cases]
    return [below, above]


def _tidy(ax: Axes, cases: Sequence[Row]) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sorted({case["num_samples"] for case in cases})))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    tidy(ax)


def _name(name: str) -> str:
    return "random weights" if name == "random" else {"sgd": "SGD", "adam": "Adam"}.get(name, name.replace("_", " "))


def _text(value: object) -> str:
    """Widths as text: a table's reader makes a number of a single one."""
    return f"{value:g}" if isinstance(value, float) else str(value)
