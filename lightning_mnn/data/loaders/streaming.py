"""Data larger than memory: batches from a file of rows that is prefetched, in an order that is fast on disks.

Shapes: N samples, d0 inputs, B samples per batch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import override

from lightning_mnn.data.loaders.exact import EpochShuffle, ExactLoader
from lightning_mnn.utilities.distributed import part_of
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import sent
from lightning_mnn.utilities.validation import positive_integer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_mnn.data.loaders.rows import Rows
    from lightning_mnn.data.loaders.whitening import InputMap

BUFFER_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 22
_NUMBER_BYTES = 4  # assumed for both sizes, so that the order does not depend on the dtype of the rows


class BufferedShuffle(EpochShuffle):
    """Order of the samples in each epoch in which a file is read in long pieces.

    First, chunks of consecutive samples are put in random order. Then each group of ``buffer`` consecutive samples of
    that order is shuffled. The result depends only on the seed, the epoch and the three sizes.

    Args:
        num_samples: N.
        seeds: a list with one seed.
        chunk: samples per chunk.
        buffer: samples per buffer.
        shuffle: False keeps the samples in their order.

    >>> order = BufferedShuffle(10, [0], chunk=2, buffer=5).permutation()
    >>> bool(torch.equal(order.sort().values, torch.arange(10)))
    True
    """

    def __init__(
        self, num_samples: int, seeds: Sequence[int], *, chunk: int, buffer: int, shuffle: bool = True
    ) -> None:
        super().__init__(num_samples, seeds, shuffle=shuffle)
        self.chunk = chunk
        self.buffer = buffer

    @override
    def permutation(self) -> Tensor:
        """Sample indices in this epoch's order, (N,)."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        draw = generator(self.seeds[0], "shuffle", self.epoch)
        chunks = torch.randperm(-(-self.num_samples // self.chunk), generator=draw)
        order = (chunks[:, None] * self.chunk + torch.arange(self.chunk)).flatten()
        order = order[order < self.num_samples]
        buffers = torch.split(order, self.buffer)
        return torch.cat([part[torch.randperm(len(part), generator=draw)] for part in buffers])


class StreamedLoader(ExactLoader):
    """Batches (inputs, targets) whose rows are read from disk; the batches do not depend on the number of processes.

    While one buffer of samples is used, a thread reads the next one, so two buffers are in memory. A process reads only
    the rows of its own part of each batch. The order is that of :class:`BufferedShuffle`: it depends on
    ``buffer_bytes`` and d0, but not on the number of processes or the dtype of the rows.

    Args:
        rows: the source of the inputs, (n, d0).
        targets: (N,).
        batch_size: B over all processes; None: all N samples.
        chosen: indices of the N rows that are the samples, ascending; None: all rows.
        mapping: applied to each row, on its device and in its precision; None: the rows are the inputs.
        dtype: of the mapped inputs, which are rounded to it.
        device: of the batches.
        buffer_bytes: size of a buffer over all processes, computed as if rows were float32: a buffer of uint8 rows
            needs a quarter of it, a buffer of float64 rows twice as much.
        **options: see :class:`ExactLoader`.

    Raises:
        ValueError: the numbers of rows and targets differ, several seeds would give several orders, the data set is
            empty, or a size is not positive.
        OSError: (during a pass) rows cannot be read.
    """

    def __init__(
        self,
        rows: Rows,
        targets: Tensor,
        batch_size: int | None = None,
        *,
        chosen: NDArray[np.int64] | None = None,
        mapping: InputMap | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        buffer_bytes: int = BUFFER_BYTES,
        **options: Any,
    ) -> None:
        num_samples = rows.shape[0] if chosen is None else len(chosen)
        if targets.shape != (num_samples,):
            raise ValueError(f"there are {num_samples} rows of inputs, but targets of shape {tuple(targets.shape)}")
        super().__init__(num_samples, batch_size, **options)
        seeds, shuffle = self.sampler.seeds, self.sampler.shuffle
        if shuffle and len(seeds) > 1 and self.num_steps > 1:
            raise ValueError(
                f"streamed data have one order, but {len(seeds)} replicas would each have their own: "
                "set shuffle=False, replicas=1 or keep the data in memory (residency=memory)"
            )
        self.device = torch.device(device)
        self.targets = targets.to(self.device)
        self._rows = rows
        self._chosen = chosen
        self._mapping = mapping
        self._dtype = dtype
        row_bytes = rows.shape[1] * _NUMBER_BYTES
        buffer = max(1, positive_integer("buffer_bytes", buffer_bytes) // row_bytes)
        chunk = max(1, min(_CHUNK_BYTES // row_bytes, buffer // 2))
        self.sampler: BufferedShuffle = BufferedShuffle(num_samples, seeds, chunk=chunk, buffer=buffer, shuffle=shuffle)
        self._pass: _Pass | None = None
        self._buffers: list[Tensor] = []
        self._staging = _Staging(rows, self.device)
        self._mapped_memory: Tensor | None = None  # buffer of the last batch, to be reused

    @property
    @override
    def numbers_per_sample(self) -> int:
        return self._rows.shape[1]

    @property
    @override
    def operations_per_sample(self) -> float:
        whitened = self._mapping is not None and self._mapping.matrix is not None
        return 2.0 * self._rows.shape[1] ** 2 if whitened else 0.0

    @override
    def samples(self, index: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the samples at an index into the data set; all of them are in memory at once."""
        samples = np.arange(*index.indices(self.num_samples)) if isinstance(index, slice) else index.cpu().numpy()
        rows = torch.empty(len(samples), self._rows.shape[1], dtype=self._rows.dtype)
        places = self._read(samples, rows)
        if (np.diff(samples) < 0).any():
            rows = rows[places]
        return self._mapped(rows.to(self.device), reuse=False), self.targets[index]

    @override
    def _part(self, first: int, low: int, high: int, *, reuse: bool) -> tuple[tuple[Tensor, Tensor], slice | Tensor]:
        if self.num_steps == 1 or low == high:
            return self.samples(slice(low, high)), slice(low, high)
        current = self._pass
        if current is None or (current.epoch, current.next) != (self.sampler.epoch, first + low):
            current = self._start_pass(first + low)
        rows = self._staging.memory(high - low, new=self._mapping is None and not reuse)
        samples = current.copy(rows)
        targets = self.targets[sent(samples, self.device)]
        return (self._mapped(self._staging.send(rows), reuse=reuse), targets), samples

    def _start_pass(self, start: int) -> _Pass:
        """Start a pass over this process's samples of the epoch, from position ``start`` of its order."""
        if self._pass is not None:
            self._pass.close()
        batch, within = np.divmod(np.arange(self.num_samples), self.batch_size)
        size = np.minimum(self.batch_size, self.num_samples - batch * self.batch_size)
        low, high = part_of(size, self.rank, self.world_size)
        places = np.flatnonzero((low <= within) & (within < high) & (np.arange(self.num_samples) >= start))
        cuts = np.flatnonzero(np.diff(places // self.sampler.buffer)) + 1
        bounds = [0, *cuts.tolist(), len(places)]
        if not self._buffers or len(self._buffers[0]) < max(np.diff(bounds)):
            shape = int(max(np.diff(bounds))), self._rows.shape[1]
            self._buffers = [torch.empty(shape, dtype=self._rows.dtype) for _ in range(2)]
        self._pass = _Pass(self.sampler, places, bounds, self._read, self._buffers)
        return self._pass

    def _read(self, samples: NDArray[np.int64], out: Tensor) -> Tensor:
        """Read the rows of some samples into ``out`` in the file's order; return the position of each sample's row."""
        order = np.argsort(samples, kind="stable")
        numbers = samples[order]
        self._rows.read(numbers if self._chosen is None else self._chosen[numbers], out)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return torch.from_numpy(places)

    def _mapped(self, rows: Tensor, *, reuse: bool) -> Tensor:
        if self._mapping is None:
            return rows
        out = self._mapped_memory if reuse else None
        if out is None or out.shape != rows.shape:
            out = torch.empty(rows.shape, dtype=self._dtype, device=self.device)
        self._mapped_memory = out if reuse else None
        return self._mapping.apply(rows, out)


class _Pass:
    """Copies the rows of an epoch's order one after the other, while a thread reads the next buffer of rows.

    Args:
        sampler: the order.
        places: positions in that order, ascending, of the samples to read.
        bounds: indices into ``places`` at which the buffers start and end.
        read: reads the rows of samples (n,) into (n, d0) in any order, and returns the position of each sample's row.
        buffers: memory for two buffers.
    """

    def __init__(
        self,
        sampler: BufferedShuffle,
        places: NDArray[np.int64],
        bounds: list[int],
        read: Callable[[NDArray[np.int64], Tensor], Tensor],
        buffers: list[Tensor],
    ) -> None:
        self.epoch = sampler.epoch
        self._places = places
        self._samples = sampler.permutation()[torch.from_numpy(places)]
        self._bounds = bounds
        self._read = read
        self._buffers = buffers
        self._at = 0
        self._buffer = -1
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._ahead = self._thread.submit(self._load, 0)

    @property
    def next(self) -> int | None:
        """Position in the epoch's order of the next sample; None after the last one."""
        return int(self._places[self._at]) if self._at < len(self._places) else None

    def copy(self, out: Tensor) -> Tensor:
        """Copy the next rows into ``out`` (n, d0), and return the indices of their samples, (n,)."""
        start, stop = self._at, self._at + len(out)
        while self._at < stop:
            if self._at == self._bounds[self._buffer + 1]:
                self._next_buffer()
            begin, end = self._bounds[self._buffer : self._buffer + 2]
            high = min(end, stop)
            index = self._where[self._at - begin : high - begin]
            torch.index_select(self._rows, 0, index, out=out[self._at - start : high - start])
            self._at = high
        return self._samples[start:stop]

    def close(self) -> None:
        """Wait until the thread no longer writes to the buffers."""
        self._thread.shutdown(cancel_futures=True)

    def _next_buffer(self) -> None:
        self._rows, self._where = self._ahead.result()
        self._buffer += 1
        if self._buffer + 2 < len(self._bounds):
            self._ahead = self._thread.submit(self._load, self._buffer + 1)

    def _load(self, number: int) -> tuple[Tensor, Tensor]:
        samples = self._samples[self._bounds[number] : self._bounds[number + 1]].numpy()
        rows = self._buffers[number % 2][: len(samples)]
        return rows, self._read(samples, rows)


class _Staging:
    """Memory in which the rows of a batch are collected, and from which they are copied to the device.

    For a CUDA device it is pinned, and two pieces are used alternately, so that the next batch can be collected in one
    while the other is still being copied to the device.

    Args:
        rows: they determine the width and the dtype.
        device: of the batches.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self._width, self._dtype = rows.shape[1], rows.dtype
        self._device = device
        self._pieces: list[Tensor | None] = [None, None]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def memory(self, count: int, *, new: bool) -> Tensor:
        """Memory for ``count`` rows; on the CPU, where rows are not copied, that of the last batch unless ``new``."""
        pinned = self._device.type == "cuda"
        if new and not pinned:
            return torch.empty(count, self._width, dtype=self._dtype)
        self._turn = 1 - self._turn if pinned else 0
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        piece = self._pieces[self._turn]
        if piece is None or len(piece) < count:
            piece = self._pieces[self._turn] = torch.empty(count, self._width, dtype=self._dtype, pin_memory=pinned)
        return piece[:count]

    def send(self, rows: Tensor) -> Tensor:
        """The rows on the device."""
        sent = rows.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                event = self._copied[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        return sent
