"""Figures of local volumes (keep probabilities against the size of a random move) and of Langevin chains."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from lightning_mnn.figures.style import COLORS, literal, save, tidy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_mnn.landscape.curvature.sampled_coefficient import SampledCoefficient
    from lightning_mnn.landscape.volumes.random_moves import KeepCurve, LocalVolume

_MAX_LEGEND_LAYERS = 6  # layers that the legend names; if there are more, layers are coloured by depth
_MAX_BAR_NAMES = 24  # names of layers that fit beside the colour bar
_MAX_CHAINS = 16  # chains whose traces can be told apart
_MAX_PLACES = 250  # places of a trace
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


def chains_figure(found: SampledCoefficient, path: Path, title: str = "") -> Path:
    """Draw the loss above the minimum, nβ (L − L(w*)), of each chain against its moves, with the burn-in shaded.

    Of more than 250 moves, means of successive ones are drawn, and of more than 16 chains the first 16. The
    broken line is the mean of all chains; with a reliable estimate, a band shows its 95 % interval. The title has
    R-hat, the effective number of samples, and the estimate, or why there is none.

    Args:
        found: the chains and the estimate.
        path: of the PNG file.
        title: the first line of the title.

    Returns:
        The path.
    """
    parts = [part[:_MAX_CHAINS].cpu().double().numpy() for part in (found.burn_in_traces, found.traces)]
    chains, moves = len(found.traces), sum(part.shape[1] for part in parts)
    together = -(-moves // _MAX_PLACES)
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    ax = figure.subplots()
    start = -parts[0].shape[1]
    for part, first in zip(parts, (start, 0), strict=True):
        places, means = _means_of(part, together)
        ax.plot(first + places, means.T, lw=0.7, alpha=0.6, color=COLORS[0])
    ax.axvspan(start, 0, color="0.9", lw=0, zorder=0, label="burn-in")
    ax.axhline(found.mean, color=COLORS[1], lw=1.4, ls="--", label="mean")
    if found.value is not None and found.standard_error is not None:
        half = 1.96 * found.standard_error
        ax.axhspan(found.value - half, found.value + half, color=COLORS[1], alpha=0.2, lw=0, label="95 % interval")
    ax.set(
        xlabel="moves after burn-in" + (f" (means of {together})" if together > 1 else ""),
        ylabel="nβ (L − L(w*))",
        xlim=(start, moves + start),
    )
    result = "no estimate" if found.value is None else f"λ̂ = {found.value:.4g} ± {found.standard_error:.2g}"
    facts = f"R-hat {found.r_hat:.3f}, {found.effective_samples:,.0f} effective samples, {result}"
    reason = "" if found.value is not None else f"\n{fill(found.reason, 100)}"
    ax.set_title(literal("\n".join(filter(None, (title, facts))) + reason), fontsize=11)
    tidy(ax)
    of_all = f"{chains} chains" if chains <= _MAX_CHAINS else f"{_MAX_CHAINS} of {chains} chains"
    ax.plot([], [], lw=0.7, color=COLORS[0], label=of_all)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=4, frameon=False, fontsize=9)
    return save(figure, path)


def _means_of(traces: NDArray[np.float64], together: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of so many successive moves, the last of fewer, and their places.

    >>> places, means = _means_of(np.array([[1.0, 3.0, 5.0]]), 2)
    >>> places.tolist(), means.tolist()
    ([1.0, 2.5], [[2.0, 5.0]])
    """
    starts = np.arange(0, traces.shape[1], together)
    counts = np.diff(np.append(starts, traces.shape[1]))
    return starts + counts / 2, np.add.reduceat(traces, starts, axis=1) / counts


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
