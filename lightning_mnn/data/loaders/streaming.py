"""Data larger than memory: batches from a file of rows that is read ahead, in an order that disks like.

Shapes: N samples, d0 inputs, B samples of a batch.
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
_NUMBER_BYTES = 4  # by which both are counted, so that the order does not depend on what the rows are stored in


class BufferedShuffle(EpochShuffle):
    """Order of the samples in each epoch that reads a file in long pieces.

    Chunks of consecutive samples come in random order; of every ``buffer`` samples in a row in that order, the order is
    drawn anew. It depends on the seed, the epoch and the three sizes only.

    Args:
        num_samples: N.
        seeds: the one seed.
        chunk: samples of a chunk.
        buffer: samples of a buffer.
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
    """Batches (inputs, targets) of rows that are read from where they lie, the same for any number of processes.

    A buffer of samples is in use while a thread reads the next one: two buffers are in memory. A process reads the rows
    of its own part of each batch, and those only. The order is that of :class:`BufferedShuffle`: it depends on
    ``buffer_bytes`` and d0, and neither on the number of processes nor on the dtype of the rows.

    Args:
        rows: where the inputs are read, (n, d0).
        targets: (N,).
        batch_size: B over all processes; None: all N.
        chosen: numbers of the N rows that are the samples, ascending; None: all.
        mapping: applied to each row, on its device and in its precision; None: rows are the inputs as they are.
        dtype: to which mapped inputs are rounded.
        device: of the batches.
        buffer_bytes: size of a buffer over all processes, counted in float32: one of bytes takes a quarter of it, one
            of float64 twice as much.
        **options: see :class:`ExactLoader`.

    Raises:
        ValueError: numbers of rows and targets that do not agree, several seeds that would give several orders, an
            empty data set, or a size that is not positive.
        OSError: (in a pass) rows that cannot be read.
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
            raise ValueError(f"there are {num_samples} rows of inputs and targets of shape {tuple(targets.shape)}")
        super().__init__(num_samples, batch_size, **options)
        seeds, shuffle = self.sampler.seeds, self.sampler.shuffle
        if shuffle and len(seeds) > 1 and self.num_steps > 1:
            raise ValueError(
                f"streamed data have one order, and {len(seeds)} replicas would have one each: "
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
        self._mapped_memory: Tensor | None = None  # of the last batch

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
        """Inputs and targets of some samples, in the data set's order; all of them are in memory at once."""
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
            current = self._begin_pass(first + low)
        rows = self._staging.memory(high - low, fresh=self._mapping is None and not reuse)
        samples = current.copy(rows)
        targets = self.targets[sent(samples, self.device)]
        return (self._mapped(self._staging.send(rows), reuse=reuse), targets), samples

    def _begin_pass(self, start: int) -> _Pass:
        """A pass over this process's samples of the epoch, from a place in its order on."""
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
        """Read the rows of some samples in the file's order, and say where each sample's row is."""
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
    """Rows of an epoch's order, copied out in turn, while a thread reads the next buffer of them.

    Args:
        sampler: the order.
        places: those places in the order, ascending, whose samples are wanted.
        bounds: where among the places the buffers begin and end.
        read: reads the rows of samples (n,) in an order that it likes into (n, d0), and returns where each one is.
        buffers: memory of two of them.
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
        """The place in the epoch's order of the sample that comes next."""
        return int(self._places[self._at]) if self._at < len(self._places) else None

    def copy(self, out: Tensor) -> Tensor:
        """Copy the next rows (n, d0) into a tensor, and return whose they are, (n,)."""
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
        """Wait until nothing is read into the buffers any more."""
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
    """Memory in which the rows of a batch are put together, and from which they go to the device.

    For a CUDA device it is pinned, and there are two pieces in turn, so that one may still be copied to the device
    while the next batch is put together in the other.

    Args:
        rows: whose shape and dtype it has.
        device: of the batches.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self._width, self._dtype = rows.shape[1], rows.dtype
        self._device = device
        self._pieces: list[Tensor | None] = [None, None]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def memory(self, count: int, *, fresh: bool) -> Tensor:
        """Memory for so many rows; on the CPU, where they stay, that of the last batch unless it is to be fresh."""
        pinned = self._device.type == "cuda"
        if fresh and not pinned:
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
