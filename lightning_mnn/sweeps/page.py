"""The content of ``report.html``: what is read from the folders of a sweep's jobs, in the form that the page needs."""

from __future__ import annotations

import math
import re
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lightning_mnn.figures.report_page.render import Column, Page, Problem, write_page
from lightning_mnn.figures.run import PANELS
from lightning_mnn.figures.scales import REPETITION, Scale, colors_of, identity, label_of, number_in, scale_of
from lightning_mnn.figures.sweep import MEASURES, choose_axes
from lightning_mnn.runs.logs import read_logs
from lightning_mnn.sweeps.jobs import Status, Sweep, SweepJob, by_task, commands_of, resume_commands, versions_of
from lightning_mnn.sweeps.table import table_rows
from lightning_mnn.utilities.files import relative
from lightning_mnn.verdicts import AT_GLOBAL, Ended, class_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Row = dict[str, Any]

PAGE = "report.html"

MAX_ROWS = 5_000  # of the table; with them the page stays below 10 MB
MAX_CURVE_POINTS = 250_000  # of all curves together, about 3.5 MB
MAX_POINTS = 200  # of a curve
_MIN_POINTS = 24
_LOG_LINES = 40  # at the end of a job's log
_LOG_BYTES = 16_384
_MAX_LOGS = 50
_MAX_CURVES = 16  # of a job

_FIRST = (  # columns after the swept ones, in this order
    *("status", "replica", "kind", "zero_error", "mse", "mce", "wrong", "test_mse", "test_mce", "minimum_mse"),
    *("descends_to", "descends_to_zero_error", "descends_to_mse", "descends_to_distance"),
    *("distance", "margin_ratio", "min_preactivation", "kinks", "rank", "log_volume", "learning_coefficient"),
    *("regions_visited", "epochs", "steps", "seconds", "reason_code"),
)
_NOT_DRAWN = ("job", "replica", "seed", "class_is_ahead")  # numbers that are names; the page draws classes itself
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")  # of a terminal


def write_report_page(sweep: Sweep, *, reload: int | None = None) -> Path:
    """Write ``report.html`` into the folder of a sweep or a run, atomically.

    Args:
        sweep: the jobs.
        reload: seconds after which an open page loads itself again; None: it does not.

    Returns:
        The path.
    """
    return write_page(page_of(sweep, reload=reload), sweep.folder / PAGE)


def page_of(sweep: Sweep, *, reload: int | None = None) -> Page:
    """The content of the page."""
    everything = table_rows(sweep)
    rows = everything[:MAX_ROWS]
    columns = _columns(rows, sweep)
    shown = [key for key in columns if key == "status" or key in sweep.swept or _varies(rows, key)]
    classes = [class_of(row) if has_result(row) else None for row in rows]
    left = [job for job in sweep.jobs if job.status not in (Status.FINISHED, Status.UNRECORDED)]
    cut = [f"The table ends after {MAX_ROWS:,} of {len(everything):,} rows: sweep.csv has all."]
    return Page(
        title=f"{'Run' if sweep.is_run else 'Sweep'} {relative(sweep.folder)}",
        facts=_facts(sweep),
        swept=[(key, _values(values)) for key, values in sweep.swept.items()],
        columns=[Column(key, [_text(row[key]) for row in rows], is_number=_has_numbers(rows, key)) for key in shown],
        classes=classes,
        jobs=_owners(sweep)[: len(rows)],
        common=[(key, _text(_known(rows, key)[0])) for key in columns if key not in (*shown, "replica")],
        notes=cut if len(everything) > len(rows) else (),
        problems=[_problem(sweep, job, with_log=number < _MAX_LOGS) for number, job in enumerate(left)],
        resume=_resume(sweep) if left and reload is None else (),  # what runs cannot be resumed
        data=_data(sweep, rows, shown, classes),
        reload=reload,
    )


