"""``hydra/launcher=device_pool``: each job of a sweep in its own process, several at once over a pool of devices.

Hydra finds the launcher in every environment with lightning_mnn, for any application.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from lightning_mnn.config.paths import hydra_path
from lightning_mnn.launchers.jobs.records import JobState, SweepCommand
from lightning_mnn.launchers.signals import collected_signals, one_line_errors
from lightning_mnn.utilities.compat.hydra_internals import result_of, singletons

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hydra.types import HydraContext, TaskFunction

    from lightning_mnn.config.job_configs import JobConfigs
    from lightning_mnn.launchers.jobs.batch import JobBatch
    from lightning_mnn.launchers.jobs.calls import TaskReference
    from lightning_mnn.launchers.jobs.devices import Allocation, Devices, Request
    from lightning_mnn.launchers.jobs.job import Job
    from lightning_mnn.launchers.warm.client import WarmServers


log = logging.getLogger(__name__)

_PRELOAD = "__preload__"  # in the module of a program's main function: names of modules that its jobs will import

_INTERVAL = 0.1  # seconds between two checks of the jobs

_GRACE = {"SIGINT": 20.0, "SIGTERM": 5.0, "SIGKILL": 5.0}  # seconds for a job to end after each signal


@dataclass
class DevicePoolConf:
    """Config of the launcher.

    Attributes:
        n_jobs: number of jobs at once; null: as many as there are devices for.
        gpus: names of the GPUs to allocate, a subset of CUDA_VISIBLE_DEVICES if that is set; null: all in
            CUDA_VISIBLE_DEVICES, or all of the machine. A job sees only the GPUs allocated to it; a job on the CPU sees
            none.
        cpu_slots: number of devices that the CPU counts as; null: one per core, or ``n_jobs`` if that is more.
        resume: leave out jobs that have finished, by the ``job.json`` in their folders; null: the value of the
            application's own key ``resume``, if it has one that is true or false.
        warm: fork the jobs from a server that has imported the program, where that is safe; then a job does not import
            it again. Where it is not safe, one line says why. false: each job is a new process.
        jobs_per_gpu: number of jobs that may share a GPU.
        fail_fast: after the first job that fails, start no further ones; those that run continue to their end.
        retries: how often a job is started again whose process has crashed: ended by a signal or with an exit code, not
            by an error of the program. It resumes if the program has a key ``resume`` that is true or false.
        trainer_key: key of the Trainer's arguments in the application's config: ``devices``, ``accelerator``,
            ``num_nodes``.
    """

    _target_: str = "hydra_plugins.lightning_mnn.DevicePool"
    n_jobs: int | None = None
    gpus: list[Any] | None = None
    cpu_slots: int | None = None
    resume: bool | None = None
    warm: bool = True
    jobs_per_gpu: int = 1
    fail_fast: bool = False
    retries: int = 0
    trainer_key: str = "trainer"


class DevicePool(Launcher):
    """Runs each job of a sweep in a fresh process, several at once, each on as many devices as its Trainer asks for.

    A job that fails does not affect the others. A job also fails if its process is ended from outside; processes that
    its ranks leave behind are ended too. Each job's folder gets ``console.log``, its output, and ``job.json``, its
    result. The sweep's folder gets ``sweep.json``, the command. The launcher prints the command that resumes the sweep
    at the start, and again at the end if any job is not finished.

    Args:
        **options: see :class:`DevicePoolConf`.

    Raises:
        LaunchError: (at the launch, before any job is started) a job asks for devices that the pool does not have, or
            for several nodes, or two jobs share a folder.
    """

    _manner = ", each in its own process"

    def __init__(self, **options: Any) -> None:
        self._options = DevicePoolConf(**options)
        self._context: tuple[HydraContext, TaskFunction, DictConfig] | None = None
        self._configs: JobConfigs | None = None
        self._sweep_dir = ""
        self._servers: WarmServers | None = None  # kept from launch to launch: a sweeper may have many

    @override
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context = (hydra_context, task_function, config)

    @override
    @one_line_errors
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lightning_mnn.config.job_configs import JobConfigs  # noqa: PLC0415 (Hydra imports this module in all programs)
        from lightning_mnn.launchers.jobs.calls import TaskReference  # noqa: PLC0415 (Hydra imports this module in all programs)
        from lightning_mnn.launchers.jobs.devices import Devices  # noqa: PLC0415

        assert self._context is not None  # noqa: S101 (for the type checker: Hydra calls setup first)
        if not hasattr(os, "killpg"):
            raise OSError(
                "hydra/launcher=device_pool needs Linux or macOS, where it can signal all processes of a job: "
                "choose hydra/launcher=basic"
            )
        hydra_context, task_function, config = self._context
        setup_globals()
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        options = self._options
        if options.retries < 0:
            raise ValueError(f"hydra.launcher.retries={options.retries}: must be 0 or a positive number")
        pool = Devices(options.gpus, options.cpu_slots, options.n_jobs, options.jobs_per_gpu)
        self._configs = JobConfigs(partial(hydra_context.config_loader.load_sweep_config, config))
        self._sweep_dir = str(config.hydra.sweep.dir)
        common = set.intersection(*(set(one) for one in job_overrides)) if len(job_overrides) > 1 else set()
        jobs = [self._job(number, list(one), pool, common) for number, one in enumerate(job_overrides, initial_job_idx)]
        _require_own_folders(jobs)
        if self._resumes(config):
            for job in jobs:
                job.keep_if_finished()
        folder = Path(config.hydra.sweep.dir)
        command = SweepCommand.of_this_process(config)
        command.write(folder)
        log.info("%d jobs in %s%s", len(jobs), folder, self._manner)
        if initial_job_idx == 0:  # now, because a SIGKILL or a power cut leaves no time to print it
            log.info("if it is killed, this command resumes the sweep:\n  %s", command.resumed(folder))
        task = TaskReference.to(task_function)
        call = {"hydra_context": hydra_context, "task_function": task, "singletons": singletons()}
        if options.warm and self._servers is None and jobs:
            self._servers = _servers(task, jobs[0].config)
            weakref.finalize(self, self._servers.close)  # at the latest when this process ends
        with collected_signals() as received:
            try:
                with _display(jobs) as show:
                    for job in jobs:
                        if job.state is JobState.KEPT:
                            show(job)
                    _run(self._processes(jobs, pool), pool, Starter(call, self._servers, options), show, received)
            finally:  # below the table, not in it
                _print_end(jobs, command.resumed(folder), fail_fast=options.fail_fast)
        if received:
            raise SystemExit(128 + received[0])
        return [job.returned for job in jobs if job.returned is not None]

    def _job(self, number: int, overrides: list[str], pool: Devices, common: set[str]) -> Job:
        from lightning_mnn.config.job_configs import numbered  # noqa: PLC0415

        assert self._configs is not None  # noqa: S101 (for the type checker)
        composed = numbered(self._configs.of(overrides), number, self._sweep_dir)
        return self._job_with(composed, number, overrides, pool, common)

    def _job_with(
        self, composed: DictConfig, number: int, overrides: list[str], pool: Devices, common: set[str]
    ) -> Job:
        from lightning_mnn.launchers.jobs.job import Job, digest_of  # noqa: PLC0415

        request = request_of(composed, self._options.trainer_key, pool)
        own = list(filter_overrides(overrides))
        label = " ".join(override for override in own if override not in common)
        folder = hydra_path(composed, "sweep.dir", "sweep.subdir").resolve()
        return Job(number, own, label, composed, folder, request, digest_of(composed))

    def _processes(self, jobs: Sequence[Job], pool: Devices) -> Sequence[Job | JobBatch]:  # noqa: ARG002 (of subclasses)
        """What is started, each in a process of its own."""
        return jobs

    def _resumes(self, config: DictConfig) -> bool:
        own = self._options.resume
        return OmegaConf.select(config, "resume") is True if own is None else own


@dataclass(frozen=True)
class Starter:
    """What jobs are started with: arguments for Hydra's ``run_job``, the servers that may fork them, the options."""

    call: dict[str, Any]
    servers: WarmServers | None
    options: DevicePoolConf

    def start(self, job: Job | JobBatch, allocation: Allocation, received: Sequence[int]) -> bool:
        """Start a job, once a server is ready, unless a signal is received before; whether the job runs."""
        from lightning_mnn.launchers.jobs.process import environment_of  # noqa: PLC0415

        if self.servers is not None:
            self.servers.prepare(environment_of(allocation), received)
        return not received and job.start(allocation, self.call, self.servers)

    def wait(self) -> None:
        """Wait before the jobs are checked again."""
        if self.servers is None:
            time.sleep(_INTERVAL)
        else:
            self.servers.wait(_INTERVAL)

    def retries(self, job: Job | JobBatch) -> bool:
        """Let a job that has crashed wait for another start; whether it does."""
        if not job.has_crashed or job.retries >= self.options.retries:
            return False
        error = job.error
        job.wait_again()
        how = "resuming it" if job.can_resume else "from its beginning"
        log.warning("%s; it is started again (%d of %d), %s", error, job.retries, self.options.retries, how)
        return True


