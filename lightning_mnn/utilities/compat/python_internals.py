"""Undocumented parts of Python's standard library."""

from __future__ import annotations

import atexit
import multiprocessing.spawn
import os
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_mnn.utilities.compat.missing import MissingPartError, attribute

if TYPE_CHECKING:
    import tempfile
    from collections.abc import Iterator, Mapping, Sequence

_KEYS = ("sys_path", "init_main_from_name", "init_main_from_path")


def preparation() -> dict[str, Any]:
    """What another process needs to import the ``__main__`` module of this one.

    These are the entries of ``multiprocessing.spawn.get_preparation_data`` that :func:`prepare` uses.
    """
    found = attribute(multiprocessing.spawn, "get_preparation_data", "python")("job")
    return {key: found[key] for key in _KEYS if key in found}


def prepare(prepared: dict[str, Any]) -> None:
    """Apply what :func:`preparation` returned in another process: ``multiprocessing.spawn.prepare``."""
    attribute(multiprocessing.spawn, "prepare", "python")(prepared)


@contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """A context that collects the names of the variables that are read from ``os.environ``, one at a time.

    Copies of the whole environment do not count. It changes the class of ``os.environ``, which is ``os._Environ``.
    """
    names: set[str] = set()
    plain: Any = type(os.environ)

    class Environ(plain):  # type: ignore[misc]
        def __getitem__(self, name: str) -> Any:
            if not (copied and copied.pop() == name):
                copied.clear()
                names.add(name)
            return super().__getitem__(name)

        def keys(self) -> Any:  # dict(os.environ) calls it, then reads each
            listed = list(super().keys())
            copied[:] = reversed(listed)
            return listed

        def items(self) -> Any:
            return dict(self).items()

        def copy(self) -> Any:
            return dict(self)

    copied: list[str] = []
    os.environ.__class__ = Environ
    try:
        yield names
    finally:
        os.environ.__class__ = plain


def renew_temporary_directory(
    folder: tempfile.TemporaryDirectory[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Let an object stand for a new temporary folder; the old one is not removed: ``TemporaryDirectory._finalizer``.

    Args:
        folder: the object.
        args: the arguments that it was made with.
        kwargs: likewise, by name.
    """
    attribute(folder, "_finalizer.detach", "python")()
    type(folder).__init__(folder, *args, **kwargs)


def end_process(code: int) -> NoReturn:
    """End this process as ``sys.exit`` does, but leave its memory to the system instead of freeing each object.

    Freeing what a forked process shares with its parent means to copy it first. It calls ``threading._shutdown``, which
    waits for threads, and ``atexit._run_exitfuncs``; without these it is ``sys.exit``.
    """
    try:
        steps = (attribute(threading, "_shutdown", "python"), attribute(atexit, "_run_exitfuncs", "python"))
    except MissingPartError:
        sys.exit(code)
    for step in steps:
        step()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
