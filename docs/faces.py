"""Draws the picture of the page on faces: ``python docs/faces.py`` writes ``outputs/reference/faces/figure.png``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from lightning_mnn.landscape import certify, planted_kink_minimum

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

PATH = Path(__file__).parent.parent / "outputs" / "reference" / "faces" / "figure.png"
KINK, FACE, FLAT = "0.55", "tab:red", "tab:blue"


def main() -> None:
    """Draw a certified minimum on a kink, and the valley of a symmetry."""
    planted = planted_kink_minimum(7, 2, 1, seed=1)
    found = certify(planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
    if found.kind != "kink_minimum":
        raise RuntimeError(f"the planted minimum is certified as {found.kind}")
    x, y = planted.inputs.numpy(), planted.targets.numpy()
    w, z = found.hidden_weights[0].numpy(), float(found.output_weights[0])
    (on_kink,) = np.flatnonzero(planted.kinks[:, 0].numpy())

    def loss(points: Any) -> Any:
        return np.mean((np.maximum(points @ x.T, 0) * z - y) ** 2, axis=-1)

    figure = Figure((10.5, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    normal = x[on_kink] / np.linalg.norm(x[on_kink])
    along = np.array([-normal[1], normal[0]])
    weight_plane(left, loss, w, x, on_kink)
    two_ways(middle, loss, w, along, normal)
    valley(right)
    PATH.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PATH, dpi=120)


def weight_plane(axes: Axes, loss: Callable[[Any], Any], w: Any, x: Any, on_kink: int) -> None:
    """Contours of the loss over w, with the kink of each sample."""
    size = 1.2 * np.linalg.norm(w)
    across, up = np.meshgrid(*(np.linspace(c - size, c + size, 400) for c in w))
    values = loss(np.stack([across, up], -1))
    axes.contour(
        across, up, values, np.quantile(values, np.linspace(0, 0.9, 16)) + 1e-9, cmap="Greys_r", linewidths=0.7
    )
    for sample, normal in enumerate(x):
        direction = np.array([-normal[1], normal[0]]) / np.linalg.norm(normal)
        ends = np.outer([-4 * size, 4 * size], direction)
        colour, width = (FACE, 2) if sample == on_kink else (KINK, 0.8)
        axes.plot(*ends.T, color=colour, lw=width, ls="-" if sample == on_kink else "--")
    axes.plot(*w, "o", color="black", ms=6)
    axes.set(xlim=(w[0] - size, w[0] + size), ylim=(w[1] - size, w[1] + size), xlabel="$w_1$", ylabel="$w_2$")
    axes.set_title("Kinks (dashed), and the face (red)\nof a minimum (dot)", fontsize=10)


def two_ways(axes: Axes, loss: Callable[[Any], Any], w: Any, along: Any, normal: Any) -> None:
    """The loss on lines through the minimum, along the face and across it."""
    moves = np.linspace(-0.25, 0.25, 401) * np.linalg.norm(w)
    axes.plot(moves, loss(w + moves[:, None] * along), color=FACE, lw=2, label="along the face: smooth")
    axes.plot(moves, loss(w + moves[:, None] * normal), color="black", lw=1.5, label="off the kink: a corner")
    axes.set(xlabel="distance from the minimum", ylabel="loss")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("Two tests: slopes off the kink,\ncurvature along the face", fontsize=10)


def valley(axes: Axes) -> None:
    """Contours of (z w − 1)², flat along z w = 1."""
    ends = np.linspace(0.2, 2.6, 300)
    w, z = np.meshgrid(ends, ends)
    axes.contour(w, z, np.sqrt((w * z - 1) ** 2), np.linspace(0.1, 2.5, 12), cmap="Greys_r", linewidths=0.7)
    axes.plot(ends, 1 / ends, color=FLAT, lw=2)
    axes.plot(1, 1, "o", color="black", ms=6)
    axes.set(xlim=(0.2, 2.6), ylim=(0.2, 2.6), xlabel="$w$", ylabel="$z$")
    axes.set_title("A flat direction: $w$ times $s$, $z$ by $s$\nchanges no output (blue)", fontsize=10)


if __name__ == "__main__":
    main()
