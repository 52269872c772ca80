"""A live view of a sweep: ``report.html`` is written again while the sweep runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lightning_mnn.sweeps.jobs import Status, read_sweep
from lightning_mnn.sweeps.lock import is_locked
from lightning_mnn.sweeps.page import PAGE, write_report_page
from lightning_mnn.utilities.files import relative

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from lightning_mnn.sweeps.jobs import Sweep

SECONDS = 5  # between two pages, and after which an open page loads itself again
_SHARE = 0.1  # of the time that may go into reading a large sweep and writing its page


def watch_sweep(folder: Path, console: Console, wait: Callable[[float], None] = time.sleep) -> None:
    """Write the page of a sweep again and again, until the sweep is over or on Ctrl-C.

    A sweep of this program is over when its command has ended, however it ended. A sweep of another program is over
    when all of its jobs have ended; if it was killed before, only Ctrl-C ends this. The caller writes the last page,
    which does not load itself again.

    Args:
        folder: the folder of the sweep.
        console: where a line says what happens.
        wait: called with the seconds between two pages.

    Raises:
        FileNotFoundError: the folder contains no training runs, and no command is running a sweep there.
    """
    console.print(
        f"[bold]watching:[/] {relative(folder / PAGE)} is written every {SECONDS} s or more; Ctrl-C ends this"
    )
    try:
        while True:
            started = time.monotonic()
            locked = is_locked(folder)  # before its jobs are read: what they wrote at the end is then read, too
            try:
                sweep = read_sweep(folder)
            except (FileNotFoundError, ValueError):  # no job has begun, or a file is just being written
                if not locked:
                    raise
            else:
                if not is_running(sweep, locked=locked):
                    return
                write_report_page(sweep, reload=SECONDS)
            wait(max(SECONDS, (time.monotonic() - started) / _SHARE))
    except KeyboardInterrupt:
        console.print("no longer watching")


def is_running(sweep: Sweep, *, locked: bool) -> bool:
    """Whether a sweep is running, as far as its folder says."""
    if locked or any(is_locked(folder) for folder in sweep.sweeps):
        return True
    left = [job for job in sweep.jobs if job.status in (Status.UNFINISHED, Status.WAITING)]
    return any(job.foreign for job in left)
