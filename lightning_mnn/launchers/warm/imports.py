"""What importing a program does to a process, and whether jobs may be forked from that process.

A forked job must be like one that has imported the program itself: with random numbers, temporary folders and numbers
of threads of its own, and as if every variable of its environment had been set before the imports.
"""

from __future__ import annotations

import logging
import os
import pydoc
import signal
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from lightning_mnn.launchers.warm import blas
from lightning_mnn.launchers.warm.generators import Generators, watched_generators
from lightning_mnn.utilities.compat.python_internals import recorded_reads, renew_temporary_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# Variables that libraries read by themselves, not through Python's os.environ, when they are loaded.
NATIVE = (
    *("ATEN_", "BLIS_", "GLIBC_", "GOMP_", "GOTO_", "KMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_"),
    *("PYTHON", "PYTORCH_", "TBB_", "TORCH_", "VECLIB_"),
)
_ADAPTED = "OPENBLAS_NUM_THREADS"  # see blas

# Threads of libraries that stop and restart them around a fork by themselves: of pyarrow's jemalloc.
_FORK_SAFE_THREADS = ("jemalloc_bg_thd",)

_PROC = Path("/proc/self")


@dataclass
class Imports:
    """What imports have done to this process.

    Attributes:
        problem: why jobs must not be forked from it; None: they may.
        environment: its environment before the imports.
        reads: variables of the environment that the imports have read.
        changed: variables that they have set, with their values; None: removed.
        generators: the random generators.
        states: states of the random generators that the program has seeded.
        folders: the temporary folders that they have made, as objects, with the arguments of these.
    """

    problem: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    reads: set[str] = field(default_factory=set)
    changed: dict[str, str | None] = field(default_factory=dict)
    generators: Generators = field(default_factory=Generators)
    states: dict[str, Any] = field(default_factory=dict)
    folders: list[tuple[tempfile.TemporaryDirectory[str], Any]] = field(default_factory=list)

    def reason_against(self, environment: Mapping[str, str], later: Mapping[str, str]) -> str | None:
        """Why a job must not be forked from this process; None: it may be.

        Args:
            environment: the job's environment.
            later: variables that Hydra sets when the job starts (``hydra.job.env_set``).
        """
        wanted = {**environment, **{name: str(value) for name, value in later.items()}}
        names = self.environment.keys() | wanted.keys()
        differing = {name for name in names if self.environment.get(name) != wanted.get(name)} - {_ADAPTED}
        read = sorted(name for name in differing if name in self.reads | self.changed.keys() or is_native(name))
        return f"the variable {read[0]} of its environment is read when modules are imported" if read else None

    def make_own(self, environment: Mapping[str, str]) -> None:
        """In a forked job: give it its environment, random numbers, temporary folders and numbers of threads."""
        changed = {**environment, **self.changed}
        os.environ.clear()
        os.environ.update({name: value for name, value in changed.items() if value is not None})
        time.tzset()
        blas.set_threads(environment.get(_ADAPTED))
        self.generators.renew(self.states)
        for folder, arguments in self.folders:
            if Path(folder.name).exists():  # else it was removed during the imports
                renew_temporary_directory(folder, *arguments)


def is_native(name: str) -> bool:
    """Whether libraries read a variable when they are loaded."""
    return name.startswith(NATIVE)


def import_all(program: Callable[[], None], modules: Sequence[str]) -> Imports:
    """Import a program, then what its jobs will import; the latter only if it can be imported.

    Args:
        program: imports the program.
        modules: names of the other modules, or of classes and functions in them.
    """
    found = Imports(environment=dict(os.environ))
    os.putenv(_ADAPTED, "1")  # only what OpenBLAS reads: it would start its threads when it is loaded
    folder, signals, files = Path.cwd(), _signal_handlers(), _open_files()
    with ExitStack() as stack:
        found.reads = stack.enter_context(recorded_reads())
        made = stack.enter_context(_temporary_folders(found))
        found.generators = generators = stack.enter_context(watched_generators())
        try:
            program()
        except SystemExit:
            found.problem = "the program calls its main function when it is imported"
            return found
        except Exception as error:  # noqa: BLE001 (the program is someone else's)
            found.problem = f"importing the program raises {type(error).__name__}: {error}"
            return found
        found.states = generators.seeded()
        stack.enter_context(_configured_log())
        for name in modules:
            with suppress(Exception):  # then the job, which imports it again, will say so
                pydoc.locate(name)
        if generators.seeded().keys() != found.states.keys():
            found.problem = "importing a module seeds random numbers"
    before = found.environment
    names = before.keys() | os.environ.keys()
    found.changed = {name: os.environ.get(name) for name in names if os.environ.get(name) != before.get(name)}
    others = {path for path in made if Path(path).exists()} - {one.name for one, _ in found.folders}
    checks = (
        (bool(others), "importing the program makes a temporary folder"),
        (folder != Path.cwd(), "importing the program changes the current folder"),
        (signals != _signal_handlers(), "importing the program installs a signal handler"),
    )
    found.problem = found.problem or next((words for failed, words in checks if failed), None)
    found.problem = found.problem or _why_not_forked() or _left_open(files) or blas.problem(before.get(_ADAPTED))
    return found


def _why_not_forked() -> str | None:
    """Threads, child processes or CUDA in this process."""
    names = [(_PROC / "task" / one / "comm").read_text().strip() for one in os.listdir(_PROC / "task")]  # noqa: PTH208
    native = [name for name in names if name not in _FORK_SAFE_THREADS]
    if len(native) > 1 or threading.active_count() > 1:
        python = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        return f"importing the program starts threads ({', '.join(python or native[1:])})"
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        pass
    else:
        return "importing the program starts processes"
    torch = sys.modules.get("torch")
    if torch is not None and (torch.cuda.is_initialized() or "libcuda.so" in (_PROC / "maps").read_text()):
        return "importing the program initialises CUDA"
    return None


def _open_files() -> set[tuple[str, str]]:
    found = set()
    for one in os.listdir(_PROC / "fd"):  # noqa: PTH208 (which needs no second look at each)
        with suppress(OSError):  # that of the listing itself
            found.add((one, os.readlink(_PROC / "fd" / one)))  # noqa: PTH115
    return found


def _left_open(before: set[tuple[str, str]]) -> str | None:
    """Files, pipes or connections that are open since then, which all jobs would share."""
    new = sorted(name for _, name in _open_files() - before if name not in ("/dev/null", "/dev/urandom"))
    return f"importing the program leaves {new[0]} open" if new else None


def _signal_handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


@contextmanager
def _configured_log() -> Iterator[None]:
    """A context in which the log has a handler, as in a job: without one, Lightning would add its own."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def _temporary_folders(found: Imports) -> Iterator[list[str]]:
    """Collect the temporary folders that are made: their paths; those that are objects in ``found``."""
    paths: list[str] = []
    make_path, make = tempfile.mkdtemp, tempfile.TemporaryDirectory.__init__

    def mkdtemp(*args: Any, **kwargs: Any) -> Any:
        paths.append(make_path(*args, **kwargs))
        return paths[-1]

    def init(self: tempfile.TemporaryDirectory[str], *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        found.folders.append((self, (args, kwargs)))

    with patch.object(tempfile, "mkdtemp", mkdtemp), patch.object(tempfile.TemporaryDirectory, "__init__", init):
        yield paths
