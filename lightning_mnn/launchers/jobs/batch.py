"""Jobs of a sweep that share a process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_mnn.launchers.jobs.process import JobProcess
from lightning_mnn.launchers.jobs.records import JOB_RECORD, JobState, read_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hydra.core.utils import JobReturn

    from lightning_mnn.launchers.jobs.devices import Allocation, Request
    from lightning_mnn.launchers.jobs.job import Job
    from lightning_mnn.launchers.jobs.turns import JobPlan
    from lightning_mnn.launchers.warm.client import WarmServers


@dataclass
class JobBatch:
    """Jobs that run in one process (see :mod:`lightning_mnn.launchers.jobs.turns`); to the launcher, like one job.

    Attributes:
        jobs: the jobs.
        plans: what each of them is to do.
        options: ``max_replicas``, how many run at a time, and ``fail_fast``.
        log: file for what the process itself prints.
        state: of the process.
        allocation: its devices.
        process: the process, once it is started.
        retries: how often it was started again after a crash.
        has_crashed: whether the process has ended before its jobs, and the launcher did not end it.
        may_start: whether nothing that has crashed is left.
    """

    jobs: Sequence[Job]
    plans: Sequence[JobPlan]
    options: dict[str, Any]
    log: Path
    state: JobState = JobState.WAITING
    allocation: Allocation | None = None
    process: JobProcess | None = None
    retries: int = 0
    has_crashed: bool = False
    may_start: bool = True
    _ended: list[Job] = field(default_factory=list)
    _resumes: bool = False

    @property
    def request(self) -> Request:
        """The devices that the process needs."""
        return self.jobs[0].request

    @property
    def num_left(self) -> int:
        """Number of jobs that have not ended."""
        return len(self._left())

    @property
    def error(self) -> str:
        """How the process has ended."""
        code = None if self.process is None else self.process.exit_code
        return f"the process of {self.num_left} jobs, {self.log}, has ended with exit code {code}"

    @property
    def can_resume(self) -> bool:
        """Whether the program has a key ``resume`` that is true or false."""
        return self.jobs[0].can_resume

    def start(self, allocation: Allocation, call: dict[str, Any], servers: WarmServers | None = None) -> bool:
        """Start the process on allocated devices, for all jobs that have not ended; if that is impossible, they fail.

        Returns:
            Whether it runs.
        """
        self.allocation, left = allocation, {job.number for job in self._left()}
        plans = [plan for plan in self.plans if plan.number in left]
        try:
            for job in self._left():
                job.folder.mkdir(parents=True, exist_ok=True)
                (job.folder / JOB_RECORD).unlink(missing_ok=True)
                job.allocation = allocation
            own = {"config": plans[0].template, "plans": plans, **self.options}
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                self.process = JobProcess(allocation, output, call | own, servers)
            self.state = JobState.RUNNING
            for job in self._left():
                job.state, job.process = JobState.RUNNING, self.process
        except Exception as error:  # noqa: BLE001 (the other jobs must continue)
            self.state = JobState.FAILED
            for job in self._left():
                job.end_with(job.failed(f"cannot be started: {type(error).__name__}: {error}"))
                self._ended.append(job)
        return self.state is JobState.RUNNING

    def has_ended(self) -> bool:
        """Check which jobs have ended, and write their records; whether the process has ended."""
        if self.state is not JobState.RUNNING or self.process is None:
            return self.state is not JobState.WAITING
        over = self.process.exit_code is not None  # asked first: what it has written by then is complete
        returns = self.process.returned_jobs()
        for job in self._left():
            job.seconds = self.process.seconds
            if job.number in returns:
                self._end(job, returns[job.number])
        if not over:
            return False
        if self.process.exit_code == 0 and self.options["fail_fast"] and not self.process.ended_by_us:
            for job in self._left():  # after another has failed, they were not started
                job.state, job.allocation = JobState.WAITING, None
            self.state = JobState.FINISHED
            self.process.clean_up()
            self.process = None
            return True
        self.has_crashed = bool(self._left()) and not self.process.ended_by_us
        self.state = JobState.FAILED if self._left() else JobState.FINISHED
        if not self.has_crashed:
            self.give_up()
        return True

    def give_up(self) -> None:
        """Record that the jobs that are left have failed or, if the launcher ended their process, were interrupted."""
        if self.process is None:
            return
        process, self.process = self.process, None
        for job in self._left():
            job.end_with(job.failed(None), JobState.INTERRUPTED if process.ended_by_us else JobState.FAILED)
            self._ended.append(job)
        process.clean_up()

    def just_ended(self) -> list[Job]:
        """The jobs that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def wait_again(self) -> None:
        """After a crash: wait for another start, at which the jobs that are left resume if they can."""
        assert self.process is not None  # noqa: S101
        self.process.clean_up()
        self.retries += 1
        self.state, self.process, self.has_crashed = JobState.WAITING, None, False
        for job in self._left():
            job.state, job.process, job.allocation = JobState.WAITING, None, None
        if self.can_resume and not self._resumes:
            self._resumes = True
            for plan in self.plans:
                plan.values["resume"] = True

    def _left(self) -> list[Job]:
        return [job for job in self.jobs if job.state in (JobState.WAITING, JobState.RUNNING)]

    def _end(self, job: Job, found: JobReturn) -> None:
        job.seconds = getattr(found, "seconds", job.seconds)
        job.progress = {"minimum": _minimum(job.folder)}
        job.end_with(found)
        self._ended.append(job)


def _minimum(folder: Path) -> dict[str, Any] | None:
    """What the job has found, for the sweep's records."""
    summary = read_record(folder / "summary.json")
    return {key: summary.get(key) for key in ("evidence", "kind", "reason_code", "reason")} if summary else None
