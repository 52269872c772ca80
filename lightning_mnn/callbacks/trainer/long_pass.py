"""Says before long work on the training set what it will take, and shows how far it is."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl

LONG = 5.0  # seconds of work from which it is announced
_MEASURED = 0.5  # seconds of batches from which the time of the others is estimated


@dataclass
class _Watched:
    """Work that goes on now."""

    what: str
    batches: int
    at_most: bool
    console: Console | None  # for a bar; None: there is none
    done: int = 0
    since: float = 0.0  # the end of the first batch, which workers start for and kernels are compiled in
    announced: bool = False
    bar: Progress | None = None


_watched: list[_Watched] = []  # the innermost last


@contextmanager
def long_pass(trainer: pl.Trainer, what: str, passes: int = 1, *, at_most: bool = False) -> Iterator[None]:
    """Inside, work that will take more than 5 s says so once, on the first process, and shows a bar on a terminal.

    How long it will take is estimated from its first batches, by the clock of the host: nothing waits for a device.

    Args:
        trainer: the Trainer; where it shows no progress bar, there is none here.
        what: the work, for a sentence that begins with it.
        passes: over the training set.
        at_most: they may be fewer.
    """
    own = _Watched(what, passes * _batches_of_pass(trainer), at_most, _console(trainer))
    _watched.append(own)
    try:
        yield
    finally:
        _watched.pop()
        if own.bar is not None:
            own.bar.stop()


def count_batch() -> None:
    """Count a batch of the work that is watched, if any is."""
    if not _watched:
        return
    own, now = _watched[-1], time.monotonic()
    own.done += 1
    if own.done == 1:
        own.since = now
    elif not own.announced and own.done < own.batches and now - own.since >= _MEASURED:
        seconds = (now - own.since) / (own.done - 1) * own.batches
        if seconds >= LONG:
            _announce(own, seconds)
    if own.bar is not None:
        own.bar.update(own.bar.task_ids[0], completed=own.done)


def duration(seconds: float) -> str:
    """About so long, in words.

    >>> duration(8.2), duration(400), duration(30_000)
    ('8 s', '7 min', '8.3 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _announce(own: _Watched, seconds: float) -> None:
    own.announced = True
    about = "at most about" if own.at_most else "about"
    rank_zero_info(f"{own.what}: {about} {duration(seconds)} for {own.batches} batches of the training set")
    if own.console is None:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"))
    times = () if own.at_most else (TextColumn("left"), TimeRemainingColumn())
    own.bar = Progress(*columns, TimeElapsedColumn(), *times, console=own.console, transient=True)
    own.bar.add_task(own.what, total=own.batches)
    own.bar.start()


def _batches_of_pass(trainer: pl.Trainer) -> int:
    """Of this process; 0 where that is not known."""
    loader = trainer.train_dataloader
    if can_be_enumerated(loader):
        return num_batches(loader, trainer.global_rank, trainer.world_size)
    drawn = trainer.num_training_batches
    return int(drawn) if math.isfinite(drawn) else 0


def _console(trainer: pl.Trainer) -> Console | None:
    """Where a bar is drawn: on a terminal, by the first process, where Lightning draws one and none of rich's is up."""
    shown: Any = trainer.progress_bar_callback
    if shown is None or not trainer.is_global_zero:
        return None
    live = getattr(shown, "progress", None)  # of RunProgress and of RichProgressBar
    console = Console(stderr=True)
    return console if console.is_terminal and live is None else None
