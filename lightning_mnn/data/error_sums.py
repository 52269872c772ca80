"""MSE and MCE of a set of samples that comes in batches: from sums over samples and processes, not means of batches.

Shapes: B samples of a batch, R replicas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_mnn.data.checks import the_threshold
from lightning_mnn.landscape.labels import check_labels, fitting_thresholds, wrong
from lightning_mnn.utilities.transfer import widest_dtype

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

_THRESHOLDS = (0.5, 0.0)  # of labels {0, 1} and ±1


class ErrorSums:
    """Sums of squared errors and of mistakes, from which the MSE and the MCE of a whole set follow.

    Args:
        threshold: decision threshold of the classification error; None: it is inferred from the targets.
        regression: there is no classification error.

    >>> sums = ErrorSums(threshold=0.0)
    >>> sums.add(torch.tensor([0.5, 1.0]), torch.tensor([1.0, -1.0]))
    >>> sums.add(torch.tensor([1.0]), torch.tensor([1.0]))
    >>> sums.means()
    {'mse': tensor(1.4167, dtype=torch.float64), 'mce': tensor(0.3333, dtype=torch.float64)}
    """

    def __init__(self, threshold: float | None = None, *, regression: bool = False) -> None:
        self._is_given = threshold is not None
        self._thresholds = () if regression else _THRESHOLDS if threshold is None else (threshold,)
        self._fitting = set(self._thresholds)
        self._sums: Tensor | None = None  # numbers of samples, squared errors, mistakes for each threshold

    def add(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch, which may be empty.

        Args:
            predictions: (B,) or (R, B).
            targets: (B,) or (R, B).

        Raises:
            ValueError: targets are not the two labels of the given threshold.
        """
        if self._is_given:
            for threshold in self._thresholds:
                check_labels(targets, threshold)
        elif self._fitting:
            self._fitting &= fitting_thresholds(targets)
        dtype = widest_dtype(predictions.device)
        squared = (predictions.to(dtype) - targets.to(dtype)).square().sum(-1)
        mistakes = [wrong(predictions, targets, threshold).sum(-1).to(dtype) for threshold in self._thresholds]
        sums = torch.stack([torch.full_like(squared, predictions.shape[-1]), squared, *mistakes])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, strategy: pl.strategies.Strategy | None = None) -> dict[str, Tensor]:
        """The errors of all samples, float64 () or (R,): ``mse``, and ``mce`` if the targets are two labels.

        Args:
            strategy: of a Trainer, over whose processes the samples are distributed; every process must call this.

        Raises:
            ValueError: all targets are 1, and no threshold was given; or there are no samples.
        """
        if self._sums is None:
            raise ValueError("no samples were added")
        sums, fitting = self._sums, [threshold in self._fitting for threshold in self._thresholds]
        if strategy is not None:
            sums = strategy.reduce(sums.clone(), reduce_op="sum")
            fitting = [strategy.reduce_boolean_decision(one) for one in fitting]
        count, squared, *mistakes = sums.cpu().double()
        chosen = the_threshold([one for one, fits in zip(self._thresholds, fitting, strict=True) if fits])
        found = {"mse": squared / count}
        if chosen is not None:
            found["mce"] = mistakes[self._thresholds.index(chosen)] / count
        return found
