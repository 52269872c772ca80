"""What the figures of several networks have in common: colours, kinds, the look of axes and of notes in them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# After Okabe and Ito, whose colours the colour-blind tell apart too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

# Kinds, their names in the legend, colours and markers; None: nothing was asked, or only necessary conditions hold.
KINDS: dict[str | None, tuple[str, str, str]] = {
    "differentiable_minimum": ("differentiable minimum", "#0072b2", "o"),
    "kink_minimum": ("minimum on kinks", "#e69f00", "D"),
    "saddle": ("saddle", "#cc79a7", "s"),
    "not_stationary": ("not stationary", "#7f7f7f", "x"),
    "on_kink": ("on a kink", "#56b4e9", "^"),
    "undecided": ("undecided", "#bfbfbf", "+"),
    None: ("not judged", "#000000", "."),
}

NOTE: dict[str, Any] = {
    "fontsize": 9,
    "color": "0.4",
    "path_effects": [patheffects.withStroke(linewidth=2.5, foreground="white")],  # a dot may lie behind it
}


def tidy(ax: Axes) -> None:
    """A faint grid behind the data, and no frame above and on the right."""
    ax.grid(visible=True, color="0.93")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def mark_zeros(ax: Axes, foot: float) -> None:
    """Set what is exactly zero, drawn at the foot of a logarithmic axis, apart; the note is outside, off the dots."""
    ax.axhline(foot * 3, color="0.6", lw=0.8, ls=":")
    ax.text(1.01, foot, "exactly 0", ha="left", va="center", transform=ax.get_yaxis_transform(), **NOTE)


def plain(text: str) -> str:
    r"""Text that is drawn as it is written: dollar signs around what is no formula are escaped.

    >>> print(plain("a$b^^c$"))
    a\$b^^c\$
    """
    return text.replace("$", r"\$")


def save(figure: Figure, path: Path) -> Path:
    """Draw a figure as PNG under a temporary name, then rename; letters that no font has are boxes in it."""
    unfinished = path.with_name("." + path.name)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)  # of names such as 数
        figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path
