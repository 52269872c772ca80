"""The figures of slices: the loss on a plane or a line of weight space, with the kinks there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightning_mnn.figures.style import KINDS, literal, save, tidy

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_mnn.landscape.slices.kink_lines import SliceKinks
    from lightning_mnn.landscape.slices.landscape_slice import LandscapeSlice
    from lightning_mnn.verdicts import Kind

    Array = NDArray[np.float64]

_DECADES = 1e-6  # smallest colour, relative to the largest loss
_LAYERS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b")  # colours of the layers' kinks
_INK = 60.0  # kinks of full strength; more are drawn more faintly
_TRAJECTORY = "#111111"


def slice_figure(
    slices: dict[str, LandscapeSlice], path: Path, title: str = "", labels: tuple[str, str] = ("", "")
) -> Path:
    """Draw planes of weight space side by side: the loss in colours, kinks, the centre's region and the trajectory.

    Args:
        slices: planes by the titles of their panels.
        path: of the PNG file.
        title: above all panels; the kind of the centre's certificate follows it.
        labels: what the two directions are.

    Returns:
        The path.
    """
    figure = Figure(figsize=(1 + 6.2 * len(slices), 6.4), layout="constrained")
    legend: dict[str, Any] = {}
    for ax, (name, found) in zip(np.atleast_1d(figure.subplots(1, len(slices))), slices.items(), strict=True):
        _draw_plane(figure, ax, found, legend)
        ax.set(xlabel=literal(labels[0]), ylabel=literal(labels[1]))
        ax.set_title(literal(name), fontsize=11)
    figure.suptitle(literal(_title(title, [found.kind for found in slices.values()])), fontsize=12)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)


def line_figure(slices: dict[str, LandscapeSlice], path: Path, title: str = "", label: str = "") -> Path:
    """Draw lines of weight space side by side: the loss along each, and a mark for each kink.

    Args:
        slices: lines by the titles of their panels.
        path: of the PNG file.
        title: above all panels; the kind of the centre's certificate follows it.
        label: what the direction is.

    Returns:
        The path.
    """
    figure = Figure(figsize=(1 + 6.2 * len(slices), 5.2), layout="constrained")
    legend: dict[str, Any] = {}
    for ax, (name, found) in zip(np.atleast_1d(figure.subplots(1, len(slices))), slices.items(), strict=True):
        _draw_line(ax, found, legend)
        ax.set_xlabel(literal(label))
        ax.set_title(literal(name), fontsize=11)
    figure.suptitle(literal(_title(title, [found.kind for found in slices.values()])), fontsize=12)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)


def _title(title: str, kinds: list[Kind | None]) -> str:
    named = [KINDS[kind][0] for kind in dict.fromkeys(kinds) if kind is not None]
    return "   |   ".join(part for part in (title, *named) if part)


def _draw_plane(figure: Figure, ax: Axes, found: LandscapeSlice, legend: dict[str, Any]) -> None:
    first, second = (axis.cpu().double().numpy() for axis in found.axes)
    shown, norm, name = _colours(found)
    image = ax.pcolormesh(first, second, shown.T, norm=norm, cmap="Greys_r", shading="gouraud", rasterized=True)
    figure.colorbar(image, ax=ax, label=name, shrink=0.8, pad=0.01)
    inside = found.region.cpu().numpy()
    if inside.sum() > 1:
        ax.contourf(first, second, inside.T.astype(float), [0.5, 1.5], colors=["#ffd92f"], alpha=0.4)
        legend["region of the centre"] = Patch(color="#ffd92f", alpha=0.4)
    for depth, kinks in enumerate(found.kinks):
        color = _LAYERS[depth % len(_LAYERS)]
        strength = min(0.9, max(0.03, _INK / max(_num_kinks(kinks), 1)))
        ax.add_collection(LineCollection(list(_ends(kinks)), colors=color, linewidths=0.8, alpha=strength))
        if len(kinks.ends):
            legend[_kinks_label(kinks)] = Line2D([], [], color=color, lw=1.2)
    if len(found.trajectory):
        passed = found.trajectory.cpu().double().numpy()
        if len(passed) > 1:
            way = np.concatenate([passed, np.zeros((1, 2))])
            ax.plot(*way.T, color="white", lw=2.8, alpha=0.9)
            ax.plot(*way.T, color=_TRAJECTORY, lw=1.2, marker=".", ms=5)
            legend["trajectory, projected"] = Line2D([], [], color=_TRAJECTORY, lw=1.2, marker=".")
        (legend["start"],) = ax.plot(*passed[0], "o", ms=9, mfc="white", mec=_TRAJECTORY, mew=1.6, ls="none")
    (legend["centre"],) = ax.plot(0, 0, "*", ms=13, mfc="#f2c500", mec=_TRAJECTORY, mew=0.9, ls="none")
    ax.set(xlim=(first[0], first[-1]), ylim=(second[0], second[-1]))
    ax.ticklabel_format(style="sci", scilimits=(-2, 3))


def _draw_line(ax: Axes, found: LandscapeSlice, legend: dict[str, Any]) -> None:
    places = found.axes[0].cpu().double().numpy()
    losses = found.losses.cpu().double().numpy()
    (legend["loss"],) = ax.plot(places, losses, color="black", lw=1.6)
    positive = losses[losses > 0]
    if len(positive) and positive.max() > 20 * positive.min():
        ax.set_yscale("log")
        ax.set_ylim(max(positive.min() * 0.5, positive.max() * _DECADES), 2 * positive.max())
    for depth, kinks in enumerate(found.kinks):
        color, row = _LAYERS[depth % len(_LAYERS)], 0.045 * depth
        strength = min(0.9, max(0.1, 4 * _INK / max(_num_kinks(kinks), 1)))
        at = kinks.ends.flatten().cpu().double().numpy()
        ax.vlines(at, row, row + 0.04, transform=ax.get_xaxis_transform(), color=color, lw=0.8, alpha=strength)
        if len(at):
            legend[_kinks_label(kinks)] = Line2D([], [], color=color, lw=1.2)
    inside = found.region.cpu().numpy()
    if inside.sum() > 1:
        ax.axvspan(places[inside].min(), places[inside].max(), color="#ffd92f", alpha=0.4, lw=0)
        legend["region of the centre"] = Patch(color="#ffd92f", alpha=0.4)
    for place in found.trajectory.flatten().tolist()[:1]:
        legend["start"] = ax.axvline(place, color=_TRAJECTORY, lw=1, ls=":")
    legend["centre"] = ax.axvline(0, color=_TRAJECTORY, lw=1, ls="--")
    ax.set(xlim=(places[0], places[-1]), ylabel="loss")
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    tidy(ax)


def _colours(found: LandscapeSlice) -> tuple[Array, LogNorm, str]:
    """What the colours show: the loss, or what it has above its lowest where it varies by little."""
    losses = found.losses.cpu().double().numpy()
    finite = losses[np.isfinite(losses)]
    lowest, highest = float(finite.min()), float(finite.max())
    shown, name = losses, "loss"
    if lowest < 0 or (lowest > 0 and highest < 20 * lowest):
        lowest = min(lowest, found.center_loss)
        shown, name = losses - lowest, f"loss − {lowest:.6g}"
    largest = float(np.nanmax(shown[np.isfinite(shown)])) or 1.0
    above = shown[shown > 0]
    smallest = max(float(above.min()) if len(above) else 0.0, _DECADES * largest)
    return np.clip(shown, smallest, largest), LogNorm(smallest, largest), name


def _ends(kinks: SliceKinks) -> Array:
    return kinks.ends.cpu().double().numpy()


def _num_kinks(kinks: SliceKinks) -> int:
    """Number of pairs with a kink in the slice."""
    return len({*zip(kinks.samples.tolist(), kinks.units.tolist(), strict=True)})


def _kinks_label(kinks: SliceKinks) -> str:
    some = f", {kinks.traced:,} of {kinks.pairs:,} pairs" if kinks.traced < kinks.pairs else ""
    how = "exact" if kinks.exact else "grid" if kinks.ends.shape[1] == 2 else "roots"
    return literal(f"kinks of layer {kinks.layer} ({how}{some})")