def _run(
    jobs: Sequence[Job | JobBatch],
    pool: Devices,
    starter: Starter,
    show: Callable[[Job | JobBatch], None],
    received: Sequence[int],
) -> None:
    """Run the waiting jobs, until all have ended or a signal is received.

    They start in order, but a job whose devices are free may start before one whose devices are not.
    """
    running: list[Job | JobBatch] = []
    try:
        while not received and ((waiting := _waiting(jobs, starter.options)) or running):
            for job in waiting:
                if not received and job.may_start and (allocation := pool.allocate(job.request)) is not None:
                    running.append(job)
                    if starter.start(job, allocation, received):
                        show(job)
            starter.wait()
            for job in list(running):
                if job.has_ended():
                    running.remove(job)
                    if job.allocation is not None:
                        pool.release(job.allocation)
                    if starter.retries(job):
                        continue
                    job.give_up()
                for ended in job.just_ended():
                    show(ended)
    finally:
        _end(running, received)


def _waiting(jobs: Sequence[Job | JobBatch], options: DevicePoolConf) -> list[Job | JobBatch]:
    """The jobs that are to be started."""
    if options.fail_fast and any(job.state is JobState.FAILED for job in jobs):
        return []
    return [job for job in jobs if job.state is JobState.WAITING]


def _servers(task: TaskReference, config: DictConfig) -> WarmServers:
    """The servers for a program: they import it, and what its config names by ``_target_``."""
    from lightning_mnn.launchers.jobs import main  # noqa: PLC0415
    from lightning_mnn.launchers.warm.client import WarmServers  # noqa: PLC0415
    from lightning_mnn.utilities.compat.python_internals import preparation  # noqa: PLC0415

    program = [task.module] if task.value is None and task.module != "__main__" else []
    content: Any = OmegaConf.to_container(config, resolve=False)
    names = [name for key, node in content.items() if key != "hydra" for name in _targets(node)]
    own = getattr(sys.modules.get(task.module), _PRELOAD, ())
    if OmegaConf.select(config, "hydra.job_logging.disable_existing_loggers"):  # those of modules imported before
        own, names = (), []
    return WarmServers(
        prepared=preparation(),
        program=program,
        modules=list(dict.fromkeys([*own, *names])),
        script=str(main.__file__),
        run=f"{main.__name__}:{main.run_forked.__name__}",
    )


