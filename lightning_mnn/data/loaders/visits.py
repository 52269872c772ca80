"""How often training sees each sample.

Shapes: N samples, R replicas, B samples of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_NOTED = 1 << 16  # indices that are kept in memory to be counted together, at least


class Visits:
    """How often each sample was looked up, counted from the very indices by which it was.

    Indices are noted as they come and counted many together: to count those of a small batch takes as long as a good
    part of a small network's step. An index that is a view keeps all that it is a view of in memory until
    then, and weighs as much.

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
        self._slices: dict[tuple[int, int], int] = {}  # how often each came
        self._indices: list[Tensor] = []
        self._noted = 0  # numbers that they keep in memory
        self._kept = 0  # where those begin that the last index keeps

    def add(self, index: slice | Tensor) -> None:
        """Note that samples were looked up.

        Args:
            index: a slice with start and stop, or the samples' numbers (B,), (R, B) where each replica has an order of
                its own; a tensor must stay as it is.
        """
        if isinstance(index, slice):
            span = index.start, index.stop
            self._slices[span] = self._slices.get(span, 0) + 1
            return
        self._indices.append(index)
        storage = index.untyped_storage()
        if storage.data_ptr() != self._kept:
            self._kept = storage.data_ptr()
            self._noted += storage.nbytes() // index.element_size()
        if self._noted >= max(_NOTED, self.num_samples):
            self._count()

    def counts(self) -> Tensor:
        """How often each sample was looked up, (N,), or (R, N) where each replica has an order of its own."""
        self._count()
        return self._counts

    def go_on_from(self, counts: Tensor) -> None:
        """Forget what was counted, and begin with these counts."""
        self._counts = counts
        self._forget()

    def _count(self) -> None:
        """Count what is noted."""
        for (low, high), times in self._slices.items():
            self._counts[..., low:high] += times
        if self._indices:
            index = torch.cat(self._indices, dim=-1).cpu()
            if index.ndim > self._counts.ndim:
                self._counts = self._counts.repeat(len(index), 1)
            one = torch.ones((), dtype=self._counts.dtype)
            self._counts.scatter_add_(-1, index, one.expand(index.shape))
        self._forget()

    def _forget(self) -> None:
        self._slices, self._indices, self._noted, self._kept = {}, [], 0, 0


def packed(counts: Tensor) -> dict[str, Any]:
    """Counts for a checkpoint: two numbers where all are equal, as they are between epochs.

    >>> packed(torch.tensor([2, 2])), packed(torch.tensor([2, 3]))
    ({'samples': 2, 'fewest': 2}, {'samples': 2, 'fewest': 2, 'more': tensor([0, 1])})
    """
    fewest = int(counts.min())
    more = counts - fewest
    return {"samples": counts.shape[-1], "fewest": fewest} | ({"more": more} if bool(more.any()) else {})


def unpacked(state: dict[str, Any]) -> Tensor:
    """Counts from what :func:`packed` made of them.

    >>> unpacked(packed(torch.tensor([2, 3]))).tolist()
    [2, 3]
    """
    more: Tensor = state.get("more", torch.zeros(state["samples"], dtype=torch.int32))
    counts: Tensor = more + state["fewest"]
    return counts
