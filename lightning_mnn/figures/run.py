"""The figure of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mnn.figures.style import save
from lightning_mnn.figures.tables import read_metrics
from lightning_mnn.utilities.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes


_COLORS = ("#1f5fa8", "#d1701c", "#2f8f4e")


@dataclass(frozen=True)
class Panel:
    """One panel of a run's figure: its title, the unit of its axis, and its curves as (logged name, label)."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    scale: str = "log"


PANELS = (
    Panel("Loss", "MSE", (("train/mse", "batch"), ("minimum/mse", "whole training set"), ("test/mse", "test set"))),
    Panel(
        "Classification error",
        "fraction wrong",
        (("train/mce", "batch"), ("minimum/mce", "whole training set"), ("test/mce", "test set")),
        "symlog",
    ),
    Panel("Stationarity", "‖G e‖ / (‖G‖ ‖y‖)", (("minimum/stationarity", "G e"),)),
    Panel(
        "Distance to the nearest kink",
        "smallest |pre-activation|",
        (("minimum/min_preactivation", "|w·x|"), ("minimum/relative_preactivation", "|w·x| / (‖w‖ ‖x‖)")),
    ),
    Panel(
        "Activation pattern",
        "flips (sample, unit)",
        (("pattern/flips_from_start", "since the start"), ("pattern/flips", "since the last snapshot")),
        "linear",
    ),
    Panel(
        "Angular volume of the region",
        "log-volume (nats)",
        (("volume/log_lower_bound", "lower bound"), ("volume/log_volume", "estimate")),
        "linear",
    ),
)


def run_figure(run_dir: Path) -> Path:
    """Draw ``figure.png`` of a run folder from its ``metrics.csv`` and ``summary.json``.

    It shows loss, classification error, stationarity, distance to the nearest kink, pattern flips and volume bound
    against the optimiser step. With several replicas the values are means over them.

    Returns:
        The path of the figure.
    """
    series = read_metrics(run_dir / "metrics.csv")
    needs = ("input_dim", "hidden_dims", "negative_slope", "num_samples", "replicas", "kind", "mse", "wrong")
    summary = read_json(run_dir / "summary.json", needs)
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, panel in zip(axes.flat, PANELS, strict=True):
        _draw_panel(ax, panel, series, summary["num_samples"])
    figure.suptitle(_title(summary), fontsize=12)
    return save(figure, run_dir / "figure.png")


def _draw_panel(ax: Axes, panel: Panel, series: dict[str, tuple[list[int], list[float]]], num_samples: int) -> None:
    drawn = 0
    for (name, label), color in zip(panel.curves, _COLORS, strict=False):
        steps, values = series.get(name, ([], []))
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0 or panel.scale != "log"]
        if not points:
            continue
        few = len(points) <= 60
        look: dict[str, Any] = {"lw": 1.4, "marker": "o", "ms": 3} if few else {"lw": 0.8, "alpha": 0.7}
        ax.plot(*zip(*points, strict=True), color=color, label=label, **look)
        drawn += 1
    ax.set(title=panel.title, ylabel=panel.unit, xlabel="optimiser step")
    ax.title.set_fontsize(11)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.grid(visible=True, color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if not drawn:
        ax.text(0.5, 0.5, "not logged in this run", transform=ax.transAxes, ha="center", color="0.5")
        return
    if panel.scale == "symlog":  # logarithmic down to one sample, linear to zero below
        ax.set_yscale("symlog", linthresh=1 / num_samples)
        ax.set_ylim(bottom=0)
    else:
        ax.set_yscale(panel.scale)
    if drawn > 1:  # below the panel, where it covers no data
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)


def _title(summary: dict[str, Any]) -> str:
    sizes = "–".join(str(size) for size in (summary["input_dim"], *summary["hidden_dims"], 1))
    kinds = summary["kind"] if isinstance(summary["kind"], list) else [summary["kind"]]
    counts = {kind: kinds.count(kind) for kind in kinds if kind is not None}
    verdict = ", ".join(f"{n} × {k}" if len(kinds) > 1 else str(k) for k, n in counts.items()).replace("_", " ")
    parts = [f"{sizes}, ρ = {summary['negative_slope']:g}, N = {summary['num_samples']:,}"]
    if summary["replicas"] > 1:
        parts.append(f"mean of {summary['replicas']} replicas")
    if verdict:
        parts.append(verdict)
    if isinstance(summary["mse"], float):
        parts.append(f"MSE {summary['mse']:.2g}")
    if isinstance(summary["wrong"], int):
        parts.append(f"{summary['wrong']:,} wrong")
    return "   |   ".join(parts)
