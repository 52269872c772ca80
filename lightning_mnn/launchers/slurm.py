"""``hydra/launcher=slurm``: each job of a sweep as a SLURM job, with the nodes and tasks that it needs."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from lightning_mnn.launchers.jobs.records import SweepCommand
from lightning_mnn.launchers.signals import collected_signals, one_line_errors
from lightning_mnn.utilities.compat.hydra_internals import singletons, submitit_job

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

_SIZES = ("num_nodes", "devices", "accelerator")
_GENERIC_OPTIONS = ("name", "timeout_min", "mem_gb", "cpus_per_task", *("nodes", "tasks_per_node", "gpus_per_node"))
_FILES_INTERVAL = 1.0  # seconds between two checks for results of jobs
_QUEUE_INTERVAL = 10.0  # seconds between two queries to SLURM
_GRACE = 30.0  # seconds for a job's results to become visible here after it left the queue
_LEAVING = 40.0  # seconds for an ending job to leave the queue: SLURM gives its processes 30 to end


@dataclass(frozen=True)
class SlurmRequest:
    """A request to SLURM: ``nodes``, ``tasks_per_node`` (processes, one per device), and ``gpus_per_node``."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int | None


def allocation(trainer: Mapping[str, Any]) -> SlurmRequest:
    """What a job needs whose Trainer has these arguments: a task for each device of each of its nodes.

    Raises:
        ValueError: ``devices`` is not a number (a list must count from 0), ``num_nodes`` is not one, or ``accelerator``
            does not determine whether GPUs are needed.

    >>> allocation({"accelerator": "gpu", "devices": 4, "num_nodes": 2})
    SlurmRequest(nodes=2, tasks_per_node=4, gpus_per_node=4)
    >>> allocation({"accelerator": "cpu", "devices": 1})
    SlurmRequest(nodes=1, tasks_per_node=1, gpus_per_node=None)
    """
    nodes, devices = trainer.get("num_nodes", 1), _number(trainer.get("devices", "auto"))
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ValueError(f"trainer.num_nodes must be a positive number, got {nodes!r}")
    accelerator = trainer.get("accelerator", "auto")
    if accelerator not in ("cpu", "gpu", "cuda"):
        raise ValueError(
            f"trainer.accelerator={accelerator} does not determine what to request from SLURM: "
            "choose trainer.accelerator=cpu or trainer.accelerator=gpu"
        )
    return SlurmRequest(nodes, devices, None if accelerator == "cpu" else devices)


def _number(devices: Any) -> int:
    names = list(devices) if isinstance(devices, list | tuple) else None
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if names and names == list(range(len(names))):  # a job sees its GPUs as 0, 1, …
        return len(names)
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ValueError(
            f"trainer.devices={devices} does not determine how many devices of a node to request from SLURM: "
            "give a number, such as trainer.devices=2"
        )
    return devices


