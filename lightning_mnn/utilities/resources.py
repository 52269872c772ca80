"""What worker processes have in common."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Processor cores that this process may use, by which workers, jobs and threads are counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let processes that are started meanwhile do their linear algebra on one thread each.

    NumPy asks the environment when it is loaded, and nothing else. Workers with several threads each would wait for
    each other's.
    """
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_KIBI = 1024.0

_KNOWN = Path("/proc/meminfo")

_CONTAINER = Path("/sys/fs/cgroup")  # whose limit may be below the machine's memory


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device, those included that hold no more than copies of files."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if not _KNOWN.exists():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(_KIBI * _amounts(_KNOWN)["MemAvailable:"], _free_in_container())


def free_swap() -> float:
    """Bytes of the disk that may take the place of memory."""
    return _KIBI * _amounts(_KNOWN).get("SwapFree:", 0.0) if _KNOWN.exists() else 0.0


def _free_in_container() -> float:
    """Bytes that the limit of a container leaves; infinity without one."""
    try:
        limit, used = ((_CONTAINER / name).read_text().strip() for name in ("memory.max", "memory.current"))
        files = _amounts(_CONTAINER / "memory.stat").get("inactive_file", 0.0)
    except OSError:
        return float("inf")
    return float(limit) - float(used) + files if limit.isdigit() else float("inf")


def _amounts(path: Path) -> dict[str, float]:
    """Numbers by the names before them, a line each."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: float(words[1]) for words in lines if len(words) > 1}
