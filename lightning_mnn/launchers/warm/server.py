"""The server: run by this file's path, it imports a program and then forks a process for each job that it is asked for.

Its standard input has its task (see :mod:`lightning_mnn.launchers.warm.client`), its argument is the number of a socket
to the launcher. It answers each request with the id of the job's process, or a reason for which it forks none, and
reports the exit code of each job. It ends when the launcher is gone; the jobs are told so by pipes of their own.
"""

from __future__ import annotations

import os
import sys

if sys.path and sys.path[0] == os.path.dirname(__file__):  # noqa: PTH120 (pathlib is yet to be imported)
    del sys.path[0]  # modules beside this script would hide the user's modules of the same name

import contextlib
import ctypes
import gc
import importlib
import json
import pickle
import select
import signal
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mnn.launchers.warm.imports import Imports

REQUEST = "start.json"  # in a job's folder
_LONGEST_MESSAGE = 65536
_PR_SET_PDEATHSIG = 1
_INTERVAL = 0.02  # seconds between two checks of the jobs


@dataclass(frozen=True)
class Start:
    """What a forked job has to do.

    Attributes:
        folder: the folder through which launcher and job communicate.
        output: file descriptor for its output.
        watched: file descriptor that reaches its end when the launcher ends.
        environment: its environment.
        here: its current folder.
    """

    folder: Path
    output: int
    watched: int
    environment: dict[str, str]
    here: str


def main() -> None:
    """Serve; in a forked job, run the job."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    task = pickle.load(sys.stdin.buffer)  # noqa: S301 (written by the launcher a moment ago)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [task["script"], ""]
    sys.path = task["prepared"]["sys_path"]
    from lightning_mnn.launchers.warm.imports import import_all  # noqa: PLC0415 (it may be on that path)
    from lightning_mnn.utilities.compat import python_internals  # noqa: PLC0415

    def program() -> None:
        python_internals.prepare(task["prepared"])
        for name in task["program"]:
            importlib.import_module(name)

    _end_with_parent(signal.SIGKILL)  # before it can read from the connection that the launcher is gone
    imports = import_all(program, task["modules"])
    _end_with_parent(None)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    said = os.pread(1, os.fstat(1).st_size, 0)  # standard output is a file
    _send(connection, {"problem": imports.problem})
    if imports.problem is not None:
        return
    gc.collect()
    gc.freeze()  # what is imported is neither searched nor copied by the jobs' garbage collection
    start = _serve(connection, imports, said)
    if start is None:
        python_internals.end_process(0)
    imports.make_own(start.environment)
    sys.argv = [task["script"], str(start.folder)]
    module, _, name = task["run"].partition(":")
    try:
        code = getattr(importlib.import_module(module), name)(start.folder, start.watched)
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise
        code = error.code or 0
    python_internals.end_process(code)


def _serve(connection: socket.socket, imports: Imports, said: bytes) -> Start | None:
    """Fork jobs until the launcher is gone: then None. It returns in each job too; its output begins with ``said``."""
    jobs: set[int] = set()
    while True:
        if select.select([connection], [], [], _INTERVAL if jobs else None)[0]:
            message, descriptors, _, _ = socket.recv_fds(connection, _LONGEST_MESSAGE, 2)
            if not message:
                return None
            folder = Path(message.decode())
            request = json.loads((folder / REQUEST).read_text())
            start = Start(folder, descriptors[0], descriptors[1], request["environment"], request["here"])
            answer: dict[str, Any] = {"refused": imports.reason_against(start.environment, request["later"])}
            if answer["refused"] is None:
                try:
                    job = _fork(start, connection, said)
                except OSError as error:
                    answer = {"refused": f"the server cannot fork: {error}"}
                else:
                    if job is None:
                        return start
                    jobs.add(job)
                    answer = {"job": job}
            for descriptor in descriptors:
                os.close(descriptor)
            _send(connection, answer)
        jobs -= _report_ended(jobs, connection)


def _report_ended(jobs: set[int], connection: socket.socket) -> set[int]:
    """The jobs that have ended since, which the launcher is told."""
    found = set()
    for job in jobs:
        ended, status = os.waitpid(job, os.WNOHANG)
        if ended:
            found.add(job)
            _send(connection, {"ended": job, "code": os.waitstatus_to_exitcode(status)})
    return found


def _fork(start: Start, connection: socket.socket, said: bytes) -> int | None:
    """Fork a job in a session of its own: the id of its process; None in the job."""
    is_ready, ready = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about threads that are safe
            job = os.fork()
    except OSError:
        for end in (is_ready, ready):
            os.close(end)
        raise
    if job:
        os.close(ready)
        os.read(is_ready, 1)  # signals to its group reach it from now on
        os.close(is_ready)
        return job
    os.setsid()
    connection.close()
    os.close(is_ready)
    for number in (1, 2):
        os.dup2(start.output, number)
    os.close(start.output)
    os.set_inheritable(start.watched, False)  # noqa: FBT003 (it takes no keyword)
    os.write(1, said)
    os.chdir(start.here)
    os.close(ready)
    return None


def _end_with_parent(number: signal.Signals | None) -> None:
    """Get a signal when the thread that has started this process ends: Linux's ``prctl(PR_SET_PDEATHSIG)``."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number or 0)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the launcher is gone
        connection.send(json.dumps(message).encode())


if __name__ == "__main__":
    main()
