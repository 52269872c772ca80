"""Which samples are trained on, and with which labels: subsets, held-out samples, flipped and random labels.

Shapes: N samples, R replicas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def subset(available: int, count: int, seed: int) -> Tensor:
    """Ascending indices of ``count`` random samples out of ``available``.

    Raises:
        ArgumentError: there are fewer samples.

    >>> subset(5, 5, seed=0), len(subset(5, 2, seed=0))
    (tensor([0, 1, 2, 3, 4]), 2)
    """
    if count > available:
        raise ArgumentError("num_samples", count, f"must be at most {available}, the size of the training set")
    return torch.randperm(available, generator=generator(seed, "subset"))[:count].sort().values


def held_out(available: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Ascending indices of the training samples, and of the fraction of all samples that is held out, at random.

    Raises:
        ArgumentError: one of the two would be empty.

    >>> [len(part) for part in held_out(10, 0.3, seed=0)]
    [7, 3]
    """
    count = round(fraction * available)
    if not 0 < count < available:
        problem = f"leaves an empty training or test set of the {available} samples"
        raise ArgumentError("test_fraction", fraction, problem, "choose another, or 0")
    order = torch.randperm(available, generator=generator(seed, "held out"))
    return order[count:].sort().values, order[:count].sort().values


def changed_labels(targets: Tensor, seeds: Sequence[int], label_noise: float, *, random_labels: bool) -> Tensor:
    """Labels of which some are wrong, or all of which are random.

    Args:
        targets: (N,) or (R, N), with two different values.
        seeds: one per replica.
        label_noise: fraction of each replica's labels that are replaced by the other label, rounded to whole samples.
        random_labels: whether all labels are first replaced by random ones, each of the two with probability ½.

    Returns:
        The targets themselves if nothing changes; else (N,), or (R, N) if there are several replicas.

    Raises:
        ArgumentError: the targets are not two labels.

    >>> changed_labels(torch.tensor([-1.0, -1.0, 1.0]), [0], label_noise=1.0, random_labels=False)
    tensor([ 1.,  1., -1.])
    """
    if not label_noise and not random_labels:
        return targets
    labels = targets.unique()  # type: ignore[no-untyped-call]
    if len(labels) != 2:
        name, value = ("random_labels", True) if random_labels else ("label_noise", label_noise)
        problem = f"needs targets with two labels, and they have {len(labels)} different values"
        raise ArgumentError(name, value, problem, "leave it out")
    changed = targets.expand(len(seeds), -1).clone()  # (R, N)
    for row, seed in zip(changed, seeds, strict=True):
        if random_labels:
            row[:] = labels[torch.randint(0, 2, row.shape, generator=generator(seed, "random labels"))]
        wrong = torch.randperm(len(row), generator=generator(seed, "label noise"))[: round(label_noise * len(row))]
        row[wrong] = labels.sum() - row[wrong]
    return changed if len(seeds) > 1 else changed[0]
