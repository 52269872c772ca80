"""What the rank of a region costs, in time and memory, beside NumPy's SVD of the dense matrix.

Both are run in turns, and ratios of neighbouring runs are reported: absolute times on shared machines are noisy. Peak
memory is that of a process of its own, above what it holds once the inputs are there, in N × N matrices of doubles.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from lightning_mnn.landscape.regions.rank import khatri_rao_rank

ROUNDS = 3
N, WIDTH = 2000, 100


def main():
    for name in CASES:
        inputs, slopes = region(name)
        ratios = []
        for _ in range(ROUNDS):
            before, (dense_seconds, expected), after = ours(inputs, slopes), dense(inputs, slopes), ours(inputs, slopes)
            assert before[1] == after[1] == expected
            ratios.append(dense_seconds * 2 / (before[0] + after[0]))
            print(
                f"{name}: SVD {dense_seconds:.2f} s, ours {before[0]:.3f} and {after[0]:.3f} s, {ratios[-1]:.1f} times"
            )
        print(f"{name}: rank {expected}, median {sorted(ratios)[ROUNDS // 2]:.1f} times faster, peak {peak(name)} N²")


def full():
    """A pattern of a network on Gaussian inputs."""
    inputs, weights = normal(N, WIDTH), normal(WIDTH, WIDTH)
    return inputs, (inputs @ weights > 0).double()


def repeated(count=50):
    """The same with samples repeated."""
    inputs, slopes = full()
    inputs[-count:], slopes[-count:] = inputs[:count], slopes[:count]
    return inputs, slopes


def nearly_repeated():
    """The same with samples repeated but for 1e-6."""
    inputs, slopes = repeated()
    return inputs + 1e-6 * normal(N, WIDTH), slopes


def low(rank=15, kinds=20):
    """Inputs of low rank, and few kinds of unit."""
    return normal(N, rank) @ normal(rank, WIDTH), (normal(N, kinds) > 0).double().repeat(1, WIDTH // kinds)


CASES = {
    "full rank": full,
    "50 samples repeated": repeated,
    "50 samples nearly repeated": nearly_repeated,
    "1000 samples repeated": lambda: repeated(N // 2),
    "inputs of rank 15, 20 kinds of unit": low,
    "inputs of rank 20, 50 kinds of unit": lambda: low(20, 50),
}


def region(name):
    torch.manual_seed(0)
    return CASES[name]()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ours(inputs, slopes):
    start = time.perf_counter()
    rank = khatri_rao_rank(inputs, slopes)
    return time.perf_counter() - start, rank


def dense(inputs, slopes):
    matrix = (slopes[:, :, None] * inputs[:, None, :]).flatten(1).numpy()
    start = time.perf_counter()
    values = np.linalg.svd(matrix, compute_uv=False)
    return time.perf_counter() - start, int((values > values[0] * max(matrix.shape) * np.finfo(float).eps).sum())


def peak(name):
    """Peak memory of one call, measured by a process of its own."""
    command = [sys.executable, "-c", f"from tests.benchmarks.bench_rank import print_peak; print_peak({name!r})"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    ).stdout.strip()


def print_peak(name):
    khatri_rao_rank(torch.ones(300, 2, dtype=torch.float64), torch.ones(300, 200, dtype=torch.float64))  # libraries
    inputs, slopes = region(name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    start = resident("VmRSS")
    khatri_rao_rank(inputs, slopes)
    print(f"{(resident('VmHWM') - start) / (8 * N * N):.1f}")


def resident(key):
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
