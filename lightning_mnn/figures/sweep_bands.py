"""The figure of a sweep for a paper: chosen columns of its table, as curves with a band over repetitions."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from scipy.special import stdtrit

from lightning_mnn.figures.scales import (
    MIN_LOG_RATIO,
    REPETITION,
    Row,
    Scale,
    colors_of,
    distinct,
    draw_places,
    number_in,
    scale_of,
)
from lightning_mnn.figures.style import literal, save, tidy
from lightning_mnn.figures.sweep import MEASURES, choose_axes
from lightning_mnn.utilities.files import whole_file
from lightning_mnn.utilities.validation import ArgumentError, one_of
from lightning_mnn.verdicts import AT_GLOBAL, class_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

BANDS = ("std", "quartiles", "confidence")

_UNITS = {
    "mse": "training MSE",
    "mce": "training error (fraction)",
    "test_mse": "test MSE",
    "test_mce": "test error (fraction)",
    "data.num_samples": "N",
    "num_samples": "N",
    "seconds": "seconds",
    "log_volume": "log-volume (nats)",
    "learning_coefficient": "learning coefficient λ",
    "steps": "optimiser steps",
    "model.hidden_dims": "hidden units",
}


_CONFIDENCE = 0.95


def band_figure(folder: Path, x: str, y: Sequence[str], color: str | None = None, band: str = "std") -> list[Path]:
    """Draw ``figure_bands.png`` and ``figure_bands.pdf`` of a sweep from its ``sweep.parquet``.

    A panel for each column of ``y`` against the column ``x``: for each value of the column ``color`` the curve of the
    mean over the networks of all finished jobs, with a band of one standard deviation to each side (of n − 1; none
    for one network), or ("confidence") of the 95 % confidence interval of the mean by Student's t; or the curve of the
    median with a band from the lower to the upper quartile. If all values of a
    panel are positive and span a factor of 30 or more, its axis is logarithmic, and a band that would reach 0 ends at
    the smallest value.

    Args:
        folder: the folder of the sweep.
        x: column of the horizontal axis.
        y: columns to draw, with numbers.
        color: column of the colours; None: one curve.
        band: "std", "quartiles" or "confidence".

    Returns:
        The paths of both files.

    Raises:
        ArgumentError: a column does not exist or has no numbers, or ``band`` is none of the three.
    """
    one_of("band", band, BANDS)
    rows = [row for row in pq.read_table(folder / "sweep.parquet").to_pylist() if row["status"] == "finished"]
    for name, column in (("x", x), ("color", color), *(("y", column) for column in y)):
        if column is not None and not any(row.get(column) is not None for row in rows):
            known = ", ".join(key for key in (rows[0] if rows else ()) if any(row[key] is not None for row in rows))
            raise ArgumentError(name, column, "is no column with values of the finished jobs", f"choose from {known}")
    for column in y:
        if all(number_in(row[column]) is None for row in rows):
            raise ArgumentError("y", column, "has no numbers", "choose another column")
    figure = _figure_of(rows, x, y, color, band)
    path = folder / "figure_bands.pdf"
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="pdf")
    return [save(figure, folder / "figure_bands.png"), path]


def figure_of_test_errors(folder: Path) -> Path | None:
    """Draw ``figure_test_error.png`` of a sweep from its ``sweep.parquet``: the test errors of the global minima.

    The panels are those of :func:`band_figure` with ``band="confidence"``, for ``test_mse`` and ``test_mce`` against
    the axis that :func:`~lightning_mnn.figures.sweep.sweep_figure` chooses. Only networks whose global minimum is
    certified are drawn; the title says how many of all finished ones that are.

    Returns:
        The path of the figure; None if fewer than two values of the axis have a certified global minimum with a test
        error.
    """
    table = pq.read_table(folder / "sweep.parquet")
    finished = [row for row in table.to_pylist() if row["status"] == "finished"]
    rows = [row for row in finished if class_of(row) == AT_GLOBAL]
    columns = [name for name in ("test_mse", "test_mce") if any(row.get(name) is not None for row in rows)]
    swept = json.loads(table.schema.metadata[b"swept"])
    x, color = choose_axes(finished, swept, [one for one in MEASURES if one.known(finished)]) if columns else ("", "")
    if x in ("", REPETITION) or len(distinct(rows, x)) < 2:
        return None
    figure = _figure_of(rows, x, columns, color or None, "confidence")
    how_many = f"{len(rows):,} of {len(finished):,} networks, those at certified global minima"
    figure.suptitle(f"{how_many}\nmean, with its 95 % interval by Student's t, cut at 0", fontsize=10)
    return save(figure, folder / "figure_test_error.png")


def _figure_of(rows: Sequence[Row], x: str, y: Sequence[str], color: str | None, band: str) -> Figure:
    figure = Figure(figsize=(4.2 * len(y), 3.4), dpi=150, layout="constrained")
    scales = scale_of(rows, x), scale_of(rows, color or "")
    for ax, column in zip(figure.subplots(1, len(y), squeeze=False).flat, y, strict=True):
        _draw_curves(ax, rows, column, *scales, band)
    if color is not None:
        handles, names = figure.axes[0].get_legend_handles_labels()
        title = literal(_UNITS.get(color, color))
        figure.legend(handles, names, title=title, loc="outside right upper", frameon=False)
    return figure


def statistics_of(values: Sequence[float], band: str) -> tuple[float, float, float]:
    """Middle, low and high of a band over repetitions; a confidence interval ends at 0 if no value is negative.

    >>> statistics_of([1.0, 2.0, 3.0], "std"), statistics_of([1.0, 2.0, 3.0, 4.0, 9.0], "quartiles")
    ((2.0, 1.0, 3.0), (3.0, 2.0, 4.0))
    >>> [round(value, 3) for value in statistics_of([-1.0, 2.0, 3.0], "confidence")]
    [1.333, -3.838, 6.504]
    """
    if band == "quartiles":
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return middle, low, high
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if band == "confidence" and len(values) > 1:
        spread = half_width(values)
    low = mean - spread
    if band == "confidence" and min(values) >= 0:  # then the mean is not negative either
        low = max(low, 0.0)
    return mean, low, mean + spread


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean of two or more independent values, by Student's t.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    quantile = float(stdtrit(len(values) - 1, (1 + _CONFIDENCE) / 2))
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _draw_curves(ax: Axes, rows: Sequence[Row], column: str, x: Scale, color: Scale, band: str) -> None:
    known = [(row, value) for row in rows if (value := number_in(row[column])) is not None]
    values = [value for _, value in known]
    log = min(values) > 0 and max(values) / min(values) >= MIN_LOG_RATIO
    draw_places(ax, x)
    for number, (hue, name) in enumerate(zip(colors_of(color), color.names, strict=True)):
        groups: dict[int, list[float]] = {}
        for row, value in known:
            if color.index(row) == number:
                groups.setdefault(x.index(row), []).append(value)
        if not groups:
            continue
        places = [x.places[index] for index in sorted(groups)]
        middles, lows, highs = zip(*(statistics_of(groups[index], band) for index in sorted(groups)), strict=True)
        floor = min(values) if log else -math.inf
        look: dict[str, Any] = {"color": hue, "zorder": 3}
        ax.plot(places, middles, "o-", ms=4, lw=1.6, label=literal(name), **look)
        ax.fill_between(places, np.maximum(lows, floor), highs, alpha=0.2, lw=0, **look)
    ax.set_yscale("log" if log else "linear")
    ax.set_xlabel(literal(_UNITS.get(x.key, x.key)))
    ax.set_ylabel(literal(_UNITS.get(column, column)))
    tidy(ax)
