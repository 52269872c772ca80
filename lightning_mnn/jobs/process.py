"""One job of a sweep: what it is to do, and its process."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.spawn
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException

from lightning_mnn.jobs import main
from lightning_mnn.jobs.progress import VARIABLE, note, read_note

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from omegaconf import DictConfig

    from lightning_mnn.jobs.devices import Loan, Request

# Of a process group that this one may itself be in, and of services that another run may have started.
_NOT_INHERITED = (
    *("LOCAL_RANK", "GLOBAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "WANDB_SERVICE", "WANDB_RUN_ID"),
)
_LAST_WORDS = 4096  # bytes of a log that are searched for why a job failed
_ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b")  # as a traceback ends


class JobError(CompactHydraException):
    """A job of a sweep has failed; the message says how, and where its output is."""


@dataclass(frozen=True)
class TaskReference:
    """A function by the place where it is defined, below so many decorators; or, where it has none, by its value.

    The job imports the module, or the script that was started, anew: what it registers there is there in the job.
    """

    module: str
    name: str
    depth: int
    value: Callable[..., Any] | None = None

    @classmethod
    def to(cls, function: Callable[..., Any]) -> TaskReference:
        """A reference to a function."""
        module, name = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
        found, depth = _look_up(module, name), 0
        while found is not None and found is not function:
            found, depth = getattr(found, "__wrapped__", None), depth + 1
        return cls(module, name, depth, function if found is None else None)

    def resolve(self) -> Callable[..., Any]:
        """The function."""
        found = self.value
        if found is None:
            __import__(self.module)
            found = _look_up(self.module, self.name)
            for _ in range(self.depth):
                found = found.__wrapped__
        return found


def _look_up(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        number: its place in the sweep.
        overrides: of the application's config.
        label: those that set it apart.
        config: composed, with Hydra's node.
        folder: its output folder.
        request: devices that it asks for.
        state: "waiting", "running", "finished", "failed", or "kept" if it had finished before.
        returned: what it has come to.
        process: that runs it, once it is started.
        seconds: since its start, or that it took.
        progress: what its Trainer has noted last (see :mod:`lightning_mnn.jobs.progress`).
    """

    number: int
    overrides: list[str]
    label: str
    config: DictConfig
    folder: Path
    request: Request
    state: str = "waiting"
    returned: JobReturn | None = None
    process: JobProcess | None = None
    seconds: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """What the job prints."""
        return self.folder / "console.log"

    def keep_if_finished(self) -> None:
        """Take over what the job came to when it was run before, if it had finished, with the same overrides."""
        try:
            record = json.loads((self.folder / "job.json").read_text())
        except FileNotFoundError:
            return
        if record["status"] == "finished" and record["overrides"] == _without_resume(self.overrides):
            self.state = "kept"
            self.returned = self._return(JobStatus.COMPLETED, record["return_value"])

    def start(self, loan: Loan, call: dict[str, Any]) -> None:
        """Start the job's process on lent devices."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "job.json").unlink(missing_ok=True)
        self.process = JobProcess(loan, self.log, call | {"config": self.config})
        self.state = "running"

    def has_ended(self) -> bool:
        """Look at the process: whether it has ended. The first time this is so, the job's record is written."""
        if self.state != "running" or self.process is None:
            return self.state != "waiting"
        self.seconds, self.progress = self.process.seconds, self.process.progress
        if self.process.exit_code is None:
            return False
        found = self.process.returned() or self._return(JobStatus.FAILED, None)
        if found.status is not JobStatus.COMPLETED:
            found._return_value = self._error(found._return_value)  # noqa: SLF001 (return_value would raise it)
        self.returned = found
        self.state = "finished" if found.status is JobStatus.COMPLETED else "failed"
        self._write_record()
        self.process.clear_away()
        return True

    def _error(self, words: str | None) -> JobError:
        process = self.process
        assert process is not None  # noqa: S101 (for the type checker: only what ran has failed)
        code = process.exit_code or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        words = words or _last_words(self.log)
        return JobError(
            f"job #{self.number} ({self.label}) {'was interrupted' if process.ended_by_us else how}"
            f"{f': {words}' if words else ''}\n  all it said is in {self.log}"
        )

    def _return(self, status: JobStatus, value: Any) -> JobReturn:
        return JobReturn(
            overrides=list(self.overrides),
            cfg=None,
            hydra_cfg=None,
            working_dir=str(self.folder),
            status=status,
            _return_value=value,
        )

    def _write_record(self) -> None:
        assert self.returned is not None  # noqa: S101 (for the type checker: there is a record of what has ended)
        assert self.process is not None  # noqa: S101
        value = self.returned._return_value  # noqa: SLF001 (return_value would raise the error)
        started = self.progress.get("started")
        record = {
            "overrides": _without_resume(self.overrides),
            "status": self.state,
            "error": str(value) if self.state == "failed" else None,
            "return_value": None if self.state == "failed" else value,
            "devices": str(self.process.loan),
            "seconds": self.seconds,
            "seconds_to_training": None if started is None else started - self.process.began,
        }
        try:
            json.dumps(record)
        except (TypeError, ValueError):  # it cannot be given again later, so that the job would have to run anew
            record |= {"status": "returned", "return_value": repr(value)}
        note(self.folder / "job.json", record)


