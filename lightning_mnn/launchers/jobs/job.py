"""One job of a sweep: its config, state and result."""

from __future__ import annotations

import hashlib
import re
import signal
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf, read_write

from lightning_mnn.launchers.jobs.process import JobProcess, log
from lightning_mnn.launchers.jobs.records import JOB_RECORD, JobState, read_record, recorded, returned
from lightning_mnn.utilities.compat.hydra_internals import result_of
from lightning_mnn.utilities.files import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from lightning_mnn.launchers.jobs.devices import Allocation, Request
    from lightning_mnn.launchers.warm.client import WarmServers


_LONGEST_ERROR = 300  # characters of a job's error message

_PATIENCE = 60.0  # seconds for the processes of a job that has crashed to end

_HINT = "Set the environment variable HYDRA_FULL_ERROR"  # Hydra prints it below the error

_LOG_TAIL = 4096  # bytes at the end of a log that are searched for the error

_ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b")  # the last line of a traceback


class JobError(CompactHydraException):
    """A job of a sweep has failed; the message says how, and where its output is."""


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        number: its number in the sweep.
        overrides: overrides of the application's config.
        label: the overrides that distinguish it from the other jobs.
        config: the composed config, with Hydra's node.
        folder: its output folder.
        request: the devices that it asks for.
        digest: of the config (see :func:`digest_of`).
        state: its state.
        allocation: the devices that it got.
        returned: its result.
        process: its process, once it is started.
        seconds: seconds since its start; at the end, its duration.
        progress: what its Trainer reported last (see :mod:`lightning_mnn.launchers.jobs.progress`).
        retries: how often it was started again after a crash.
        has_crashed: whether its process has ended without a result or an error of the program.
    """

    number: int
    overrides: list[str]
    label: str
    config: DictConfig
    folder: Path
    request: Request
    digest: str
    state: JobState = JobState.WAITING
    allocation: Allocation | None = None
    returned: JobReturn | None = None
    process: JobProcess | None = None
    seconds: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)
    retries: int = 0
    has_crashed: bool = False
    _is_told: bool = False
    _crashed_at: float = 0.0

    @property
    def log(self) -> Path:
        """The file with the job's output."""
        return self.folder / "console.log"

    def keep_if_finished(self) -> None:
        """Use the result of an earlier run of the job, if that finished and had the same config."""
        record = read_record(self.folder / JOB_RECORD)
        if record.get("status") == JobState.FINISHED and record.get("config") == self.digest:
            self.state = JobState.KEPT
            self.returned = self._return(JobStatus.COMPLETED, returned(record.get("return_value")))

    @property
    def can_resume(self) -> bool:
        """Whether the program has a key ``resume`` that is true or false."""
        return isinstance(OmegaConf.select(self.config, "resume"), bool)

    def wait_again(self) -> None:
        """After a crash: wait for another start, at which the job resumes if it can."""
        self.retries += 1
        self.state, self.allocation, self.process, self.returned = JobState.WAITING, None, None, None
        self.progress, self.has_crashed = {}, False
        self._crashed_at = time.monotonic()
        if self.can_resume:
            with read_write(self.config):
                self.config.resume = True

    @property
    def may_start(self) -> bool:
        """Whether it waits, and not for processes that the crashed one has left behind, such as W&B's, to end."""
        if self.state is not JobState.WAITING:
            return False
        if not self.retries or time.monotonic() > self._crashed_at + _PATIENCE:
            return True
        try:
            with self.log.open("ab") as output:
                _lock(output, self.folder)
        except (OSError, RuntimeError):
            return False
        return True

    def start(self, allocation: Allocation, call: dict[str, Any], servers: WarmServers | None = None) -> bool:
        """Start the job's process on allocated devices; if that is impossible, the job has failed.

        Args:
            allocation: the devices.
            call: arguments for Hydra's ``run_job``, without the config.
            servers: the servers that may fork the process; None: it is a new one.

        Returns:
            Whether it runs.
        """
        self.allocation = allocation
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                _lock(output, self.folder)
                (self.folder / JOB_RECORD).unlink(missing_ok=True)
                self.process = JobProcess(allocation, output, call | {"config": self.config}, servers)
            self.state = JobState.RUNNING
        except Exception as error:  # noqa: BLE001 (the other jobs must continue)
            self.end_with(self.failed(f"cannot be started: {type(error).__name__}: {error}"))
        return self.state is JobState.RUNNING

    def has_ended(self) -> bool:
        """Check whether the process has ended; the first time that it has, write the job's record."""
        if self.state is not JobState.RUNNING or self.process is None:
            return self.state is not JobState.WAITING
        self.seconds, self.progress = self.process.seconds, self.process.progress
        if self.process.exit_code is None:
            return False
        try:
            given = self.process.returned()
            self.has_crashed = given is None and not self.process.ended_by_us
            found = given or self.failed(None)
        except Exception as error:  # noqa: BLE001 (unpickling a job's return may raise anything)
            found = self.failed(f"its return value cannot be read: {type(error).__name__}: {error}")
        if self.process.ended_by_us:  # whatever it returned
            self.end_with(self.failed(None), JobState.INTERRUPTED)
        else:
            self.end_with(found)
        self.process.clean_up()
        return True

    def end_with(self, found: JobReturn, failure: JobState = JobState.FAILED) -> None:
        """Keep the job's return, and write its record; ``failure`` is its state if it did not complete."""
        self.state = JobState.FINISHED if found.status is JobStatus.COMPLETED else failure
        if self.state is not JobState.FINISHED:
            found.return_value = self._error(result_of(found))
        self.returned = found
        if self.process is None:  # not started, maybe because another process is working in the folder
            return
        try:
            write_json(self.folder / JOB_RECORD, self._record())
        except OSError as error:
            log.warning("#%d: %s cannot be written: %s", self.number, self.folder / JOB_RECORD, error)

    def _error(self, words: str | None) -> JobError:
        code = None if self.process is None else self.process.exit_code
        if self.state is JobState.INTERRUPTED:
            how = "was interrupted"
        elif code is None:  # it could not be started, or other jobs of its process are still running
            how = str(words) if self.process is None else f"failed: {_printable(str(words))}"
        elif self.process is not None and self.process.is_lost:
            how = "has ended, and its exit code is not known, because the server that forked it had ended before"
        else:
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"failed with exit code {code}"
            how += f": {shortened}" if (shortened := _printable(words or _last_error(self.log))) else ""
        return JobError(f"job #{self.number} ({self.label}) {how}\n  its output is in {self.log}")

    def failed(self, words: str | None) -> JobReturn:
        """A return for a job that has none of its own; None: what is said about it is found in its log."""
        return self._return(JobStatus.FAILED, words)

    def just_ended(self) -> list[Job]:
        """The jobs that have ended since the last call: this one, once."""
        if self.state in (JobState.WAITING, JobState.RUNNING) or self._is_told:
            return []
        self._is_told = True
        return [self]

    def give_up(self) -> None:
        """Nothing is left to record."""

    @property
    def error(self) -> str:
        """How the job has failed."""
        return str(None if self.returned is None else result_of(self.returned)).partition("\n")[0]

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
            "config": self.digest,
            "status": str(self.state),
            "exit_code": None if self.process is None or self.process.is_lost else self.process.exit_code,
            "retries": self.retries,
            "warm": self.process is not None and self.process.is_warm,
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
        except TypeError:  # it cannot be restored later, so a resumed sweep must run the job again
            return record | {"status": str(JobState.RETURNED), "return_value": repr(value)}


