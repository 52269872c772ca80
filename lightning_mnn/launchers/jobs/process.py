"""The process of one job of a sweep."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from lightning_mnn.launchers.jobs import main
from lightning_mnn.launchers.jobs.calls import write_call
from lightning_mnn.launchers.jobs.progress import VARIABLE
from lightning_mnn.launchers.jobs.records import read_record

if TYPE_CHECKING:
    from lightning_mnn.launchers.jobs.devices import Allocation
    from lightning_mnn.launchers.warm.client import WarmServers


log = logging.getLogger(__name__)

# Variables of a process group to which this process may belong, and of services that another run may have started.
_NOT_INHERITED = (
    *("LOCAL_RANK", "GLOBAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "WANDB_SERVICE", "WANDB_RUN_ID"),
)


@dataclass
class JobProcess:
    """The process of a job, in its own session, with the folder through which launcher and job communicate.

    Attributes:
        allocation: its devices.
        output: file for its output.
        call: arguments for Hydra's ``run_job``.
        servers: the servers that may fork it; None: it is a new process.
        began: when it was started, in seconds since the epoch.
        is_warm: whether it was forked.
        ended_by_us: whether the launcher has sent it a signal to end.
    """

    allocation: Allocation
    output: IO[bytes]
    call: InitVar[dict[str, Any]]
    servers: InitVar[WarmServers | None] = None
    began: float = field(default_factory=time.time)
    is_warm: bool = False
    ended_by_us: bool = False

    def __post_init__(self, call: dict[str, Any], servers: WarmServers | None) -> None:
        """Start the process."""
        self._folder = Path(tempfile.mkdtemp(prefix="lightning-mnn-job-"))
        watched, self._launcher_end = os.pipe()  # end of file means to the job that the launcher is gone
        try:
            write_call(self._folder / main.CALL, call, watched)
            environment = environment_of(self.allocation) | {VARIABLE: str(self._folder / "progress.json")}
            forked = None
            if servers is not None:
                later: Any = OmegaConf.to_container(call["config"].hydra.job.env_set, resolve=False)
                forked = servers.start(self._folder, environment, later, self.output.fileno(), watched)
            self.is_warm = forked is not None
            self._process = forked or self._new_process(environment, watched)
        except BaseException:
            self._remove()
            raise
        finally:
            os.close(watched)

    def _new_process(self, environment: dict[str, str], watched: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 (our own file)
            [sys.executable, str(main.__file__), str(self._folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            pass_fds=[watched],
            start_new_session=True,  # Ctrl-C on the terminal does not reach it; our own signals do
        )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; −n if signal n ended it."""
        return self._process.poll()

    @property
    def is_lost(self) -> bool:
        """Whether nobody knows its exit code, which is then 1: it was forked, and the server had ended before."""
        return bool(getattr(self._process, "is_lost", False))

    @property
    def progress(self) -> dict[str, Any]:
        """What its Trainer reported last."""
        return read_record(self._folder / "progress.json")

    @property
    def seconds(self) -> float:
        """Seconds since its start."""
        return time.time() - self.began

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and to all that it has started."""
        self.ended_by_us = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def returned(self) -> JobReturn | None:
        """Its return; None: it did not finish. An exit code of 0 without a return counts as completed."""
        path = self._folder / main.RETURN
        if not path.exists():
            return JobReturn(status=JobStatus.COMPLETED) if self.exit_code == 0 else None
        return _read_return(path)

    def returned_jobs(self) -> dict[int, JobReturn]:
        """The returns of the jobs of a batch that have ended since the last call, by number."""
        found = {}
        for path in self._folder.glob(f"{main.RETURN}.*"):
            if path.suffix[1:].isdigit():  # the file is complete
                found[int(path.suffix[1:])] = _read_return(path)
                path.unlink()
        return found

    def clean_up(self) -> None:
        """End processes that it has left running, and remove its folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._remove()

    def _remove(self) -> None:
        os.close(self._launcher_end)
        shutil.rmtree(self._folder, ignore_errors=True)


def _read_return(path: Path) -> JobReturn:
    with path.open("rb") as file:
        found: JobReturn = pickle.load(file)  # noqa: S301 (written by our own process a moment ago)
    return found


def environment_of(allocation: Allocation) -> dict[str, str]:
    """The environment of a job on these devices, without what belongs to that job alone."""
    own = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    if "SLURM_JOB_ID" in own:  # in an allocation: Lightning must start its own processes, not expect srun's
        own["SLURM_JOB_NAME"] = "interactive"
    return own | allocation.environment | {"PYTHONUNBUFFERED": "1"}
