"""The images of a data set that are used for training, their groups and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_mnn.data.loaders.rows import RowFile, Rows, rows_of
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_mnn.data.images.store import LabelledImages


_COMPARED_ROWS = 256  # rows of a file that go into the digest by which a checkpoint recognises its data

BLOCK_NUMBERS = 1 << 25  # numbers of samples in a block when moments are computed: 256 MiB in float64


class ImageSamples:
    """The images of a source that are used for training, or for the test set.

    Attributes:
        rows: of the source.
        chosen: indices of the rows that are used; None: all.
        ones: whether each sample is in the second group, (N,).
    """

    def __init__(self, source: LabelledImages, groups: Groups | None) -> None:
        group_of = np.full(len(source.names), -1)
        for group, classes in enumerate(group_classes(groups, source.names)):
            group_of[list(classes)] = group
        found = group_of[source.classes]
        if (counts := [int((found == group).sum()) for group in (0, 1)]) and not all(counts):
            raise ValueError(f"groups must both contain images, got {counts[0]} of label 0 and {counts[1]} of label 1")
        self.rows: Rows = rows_of(source.images)
        self.chosen = None if (found >= 0).all() else np.flatnonzero(found >= 0)
        self.ones: NDArray[np.bool_] = (found if self.chosen is None else found[self.chosen]) == 1
        self._source = source

    @property
    def count(self) -> int:
        """N."""
        return len(self.ones)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, d0)."""
        return self.count, self.rows.shape[1]

    def part(self, numbers: NDArray[np.int64]) -> ImageSamples:
        """Some of the samples, by their indices in ascending order."""
        part = copy(self)
        part.chosen = numbers if self.chosen is None else self.chosen[numbers]
        part.ones = self.ones[numbers]
        return part

    def read(self, low: int, high: int) -> Tensor:
        """Samples low to high: uint8 (high − low, d0)."""
        numbers = np.arange(low, high) if self.chosen is None else self.chosen[low:high]
        out = torch.empty(len(numbers), self.rows.shape[1], dtype=self.rows.dtype)
        self.rows.read(numbers, out)
        return out

    @cached_property
    def content(self) -> str:
        """A digest of the source's images, whatever their location; for a file without a known digest, of some rows."""
        if self._source.digest is not None:
            return self._source.digest
        if not isinstance(self.rows, RowFile):
            return hashlib.sha256(np.ascontiguousarray(self._source.images).data).hexdigest()
        numbers = np.unique(np.linspace(0, self.rows.shape[0] - 1, _COMPARED_ROWS).astype(np.int64))
        out = torch.empty(len(numbers), self.rows.shape[1], dtype=self.rows.dtype)
        self.rows.read(numbers, out)
        return digest_of_words([str(self.rows.shape), hashlib.sha256(out.view(torch.uint8).numpy().data).hexdigest()])

    def digest(self) -> str:
        """A digest of the samples: their content, selection and groups; it does not depend on their location."""
        return digest_of_words([self.content, self._selection(), hashlib.sha256(self.ones.data).hexdigest()])

    def identity(self) -> str:
        """A digest of the samples that needs no reading of files.

        It covers a file's path, size and time, or an array's content, and the selection of the samples.
        """
        if isinstance(self.rows, RowFile):
            stat = self.rows.path.stat()
            source = [str(self.rows.path.resolve()), str(stat.st_size), str(stat.st_mtime_ns), str(self.rows.offset)]
        else:
            source = [self.content]
        return digest_of_words([*source, str(self.rows.shape), self._selection()])

    def _selection(self) -> str:
        return "all" if self.chosen is None else hashlib.sha256(self.chosen.data).hexdigest()


Groups = tuple[tuple[int | str, ...], tuple[int | str, ...]]


def check_groups(groups: Sequence[Sequence[int | str]]) -> Groups:
    """Two groups of classes, as tuples.

    Raises:
        ValueError: they are not two lists of names and numbers, one list is empty, or a class is named twice.
    """
    checked = [tuple(group) if is_list(group) else () for group in groups] if is_list(groups) else []
    classes = [c for group in checked for c in group]
    known = all(isinstance(c, int | str) for c in classes)
    if len(checked) != 2 or not all(checked) or not known or len(set(classes)) < len(classes):
        raise ArgumentError("groups", groups, "must be two lists of classes that share none", "as [[cat, cow], [dog]]")
    return checked[0], checked[1]


def is_list(value: Any) -> bool:
    """Whether the value is a list of items; a string, although iterable, is not."""
    return isinstance(value, Iterable) and not isinstance(value, str)


def group_classes(groups: Groups | None, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the classes of two groups.

    Args:
        groups: classes by name or by index. A number that is written like a name means that name. None: the first half
            of the sorted names, and the others.
        names: of all classes.

    Raises:
        ValueError: a class does not exist, or is in both groups.

    >>> group_classes((("cat",), (0, "bat")), ("ant", "bat", "cat"))
    ((2,), (0, 1))
    >>> group_classes(((10,), (2,)), ("0", "10", "2"))
    ((1,), (2,))
    >>> group_classes(None, ("ant", "cat", "bat"))
    ((0,), (1, 2))
    """
    if groups is None:
        order = sorted(range(len(names)), key=lambda index: names[index])
        groups = tuple(order[: len(names) // 2]), tuple(order[len(names) // 2 :])
        if len(names) < 2:
            raise ArgumentError("groups", None, f"needs at least two classes, but there is only {list(names)}")
    known: dict[int | str, int] = {index: index for index in range(len(names))}
    known |= {name: index for index, name in enumerate(names)}
    known |= {number: known[str(number)] for group in groups for number in group if str(number) in known}
    if unknown := [c for group in groups for c in group if c not in known]:
        some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        problem = f"must not contain {unknown}, which are not classes"
        remedy = f"name classes 0 to {len(names) - 1}, or {some}"
        raise ArgumentError("groups", [list(group) for group in groups], problem, remedy)
    first, second = (tuple(sorted(known[c] for c in group)) for group in groups)
    check_groups((first, second))
    return first, second


def spans(low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of one size; the last one may be smaller.

    >>> list(spans(1, 6, 2))
    [(1, 3), (3, 5), (5, 6)]
    """
    for start in range(low, high, size):
        yield start, min(start + size, high)


def digest_of_words(parts: Sequence[str]) -> str:
    """A digest of a list of words: twenty hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
