"""A figure's file, written whole or not at all."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> Path:
    """Draw a figure as PNG under a temporary name, then rename; letters that no font has are boxes in it."""
    unfinished = path.with_name("." + path.name)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)  # of names such as 数
        figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path
