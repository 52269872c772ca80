"""The report of a sweep: its table, figures and page are written, and what is left to do is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_mnn.figures import figure_of_test_errors, sweep_figure
from lightning_mnn.figures.scales import REPETITION, label_of, number_in
from lightning_mnn.figures.style import ENDS, look_of
from lightning_mnn.figures.sweep_bands import statistics_of
from lightning_mnn.runs.logs import has_logs
from lightning_mnn.sweeps.jobs import Status, by_task, resume_commands
from lightning_mnn.sweeps.page import PAGE, axes_of, has_result, write_report_page
from lightning_mnn.sweeps.table import table_rows, write_table
from lightning_mnn.utilities.files import relative
from lightning_mnn.verdicts import class_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from lightning_mnn.sweeps.jobs import Sweep, SweepJob

_NO_LOGS = (
    "no metrics: the folders of the jobs contain no metrics.csv: give the program a CSVLogger with "
    "save_dir=${hydra:runtime.output_dir}"
)

# Columns of the printed table, with their headings.
_MEANS = {"mse": "mse", "mce": "mce", "test_mse": "test_mse", "test_mce": "test_mce", "learning_coefficient": "λ"}

_MAX_LINES = 40  # of the printed table


@dataclass(frozen=True)
class Report:
    """The files of a sweep's report: both tables, the figures as PNG, and the page."""

    text: Path
    typed: Path
    figures: Sequence[Path]
    page: Path

    @property
    def paths(self) -> list[Path]:
        """All of them."""
        return [self.text, self.typed, *self.figures, self.page]


def write_report(sweep: Sweep) -> Report:
    """Write ``sweep.csv``, ``sweep.parquet``, ``figure.png``, ``figure_test_error.png`` and ``report.html``.

    There is no figure without a finished job, and no figure of the test error without a test set (see
    :func:`lightning_mnn.figures.figure_of_test_errors`).
    """
    text, typed = write_table(sweep)
    figures = [figure for draw in (sweep_figure, figure_of_test_errors) if (figure := draw(sweep.folder)) is not None]
    return Report(text, typed, figures, write_report_page(sweep))


def runs_without_figure(sweep: Sweep) -> list[Path]:
    """Folders of the finished runs of this program that have no ``figure.png``."""
    own = [sweep.folder / job.folder for job in sweep.having(Status.FINISHED) if job.folder and not job.foreign]
    return [run for run in own if (run / "metrics.csv").exists() and not (run / "figure.png").exists()]


def print_report(sweep: Sweep, console: Console, *, unfinished: bool = True) -> None:
    """Print the number of jobs in each state, what was swept, and if asked unfinished jobs with their command."""
    counts = {status: len(sweep.having(status)) for status in Status}
    console.print(f"[bold]jobs:[/] {', '.join(f'{n} {status}' for status, n in counts.items() if n)}")
    console.print(f"[bold]swept:[/] {', '.join(sweep.swept) or 'nothing'}")
    for job in sorted(sweep.jobs, key=lambda job: list(Status).index(job.status)) if unfinished else ():
        if job.error or job.status in (Status.FAILED, Status.UNFINISHED, Status.WAITING):
            line = f"{job.name}{_swept_values(sweep, job)}{_error_line(job)}"
            console.print(Text.assemble((f"{job.status}: ", "bold"), line))
    if counts[Status.UNRECORDED]:
        console.print("[bold]unrecorded:[/] only hydra/launcher=device_pool records whether a job is finished")
    if sweep.others:
        console.print(Text.assemble(("left out: ", "bold"), by_task(sweep.others)))
    if unfinished and any(counts[status] for status in (Status.FAILED, Status.UNFINISHED, Status.WAITING)):
        print_how_to_resume(sweep, console)
    if any(job.foreign and job.results for job in sweep.jobs) and not has_logs(sweep.logged):
        console.print(_NO_LOGS, markup=False)


def print_verdicts(sweep: Sweep, console: Console) -> None:
    """Print what the networks ended in and mean errors, for each value of the figure's axis and colour.

    With them are the means of λ, the exact learning coefficient, over the minima for which it is known.
    """
    rows = [row for row in table_rows(sweep) if has_result(row)]
    if not any(row.get("kind") for row in rows):
        return
    keys = [key for key in axes_of(sweep, rows) if key not in ("", REPETITION)]
    means = {name: head for name, head in _MEANS.items() if any(row.get(name) is not None for row in rows)}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(label_of(row[key]) for key in keys), []).append(row)
    classes = {id(row): class_of(row) for row in rows}
    ends = [end for end in ENDS if end in classes.values()]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title="means ± half of their 95 % intervals by Student's t")
    for name in (
        *(key.rpartition(".")[2] for key in keys),
        "networks",
        *(look_of(end).short for end in ends),
        *means.values(),
    ):
        table.add_column(name, justify="right", overflow="fold")
    for names, group in list(groups.items())[:_MAX_LINES]:
        found = [classes[id(row)] for row in group]
        counts = [str(found.count(end) or "–") for end in ends]
        table.add_row(*names, str(len(group)), *counts, *(_mean_text(group, name) for name in means))
    console.print(table)
    if len(groups) > _MAX_LINES:
        console.print(f"… and {len(groups) - _MAX_LINES} more groups, in {PAGE}")


def _mean_text(group: Sequence[dict[str, Any]], name: str) -> str:
    values = [value for row in group if (value := number_in(row.get(name))) is not None]
    if not values:
        return "–"
    mean, _, high = statistics_of(values, "confidence")
    return f"{mean:.3g}" + (f" ± {high - mean:.2g}" if len(values) > 1 else "")


def print_written(paths: Sequence[Path], console: Console) -> None:
    """Print a line for each file."""
    for path in paths:
        console.print(Text.assemble(("written: ", "bold"), str(relative(path))))


def print_how_to_resume(sweep: Sweep, console: Console) -> None:
    """Print the commands that finish the unfinished jobs."""
    commands = resume_commands(sweep)
    if not commands:
        console.print("[bold]resume[/] each job by its own command, with resume=true and hydra.run.dir=its folder")
    known = [command for command in commands.values() if command is not None]
    if known:
        console.print("[bold]resume[/] (finished jobs stay as they are) [bold]with[/]")
    for command in known:
        console.print(f"  {command}", markup=False)
    for folder in (folder for folder, command in commands.items() if command is None):
        console.print(
            f"{relative(folder)} has no sweep.json, in which hydra/launcher=device_pool records the command: run its "
            "own program again for the unfinished jobs",
            markup=False,
        )


def _swept_values(sweep: Sweep, job: SweepJob) -> str:
    """The job's values of what was swept, as text."""
    place = sweep.jobs.index(job)
    values = " ".join(f"{key}={values[place]}" for key, values in sweep.swept.items())
    return f" ({values})" if values and job.folder is not None else ""


def _error_line(job: SweepJob) -> str:
    """The line of a failed job's error that names the error: the first line, or the last line of a traceback."""
    lines = str(job.error or "").strip().splitlines()
    if not lines:
        return ""
    return f": {lines[-1] if lines[0].startswith('Traceback') else lines[0]}"