def _facts(sweep: Sweep) -> list[tuple[str, str]]:
    """What stands at the head of the page."""
    counts = {str(status): len(sweep.having(status)) for status in Status}
    facts = [("jobs", ", ".join(f"{count} {status}" for status, count in counts.items() if count))]
    facts += [("command", command) for command in commands_of(sweep)]
    facts += [("versions", ", ".join(f"{name} {number}" for name, number in versions_of(sweep).items()))]
    if sweep.others:
        facts.append(("left out", by_task(sweep.others)))
    now = datetime.now().astimezone()
    facts.append(("written", f"{now:%Y-%m-%d %H:%M:%S %Z} by lightning-mnn {version('lightning_mnn')}"))
    return [(name, text) for name, text in facts if text]


def _owners(sweep: Sweep) -> list[int]:
    """The index of the job of each row of the table."""
    counts = [job.results.get("replicas", 1) if job.results else 1 for job in sweep.jobs]
    return [number for number, count in enumerate(counts) for _ in range(count)]


def _columns(rows: Sequence[Row], sweep: Sweep) -> list[str]:
    """Columns that the table may show, in order: the job, what was swept, verdict and measures."""
    known = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    named = [key for key in rows[0] if key == "job" or (key == "folder" and "job" not in known)]
    wanted = [*named, *sweep.swept, *_FIRST, *sweep.logged]
    return [key for key in dict.fromkeys(wanted) if key in known]


def _varies(rows: Sequence[Row], key: str) -> bool:
    known = _known(rows, key)
    return any(value != known[0] for value in known)


def _known(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows if row[key] is not None]


def has_result(row: Row) -> bool:
    """Whether a row of the table has the results of a network."""
    return row["status"] in (Status.FINISHED, Status.UNRECORDED) and row["replica"] is not None


def _has_numbers(rows: Sequence[Row], key: str) -> bool:
    return any(number_in(row[key]) is not None for row in rows)


def _values(values: Sequence[Any]) -> str:
    names = list(dict.fromkeys(map(label_of, values)))
    shown = names if len(names) <= 16 else [*names[:12], f"… ({len(names)} values)", names[-1]]
    return ", ".join(shown) if not any("," in name for name in shown) else "; ".join(shown)


def _text(value: Any) -> str:
    """A value in the table.

    >>> _text(1.23456789e-9), _text(1_234_567), _text(None), _text(True), _text([8, 4])
    ('1.235e-09', '1,234,567', '', 'true', '8, 4')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value.replace("_", " ") if isinstance(value, str) else label_of(value)


def _resume(sweep: Sweep) -> list[str]:
    commands = resume_commands(sweep)
    unknown = "# {}: run its own program again for the unfinished jobs"
    return [unknown.format(relative(folder)) if line is None else line for folder, line in commands.items()]


def _problem(sweep: Sweep, job: SweepJob, *, with_log: bool) -> Problem:
    place = sweep.jobs.index(job)
    values = ", ".join(f"{key} = {label_of(values[place])}" for key, values in sweep.swept.items())
    name = f"{job.name} ({values})" if values and job.folder is not None else job.name
    log = _end_of_log(sweep.folder / job.folder) if with_log and job.folder is not None else ""
    return Problem(name, str(job.status), printable(str(job.error or "")), log)


def _end_of_log(folder: Path) -> str:
    """The last lines of a job's output: of ``console.log``, else of Hydra's log."""
    logs = [folder / "console.log", *sorted(folder.glob("*.log"))]
    for path in logs:
        if path.is_file() and (size := path.stat().st_size):
            with path.open("rb") as file:
                file.seek(max(0, size - _LOG_BYTES))
                lines = printable(file.read().decode(errors="replace")).splitlines()
            return "\n".join(lines[-_LOG_LINES:])
    return ""


def printable(text: str) -> str:
    r"""Text without the characters that move a terminal's cursor or colour it; of a line written over, its last state.

    >>> printable("\x1b[31mred\x1b[0m 10 %\r 20 %\n")
    ' 20 %\n'
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(_SEQUENCE.sub("", line.rstrip("\r").rpartition("\r")[2]) for line in lines)


