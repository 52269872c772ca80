"""The jobs of a sweep on a terminal: a table that is redrawn as they progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_mnn.launchers.jobs.records import JobState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from lightning_mnn.launchers.jobs.job import Job

_STYLES = {
    JobState.WAITING: "dim",
    JobState.RUNNING: "bold cyan",
    JobState.FINISHED: "green",
    JobState.KEPT: "green",
    JobState.FAILED: "bold red",
    JobState.INTERRUPTED: "bold yellow",
}
_WORDS = {JobState.FINISHED: "done", JobState.KEPT: "done before"}
_DISPLAY_PRIORITY = (
    *(JobState.RUNNING, JobState.FAILED, JobState.INTERRUPTED),
    *(JobState.WAITING, JobState.FINISHED, JobState.KEPT),
)
_OTHER_LINES = 6  # lines of the screen that are not rows


class JobTable:
    """A rich renderable with a row per job; if the screen is too small for all, running jobs are shown first."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, no higher than the screen, and below it the number of jobs in each state."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
        table.add_column("#", justify="right")
        table.add_column("job", min_width=12)  # the only column that shrinks on a narrow screen
        table.add_column("state", no_wrap=True)
        table.add_column("on", no_wrap=True)
        for name in ("epoch", "loss", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = max(1, (options.height or console.height) - _OTHER_LINES)
        urgent = sorted(self._jobs, key=lambda job: _DISPLAY_PRIORITY.index(job.state))[:rows]
        for job in sorted(urgent, key=lambda job: job.number):
            table.add_row(*_row(job))
        yield Group(table, Text(f"  {counts(self._jobs)}"))

    def live(self, console: Console) -> Live:
        """The table on a terminal, redrawn four times a second."""
        return Live(self, console=console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False)


def counts(jobs: Sequence[Job]) -> str:
    """The number of jobs in each state.

    >>> counts([])
    'no jobs'
    """
    states = [job.state for job in jobs]
    known = {_WORDS.get(state, state): states.count(state) for state in _STYLES if state in states}
    return ", ".join(f"{number} {word}" for word, number in known.items()) or "no jobs"


def clock(seconds: float) -> str:
    """A duration.

    >>> clock(7), clock(83), clock(7384)
    ('7 s', '1:23', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def _row(job: Job) -> tuple[Any, ...]:
    label = Text(job.label, no_wrap=True, overflow="ellipsis")
    state = Text(_WORDS.get(job.state, job.state), style=_STYLES[job.state])
    if job.allocation is None:
        return str(job.number), label, state, "", "", "", ""
    progress = job.progress
    limit = progress.get("max_epochs")
    epochs = "" if "epochs" not in progress else f"{progress['epochs']:,}" + (f"/{limit:,}" if limit else "")
    loss = "" if progress.get("loss") is None else f"{progress['loss']:.3g}"
    if job.state is JobState.RUNNING and not epochs:
        state = Text("starting", style="cyan")
    return str(job.number), label, state, str(job.allocation), epochs, loss, clock(job.seconds)
