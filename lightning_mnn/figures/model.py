"""The figure of a run of any model that was trained with the three callbacks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mnn.figures.style import COLORS, NOTE, literal, save, tidy
from lightning_mnn.figures.tables import read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

    Series = Mapping[str, tuple[list[int], list[float]]]
    Draw = Callable[[Axes, Series], bool]

_MAX_LEGEND_LAYERS = 6  # layers that a legend names; if there are more, there is a colour bar
_MAX_LOSSES = 3


def model_figure(run_dir: Path) -> Path:
    """Draw ``figure.png`` of a log folder from its ``metrics.csv``, a file that Lightning's ``CSVLogger`` writes.

    It shows, against the optimiser step: loss, gradient, smallest curvature with its error, distance to the nearest
    kink, the fraction of each layer's activation pattern that has flipped since the start, and the relative
    perturbation under which each layer's pattern is kept. Panels of values that the run did not log are empty.

    Returns:
        The path of the figure.

    Raises:
        ValueError: the file has no values of the three callbacks.
    """
    series = read_metrics(run_dir / "metrics.csv")
    if not any(name.startswith(("minimum/", "pattern/", "volume/")) for name in series):
        raise ValueError(
            f"{run_dir / 'metrics.csv'} has none of minimum/…, pattern/… and volume/…: add callbacks of "
            "lightning_mnn.callbacks to the Trainer, and a logger"
        )
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    for ax, draw in zip(figure.subplots(2, 3).flat, (draw_losses, *PANELS), strict=True):
        tidy(ax)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        shown = draw(ax, series)
        ax.title.set_fontsize(11)
        if not shown:
            ax.text(0.5, 0.5, "not logged in this run", transform=ax.transAxes, ha="center", color="0.5")
    return save(figure, run_dir / "figure.png")


def layers_of(names: Iterable[str], group: str, measure: str) -> dict[str, str]:
    """The layers for which a measure is logged, with its full logged names; sorted by name, digits as numbers.

    >>> layers_of(["pattern/flips", "pattern/net.10/flips", "pattern/net.3/flips"], "pattern", "flips")
    {'net.3': 'pattern/net.3/flips', 'net.10': 'pattern/net.10/flips'}
    """
    pattern = re.compile(f"{re.escape(group)}/(.+)/{re.escape(measure)}")
    found = {match[1]: name for name in names if (match := pattern.fullmatch(name))}
    return {layer: found[layer] for layer in sorted(found, key=_with_numbers)}


def _with_numbers(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def draw_losses(ax: Axes, series: Series) -> bool:
    """Draw the losses that training logged, and that over the whole training set."""
    ax.set(title="Loss", xlabel="optimiser step")
    losses = [name for name in series if "loss" in name and not name.startswith(("minimum/", "val", "test"))]
    curves = {name: name for name in losses[:_MAX_LOSSES]}
    curves |= {"minimum/loss": "whole training set", "minimum/mse": "MSE, whole training set"}
    return positive_lines(ax, series, curves)


def _gradient(ax: Axes, series: Series) -> bool:
    if "minimum/stationarity" in series:  # logged only for a network that can be certified
        ax.set(title="Stationarity", xlabel="optimiser step", ylabel="‖G e‖ / (‖G‖ ‖y‖)")
        return positive_lines(ax, series, {"minimum/stationarity": "G e"})
    ax.set(title="Gradient of the whole training loss", xlabel="optimiser step", ylabel="norm")
    curves = {"minimum/gradient_norm": "‖∇L‖", "minimum/relative_gradient": "relative to the start"}
    return positive_lines(ax, series, curves)


def _curvature(ax: Axes, series: Series) -> bool:
    if "minimum/stationarity" in series:
        ax.set(title="Certified minimum", xlabel="optimiser step", ylabel="of the minimum")
        return positive_lines(ax, series, {"minimum/distance": "distance", "minimum/certified_mse": "MSE"})
    ax.set(title="Smallest eigenvalue of the Hessian", xlabel="optimiser step", ylabel="λ, lower bound below it")
    errors = dict(zip(*series.get("minimum/eigenvalue_error", ([], [])), strict=True))
    steps, values = series.get("minimum/smallest_eigenvalue", ([], []))
    if not steps:
        return False
    below = [errors.get(step, 0.0) for step in steps]
    ax.errorbar(steps, values, [below, [0.0] * len(below)], fmt="o", ms=4, color=COLORS[0], capsize=3)
    ax.axhline(0.0, color="0.6", lw=0.8, ls=":")
    last = max(max(steps) for steps, _ in series.values())
    ax.set_xlim(-0.05 * last, 1.05 * last)
    largest = series.get("minimum/largest_eigenvalue")
    if largest:
        ax.text(0.02, 0.03, f"largest: {largest[1][-1]:.3g}", transform=ax.transAxes, **NOTE)
    return True


def _kink(ax: Axes, series: Series) -> bool:
    ax.set(title="Distance to the nearest kink", xlabel="optimiser step", ylabel="smallest |pre-activation|")
    curves = {"minimum/min_preactivation": "absolute", "minimum/relative_preactivation": "relative to its layer"}
    return positive_lines(ax, series, curves)


def _patterns(ax: Axes, series: Series) -> bool:
    ax.set(title="Activation patterns", xlabel="optimiser step", ylabel="fraction flipped since the start")
    return draw_layers(ax, series, "pattern", "hamming_from_start")


def draw_layers(ax: Axes, series: Series, group: str, measure: str) -> bool:
    """Draw a measure of each layer; return whether there was any."""
    layers = layers_of(series, group, measure)
    for layer, color in layer_colors(ax, layers).items():
        steps, values = series[layers[layer]]
        ax.plot(steps, values, color=color, lw=1.3, marker="o", ms=3, label=literal(layer))
    ax.set_ylim(bottom=0)
    legend_below(ax, len(layers))
    return bool(layers)


def _local_volumes(ax: Axes, series: Series) -> bool:
    """Draw the last local volume of each layer, and of all layers together."""
    ax.set(title="Perturbation that patterns survive", ylabel="layer, by name", xlabel="relative size σ½")
    layers = layers_of(series, "volume", "half_sigma")
    if not layers and "volume/log_lower_bound" in series:
        return _log_volume(ax, series)
    last = {layer: series[name][1][-1] for layer, name in layers.items()}
    places = np.arange(1, len(last) + 1)
    ax.scatter(list(last.values()), places, c=_shades(len(last)), zorder=3)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if len(last) <= _MAX_LEGEND_LAYERS:
        ax.set_yticks(places, [literal(layer) for layer in last])
    ax.set_ylim(0.4, len(last) + 0.6)
    low, half, high = (series.get(f"volume/half_sigma{end}", ([], [])) for end in ("_low", "", "_high"))
    if half[1]:
        ax.axvline(half[1][-1], color="0.3", lw=1.2, label="all layers together")
        if low[1] and high[1]:
            ax.axvspan(low[1][-1], high[1][-1], color="0.3", alpha=0.15, lw=0)
        legend_below(ax, 1)
    if last or half[1]:
        ax.set_xscale("log")
    return bool(last or half[1])


def _log_volume(ax: Axes, series: Series) -> bool:
    """Draw the log-volume of a network whose region is a product of cones."""
    ax.set(title="Angular volume of the region", xlabel="optimiser step", ylabel="log-volume (nats)")
    ax.plot(*series["volume/log_lower_bound"], color=COLORS[0], lw=1.2, marker="o", ms=3, label="lower bound")
    steps, values = series.get("volume/log_volume", ([], []))
    errors = dict(zip(*series.get("volume/log_volume_standard_error", ([], [])), strict=True))
    ax.errorbar(
        steps,
        values,
        [1.96 * errors.get(step, 0.0) for step in steps],
        fmt="o",
        ms=4,
        color=COLORS[1],
        label="estimate",
    )
    legend_below(ax, 2)
    return True


def positive_lines(ax: Axes, series: Series, curves: Mapping[str, str]) -> bool:
    """Draw the positive values of curves on a logarithmic axis; return whether there were any."""
    drawn = 0
    for color, (name, label) in zip(COLORS, curves.items(), strict=False):
        points = [(step, value) for step, value in zip(*series.get(name, ([], [])), strict=True) if value > 0]
        if points:
            few = len(points) <= 60
            ax.plot(
                *zip(*points, strict=True), color=color, lw=1.2, marker="o" if few else "", ms=3, label=literal(label)
            )
            drawn += 1
    if drawn:
        ax.set_yscale("log")
        legend_below(ax, drawn)
    return drawn > 0


def layer_colors(ax: Axes, layers: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """A colour per layer; draws a colour bar if there are too many layers for a legend."""
    if len(layers) > _MAX_LEGEND_LAYERS:
        bar = ScalarMappable(Normalize(1, len(layers)), "viridis")
        assert ax.figure is not None  # noqa: S101 (for the type checker)
        ax.figure.colorbar(bar, ax=ax, label="layer, by name", ticks=MaxNLocator(6, integer=True))
    return dict(zip(layers, _shades(len(layers)), strict=True))


def _shades(number: int) -> list[tuple[float, ...]]:
    return [
        colormaps["viridis"](place)
        for place in np.linspace(0, 1 if number > _MAX_LEGEND_LAYERS else 0.85, max(number, 1))
    ][:number]


def legend_below(ax: Axes, number: int) -> None:
    """Draw a legend below the panel, where it covers no data, unless it has too many entries."""
    if 1 <= number <= _MAX_LEGEND_LAYERS:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)


PANELS: tuple[Draw, ...] = (_gradient, _curvature, _kink, _patterns, _local_volumes)