def _data(sweep: Sweep, rows: Sequence[Row], shown: Sequence[str], classes: Sequence[Ended | None]) -> dict[str, Any]:
    """What the script of the page draws; see ``report.js``."""
    scales = {key: scale_of(rows, key) for key in sweep.swept}
    names = [key for key in rows[0] if key not in _NOT_DRAWN and key not in sweep.swept]
    measures = [key for key in names if _is_measure([row[key] for row in rows])]
    measures.sort(key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
    x, color = axes_of(sweep, [row for row in rows if has_result(row)])
    y = next((key for key in ("test_mce", "test_mse", *sweep.logged, "mse") if key in measures), "share of global")
    at_global = [row.get(x) for row, known in zip(rows, classes, strict=True) if known == AT_GLOBAL]
    compares_global = y.startswith("test_m") and len(set(map(identity, at_global))) > 1  # as figure_test_error.png does
    return {
        "columns": {key: [_plain(row[key]) for row in rows] for key in dict.fromkeys([*shown, *measures])},
        "scales": {key: _scale(rows, scale) for key, scale in scales.items()},
        "measures": measures,
        "x": x,
        "color": color,
        "y": y,
        "only": AT_GLOBAL.key if compares_global else "",
        "runs": [job.name for job in sweep.jobs],
        "curves": _curves(sweep),
        "points": MAX_POINTS,
    }


def _is_measure(values: Sequence[Any]) -> bool:
    """Whether a column has numbers, or true and false."""
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, int | float) for value in known)


def axes_of(sweep: Sweep, finished: Sequence[Row]) -> tuple[str, str]:
    """The keys of the first figure's axis and colour, as in ``figure.png``."""
    measures = [measure for measure in MEASURES if measure.known(finished)]
    if measures:
        return choose_axes(finished, list(sweep.swept), measures)
    ordered = sorted(sweep.swept, key=lambda key: key == REPETITION)
    return (ordered[0] if ordered else ""), ""


def _scale(rows: Sequence[Row], scale: Scale) -> dict[str, Any]:
    places = {value: number for number, value in enumerate(scale.values)}
    return {
        "names": scale.names,
        "places": scale.places,
        "kind": scale.kind,
        "colors": colors_of(scale),
        "index": [places[identity(row.get(scale.key))] for row in rows],
    }


def _plain(value: Any) -> Any:
    """A value for sorting and drawing: a number with seven digits, else as text."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if value is None or isinstance(value, bool | int):
        return value
    number = number_in(value)
    return _text(value) if number is None else number


def _curves(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Curves over training by the index of the job, thinned; later jobs have none if there are too many."""
    found: dict[str, dict[str, Any]] = {}
    left, jobs = MAX_CURVE_POINTS, [number for number, job in enumerate(sweep.jobs) if job.folder is not None]
    for number in jobs:
        most = max(_MIN_POINTS, min(MAX_POINTS, MAX_CURVE_POINTS // (12 * len(jobs))))
        curves = {name: _thinned(points, most) for name, points in _chosen(_logs(sweep, sweep.jobs[number])).items()}
        left -= sum(len(steps) for steps, _ in curves.values())
        if left < 0:
            break
        if curves:
            found[str(number)] = curves
    return found


def _logs(sweep: Sweep, job: SweepJob) -> dict[str, dict[int, float]]:
    assert job.folder is not None  # noqa: S101 (of the jobs that were started)
    try:
        return read_logs(sweep.folder / job.folder)
    except (OSError, ValueError):  # while it is written, or damaged, which the table says
        return {}


def _chosen(logs: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """The curves of a run's figure first, then what else was logged; at most 16."""
    first = [name for panel in PANELS for name, _ in panel.curves]
    others = [name for name in logs if name not in first and name not in ("step", "epoch")]
    names = [name for name in (*first, *others) if any(map(math.isfinite, logs.get(name, {}).values()))]
    return {name: logs[name] for name in names[:_MAX_CURVES]}


def _thinned(points: dict[int, float], most: int) -> tuple[list[int], list[float]]:
    """Steps and values of a curve, at most so many, evenly chosen, with the first and the last; finite ones only.

    >>> _thinned({step: float(step) for step in range(101)}, 3)
    ([0, 50, 100], [0.0, 50.0, 100.0])
    """
    known = [(step, float(f"{value:.5g}")) for step, value in points.items() if math.isfinite(value)]
    if len(known) > most:
        known = [known[round(place * (len(known) - 1) / (most - 1))] for place in range(most)]
    return [step for step, _ in known], [value for _, value in known]