class Slurm(Launcher):
    """Submits each job of a sweep to SLURM, by submitit, and waits for what the jobs return.

    A job's size is that of its own Trainer (see :func:`allocation`), so a sweep may also be over sizes. A job that
    fails, or that SLURM ends, does not affect the others. Output and return values of the jobs are in ``.submitit`` in
    the sweep's folder. Ctrl-C and SIGTERM end only the waiting; the jobs continue in SLURM.

    Args:
        max_num_timeout: how often a job may run out of time and be requeued.
        **options: options of submitit's executor for SLURM: ``partition``, ``timeout_min``, …; None: the cluster's
            default.
    """

    def __init__(self, *, max_num_timeout: int, **options: Any) -> None:
        self._max_num_timeout = max_num_timeout
        self._options = {key: _plain(value) for key, value in options.items() if value is not None}
        self._hydra: dict[str, Any] = {}
        self._returned: set[str] = set()  # jobs of an earlier batch, which may still be in the queue

    @one_line_errors
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra passes to a launcher."""
        _submitit()
        self._hydra = {"hydra_context": hydra_context, "task_function": task_function, "config": config}

    @one_line_errors
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit the jobs, those of one size together, and wait for all of them.

        Returns:
            What each job's first process returned; for a job that failed in any of its processes, that failure.

        Raises:
            LaunchError: a job's Trainer does not determine what to request, SLURM would not accept the sweep's folder
                name, or jobs of that folder are in the queue; nothing has been submitted.
            SystemExit: a signal was received; the jobs continue.
        """
        groups: dict[SlurmRequest, list[int]] = {}
        for index, overrides in enumerate(job_overrides):
            groups.setdefault(self._allocation(overrides), []).append(index)
        config = self._hydra["config"]
        files = _files_of(str(config.hydra.sweep.dir))  # resolved now: it may contain the time
        _require_none_queued(files, but=self._returned)
        files.mkdir(parents=True, exist_ok=True)
        command = SweepCommand.of_this_process(config)
        command.write(files.parent)
        jobs: dict[int, Any] = {}
        submitted = False
        with collected_signals() as received:
            try:
                for size, indices in groups.items():
                    group = self._submit(files, size, [(initial_job_idx + i, job_overrides[i]) for i in indices])
                    jobs |= dict(zip(indices, group, strict=True))
                submitted = True
                for index in range(len(job_overrides)):
                    words = " ".join(filter_overrides(job_overrides[index]))
                    log.info("#%d is SLURM's job %s: %s", initial_job_idx + index, jobs[index].job_id, words)
                _wait(jobs.values(), received)
            finally:
                if received or not submitted:
                    _print_running_jobs(files, command)
                if received:  # whatever was raised: on a terminal Ctrl-C also ends sbatch
                    raise SystemExit(128 + received[0])
        self._returned |= {job.job_id for job in jobs.values()}
        found = [_returned(jobs[index]) for index in range(len(job_overrides))]
        for index, result in enumerate(found):
            result.overrides = job_overrides[index]
            if result.status == JobStatus.FAILED:
                log.error("#%d failed: %s", initial_job_idx + index, jobs[index].paths.stderr)
        if any(result.status == JobStatus.FAILED for result in found):
            log.error("this command resumes the sweep:\n  %s", command.resumed(files.parent))
        return found

    def _allocation(self, overrides: Sequence[str]) -> SlurmRequest:
        loader, config = self._hydra["hydra_context"].config_loader, self._hydra["config"]
        trainer = loader.load_sweep_config(config, list(overrides)).get("trainer") or {}
        try:
            return allocation({key: _plain(trainer.get(key)) for key in _SIZES if key in trainer})
        except ValueError as error:
            raise ValueError(f"{error} (job {' '.join(overrides)})") from None

    def _submit(self, files: Path, size: SlurmRequest, jobs: Sequence[tuple[int, Sequence[str]]]) -> list[Any]:
        executor_class, call_class = _submitit()
        executor = executor_class(folder=files / "%j", cluster="slurm", slurm_max_num_timeout=self._max_num_timeout)
        # A killed rank ends its job; and srun does not inherit the number of CPUs requested from sbatch.
        srun = ["--kill-on-bad-exit=1", *(f"--cpus-per-task={n}" for n in [self._options.get("cpus_per_task")] if n)]
        options = self._options | {key: value for key, value in asdict(size).items() if value} | {"srun_args": srun}
        executor.update_parameters(**{k if k in _GENERIC_OPTIONS else f"slurm_{k}": v for k, v in options.items()})
        call = call_class()  # a launcher too, but it waits for SLURM's accounting and has one size for all jobs
        call.setup(**self._hydra)
        state = singletons()
        folder = str(files.parent).replace("'", r"\'")
        fixed = f"hydra.sweep.dir='{folder}'"
        calls = [([*words, fixed], "hydra.sweep.dir", number, f"job_id_for_{number}", state) for number, words in jobs]
        submitted: list[Any] = executor.map_array(call, *zip(*calls, strict=True))
        return submitted


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _submitit() -> tuple[Any, Any]:
    """Submitit's executor, and the callable that runs one job of a sweep in the process that submitit starts."""
    try:
        from submitit import AutoExecutor  # noqa: PLC0415 (optional)

        call_class = submitit_job()
    except ImportError as error:
        raise ImportError(f"hydra/launcher=slurm needs submitit: pip install lightning-mnn[slurm] ({error})") from error
    return AutoExecutor, call_class


def _processes(job: Any) -> list[Any]:
    return [job.task(number) for number in range(job.num_tasks)]


def _complete(job: Any) -> bool:
    return all(process.paths.result_pickle.exists() for process in _processes(job))


