"""Two labels, the threshold between them, and which predictions are wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances

if TYPE_CHECKING:
    from torch import Tensor


def check_labels(targets: Tensor, threshold: float) -> None:
    """Check that targets are the two labels of a threshold: {0, 1} for 0.5, and ±1 for 0.

    For any other threshold, no target may be equal to it.

    Raises:
        ValueError: there are other targets.
    """
    if threshold in (0.5, 0.0):
        low = 0.0 if threshold == 0.5 else -1.0
        fits = (targets == 1) | (targets == low)
        expected = f"{low:g} and 1"
    else:
        fits = targets != threshold
        expected = f"values on either side of {threshold:g}"
    if not bool(fits.all()):
        found = targets[~fits].flatten()[0].item()
        raise ValueError(
            f"labels are not binary: threshold={threshold:g} expects {expected}, found {found:g}. "
            "Map the classes to two labels first"
        )


def infer_threshold(targets: Tensor) -> float | None:
    """The decision threshold of two labels: 0.5 for {0, 1}, 0 for ±1; None for any other targets.

    Raises:
        ValueError: all targets are 1, which fits both pairs of labels.

    >>> infer_threshold(torch.tensor([0.0, 1.0])), infer_threshold(torch.tensor([-1.0, 1.0]))
    (0.5, 0.0)
    """
    fitting = fitting_thresholds(targets)
    if len(fitting) > 1:
        raise ValueError("all targets are 1, which fits labels {0, 1} and ±1: give threshold=0.5 or threshold=0")
    return fitting.pop() if fitting else None


def fitting_thresholds(targets: Tensor) -> set[float]:
    """The thresholds whose labels include all targets: 0.5 for {0, 1}, 0 for ±1."""
    one = targets == 1
    return {threshold for threshold, low in ((0.5, 0), (0.0, -1)) if bool((one | (targets == low)).all())}


def wrong(predictions: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Which samples are misclassified, bool (..., N): (ŷ − threshold)(y − threshold) ≤ 1e-12 s².

    s is the scale of the labels: 1 for {0, 1} and ±1; for others, the number nearest to 1 between their distance to the
    threshold and twice that distance. A prediction on the threshold is an error, and so is NaN.

    >>> predictions, targets = torch.tensor([2e-7, 2e-7, 0.0]), torch.tensor([1e-7, -1e-7, 1e-7])
    >>> wrong(predictions, targets, threshold=0.0)
    tensor([False,  True,  True])
    """
    half = (targets - threshold).abs()
    size = torch.clamp(torch.ones_like(half), min=half, max=2 * half)
    return ~((predictions - threshold) / size * ((targets - threshold) / size) > tolerances.MAX_THRESHOLD_PRODUCT)