def digest_of(config: DictConfig) -> str:
    """Digest of the application's config, with references unresolved and without ``resume``."""
    content: Any = OmegaConf.to_container(config, resolve=False)
    shown = {key: value for key, value in content.items() if key not in ("hydra", "resume")}
    return hashlib.sha256(repr(_sorted(shown)).encode()).hexdigest()


def _lock(output: IO[bytes], folder: Path) -> None:
    """Lock the log of a job; the lock lasts as long as any process of the job may write to the log.

    The lock belongs to the open file itself, which all processes of the job inherit as their output: it remains when
    the launcher is gone, until the last of them has ended. (A lock of ``filelock`` belongs to one process only.)

    Raises:
        RuntimeError: it is locked.
    """
    import fcntl  # noqa: PLC0415 (not on Windows, where this launcher does not run)

    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"another process is working in {folder}: wait until it ends") from None
    except OSError:  # some network file systems have no locks
        pass


def _sorted(value: Any) -> Any:
    """A value with the keys of its mappings sorted."""
    if isinstance(value, dict):
        return sorted(((str(key), _sorted(item)) for key, item in value.items()), key=lambda pair: pair[0])
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _printable(words: str) -> str:
    """Text without characters that a terminal cannot print, shortened."""
    return "".join(c if c.isprintable() else " " for c in words)[:_LONGEST_ERROR]


def _last_error(log: Path) -> str:
    """The last error that is named at the end of a log, else the last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    lines = [line for line in lines if line and not line.startswith(_HINT)]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [""])[-1]
