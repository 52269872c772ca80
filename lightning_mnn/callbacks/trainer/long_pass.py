"""Logs the expected duration of long work on the training set and at the end of training, and shows its progress."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_mnn.data.loaders.shards import can_be_enumerated, num_batches
from lightning_mnn.utilities.interruption import at_safe_points

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl

LONG = 5.0  # seconds from which work is announced
_MEASURED = 0.5  # seconds of batches from which the time of the others is estimated


@dataclass
class _Watched:
    """Work in progress."""

    what: str
    batches: int
    at_most: bool
    console: Console | None  # for a bar; None: there is none
    done: int = 0
    since: float = 0.0  # the end of the first batch, which includes the start of workers and the compilation of kernels
    announced: bool = False
    bar: Progress | None = None


@dataclass
class _Shown:
    """The bar of the work at the end of training; None: there is none."""

    bar: Progress | None = None


_watched: list[_Watched] = []  # the innermost last
_at_end = _Shown()


@contextmanager
def long_pass(trainer: pl.Trainer, what: str, passes: int = 1, *, at_most: bool = False) -> Iterator[None]:
    """A context in which work of more than 5 s is logged once, on the first process, with a bar on a terminal.

    The duration is estimated from the first batches, by the clock of the host: nothing waits for a device.

    Args:
        trainer: the Trainer; if it shows no progress bar, there is none here.
        what: name of the work, with which the message begins.
        passes: number of passes over the training set.
        at_most: there may be fewer passes.
    """
    work = _Watched(what, passes * _batches_of_pass(trainer), at_most, _console(trainer))
    _watched.append(work)
    try:
        yield
    finally:
        _watched.pop()
        if work.bar is not None:
            work.bar.stop()


@contextmanager
def end_of_training(trainer: pl.Trainer, what: str, limit: float) -> Iterator[None]:
    """A context in which work of more than 5 s is logged once, with a bar of its time on a terminal.

    The clock is read at the safe points of the work. Passes over the training set in it are announced by themselves.

    Args:
        trainer: the Trainer; if it shows no progress bar, there is none here.
        what: name of the work, with which the message begins.
        limit: seconds after which the work is stopped.
    """
    start, announced, console = time.monotonic(), False, _console(trainer)
    total = limit if math.isfinite(limit) else None

    def show() -> None:
        nonlocal announced
        seconds = time.monotonic() - start
        if seconds < LONG or any(work.bar is not None for work in _watched):
            return
        if not announced:
            announced = True
            rest = "" if total is None else f", of at most {duration(limit)}"
            rank_zero_info(f"{what}: at work for {duration(seconds)}{rest}")
            if console is not None:
                _at_end.bar = Progress(
                    TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
                )
                _at_end.bar.add_task(what, total=total)
                _at_end.bar.start()
        if _at_end.bar is not None:
            _at_end.bar.update(_at_end.bar.task_ids[0], completed=seconds)

    try:
        with at_safe_points(show):
            yield
    finally:
        if _at_end.bar is not None:
            _at_end.bar.stop()
            _at_end.bar = None


def count_batch() -> None:
    """Count a batch of the innermost :func:`long_pass`, if there is one."""
    if not _watched:
        return
    work, now = _watched[-1], time.monotonic()
    work.done += 1
    if work.done == 1:
        work.since = now
    elif not work.announced and work.done < work.batches and now - work.since >= _MEASURED:
        seconds = (now - work.since) / (work.done - 1) * work.batches
        if seconds >= LONG:
            _announce(work, seconds)
    if work.bar is not None:
        work.bar.update(work.bar.task_ids[0], completed=work.done)


def duration(seconds: float) -> str:
    """A rounded duration as text.

    >>> duration(8.2), duration(400), duration(30_000)
    ('8 s', '7 min', '8.3 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _announce(work: _Watched, seconds: float) -> None:
    work.announced = True
    about = "at most about" if work.at_most else "about"
    rank_zero_info(f"{work.what}: {about} {duration(seconds)} for {work.batches} batches of the training set")
    if work.console is None or _at_end.bar is not None:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"))
    times = () if work.at_most else (TextColumn("left"), TimeRemainingColumn())
    work.bar = Progress(*columns, TimeElapsedColumn(), *times, console=work.console, transient=True)
    work.bar.add_task(work.what, total=work.batches)
    work.bar.start()


def _batches_of_pass(trainer: pl.Trainer) -> int:
    """Number of batches of a pass on this process; 0 if it is not known."""
    loader = trainer.train_dataloader
    if can_be_enumerated(loader):
        return num_batches(loader, trainer.global_rank, trainer.world_size)
    drawn = trainer.num_training_batches
    return int(drawn) if math.isfinite(drawn) else 0


def _console(trainer: pl.Trainer) -> Console | None:
    """Where to draw a bar: on a terminal, in the first process, if Lightning draws one and no bar of rich is active."""
    shown: Any = trainer.progress_bar_callback
    if shown is None or not trainer.is_global_zero:
        return None
    live = getattr(shown, "progress", None)  # of RunProgress and of RichProgressBar
    console = Console(stderr=True)
    return console if console.is_terminal and live is None else None
