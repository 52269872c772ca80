"""Rows of numbers that are read by index, from a file or an array; files of rows that are written once."""

from __future__ import annotations

import os
import shutil
import zlib
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info

from lightning_mnn.data.loaders.whitening import ROWS
from lightning_mnn.utilities.files import locked, naming, to_disk

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor


_BLOCK_BYTES = 1 << 24

_CHECKED_BLOCKS = 16

_PREFETCHED_RUNS = 16  # runs of consecutive rows that the system fetches in advance


class Rows(Protocol):
    """Rows (N, d0) that are read by index.

    Attributes:
        shape: (N, d0).
        dtype: of the values.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    def read(self, numbers: NDArray[np.int64], out: Tensor) -> None:
        """Read the rows with ascending indices ``numbers`` (n,) into a contiguous CPU tensor (n, d0) of their dtype."""


class RowArray:
    """Rows of an array in memory.

    Args:
        array: (N, d0).

    >>> RowArray(np.ones((3, 2), np.uint8)).shape
    (3, 2)
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self.shape: tuple[int, int] = (array.shape[0], array.shape[1])
        self.dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype

    def read(self, numbers: NDArray[np.int64], out: Tensor) -> None:
        """Copy the rows with indices ``numbers`` (n,) into a CPU tensor (n, d0)."""
        np.take(self._array, numbers, axis=0, out=out.numpy(), mode="clip")  # mode "raise" would make another copy


class RowFile:
    """Rows of a file, stored one after the other. They are read into given memory; the file is not memory-mapped.

    Args:
        path: the file.
        shape: (N, d0).
        dtype: of the values.
        offset: bytes before the first row.

    Raises:
        OSError: (in read) the file is too short.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int], dtype: torch.dtype, offset: int = 0) -> None:
        self.path = Path(path)
        self.shape = shape
        self.dtype = dtype
        self.offset = offset

    @property
    def row_bytes(self) -> int:
        """Number of bytes per row."""
        return self.shape[1] * self.dtype.itemsize

    def read(self, numbers: NDArray[np.int64], out: Tensor) -> None:
        """Read the rows with ascending indices ``numbers`` (n,) into a contiguous CPU tensor (n, d0).

        Consecutive rows are read at once.
        """
        if len(numbers) == 0:
            return
        memory = out.view(torch.uint8).numpy().data.cast("B")
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        runs = list(pairwise([0, *breaks.tolist(), len(numbers)]))
        places = (self.offset + numbers * self.row_bytes).tolist()
        with self.path.open("rb", buffering=0) as file:
            for number, (low, high) in enumerate(runs):
                for start, end in runs[number + _PREFETCHED_RUNS : number + _PREFETCHED_RUNS + 1]:
                    _prefetch(file, places[start], (end - start) * self.row_bytes)
                file.seek(places[low])
                self._fill(file, memory[low * self.row_bytes : high * self.row_bytes])

    def _fill(self, file: Any, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            count = file.readinto(memory[done:])
            if not count:
                raise OSError(
                    f"{self.path} ends before its {self.shape[0]} rows of {self.row_bytes} bytes: it was truncated"
                )
            done += count


def _prefetch(file: Any, start: int, length: int) -> None:
    """Ask the system to fetch a part of a file that is read soon: waiting for each part in turn halves the speed."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def rows_of(array: NDArray[Any]) -> Rows:
    """The rows of an array (N, d0). For a memory-mapped file, rows are read from the file without touching the map."""
    root: Any = array
    while isinstance(root.base, np.memmap):
        root = root.base
    if not isinstance(root, np.memmap) or root.filename is None or not array.flags.c_contiguous:
        return RowArray(array)
    offset = root.offset + array.ctypes.data - root.ctypes.data
    return RowFile(root.filename, (array.shape[0], array.shape[1]), RowArray(array).dtype, offset)


