"""Style that several figures share: colours, names of the kinds, and the look of axes and notes."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_mnn.utilities.files import whole_file
from lightning_mnn.verdicts import Class, Ended, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The palette of Okabe and Ito, which colour-blind readers can distinguish.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

# Name in the legend, colour and marker of each kind; None: not certified, or only necessary conditions are fulfilled.
KINDS: dict[Kind | None, tuple[str, str, str]] = {
    Kind.DIFFERENTIABLE_MINIMUM: ("differentiable minimum", "#0072b2", "o"),
    Kind.KINK_MINIMUM: ("minimum on kinks", "#e69f00", "D"),
    Kind.SADDLE: ("saddle", "#cc79a7", "s"),
    Kind.NOT_STATIONARY: ("not stationary", "#7f7f7f", "x"),
    Kind.ON_KINK: ("on a kink", "#56b4e9", "^"),
    Kind.UNDECIDED: ("undecided", "#bfbfbf", "+"),
    None: ("not classified", "#000000", "."),
}


@dataclass(frozen=True)
class ClassLook:
    """The name of a class, a short one for tables, and its colour."""

    name: str
    short: str
    color: str


CLASSES = {
    Class.GLOBAL: ClassLook("global minimum (zero error)", "global", "#0072b2"),
    Class.SUBOPTIMAL: ClassLook("sub-optimal differentiable minimum", "sub-optimal", "#d55e00"),
    Class.KINK: ClassLook("minimum on kinks, with error", "kink with error", "#e69f00"),
    Class.NOT_TOLD: ClassLook("no certified minimum", "not told", "#7f7f7f"),
}

# All that a network may have ended in, in the order of figures and tables; what lies ahead follows what is reached.
ENDS = tuple(
    Ended(known, ahead) for known in CLASSES for ahead in (False, True) if known is not Class.NOT_TOLD or not ahead
)

NOTE: dict[str, Any] = {
    "fontsize": 9,
    "color": "0.4",
    "path_effects": [patheffects.withStroke(linewidth=2.5, foreground="white")],  # legible in front of a dot
}


def look_of(ended: Ended) -> ClassLook:
    """The name, short name and colour of a class; of one that lies ahead, in a lighter colour.

    >>> look_of(Ended(Class.GLOBAL, ahead=True)).short, look_of(Ended(Class.GLOBAL, ahead=True)).color
    ('global ahead', '#8cc0dc')
    """
    look = CLASSES[ended.known]
    if not ended.ahead:
        return look
    return ClassLook(f"ahead: {look.name}", f"{look.short} ahead", lighter(look.color))


def lighter(color: str, share: float = 0.55) -> str:
    """A colour mixed with white.

    >>> lighter("#000000", 0.5), lighter("#0072b2", 0.0)
    ('#808080', '#0072b2')
    """
    parts = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
    return "#" + "".join(f"{round(part + share * (255 - part)):02x}" for part in parts)


def tidy(ax: Axes) -> None:
    """Draw a faint grid behind the data, and remove the frame at the top and on the right."""
    ax.grid(visible=True, color="0.93")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def mark_zeros(ax: Axes, foot: float) -> None:
    """Separate values that are exactly zero, drawn at the foot of a logarithmic axis; a note stands beside the axes."""
    ax.axhline(foot * 3, color="0.6", lw=0.8, ls=":")
    ax.text(1.01, foot, "exactly 0", ha="left", va="center", transform=ax.get_yaxis_transform(), **NOTE)


def literal(text: str) -> str:
    r"""Text for matplotlib that is drawn literally: dollar signs, which would start a formula, are escaped.

    >>> print(literal("a$b^^c$"))
    a\$b^^c\$
    """
    return text.replace("$", r"\$")


@contextmanager
def quiet_glyphs() -> Iterator[None]:
    """A context without warnings about letters that are missing from the font, of names such as 数: boxes are drawn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG file atomically; letters that are missing from the font become boxes."""
    FigureCanvasAgg(figure)
    with whole_file(path) as unfinished, quiet_glyphs():
        figure.savefig(unfinished, format="png")
    return path