def _targets(node: Any) -> Iterator[str]:
    """The classes and functions that a config node names by ``_target_``."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if isinstance(target, str) and "${" not in target:
            yield target
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(value)


def _end(running: Sequence[Job | JobBatch], received: Sequence[int]) -> None:
    """Ask the jobs to end, by ever stronger signals. A further signal from the user triggers the next step at once."""
    for name, grace in _GRACE.items():
        number = signal.Signals[name]
        left = [job for job in running if job.state is JobState.RUNNING]
        for job in left:
            if job.process is not None:
                job.process.signal(number)
        deadline, before = time.monotonic() + grace, len(received)
        while left and time.monotonic() < deadline and (len(received) == before or number is signal.SIGKILL):
            left = [job for job in left if not job.has_ended()]
            time.sleep(_INTERVAL)


@contextlib.contextmanager
def _display(jobs: Sequence[Job]) -> Iterator[Callable[[Job | JobBatch], None]]:
    """Show the jobs: on a terminal in a table, elsewhere by a line for each start and end."""
    from rich.console import Console  # noqa: PLC0415 (Hydra imports this module in all programs)

    from lightning_mnn.launchers.jobs.batch import JobBatch  # noqa: PLC0415
    from lightning_mnn.launchers.jobs.table import JobTable, clock  # noqa: PLC0415

    words = {JobState.FAILED: "FAILED", JobState.INTERRUPTED: "interrupted"}

    def line(job: Job | JobBatch) -> None:
        if isinstance(job, JobBatch):
            log.info("%d jobs start together on %s", job.num_left, job.allocation)
            return
        if job.state is JobState.RUNNING:
            what = f"starts on {job.allocation}"
        elif job.state is JobState.KEPT:
            what = "was done before"
        else:
            what = f"{words.get(job.state, 'done')} after {clock(job.seconds)}"
        log.info("#%d %s: %s", job.number, what, job.label)

    console = Console(stderr=True)
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        with JobTable(jobs).live(console):
            yield lambda _: None
    else:
        yield line


def _print_end(jobs: Sequence[Job], command: str, *, fail_fast: bool) -> None:
    from lightning_mnn.launchers.jobs.table import counts  # noqa: PLC0415 (Hydra imports this module in all programs)

    log.info("%s", counts(jobs))
    for job in jobs:
        if job.state in (JobState.FAILED, JobState.INTERRUPTED) and job.returned is not None:
            log.error("%s", result_of(job.returned))
    waiting = sum(job.state is JobState.WAITING for job in jobs)
    if fail_fast and waiting and any(job.state is JobState.FAILED for job in jobs):
        log.error("hydra.launcher.fail_fast=true: a job has failed, so %d were not started", waiting)
    left = sum(job.state not in (JobState.FINISHED, JobState.KEPT) for job in jobs)
    if left:
        log.error("%d of %d jobs are not finished; this command runs them:\n  %s", left, len(jobs), command)


def request_of(composed: DictConfig, key: str, pool: Devices) -> Request:
    """The devices that a job asks for."""
    nodes = OmegaConf.select(composed, f"{key}.num_nodes", default=1)
    if nodes not in (None, 1):
        raise ValueError(
            f"{key}.num_nodes={nodes}: hydra/launcher=device_pool has only the devices of one machine: choose "
            "hydra/launcher=slurm"
        )
    if OmegaConf.select(composed, key) is None:  # a program without such a key
        return pool.request(1, "auto")
    return pool.request(*(OmegaConf.select(composed, f"{key}.{name}") for name in ("devices", "accelerator")))


def _require_own_folders(jobs: Sequence[Job]) -> None:
    for folder, times in Counter(job.folder for job in jobs).items():
        if times > 1:
            numbers = [job.number for job in jobs if job.folder == folder]
            subdir = folder.name
            raise ValueError(
                f"hydra.sweep.subdir={subdir}: jobs {numbers} would share the folder {folder}: choose another, such as "
                "hydra.sweep.subdir='${hydra.job.num}'"
            )