@dataclass
class JobProcess:
    """The process of a job, in a session of its own, with the folder through which it is spoken to.

    Attributes:
        loan: its devices.
        log: where its output goes.
        call: what Hydra's ``run_job`` is to be called with.
        began: when it was started, in seconds since the epoch.
        ended_by_us: whether it was told to end.
    """

    loan: Loan
    log: Path
    call: dict[str, Any]
    began: float = field(default_factory=time.time)
    ended_by_us: bool = False

    def __post_init__(self) -> None:
        """Start it."""
        self._folder = Path(tempfile.mkdtemp(prefix="lightning-mnn-job-"))
        prepared = multiprocessing.spawn.get_preparation_data("job")
        kept = ("sys_path", "init_main_from_name", "init_main_from_path")
        with (self._folder / "call.pickle").open("wb") as file:
            pickle.dump({key: prepared[key] for key in kept if key in prepared}, file)
            cloudpickle.dump(self.call, file)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 (our own file)
                [sys.executable, str(main.__file__), str(self._folder)],
                env=self._environment(),
                stdin=subprocess.PIPE,  # held open: its end tells the job that the launcher is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # which Ctrl-C on the terminal does not reach, but our own signals do
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; −n if signal n ended it."""
        return self._process.poll()

    @property
    def progress(self) -> dict[str, Any]:
        """What its Trainer has noted last."""
        return read_note(self._folder / "progress.json")

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.time() - self.began

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and all that it has started."""
        self.ended_by_us = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def returned(self) -> JobReturn | None:
        """What it has left; None: it did not come to its end. An exit code of 0 is as good as a return of nothing."""
        path = self._folder / "return.pickle"
        if not path.exists():
            return JobReturn(status=JobStatus.COMPLETED) if self.exit_code == 0 else None
        with path.open("rb") as file:
            found: JobReturn = pickle.load(file)  # noqa: S301 (written by our own process a moment ago)
        return found

    def clear_away(self) -> None:
        """End what the process has left running, and remove its folder."""
        if self.exit_code:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
        if "SLURM_JOB_ID" in own:  # in an allocation: Lightning is to start its own processes, not to look for srun's
            own["SLURM_JOB_NAME"] = "interactive"
        return own | self.loan.environment | {VARIABLE: str(self._folder / "progress.json"), "PYTHONUNBUFFERED": "1"}


def _without_resume(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if override.split("=")[0].lstrip("+") != "resume"]


def _last_words(log: Path) -> str:
    """What a log ends in: the error that is named last, or else the last line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LAST_WORDS))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [""])[-1]
