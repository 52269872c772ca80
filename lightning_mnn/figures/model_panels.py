"""Pictures of what any program logged in a run, one for each quantity, for the page of the run."""

from __future__ import annotations

import io
import math
import re
from functools import partial
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mnn.figures.model import PANELS, draw_layers, layers_of, legend_below
from lightning_mnn.figures.style import COLORS, literal, quiet_glyphs, tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from matplotlib.axes import Axes

    Series = Mapping[str, tuple[list[int], list[float]]]

OWN_GROUPS = ("minimum/", "pattern/", "gradient/", "volume/")  # logged by the callbacks

_SIZE = (5.4, 3.9)  # inches
_DPI = 130
_MAX_POINTS = 600  # of a curve: more than there are columns of dots
_MARKED_POINTS = 60  # fewer have a mark each
_MAX_OTHERS = 12  # pictures of what the program itself logged
_LOG_RATIO = 30.0  # of the largest to the smallest value from which an axis is logarithmic
_PARTS = re.compile(r"(?:^|[/_.])(?:train|training|val|valid|validation|test)(?=[/_.]|$)|_(?:step|epoch)$")

# Measures of each layer: title, unit, group, name.
_OF_LAYERS = (
    ("Dead units", "fraction of the layer's units", "pattern", "dead_fraction"),
    ("Dormant units", "fraction of the layer's units", "pattern", "dormant_fraction"),
    ("Effective rank of the activations", "directions", "pattern", "effective_rank"),
    ("Local complexity", "units that change their piece", "pattern", "local_complexity"),
    ("Gradients beside their weights", "‖g‖ / ‖θ‖", "gradient", "relative_norm"),
)
_TOTALS = (
    ("Gradient that training follows", "norm", "gradient/norm"),
    ("Gradient noise scale", "samples", "gradient/noise_scale"),
)


def panels_of(series: Series) -> Iterator[tuple[str, bytes]]:
    """Pictures of the logged values, each with its title, as PNG: what the program logged, then what callbacks did.

    Metrics whose names differ only by "train", "val" or "test" share a picture, as ``train_loss`` and ``val/loss`` do.
    At most 12 pictures show what the program logged itself.

    Args:
        series: steps and values by logged name.
    """
    for title, names in list(groups_of(series).items())[:_MAX_OTHERS]:
        yield from _drawn(title, partial(_curves, series=series, names=names, unit=title))
    for draw in PANELS:
        yield from _drawn("", lambda ax, draw=draw: draw(ax, series))  # type: ignore[misc]
    for title, unit, name in _TOTALS:
        yield from _drawn(title, partial(_curves, series=series, names=[name], unit=unit))
    for title, unit, group, measure in _OF_LAYERS:
        yield from _drawn(title, partial(_layers, series=series, group=group, measure=measure, unit=unit))


def groups_of(names: Sequence[str] | Mapping[str, object]) -> dict[str, list[str]]:
    """What a program logged itself, grouped by what it is; losses first.

    >>> groups_of(["train_acc", "val/loss", "train_loss_epoch", "lr", "minimum/loss", "val_acc"])
    {'loss': ['val/loss', 'train_loss_epoch', 'minimum/loss'], 'acc': ['train_acc', 'val_acc'], 'lr': ['lr']}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        if not name.startswith(OWN_GROUPS) or name in ("minimum/loss", "minimum/mse"):
            what = name.removeprefix("minimum/")
            while (shorter := _PARTS.sub("", what)) != what:
                what = shorter
            groups.setdefault(what.strip("/_.") or name, []).append(name)
    return dict(sorted(groups.items(), key=lambda group: "loss" not in group[0]))


def _drawn(title: str, draw: Callable[[Axes], bool]) -> Iterator[tuple[str, bytes]]:
    """One picture, if there is anything to draw."""
    figure = Figure(figsize=_SIZE, layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    tidy(ax)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_xlabel("optimiser step")
    ax.set_title(literal(title))
    if draw(ax):
        ax.title.set_fontsize(11)
        file = io.BytesIO()
        with quiet_glyphs():
            figure.savefig(file, format="png")
        yield ax.get_title().replace(r"\$", "$"), file.getvalue()


def _curves(ax: Axes, series: Series, names: Sequence[str], unit: str) -> bool:
    """Draw curves as they are, on a logarithmic axis if they are positive and differ much."""
    shown = []
    for color, name in zip(COLORS, names, strict=False):
        points = [(x, y) for x, y in zip(*series.get(name, ([], [])), strict=True) if math.isfinite(y)]
        if points:
            every = -(-len(points) // _MAX_POINTS)
            kept = [*points[:-1:every], points[-1]]
            few = "o" if len(points) <= _MARKED_POINTS else ""
            ax.plot(*zip(*kept, strict=True), color=color, lw=1.2, marker=few, ms=3, label=literal(name))
            shown += [y for _, y in kept]
    if _is_wide(shown):
        ax.set_yscale("log")
    ax.set_ylabel(literal(unit))
    if len(names) > 1:
        legend_below(ax, len(ax.lines))
    return bool(shown)


def _layers(ax: Axes, series: Series, group: str, measure: str, unit: str) -> bool:
    """Draw a measure of each layer."""
    shown = draw_layers(ax, series, group, measure)
    ax.set_ylabel(unit)
    if _is_wide([value for name in layers_of(series, group, measure).values() for value in series[name][1]]):
        ax.set_yscale("log")
        ax.autoscale(axis="y")
    return shown


def _is_wide(values: Sequence[float]) -> bool:
    """Whether values are positive and differ by a large factor."""
    return bool(values) and min(values) > 0 and max(values) >= _LOG_RATIO * min(values)
