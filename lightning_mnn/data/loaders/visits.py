"""Counts of how often training sees each sample.

Shapes: N samples, R replicas, B samples per batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_MIN_PENDING_INDICES = 1 << 16  # indices that are collected in memory before they are counted together, at least


class Visits:
    """Counts how often each sample was read, from the same indices that were used to read it.

    Indices are collected first and counted many at a time: to count those of one small batch would take a large part of
    a small network's step. Until then, an index that is a view keeps its whole storage in memory, and counts as
    that many numbers.

    Args:
        num_samples: N.

    >>> visits = Visits(3)
    >>> visits.add(slice(0, 3))
    >>> visits.add(torch.tensor([2, 0]))
    >>> visits.counts().tolist()
    [2, 1, 2]
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self._counts = torch.zeros(num_samples, dtype=torch.int32)
        self._slices: dict[tuple[int, int], int] = {}  # how often each slice was added
        self._indices: list[Tensor] = []
        self._num_pending = 0  # numbers in the storages of these indices
        self._last_storage = 0  # address of the last index's storage, which is counted once

    def add(self, index: slice | Tensor, times: int = 1) -> None:
        """Record that samples were read.

        Args:
            index: a slice with start and stop, or the indices of the samples: (B,), or (R, B) if each replica has its
                own order. A tensor must not be changed afterwards.
            times: how often; with a tensor, once.
        """
        if isinstance(index, slice):
            span = index.start, index.stop
            self._slices[span] = self._slices.get(span, 0) + times
            return
        self._indices.append(index)
        storage = index.untyped_storage()
        if storage.data_ptr() != self._last_storage:
            self._last_storage = storage.data_ptr()
            self._num_pending += storage.nbytes() // index.element_size()
        if self._num_pending >= max(_MIN_PENDING_INDICES, self.num_samples):
            self._count()

    def counts(self) -> Tensor:
        """How often each sample was read: (N,), or (R, N) if each replica has its own order."""
        self._count()
        return self._counts

    def go_on_from(self, counts: Tensor) -> None:
        """Replace all counts by these."""
        self._counts = counts
        self._clear_pending()

    def _count(self) -> None:
        """Count the pending slices and indices."""
        for (low, high), times in self._slices.items():
            self._counts[..., low:high] += times
        if self._indices:
            index = torch.cat(self._indices, dim=-1).cpu()
            if index.ndim > self._counts.ndim:
                self._counts = self._counts.repeat(len(index), 1)
            one = torch.ones((), dtype=self._counts.dtype)
            self._counts.scatter_add_(-1, index, one.expand(index.shape))
        self._clear_pending()

    def _clear_pending(self) -> None:
        self._slices, self._indices, self._num_pending, self._last_storage = {}, [], 0, 0


def packed(counts: Tensor) -> dict[str, Any]:
    """Counts in the form for a checkpoint: two numbers if all counts are equal, as they are between epochs.

    >>> packed(torch.tensor([2, 2])), packed(torch.tensor([2, 3]))
    ({'samples': 2, 'fewest': 2}, {'samples': 2, 'fewest': 2, 'more': tensor([0, 1])})
    """
    fewest = int(counts.min())
    more = counts - fewest
    return {"samples": counts.shape[-1], "fewest": fewest} | ({"more": more} if bool(more.any()) else {})


def unpacked(state: dict[str, Any]) -> Tensor:
    """Counts from the output of :func:`packed`.

    >>> unpacked(packed(torch.tensor([2, 3]))).tolist()
    [2, 3]
    """
    more: Tensor = state.get("more", torch.zeros(state["samples"], dtype=torch.int32))
    counts: Tensor = more + state["fewest"]
    return counts
