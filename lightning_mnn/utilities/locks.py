"""Locks between processes. They end with the process that holds them, however it ends."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """A context that one process at a time can be in; the others wait.

    Args:
        path: an empty file by which they know each other; it may be there before and stay behind.
        on_wait: called once where another process has to be waited for.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """A context that one process at a time can be in; nobody waits.

    Args:
        path: an empty file by which processes know each other; it is gone when the context ends.

    Yields:
        False where another process is in it. True also where the file system has no locks or cannot be written to.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError):
        yield True
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows removes no file that is open
            path.unlink()  # while it is locked: who opened it before finds it gone, and takes another one
        lock.release()
