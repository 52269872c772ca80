"""Mean classification error (the paper's MCE) as a torchmetrics metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchmetrics import Metric

from lightning_mnn.landscape.labels import check_labels, wrong

if TYPE_CHECKING:
    from torch import Tensor


class MeanClassificationError(Metric):
    """Fraction of samples whose real-valued output is on the wrong side of the threshold.

    A prediction on the threshold is an error. Up to rounding this means (ŷ − t)(y − t) ≤ 1e-12 for labels at a distance
    of about 1 from the threshold t; for other labels the bound is relative to the square of their distance. States are
    sums, so the value does not depend on the number of batches and processes. Samples of all replicas count equally.

    Args:
        threshold: 0.5 for labels {0, 1}, 0 for labels ±1.
        **kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: (on update) the shapes differ, or targets are not the two labels.

    >>> metric = MeanClassificationError()
    >>> metric(torch.tensor([0.9, 0.5, 0.1, 0.6]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    wrong: Tensor
    total: Tensor

    def __init__(self, threshold: float = 0.5, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        self.add_state("wrong", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: network outputs ŷ, any shape.
            target: labels of the same shape.
        """
        if preds.shape != target.shape:
            raise ValueError(
                f"preds and target must have the same shape, got {tuple(preds.shape)} and {tuple(target.shape)}"
            )
        check_labels(target, self.threshold)
        self.wrong += wrong(preds, target, self.threshold).sum()
        self.total += target.numel()

    def compute(self) -> Tensor:
        """The fraction, a scalar; NaN before the first sample."""
        return self.wrong / self.total
