"""The lock of a sweep's folder: as long as it is held, the command of the sweep is running."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK = "sweep.lock"
_PATIENCE = 1.0  # seconds: a process that only asks for the lock has it for a moment


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A context that holds the lock of a sweep's folder, unless another command has it or there are no locks."""
    path = folder / LOCK
    lock = FileLock(path, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE)
    except (Timeout, OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file
            path.unlink()
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a command holds the lock of a sweep's folder."""
    path = folder / LOCK
    if not path.exists():
        return False
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
    lock.release()
    return False
