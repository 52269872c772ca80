"""A figure's file, written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> Path:
    """Draw a figure as PNG under a temporary name, then rename."""
    unfinished = path.with_name("." + path.name)
    FigureCanvasAgg(figure)
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path
