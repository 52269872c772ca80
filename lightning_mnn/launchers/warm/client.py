"""The launcher's side of the servers that start a sweep's jobs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mnn.launchers.warm import server
from lightning_mnn.launchers.warm.imports import is_native

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

_EXIT_CODE = "exit_code"  # a file in a job's folder, written by the job
_SECONDS = 60.0  # for a server that has done its imports to start a job
_SECONDS_TO_END = 5.0  # for a server; it removes its temporary folders
_LAST_WORDS = 300  # bytes of its output that are shown if it fails
_INTERVAL = 0.1  # seconds between two checks for a signal


@dataclass
class WarmProcess:
    """A job's process that a server has forked.

    Attributes:
        pid: its id.
        folder: the folder through which launcher and job communicate.
        returncode: its exit code, once it has ended; −n if signal n ended it.
        is_lost: whether nobody knows its exit code, because its server had ended before.
    """

    pid: int
    folder: Path
    server: WarmServer
    returncode: int | None = None
    is_lost: bool = False

    def __post_init__(self) -> None:
        """Note when it started, to recognise it."""
        self._since = _state(self.pid)[1]

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self.returncode is None:
            self.server.receive(0.0)
            self.returncode = self.server.codes.pop(self.pid, None)
        if self.returncode is None and not self.server.is_alive:
            state, since = _state(self.pid)
            if state in ("", "Z", "X") or since != self._since:
                self.returncode = self._noted_exit_code()
        return self.returncode

    def _noted_exit_code(self) -> int:
        """The exit code that the job itself has noted."""
        try:
            return int((self.folder / _EXIT_CODE).read_text())
        except (OSError, ValueError):
            self.is_lost = True
            return 1


class WarmServer:
    """A server.

    Args:
        environment: its environment.
        task: what it has to import and to run.

    Attributes:
        problem: why it starts no jobs; None: it does, or it has not finished its imports.
        is_ready: whether it has finished its imports.
        is_alive: whether it runs.
        codes: exit codes of jobs that have ended.
    """

    def __init__(self, environment: Mapping[str, str], task: Mapping[str, Any]) -> None:
        self.problem: str | None = None
        self.is_ready = False
        self.is_alive = True
        self.codes: dict[int, int] = {}
        self._answers: list[dict[str, Any]] = []
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
        with theirs, tempfile.TemporaryFile() as given:
            pickle.dump(task, given)
            given.seek(0)
            self._process = subprocess.Popen(  # noqa: S603 (our own file)
                [sys.executable, str(server.__file__), str(theirs.fileno())],
                env=dict(environment),
                stdin=given,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def receive(self, seconds: float) -> bool:
        """Receive messages, waiting for the first no longer than this; whether there were any."""
        found = False
        while self.is_alive and select.select([self.connection], [], [], 0.0 if found else seconds)[0]:
            found = True
            try:
                content = self.connection.recv(65536)
            except ConnectionResetError:
                content = b""
            if not content:
                self.is_alive = False
                self.problem = self.problem or f"the server that imports the program has ended{self._last_words()}"
                break
            message = json.loads(content)
            if "problem" in message:
                self.problem, self.is_ready = message["problem"], True
            elif "ended" in message:
                self.codes[message["ended"]] = message["code"]
            else:
                self._answers.append(message)
        return found

    def start(self, folder: Path, output: int, watched: int) -> WarmProcess | str:
        """Start a job, or the reason for which it is not started."""
        deadline = time.monotonic() + _SECONDS
        self._answers.clear()
        try:
            socket.send_fds(self.connection, [str(folder).encode()], [output, watched])
        except OSError:
            self.receive(0.0)
        while self.is_alive and not self._answers and time.monotonic() < deadline:
            self.receive(_INTERVAL)
        if self._answers:
            answer = self._answers.pop()
            return answer["refused"] if "refused" in answer else WarmProcess(answer["job"], folder, self)
        self.problem = self.problem or f"the server that imports the program has not answered for {_SECONDS:.0f} s"
        self._process.kill()  # it must not start the job later
        self.is_alive = False
        return self.problem

    def _last_words(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        lines = (
            os.pread(self._output.fileno(), _LAST_WORDS, max(0, size - _LAST_WORDS))
            .decode(errors="replace")
            .split("\n")
        )
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """End the server; jobs that run are not affected."""
        self.connection.close()
        self.is_alive = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_END if self.is_ready else 0)
        self._process.kill()
        self._process.wait()
        self._output.close()


class WarmServers:
    """The servers of a sweep: one for each set of variables that libraries read when they are loaded.

    Args:
        prepared: what a process needs to import the program's main module.
        program: the module of the main function, which is a part of the program.
        modules: modules that the jobs will import.
        script: path of the script that runs a job in a process of its own.
        run: ``module:function`` that runs a job in a forked process.
    """

    def __init__(
        self, prepared: Mapping[str, Any], program: Sequence[str], modules: Sequence[str], script: str, run: str
    ) -> None:
        self._task = {"prepared": prepared, "program": program, "modules": modules, "script": script, "run": run}
        self._servers: dict[tuple[tuple[str, str], ...], WarmServer] = {}
        self._told: set[str] = set()
        self._problem = _unsuitable()

    def prepare(self, environment: Mapping[str, str], received: Sequence[int] = ()) -> None:
        """Wait until the server for jobs with this environment has imported the program, or a signal is received."""
        if self._problem is not None:
            self._tell(self._problem)
            return
        key = tuple(sorted((name, value) for name, value in environment.items() if is_native(name)))
        if key not in self._servers:
            self._servers[key] = WarmServer(environment, self._task)
        found = self._servers[key]
        while found.is_alive and not found.is_ready and not received:
            found.receive(_INTERVAL)
        if found.problem is not None:
            self._problem = found.problem
            self._tell(found.problem)

    def start(
        self, folder: Path, environment: Mapping[str, str], later: Mapping[str, str], output: int, watched: int
    ) -> WarmProcess | None:
        """Start a job; None: it must be started without a server.

        Args:
            folder: the folder through which launcher and job communicate.
            environment: the job's environment.
            later: variables that Hydra sets in the job.
            output: file descriptor for its output.
            watched: file descriptor that reaches its end when the launcher ends.
        """
        self.prepare(environment)
        if self._problem is not None:
            return None
        key = tuple(sorted((name, value) for name, value in environment.items() if is_native(name)))
        request = {"environment": dict(environment), "later": dict(later), "here": os.getcwd()}  # noqa: PTH109 (for JSON)
        (folder / server.REQUEST).write_text(json.dumps(request))
        found = self._servers[key].start(folder, output, watched)
        if isinstance(found, WarmProcess):
            return found
        self._problem = self._servers[key].problem
        self._tell(found)
        return None

    def wait(self, seconds: float) -> None:
        """Wait for news of a job, no longer than this."""
        alive = {one.connection: one for one in self._servers.values() if one.is_alive}
        for connection in select.select(list(alive), [], [], seconds)[0]:
            alive[connection].receive(0.0)

    def close(self) -> None:
        """End the servers."""
        for one in self._servers.values():
            one.close()
        self._servers.clear()

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log.info("jobs start cold, each with its own imports: %s", reason)


def _unsuitable() -> str | None:
    """Why no server can be used on this machine; None: it can."""
    if sys.platform != "linux":
        return "only on Linux can a process that has imported torch be forked"
    return None if Path("/proc/self/task").is_dir() else "this machine has no /proc"


def _state(pid: int) -> tuple[str, str]:
    """State of a process and time of its start; empty: there is no such process."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return words[0], words[19]