def written_rows(
    path: Path, shape: tuple[int, int], dtype: torch.dtype, block_of: Callable[[int, int], Tensor]
) -> RowFile:
    """A file of rows, which is written if it does not exist. A killed write is continued by the next call.

    Rows are written to ``<path>.part`` and the checksum of each block to ``<path>.crc``; blocks with a wrong checksum
    are written again. Processes that need the same file wait for the one that writes it.

    Args:
        path: the file; its content must be determined by its name.
        shape: (N, d0).
        dtype: of the values.
        block_of: returns the rows from a first index, a multiple of
            :data:`~lightning_mnn.data.loaders.whitening.ROWS`, to an end index.

    Raises:
        OSError: there is too little space on the disk, or the size or a checksum of the file is wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = RowFile(path, shape, dtype)
    size = ROWS * max(1, _BLOCK_BYTES // (ROWS * rows.row_bytes))
    blocks = [(low, min(low + size, shape[0])) for low in range(0, shape[0], size)]
    with locked(path.with_name(path.name + ".lock")):
        if not path.exists():
            _write(RowFile(_part(path), shape, dtype), _checksums(path), blocks, block_of)
            _part(path).rename(path)
        else:
            _check(rows, _checksums(path), blocks)
    return rows


def _write(
    rows: RowFile, checksums: Path, blocks: list[tuple[int, int]], block_of: Callable[[int, int], Tensor]
) -> None:
    rows.path.touch()
    checksums.touch()
    done = _good_blocks(rows, checksums, blocks)
    _check_space(rows, blocks[done:])
    with rows.path.open("r+b") as file, checksums.open("r+b") as journal:
        file.truncate(sum(high - low for low, high in blocks[:done]) * rows.row_bytes)
        journal.truncate(done * len(_line(b"")))
        file.seek(0, os.SEEK_END)
        journal.seek(0, os.SEEK_END)
        for number, (low, high) in enumerate(blocks[done:], done + 1):
            content = block_of(low, high).to(rows.dtype).contiguous().view(torch.uint8).numpy().data
            with naming(rows.path):
                file.write(content)
                file.flush()
                journal.write(_line(content))
                journal.flush()
            if 10 * number // len(blocks) > 10 * (number - 1) // len(blocks):
                rank_zero_info(f"{number} of {len(blocks)} blocks of {rows.path.stem} written")
        with naming(rows.path):
            to_disk(file)
            to_disk(journal)


def _good_blocks(rows: RowFile, checksums: Path, blocks: list[tuple[int, int]]) -> int:
    """Number of blocks at the start of the file that are complete and correct."""
    kept = rows.path.stat().st_size // rows.row_bytes
    for number, ((_, high), line) in enumerate(zip(blocks, _lines(checksums), strict=False)):
        if high > kept or _line(_content(rows, blocks[number])) != line:
            return number
    return min(len(_lines(checksums)), len(blocks))


def _check(rows: RowFile, checksums: Path, blocks: list[tuple[int, int]]) -> None:
    """Check the size of a finished file, and the checksums of some blocks spread over it."""
    lines = _lines(checksums) if checksums.exists() else []
    whole = rows.path.stat().st_size == rows.shape[0] * rows.row_bytes and len(lines) == len(blocks)
    if not whole or any(_line(_content(rows, blocks[i])) != lines[i] for i in some_blocks(len(blocks))):
        raise OSError(f"{rows.path} is damaged: its size or a checksum is wrong. Delete it to make it again")


def some_blocks(count: int) -> list[int]:
    """Indices of some blocks spread over a file, whose checksums are compared whenever it is opened.

    >>> some_blocks(3), some_blocks(1000)[:3]
    ([0, 1, 2], [0, 66, 133])
    """
    return sorted(set(np.linspace(0, count - 1, _CHECKED_BLOCKS).astype(int).tolist()))


def _check_space(rows: RowFile, blocks: list[tuple[int, int]]) -> None:
    needed = sum(high - low for low, high in blocks) * rows.row_bytes
    free = shutil.disk_usage(rows.path.parent).free
    if needed > free:
        raise OSError(
            f"{rows.path.parent} needs {needed / 1e9:.1f} GB for the mapped inputs and has {free / 1e9:.1f} GB left: "
            "choose a cache on another disk, a storage of fewer bits, or materialise=false"
        )


def _content(rows: RowFile, block: tuple[int, int]) -> memoryview:
    out = torch.empty(block[1] - block[0], rows.shape[1], dtype=rows.dtype)
    rows.read(np.arange(*block), out)
    return out.view(torch.uint8).numpy().data


def _line(content: bytes | memoryview) -> bytes:
    return b"%08x\n" % zlib.crc32(content)


def _lines(checksums: Path) -> list[bytes]:
    content, length = checksums.read_bytes(), len(_line(b""))
    return [content[i : i + length] for i in range(0, len(content) - length + 1, length)]


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _checksums(path: Path) -> Path:
    return path.with_name(path.name + ".crc")
