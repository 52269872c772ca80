"""The figure of local volumes: keep probabilities against the size of a random move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from lightning_mnn.figures.style import COLORS, literal, save, tidy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

    from lightning_mnn.landscape.volumes.random_moves import KeepCurve, LocalVolume

_MAX_LEGEND_LAYERS = 6  # layers that the legend names; if there are more, layers are coloured by depth
_MAX_BAR_NAMES = 24  # names of layers that fit beside the colour bar
_SPREAD = 0.5  # part of the gap between two values of σ over which intervals are spread, so that none is hidden


def local_volume_figure(volume: LocalVolume, path: Path, title: str = "") -> Path:
    """Draw the keep probability of each layer, and of all layers together, against σ, with 95 % intervals.

    Args:
        volume: the local volume to draw.
        path: of the PNG file.
        title: above the panel.

    Returns:
        The path.
    """
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    ax = figure.subplots()
    names = list(volume.layers)
    few = len(names) <= _MAX_LEGEND_LAYERS
    colors: Colormap = ListedColormap(COLORS) if few else mpl.colormaps["viridis"].resampled(len(names))
    look: dict[str, Any] = {"ms": 3, "lw": 1.2, "elinewidth": 0.8} if few else {"ms": 2, "lw": 0.8, "elinewidth": 0.4}
    for depth, (name, curve) in enumerate(volume.layers.items()):
        shift = (depth + 1) / (len(names) + 1) - 0.5
        _draw(ax, curve, shift, color=colors(depth), label=literal(name) if few else None, **look)
    _draw(ax, volume.total, 0.0, color="black", label="all layers", lw=2.0, ms=4, elinewidth=1.0, zorder=3)
    ax.axhline(0.5, color="0.6", lw=0.8, ls=":")
    ax.set(
        xscale="log",
        ylim=(-0.03, 1.03),
        xlabel="σ: size of a random move of all parameters, relative to each tensor's norm",
        ylabel="probability that the pattern is kept",
    )
    ax.set_title(literal(title), fontsize=11)
    tidy(ax)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4, frameon=False, fontsize=9)
    if not few:
        _depth_bar(figure, ax, colors, volume.layers)
    return save(figure, path)


def _draw(ax: Axes, curve: KeepCurve, shift: float, **look: Any) -> None:
    """Draw one curve, slightly shifted, so that the intervals of several curves do not cover each other."""
    sigmas = list(curve.sigmas)
    ratio = sigmas[1] / sigmas[0] if len(sigmas) > 1 else 1.0
    places = [sigma * ratio ** (_SPREAD * shift) for sigma in sigmas]
    values = [proportion.value for proportion in curve.kept]
    below = [proportion.value - proportion.low for proportion in curve.kept]
    above = [proportion.high - proportion.value for proportion in curve.kept]
    ax.errorbar(places, values, yerr=(below, above), marker="o", **look)


def _depth_bar(figure: Figure, ax: Axes, colors: Colormap, layers: Mapping[str, KeepCurve]) -> None:
    """Draw a colour bar for the depth of the layers, the first on top, with as many names as are legible."""
    names = list(layers)
    scale = mpl.cm.ScalarMappable(BoundaryNorm(range(len(names) + 1), len(names)), colors)
    bar = figure.colorbar(scale, ax=ax, pad=0.01)
    step = -(-len(names) // _MAX_BAR_NAMES)
    bar.ax.yaxis.set_major_locator(FixedLocator([depth + 0.5 for depth in range(0, len(names), step)]))
    bar.ax.set_yticklabels([literal(name) for name in names[::step]], fontsize=7)
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
