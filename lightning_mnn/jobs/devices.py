"""Devices that are lent to the jobs of a sweep: GPUs by their names, or slots of the CPU with a share of its cores."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_mnn.workers import THREADS, cores

if TYPE_CHECKING:
    from collections.abc import Sequence

_GPU_NAMES = ("gpu", "cuda")


@dataclass(frozen=True)
class Request:
    """What a job asks for: ``count`` devices, GPUs or not, one for each of its ``processes``."""

    gpus: bool
    count: int
    processes: int


@dataclass(frozen=True)
class Loan:
    """What a job has got: names of GPUs, or of slots of the CPU, and the threads of each of its processes."""

    request: Request
    names: tuple[str, ...]
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the job's environment; a number of threads that the user has set stays."""
        shared = {name: os.environ.get(name, str(self.threads)) for name in THREADS}
        return shared | ({"CUDA_VISIBLE_DEVICES": ",".join(self.names)} if self.request.gpus else {})

    def __str__(self) -> str:
        """As it is told to the user."""
        names = ",".join(self.names)
        return f"GPU {names}" if self.request.gpus else f"CPU {names}"


class Devices:
    """A pool of GPUs and slots of the CPU.

    Args:
        gpus: names of the GPUs, as in ``CUDA_VISIBLE_DEVICES``; None: those of that variable, or all there are.
        cpu_slots: slots of the CPU; None: one a core, or ``n_jobs`` if that is more.
        n_jobs: jobs at once; None: as many as there are devices for.

    Raises:
        ValueError: ``n_jobs`` or ``cpu_slots`` is not a positive number, or a GPU is named twice.

    >>> pool = Devices(["0", "1", "2"], cpu_slots=1)
    >>> first, second = (pool.lend(pool.request(2, "gpu")) for _ in range(2))
    >>> str(first), second
    ('GPU 0,1', None)
    >>> pool.take_back(first)
    >>> str(pool.lend(pool.request("auto", "gpu")))
    'GPU 0,1,2'
    """

    def __init__(
        self, gpus: Sequence[int | str] | None = None, cpu_slots: int | None = None, n_jobs: int | None = None
    ) -> None:
        for key, value in (("cpu_slots", cpu_slots), ("n_jobs", n_jobs)):
            if value is not None and value < 1:
                raise ValueError(f"hydra.launcher.{key} must be a positive number or null, got {value}")
        names = [str(gpu) for gpu in (visible_gpus() if gpus is None else gpus)]
        if len(set(names)) < len(names):
            raise ValueError(f"hydra.launcher.gpus must name each GPU once, got {names}")
        self._cores = cores()
        self._n_jobs = n_jobs
        self._total = {True: len(names), False: cpu_slots or max(self._cores, n_jobs or 1)}
        self._free = {True: names, False: [str(slot) for slot in range(self._total[False])]}
        self._lent = 0

    def request(self, devices: Any, accelerator: Any) -> Request:
        """What a job with these arguments of a Trainer asks for.

        A job that wants more processes on the CPU than there are slots gets them all.

        Raises:
            ValueError: more GPUs than the pool has, GPUs by name, or a number of devices that is none.
        """
        gpus = accelerator in _GPU_NAMES or (accelerator in ("auto", None) and self._total[True] > 0)
        count = self._number(devices, gpus=gpus)
        total = self._total[gpus]
        if gpus and count > total:
            raise ValueError(f"trainer.devices={devices} asks for {count} GPUs, and the pool has {total}")
        return Request(gpus, min(count, total), count)

    def lend(self, request: Request) -> Loan | None:
        """Devices for a job; None: not enough are free, or ``n_jobs`` run."""
        free = self._free[request.gpus]
        if len(free) < request.count or self._lent == self._n_jobs:
            return None
        names = tuple(free[: request.count])
        del free[: request.count]
        self._lent += 1
        return Loan(request, names, self._threads(request))

    def take_back(self, loan: Loan) -> None:
        """Have a job's devices again."""
        free = self._free[loan.request.gpus]
        free.extend(loan.names)
        free.sort(key=lambda name: (len(name), name))
        self._lent -= 1

    def _threads(self, request: Request) -> int:
        """An equal share of the cores; of how many jobs there are it does not depend, for it changes rounding."""
        jobs = self._total[request.gpus] // request.count
        return max(1, self._cores // (min(jobs, self._n_jobs or jobs) * request.processes))

    def _number(self, devices: Any, *, gpus: bool) -> int:
        if isinstance(devices, str) and devices.lstrip("-").isdigit():
            devices = int(devices)
        if devices in ("auto", -1, None) and not isinstance(devices, bool):
            return max(1, self._total[True]) if gpus else 1
        if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
            return devices
        if gpus and not isinstance(devices, int):
            raise ValueError(
                f"trainer.devices={devices} names GPUs, and the launcher chooses which a job gets: give their number, "
                "and hydra.launcher.gpus=[…] for those to choose from"
            )
        raise ValueError(f"trainer.devices must be a positive number, -1 or auto, got {devices!r}")


def visible_gpus() -> list[str]:
    """Names of the GPUs in ``CUDA_VISIBLE_DEVICES``, or, where that is not set, of all that nvidia-smi knows."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 (no user's text)
    return done.stdout.split() if done.returncode == 0 else []
