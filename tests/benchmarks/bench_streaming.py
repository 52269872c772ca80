"""What streaming costs beside the disk: shuffled batches from a file of images against reading it from end to end.

The file holds random bytes, in rows as long as colour images of 64 × 64 pixels. GIGABYTES (1) sets its size, FOLDER is
where it is made and removed. Before each pass the system is asked to forget the file; what lies below the system may
still remember it. Whitening is timed too, on 50,000 × 3072 bytes in memory.
"""

import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lightning_mnn.data import StreamedLoader
from lightning_mnn.data.loaders.rows import RowFile
from lightning_mnn.data.loaders.streaming import BUFFER_BYTES
from lightning_mnn.data.loaders.whitening import InputMap, input_map, moments

DIM = 12_288
BATCH = 1024


def main():
    num = int(float(os.environ.get("GIGABYTES", "1")) * 1e9) // DIM
    with tempfile.TemporaryDirectory(dir=os.environ.get("FOLDER")) as folder:
        path = Path(folder) / "images"
        write(path, num * DIM)
        rows = RowFile(path, (num, DIM), torch.uint8)
        mapping = InputMap(torch.full((DIM,), 127.5), None, 1 / 74)
        before, rate = peak(), sequential(path)
        print(f"{num} images of {DIM} bytes, {path.stat().st_size / 1e9:.2f} GB: read from end to end {rate:.2f} GB/s")
        for name, each in (("as they are", None), ("mapped to float32", mapping)):
            loader = StreamedLoader(rows, torch.zeros(num), BATCH, mapping=each, buffer_bytes=BUFFER_BYTES)
            seconds = epoch(path, loader)
            share = num * DIM / 1e9 / seconds / rate
            print(f"shuffled, batch {BATCH}, {name}: {num / seconds:.0f} images/s, {share:.2f} of that rate")
        print(f"peak memory {peak():.2f} GB, of which {before:.2f} GB before")
    whitening(50_000, 3072)


def write(path, size):
    block = np.random.default_rng(0).bytes(1 << 26)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def forget(path):
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential(path):
    """GB/s of plain reads of 16 MiB."""
    forget(path)
    memory = bytearray(1 << 24)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass
    return path.stat().st_size / 1e9 / (time.perf_counter() - start)


def epoch(path, loader):
    forget(path)
    start = time.perf_counter()
    batches = loader.batches(0, loader.num_steps, reuse=True)  # as one process trains
    assert sum(len(targets) for _, targets in batches) == loader.num_samples
    return time.perf_counter() - start


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def whitening(num, dim):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, dim), dtype=np.uint8))
    start = time.perf_counter()
    found = moments(images.split(8192), dim)
    passed = time.perf_counter()
    mapping = input_map(found, 0.1).to("cpu", torch.float32)
    mapped = time.perf_counter()
    mapping.apply(images, torch.empty(num, dim))
    applied = time.perf_counter()
    print(
        f"whitening {num} × {dim}: moments {passed - start:.1f} s, map {mapped - passed:.1f} s, "
        f"its application {applied - mapped:.1f} s"
    )


if __name__ == "__main__":
    main()
