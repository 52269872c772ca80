"""Devices that are allocated to the jobs of a sweep: GPUs by name, or slots of the CPU with a share of its cores."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lightning_mnn.utilities.resources import THREADS, cores

if TYPE_CHECKING:
    from collections.abc import Sequence

_GPU_NAMES = ("gpu", "cuda")
_VARIABLE = "CUDA_VISIBLE_DEVICES"
_NAME = re.compile(r"\d+|(GPU|MIG)-.+")  # of a GPU, as CUDA accepts it
_SECONDS = 120  # time limit of a program that lists the GPUs


@dataclass(frozen=True)
class Request:
    """A job's request: ``count`` devices, GPUs or not, one for each of its ``processes``."""

    gpus: bool
    count: int
    processes: int


@dataclass(frozen=True)
class Allocation:
    """A job's devices: names of GPUs or of slots of the CPU, and the number of threads of each of its processes."""

    request: Request
    names: tuple[str, ...]
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the job's environment; a number of threads that the user has set is kept.

        One for OpenMP is that of the other libraries too: torch would take MKL's for its own. A job
        on the CPU sees no GPU; otherwise all such jobs would train on the first one.
        """
        number = os.environ.get("OMP_NUM_THREADS", str(self.threads))
        shared = {name: os.environ.get(name, number) for name in THREADS}
        return shared | {_VARIABLE: ",".join(self.names) if self.request.gpus else ""}

    def __str__(self) -> str:
        """The devices, as they are printed for the user."""
        names = ",".join(self.names)
        return f"GPU {names}" if self.request.gpus else f"CPU {names}"


class Devices:
    """A pool of GPUs and slots of the CPU.

    Args:
        gpus: names of the GPUs, as in ``CUDA_VISIBLE_DEVICES`` (a subset of it, if that is set); None: all of
            :func:`visible_gpus`, which is called when the first job may need a GPU.
        cpu_slots: slots of the CPU; None: one per core, or ``n_jobs`` if that is more.
        n_jobs: number of jobs at once; None: as many as there are devices for.
        jobs_per_gpu: number of jobs that may share a GPU.

    Raises:
        ValueError: ``n_jobs``, ``cpu_slots`` or ``jobs_per_gpu`` is not a positive number, or ``gpus`` contains a name
            twice, an invalid name, or a GPU that ``CUDA_VISIBLE_DEVICES`` does not show.

    >>> pool = Devices(["0", "1", "2"], cpu_slots=1)
    >>> first, second = (pool.allocate(pool.request(2, "gpu")) for _ in range(2))
    >>> str(first), second
    ('GPU 0,1', None)
    >>> pool.release(first)
    >>> str(pool.allocate(pool.request("auto", "gpu")))
    'GPU 0,1,2'
    """

    def __init__(
        self,
        gpus: Sequence[int | str] | None = None,
        cpu_slots: int | None = None,
        n_jobs: int | None = None,
        jobs_per_gpu: int = 1,
    ) -> None:
        for key, value in (("cpu_slots", cpu_slots), ("n_jobs", n_jobs)):
            if value is not None and value < 1:
                raise ValueError(f"hydra.launcher.{key}={value}: must be a positive number or null")
        if jobs_per_gpu < 1:
            raise ValueError(f"hydra.launcher.jobs_per_gpu={jobs_per_gpu}: must be a positive number")
        self._chosen = None if gpus is None else _checked([str(gpu) for gpu in gpus])
        self._cores = cores()
        self._n_jobs = n_jobs
        self._slots = [str(slot) for slot in range(cpu_slots or max(self._cores, n_jobs or 1))]
        self._jobs_per_gpu = jobs_per_gpu
        self._in_use: Counter[tuple[bool, str]] = Counter()  # jobs on each device: whether it is a GPU, and its name
        self._running = 0

    def request(self, devices: Any, accelerator: Any) -> Request:
        """The request of a job whose Trainer has these arguments.

        A job that asks for more processes on the CPU than there are slots gets all slots.

        Raises:
            ValueError: more GPUs than the pool has, GPUs by name, or an invalid number of devices.
        """
        gpus = accelerator in _GPU_NAMES or (accelerator in ("auto", None) and bool(self._gpus))
        count = self._number(devices, gpus=gpus)
        total = len(self._all(gpus=gpus))
        if gpus and not total:
            raise ValueError(
                f"trainer.accelerator={accelerator} asks for a GPU, and the pool has none: {self._no_gpu_remedy()}; or "
                "set trainer.accelerator=cpu"
            )
        if gpus and count > total:
            raise ValueError(
                f"trainer.devices={devices} asks for {count} GPUs, and the pool has {total} ({','.join(self._gpus)}): "
                f"ask for {total} at most"
            )
        return Request(gpus, min(count, total), count)

    def allocate(self, request: Request) -> Allocation | None:
        """Allocate devices to a job, those with the fewest jobs; None: not enough are free, or ``n_jobs`` jobs run."""
        gpus = request.gpus
        free = [name for name in self._all(gpus=gpus) if self._in_use[gpus, name] < self._capacity(gpus=gpus)]
        free.sort(key=lambda name: self._in_use[gpus, name])
        if len(free) < request.count or self._running == self._n_jobs:
            return None
        names = tuple(free[: request.count])
        self._in_use.update((gpus, name) for name in names)
        self._running += 1
        return Allocation(request, names, self._threads(request))

    def capacity(self, request: Request) -> int:
        """How many such jobs can run at once."""
        jobs = len(self._all(gpus=request.gpus)) * self._capacity(gpus=request.gpus) // request.count
        return max(1, min(jobs, self._n_jobs or jobs))

    def release(self, allocation: Allocation) -> None:
        """Return a job's devices to the pool."""
        self._in_use.subtract((allocation.request.gpus, name) for name in allocation.names)
        self._running -= 1

    @cached_property
    def _gpus(self) -> list[str]:
        return visible_gpus() if self._chosen is None else self._chosen

    def _all(self, *, gpus: bool) -> list[str]:
        return self._gpus if gpus else self._slots

    def _capacity(self, *, gpus: bool) -> int:
        """The number of jobs that a device can have at once."""
        return self._jobs_per_gpu if gpus else 1

    def _no_gpu_remedy(self) -> str:
        """Why the pool has no GPU, and what to do."""
        if self._chosen is not None:
            return "name some by hydra.launcher.gpus, which is empty"
        shown = os.environ.get(_VARIABLE)
        if shown is not None:
            return f"{_VARIABLE}={shown} shows none, name some there"
        return "neither nvidia-smi nor torch finds one, check the driver and that torch is a CUDA build"

    def _threads(self, request: Request) -> int:
        """An equal share of the cores, independent of the number of jobs: the number of threads changes rounding."""
        return max(1, self._cores // (self.capacity(request) * request.processes))

    def _number(self, devices: Any, *, gpus: bool) -> int:
        if isinstance(devices, str) and devices.lstrip("-").isdigit():
            devices = int(devices)
        if devices in ("auto", -1, None) and not isinstance(devices, bool):
            return max(1, len(self._gpus)) if gpus else 1
        if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
            return devices
        if gpus and not isinstance(devices, int):
            raise ValueError(
                f"trainer.devices={devices} names GPUs, but the launcher chooses which a job gets: give their number, "
                "and hydra.launcher.gpus=[…] for those to choose from"
            )
        raise ValueError(f"trainer.devices={devices}: must be a positive number, -1 or auto")


def visible_gpus() -> list[str]:
    """Names of the GPUs that a process here would see.

    These are the ones in ``CUDA_VISIBLE_DEVICES``, up to the first that CUDA does not know, as in CUDA itself; if it is
    not set, all that nvidia-smi or, without it, torch finds.

    Raises:
        ValueError: it names a GPU twice, in which case CUDA shows none.
    """
    chosen = os.environ.get(_VARIABLE)
    if chosen is None:
        return _all_gpus()
    names: list[str] = []
    for name in (part.strip() for part in chosen.split(",")):
        if not _NAME.fullmatch(name):
            break
        names.append(name)
    if len(set(names)) < len(names):
        raise ValueError(f"{_VARIABLE}={chosen} names a GPU twice, in which case CUDA shows none: name each once")
    numbered = [name for name in names if name.isdigit()]
    known = _by_nvidia_smi() if numbered else None
    beyond = [] if known is None else [name for name in numbered if int(name) >= len(known)]
    return names[: names.index(beyond[0])] if beyond else names


def _checked(names: list[str]) -> list[str]:
    """The names that a user has chosen, checked.

    Raises:
        ValueError: see :class:`Devices`.
    """
    argument = f"hydra.launcher.gpus=[{','.join(names)}]"
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} must name each GPU once")
    if unknown := [name for name in names if not _NAME.fullmatch(name)]:
        raise ValueError(f"{argument} must contain names as in {_VARIABLE} (0, GPU-…, MIG-…), got {unknown[0]!r}")
    shown = visible_gpus() if names and _VARIABLE in os.environ else names
    if beyond := [name for name in names if name not in shown]:
        raise ValueError(
            f"{argument} must be among the GPUs that {_VARIABLE}={os.environ[_VARIABLE]} shows, by their names there, "
            f"and {beyond[0]} is not: leave the key out to use all of them"
        )
    return names


def _all_gpus() -> list[str]:
    """The names of all GPUs of this machine."""
    known = _by_nvidia_smi()
    return _by_torch() if known is None else known


def _by_nvidia_smi() -> list[str] | None:
    """The GPUs that nvidia-smi lists; None if it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    text = None if tool is None else _output([tool, "--query-gpu=index", "--format=csv,noheader"])
    return None if text is None else [word for word in text.split() if word.isdigit()]  # or "No devices were found"


def _by_torch() -> list[str]:
    """The GPUs that torch finds, in a separate process: one that has used CUDA cannot start others that use it."""
    if sys.platform == "darwin" or metadata.version("torch").endswith("+cpu"):
        return []
    text = _output([sys.executable, "-c", "import torch; print('GPUs', torch.cuda.device_count())"])
    found = re.search(r"^GPUs (\d+)$", text or "", re.MULTILINE)
    return [] if found is None else [str(number) for number in range(int(found[1]))]


def _output(command: list[str]) -> str | None:
    """The output of a program; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603 (no user's text)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