def _wait(jobs: Iterable[Any], received: Sequence[int]) -> None:
    """Wait until each job has left its results or has long been missing in the queue, or until a signal is received.

    SLURM's accounting is not queried, because not every cluster has it. A requeued job is in the queue.
    """
    waiting = list(jobs)
    asked = time.monotonic()
    seen = {job.job_id: asked for job in waiting}
    while waiting := [job for job in waiting if not _complete(job) and asked - seen[job.job_id] < _GRACE]:
        time.sleep(_FILES_INTERVAL)
        if received:
            return
        if time.monotonic() - asked >= _QUEUE_INTERVAL and (queue := _queue()) is not None:
            asked = time.monotonic()
            seen |= dict.fromkeys(queue, asked)


class _Queued(NamedTuple):
    """A job in the queue: its state, as SLURM names it, and the submitted script."""

    state: str
    script: Path


def _queue() -> dict[str, _Queued] | None:
    """This user's running and waiting jobs, by their numbers; None: SLURM does not answer."""
    query = ["squeue", "--noheader", "--array", "--format=%i|%T|%o", f"--user={os.getuid()}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603 (no user's text)
    except FileNotFoundError:
        return None
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {row[0]: _Queued(row[1], Path(row[2])) for row in rows if len(row) == 3} if done.returncode == 0 else None


def _queued_from(files: Path) -> dict[str, str] | None:
    """States of the queued jobs whose scripts submitit wrote in this folder; None: SLURM does not answer."""
    queue = _queue()
    here = files.resolve()
    return None if queue is None else {k: job.state for k, job in queue.items() if job.script.parent.resolve() == here}


def _files_of(sweep_dir: str) -> Path:
    """The folder in which submitit keeps the files of a sweep."""
    folder = Path(sweep_dir).absolute()
    if any(sign in str(folder) for sign in "%\\"):
        raise ValueError(
            f"hydra.sweep.dir={folder}: SLURM interprets % and \\ in file names: choose a folder without them"
        )
    return folder / ".submitit"


def _require_none_queued(files: Path, *, but: Iterable[str]) -> None:
    """Require that no jobs of a folder are in the queue; wait for jobs that are just leaving it.

    Raises:
        FileExistsError: jobs of the same folder run or wait.
        RuntimeError: SLURM does not answer whether they do.
    """
    deadline = time.monotonic() + _LEAVING
    while files.exists():
        queue = _queued_from(files)
        if queue is None:
            raise RuntimeError(
                f"squeue does not answer whether jobs of {files.parent} are in the queue: try again later"
            )
        found = {number: state for number, state in queue.items() if number not in but}
        if not found:
            return
        leaving = (
            state == "COMPLETING" or any((files / number).glob("*_result.pkl")) for number, state in found.items()
        )
        if not all(leaving) or time.monotonic() > deadline:
            raise FileExistsError(
                f"hydra.sweep.dir={files.parent}: jobs of this folder are in SLURM's queue ({len(found)}): "
                f"wait until they have ended, or end them by: scancel {_scancel_arguments(found)}"
            )
        time.sleep(_FILES_INTERVAL)


def _print_running_jobs(files: Path, command: SweepCommand) -> None:
    """Print which jobs continue by themselves."""
    found = _queued_from(files)
    if found is None:
        log.warning("squeue does not answer which jobs of %s continue", files.parent)
    elif found:
        log.warning(
            "jobs that continue in the cluster: %d; to end them: scancel %s", len(found), _scancel_arguments(found)
        )
        log.warning("when they have ended, finish the sweep with\n  %s", command.resumed(files.parent))


def _scancel_arguments(numbers: Iterable[str]) -> str:
    """Job numbers for scancel; the jobs of an array are replaced by the number of the array."""
    return " ".join(dict.fromkeys(number.partition("_")[0] for number in numbers))


def _returned(job: Any) -> JobReturn:
    """What the first process returned, or the first failure of any process."""
    first: JobReturn | None = None
    for process in _processes(job):
        if not process.paths.result_pickle.exists():
            return _failure(RuntimeError(f"SLURM's job {job.job_id} ended early: see {process.paths.stderr}"))
        try:
            found = process.result()
        except Exception as error:  # noqa: BLE001 (whatever the job raised)
            return _failure(error)
        if found.status == JobStatus.FAILED:
            return found  # type: ignore[no-any-return]
        first = first or found
    return first or _failure(RuntimeError(f"SLURM's job {job.job_id} has no processes"))


def _failure(error: Exception) -> JobReturn:
    result = JobReturn()
    result.status = JobStatus.FAILED
    result.return_value = error
    return result
