"""One job of a sweep: what it is to do, and what is known of it."""

from __future__ import annotations

import hashlib
import re
import signal
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from lightning_mnn.launchers.jobs.process import JobProcess, log
from lightning_mnn.launchers.jobs.records import JOB_RECORD, JobState, read_record, recorded, returned
from lightning_mnn.utilities.compat.hydra_internals import result_of
from lightning_mnn.utilities.files import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from lightning_mnn.launchers.jobs.devices import Allocation, Request


_LONGEST = 300  # characters of what a job failed with

_HINT = "Set the environment variable HYDRA_FULL_ERROR"  # Hydra's, below the error

_LAST_WORDS = 4096  # bytes of a log that are searched for why a job failed

_ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b")  # as a traceback ends


class JobError(CompactHydraException):
    """A job of a sweep has failed; the message says how, and where its output is."""


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
        state: how far it is.
        allocation: devices that it got.
        returned: what it has come to.
        process: that runs it, once it is started.
        seconds: since its start, or that it took.
        progress: what its Trainer has noted last (see :mod:`lightning_mnn.launchers.jobs.progress`).
    """

    number: int
    overrides: list[str]
    label: str
    config: DictConfig
    folder: Path
    request: Request
    state: JobState = JobState.WAITING
    allocation: Allocation | None = None
    returned: JobReturn | None = None
    process: JobProcess | None = None
    seconds: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """What the job prints."""
        return self.folder / "console.log"

    def keep_if_finished(self) -> None:
        """Take over what the job came to when it was run before, if it had finished, with the same config."""
        record = read_record(self.folder / JOB_RECORD)
        if record.get("status") == JobState.FINISHED and record.get("config") == self._digest():
            self.state = JobState.KEPT
            self.returned = self._return(JobStatus.COMPLETED, returned(record.get("return_value")))

    def start(self, allocation: Allocation, call: dict[str, Any]) -> bool:
        """Start the job's process on lent devices; where that cannot be, the job has failed.

        Returns:
            Whether it runs.
        """
        self.allocation = allocation
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                _lock(output, self.folder)
                (self.folder / JOB_RECORD).unlink(missing_ok=True)
                self.process = JobProcess(allocation, output, call | {"config": self.config})
            self.state = JobState.RUNNING
        except Exception as error:  # noqa: BLE001 (the other jobs are to go on)
            self._end(self._return(JobStatus.FAILED, f"cannot be started: {type(error).__name__}: {error}"))
        return self.state is JobState.RUNNING

    def has_ended(self) -> bool:
        """Look at the process: whether it has ended. The first time this is so, the job's record is written."""
        if self.state is not JobState.RUNNING or self.process is None:
            return self.state is not JobState.WAITING
        self.seconds, self.progress = self.process.seconds, self.process.progress
        if self.process.exit_code is None:
            return False
        try:
            found = self.process.returned() or self._return(JobStatus.FAILED, None)
        except Exception as error:  # noqa: BLE001 (what a job returned may raise anything when it is loaded)
            found = self._return(JobStatus.FAILED, f"what it returned cannot be read: {type(error).__name__}: {error}")
        if self.process.ended_by_us:  # whatever it made of that
            self._end(self._return(JobStatus.FAILED, None), JobState.INTERRUPTED)
        else:
            self._end(found)
        self.process.clear_away()
        return True

    def _end(self, found: JobReturn, failure: JobState = JobState.FAILED) -> None:
        self.state = JobState.FINISHED if found.status is JobStatus.COMPLETED else failure
        if self.state is not JobState.FINISHED:
            found.return_value = self._error(result_of(found))
        self.returned = found
        if self.process is None:  # not started, maybe for another one is at work in the folder
            return
        try:
            write_json(self.folder / JOB_RECORD, self._record())
        except OSError as error:
            log.warning("#%d: %s cannot be written: %s", self.number, self.folder / JOB_RECORD, error)

    def _error(self, words: str | None) -> JobError:
        code = None if self.process is None else self.process.exit_code
        if self.state is JobState.INTERRUPTED:
            how = "was interrupted"
        elif code is None:
            how = str(words)
        else:
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"failed with exit code {code}"
            how += f": {shortened}" if (shortened := _printable(words or _last_words(self.log))) else ""
        return JobError(f"job #{self.number} ({self.label}) {how}\n  all it said is in {self.log}")

    def _return(self, status: JobStatus, value: Any) -> JobReturn:
        returned = JobReturn(overrides=list(self.overrides), working_dir=str(self.folder), status=status)
        returned.return_value = value
        return returned

    def _record(self) -> dict[str, Any]:
        value = None if self.returned is None else result_of(self.returned)
        finished = self.state is JobState.FINISHED
        started = self.progress.get("started")
        record = {
            "overrides": self.overrides,
            "config": self._digest(),
            "status": str(self.state),
            "exit_code": None if self.process is None else self.process.exit_code,
            "error": None if finished else str(value),
            "return_value": None,
            "minimum": self.progress.get("minimum"),
            "devices": str(self.allocation),
            "seconds": self.seconds,
            "seconds_to_training": None if started is None or self.process is None else started - self.process.began,
        }
        if not finished:
            return record
        try:
            return record | {"return_value": recorded(value)}
        except TypeError:  # it cannot be given again later, so that the job would have to run anew
            return record | {"status": str(JobState.RETURNED), "return_value": repr(value)}

    def _digest(self) -> str:
        """Of the application's config, as it is written, but for whether it resumes."""
        content: Any = OmegaConf.to_container(self.config, resolve=False)
        shown = {key: value for key, value in content.items() if key not in ("hydra", "resume")}
        return hashlib.sha256(repr(_sorted(shown)).encode()).hexdigest()


def _lock(output: IO[bytes], folder: Path) -> None:
    """Lock the log of a job; the lock is its process's, too, and lasts as long as anything may write to it.

    It is one of the open file itself, which all processes of the job inherit as their output: it holds when the
    launcher is gone, and until the last of them is. (A lock of ``filelock`` is its own process's alone.)

    Raises:
        RuntimeError: it is locked.
    """
    import fcntl  # noqa: PLC0415 (Windows has none, nor has it this launcher)

    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"another process is at work in {folder}: wait for its end") from None
    except OSError:  # as of some network file systems
        pass


def _sorted(value: Any) -> Any:
    """A value with the keys of its mappings in one order."""
    if isinstance(value, dict):
        return sorted(((str(key), _sorted(item)) for key, item in value.items()), key=lambda pair: pair[0])
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _printable(words: str) -> str:
    """Words that a terminal can be given, and not too many."""
    return "".join(c if c.isprintable() else " " for c in words)[:_LONGEST]


def _last_words(log: Path) -> str:
    """What a log ends in: the error that is named last, or else the last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_WORDS))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    lines = [line for line in lines if line and not line.startswith(_HINT)]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [""])[-1]
