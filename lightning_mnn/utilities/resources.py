"""Processor cores, threads and free memory of this machine."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Number of processor cores that this process may use; it limits the workers, jobs and threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread_each() -> Iterator[None]:
    """A context in which new processes do their linear algebra on one thread each.

    It sets environment variables, because NumPy reads only those, and only when it is loaded. Workers with several
    threads each would compete for the cores.
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


def raise_file_limit() -> None:
    """Let this process have as many open files as it may."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource  # noqa: PLC0415 (not on Windows)

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


_KIBI = 1024.0

_MEMINFO = Path("/proc/meminfo")

_CONTAINER = Path("/sys/fs/cgroup")  # its memory limit may be below the machine's memory


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device, including memory that only caches files."""
    if device.type == "cuda":
        import torch  # noqa: PLC0415 (launchers import this module, and do not need it)

        return float(torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.exists():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(_KIBI * _amounts(_MEMINFO)["MemAvailable:"], _free_in_container())


def free_swap() -> float:
    """Bytes of free swap space."""
    return _KIBI * _amounts(_MEMINFO).get("SwapFree:", 0.0) if _MEMINFO.exists() else 0.0


def _free_in_container() -> float:
    """Bytes that the memory limit of a container leaves free; infinity if there is no limit."""
    try:
        limit, used = ((_CONTAINER / name).read_text().strip() for name in ("memory.max", "memory.current"))
        files = _amounts(_CONTAINER / "memory.stat").get("inactive_file", 0.0)
    except OSError:
        return float("inf")
    return float(limit) - float(used) + files if limit.isdigit() else float("inf")


def _amounts(path: Path) -> dict[str, float]:
    """The number on each line of a file, keyed by the name in front of it."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: float(words[1]) for words in lines if len(words) > 1}
