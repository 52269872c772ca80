"""The figures of input space: linear regions, decision boundary and samples on a plane of inputs."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import TwoSlopeNorm, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.tri import Triangulation
from PIL import Image

from lightning_mnn.figures.style import literal, save
from lightning_mnn.utilities.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_mnn.landscape.slices.input_regions import InputRegions

    Array = NDArray[np.float64]

_LAYERS = ("#404040", "#8c2d8c", "#2d6e2d", "#b25d00")  # colours of the layers' kinks
_LABELS = ("#2166ac", "#b2182b")  # of samples below and above the threshold, and of the outputs there
_FRAME_MS = 120
_LAST_FRAME_MS = 2000


def input_space_figure(
    regions: InputRegions,
    path: Path,
    samples: tuple[Array, Array],
    *,
    threshold: float | None = None,
    title: str = "",
    labels: tuple[str, str] = ("x₁", "x₂"),
) -> Path:
    """Draw the linear regions in colours of their own, and the output of a network with one output beside them.

    Args:
        regions: what is drawn.
        path: of the PNG file.
        samples: coordinates of samples in the plane (n, 2), and their targets (n,).
        threshold: of the decision; None: there is none.
        title: above both panels.
        labels: of the axes.

    Returns:
        The path.
    """
    figure = Figure(figsize=(12.6, 6.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    rng = np.random.default_rng(0)
    hues = np.stack([rng.random(len(regions.polygons)), *np.broadcast_arrays(0.28, np.ones(len(regions.polygons)))], 1)
    left.add_collection(PolyCollection(list(regions.polygons), facecolors=hsv_to_rgb(hues), edgecolors="none"))
    _draw_kinks(left, regions)
    left.set_title(f"{len(regions.polygons):,} linear regions", fontsize=11)
    spread = _draw_output(right, regions, threshold)
    right.set_title("output, kinks and decision boundary" if threshold is not None else "output and kinks", fontsize=11)
    if spread is not None:
        figure.colorbar(spread, ax=right, label="output", shrink=0.8, pad=0.01)
    for ax in (left, right):
        _draw_samples(ax, *samples, threshold)
        _frame(ax, regions, labels)
    figure.suptitle(literal(title), fontsize=12)
    legend = [Line2D([], [], color=_layer(depth), lw=1.2) for depth in range(len(regions.kinks))]
    names = [f"kinks of layer {place}" for place in regions.kinks]
    if threshold is not None:
        legend.append(Line2D([], [], color="black", lw=2.4))
        names.append("decision boundary")
    figure.legend(legend, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return save(figure, path)


def input_space_animation(
    frames: Sequence[tuple[str, InputRegions]],
    path: Path,
    samples: tuple[Array, Array],
    *,
    threshold: float | None = None,
    labels: tuple[str, str] = ("x₁", "x₂"),
) -> Path:
    """Write a GIF of the outputs, the kinks and the decision boundary of several networks, one a frame.

    Args:
        frames: titles and regions, in order.
        path: of the GIF file.
        samples: as for :func:`input_space_figure`.
        threshold: of the decision; None: there is none.
        labels: of the axes.

    Returns:
        The path.
    """
    images = []
    for title, regions in frames:
        figure = Figure(figsize=(5.2, 5.4), layout="constrained", dpi=90)
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        _draw_output(ax, regions, threshold)
        _draw_samples(ax, *samples, threshold)
        _frame(ax, regions, labels)
        ax.set_title(literal(f"{title}, {len(regions.polygons):,} regions"), fontsize=11)
        picture = BytesIO()
        figure.savefig(picture, format="png")
        images.append(Image.open(picture).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE))
    durations = [_FRAME_MS] * (len(images) - 1) + [_LAST_FRAME_MS]
    with whole_file(path) as unfinished:
        images[0].save(
            unfinished, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True
        )
    return path


def _draw_output(ax: Axes, regions: InputRegions, threshold: float | None) -> Any:
    """The output of a network with one, which is affine on each polygon; nothing for several outputs."""
    spread = None
    if regions.outputs.shape[1] == 1:
        corners = np.concatenate(regions.polygons)
        values = np.concatenate(
            [f[0, 0] + p @ f[0, 1:] for p, f in zip(regions.polygons, regions.outputs, strict=True)]
        )
        starts = np.cumsum([0, *(len(polygon) for polygon in regions.polygons)])
        fans = [(start, i, i + 1) for start, end in pairwise(starts) for i in range(start + 1, end - 1)]
        center = 0.0 if threshold is None else threshold
        far = max(float(np.abs(values - center).max()), 1e-12)
        triangles = Triangulation(corners[:, 0], corners[:, 1], np.array(fans))
        norm = TwoSlopeNorm(center, center - far, center + far)
        spread = ax.tripcolor(triangles, values, shading="gouraud", cmap="RdBu_r", norm=norm, rasterized=True)
    _draw_kinks(ax, regions)
    if threshold is not None or regions.outputs.shape[1] > 1:
        boundary = regions.decision_boundary(0.0 if threshold is None else threshold)
        ax.add_collection(LineCollection(list(boundary), colors="black", linewidths=2.4, capstyle="round"))
    return spread


def _draw_kinks(ax: Axes, regions: InputRegions) -> None:
    for depth, segments in enumerate(regions.kinks.values()):
        ax.add_collection(LineCollection(list(segments), colors=_layer(depth), linewidths=0.6, alpha=0.7))


def _layer(depth: int) -> str:
    return _LAYERS[depth % len(_LAYERS)]


def _draw_samples(ax: Axes, places: Array, targets: Array, threshold: float | None) -> None:
    colors = "black" if threshold is None else [_LABELS[int(target > threshold)] for target in targets]
    ax.scatter(places[:, 0], places[:, 1], c=colors, s=22, edgecolors="white", linewidths=0.7, zorder=3)


def _frame(ax: Axes, regions: InputRegions, labels: tuple[str, str]) -> None:
    ax.set(xlim=regions.ranges[0], ylim=regions.ranges[1], xlabel=literal(labels[0]), ylabel=literal(labels[1]))
    ax.set_aspect("equal")
