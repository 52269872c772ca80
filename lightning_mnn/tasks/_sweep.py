"""The jobs of a sweep, as they lie below its folder, and the table of their summaries."""

from __future__ import annotations

import json
import os
import shlex
from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_mnn.tasks._experiment import shown
from lightning_mnn.tasks._files import write_csv

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Row = dict[str, Any]

_MARKS = (".hydra", "job.json", "plan.json", "summary.json")  # any of which tells a job's folder
_LISTS = ("hidden_dims", "visits")  # of a summary that are no lists over the replicas
_HOW_TO_START = ("resume",)  # overrides that say how a job is started, not what it is


class Status(StrEnum):
    """How far a job has come: ended well, ended badly, begun without an end, or never begun."""

    FINISHED = "finished"
    FAILED = "failed"
    UNFINISHED = "unfinished"
    WAITING = "waiting"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        folder: its place below the sweep's folder; of a job that waits, the one that it will have, or None.
        overrides: its part of the command, as it is written.
        status: how far it has come.
        task: what it does.
        summary: its ``summary.json``, empty where there is none.
        error: why it failed, where that is known.
    """

    folder: Path | None
    overrides: tuple[str, ...]
    status: Status
    task: str = "train"
    summary: dict[str, Any] | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """What the user knows it by."""
        return str(self.folder) if self.folder is not None else " ".join(self.overrides)

    @property
    def number(self) -> int | None:
        """Hydra's number of it, where its folder has that name."""
        return int(self.folder.name) if self.folder is not None and self.folder.name.isdigit() else None


@dataclass(frozen=True)
class Sweep:
    """The jobs below a folder.

    Attributes:
        folder: the folder.
        jobs: all of them, in the order of their numbers.
        swept: what differs between them, in the order of the command: names, and each job's value.
        plans: the ``multirun.yaml`` of the sweeps that they are of.
    """

    folder: Path
    jobs: tuple[Job, ...]
    swept: dict[str, tuple[Any, ...]]
    plans: tuple[Path, ...] = ()

    def having(self, status: Status) -> list[Job]:
        """The jobs that have come as far as that."""
        return [job for job in self.jobs if job.status is status]


def read_sweep(folder: Path) -> Sweep:
    """Find the training jobs below a folder, at any depth, and those that their sweeps have not begun.

    Raises:
        FileNotFoundError: there are none; the message says what there is.
    """
    if any((folder / mark).exists() for mark in _MARKS):
        raise FileNotFoundError(
            f"sweep={shown(folder)} is the folder of one run or experiment, not of a sweep: give task=report "
            f"folder={shown(folder)}, or the folder above it as sweep="
        )
    folders, plans = _walk(folder)
    jobs = [_read_job(folder, place) for place in folders]
    for plan in plans:
        pairs = zip(folders, jobs, strict=False)  # without those that wait
        begun = {_settings(job.overrides) for place, job in pairs if place.is_relative_to(plan.parent)}
        jobs += [job for job in _planned(folder, plan) if job.overrides not in begun]
    training = tuple(sorted((job for job in jobs if job.task == "train"), key=_in_order))
    if not training:
        raise FileNotFoundError(_nothing(folder, jobs))
    return Sweep(folder, training, _swept(folder, training), tuple(plans))


def rows_of(sweep: Sweep) -> list[Row]:
    """The table: a row for each job and replica; its columns are the first row's keys, None where there is nothing.

    ``job`` and ``folder``, what was swept, ``status`` and ``replica``, then the summary in its own order. What was
    swept stands as the job was given it, so that ``seed`` is the seed of a job's first replica.
    """
    measures = dict.fromkeys(key for job in sweep.jobs for key in job.summary or () if key not in sweep.swept)
    return [
        {"job": job.number, "folder": None if job.folder is None else str(job.folder)}
        | {key: values[place] for key, values in sweep.swept.items()}
        | {"status": str(job.status), "replica": replica}
        | {key: _of_replica(job.summary or {}, key, replica) for key in measures}
        for place, job in enumerate(sweep.jobs)
        for replica in (range(job.summary["replicas"]) if job.summary else (None,))
    ]


def write_table(sweep: Sweep) -> list[Path]:
    """Write ``sweep.csv``, lists as JSON, and ``sweep.parquet``, typed, with the names of what was swept as metadata.

    Returns:
        Their paths.
    """
    rows = rows_of(sweep)
    text, typed = sweep.folder / "sweep.csv", sweep.folder / "sweep.parquet"
    write_csv(text, [{key: _as_text(value) for key, value in row.items()} for row in rows])
    columns = {key: _column([row[key] for row in rows]) for key in rows[0]}
    table = pa.table(columns).replace_schema_metadata({"swept": json.dumps(list(sweep.swept))})
    unfinished = typed.with_name(typed.name + ".tmp")
    pq.write_table(table, unfinished)
    unfinished.replace(typed)
    return [text, typed]


def how_to_go_on(sweep: Sweep) -> list[str]:
    """Command lines that finish what is not finished: those that began it, with ``resume=true``."""
    left = [job for job in sweep.jobs if job.status is not Status.FINISHED]
    return [
        _command(plan)
        for plan in sweep.plans
        if any(job.folder is None or (sweep.folder / job.folder).is_relative_to(plan.parent) for job in left)
    ]


def is_finished(summary: Mapping[str, Any]) -> bool:
    """Whether a training run came to its end; older summaries do not say, but that of one without data is of none."""
    return bool(summary.get("finished", True)) and summary.get("num_samples") is not None


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders of jobs, none within another, and the ``multirun.yaml`` of sweeps."""
    jobs, plans = [], []
    for place, below, files in os.walk(folder):
        if any(mark in below or mark in files for mark in _MARKS):
            jobs.append(Path(place))
            below.clear()
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        plan = Path(place, "multirun.yaml")
        if _yaml(plan):
            plans.append(plan)
    return jobs, plans


def _read_job(root: Path, place: Path) -> Job:
    note, summary = _json(place / "job.json"), _json(place / "summary.json")
    overrides = _yaml(place / ".hydra" / "overrides.yaml") or note.get("overrides")
    error = note.get("error")
    if is_finished(summary):
        status, error = Status.FINISHED, None
    elif note.get("status") == "failed" or _diverged(summary):
        status, error = Status.FAILED, error or _reason(summary)
    else:
        status = Status.UNFINISHED
    given = tuple(str(override) for override in overrides or ())
    return Job(place.relative_to(root), given, status, _task(place, summary), summary, error)


def _reason(summary: Mapping[str, Any]) -> str:
    reasons = summary.get("reason")
    return str(reasons[0] if isinstance(reasons, list) else reasons)


def _diverged(summary: Mapping[str, Any]) -> bool:
    return summary.get("finished") is False and _reason(summary).startswith("training diverged")


def _task(place: Path, summary: Mapping[str, Any]) -> str:
    """What a job does: by its config, or as its summary tells where there is none."""
    if summary.keys() >= {"mse", "mce", "hidden_dims", "num_samples", "seconds"}:
        return "train"
    config = _yaml(place / ".hydra" / "config.yaml")
    return str(config["task"]) if config else "no training run" if summary else "train"


def _planned(root: Path, plan: Path) -> Iterator[Job]:
    """All jobs of a sweep, as Hydra's own sweeper makes them of the command; none where another one chooses them."""
    hydra = _yaml(plan)["hydra"]
    if not str(hydra["sweeper"]["_target_"]).endswith("BasicSweeper"):
        return
    given = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
    try:
        overrides = OverridesParser.create().parse_overrides([*given, *hydra["overrides"]["task"]])
        (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    except HydraException:  # such as glob(*), which needs the configs of the program that was run
        return
    named = hydra["sweep"].get("subdir") == "${hydra.job.num}"
    for number, job in enumerate(jobs):
        folder = (plan.parent / str(number)).relative_to(root) if named else None
        yield Job(folder, _settings(job), Status.WAITING)


def _settings(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that say what a job is."""
    return tuple(override for override in overrides if override.split("=")[0].lstrip("+") not in _HOW_TO_START)


def _command(plan: Path) -> str:
    overrides = _yaml(plan)["hydra"]["overrides"]
    own = ("hydra.mode=", "hydra.sweep.dir=")
    more = [override for override in overrides["hydra"] if not override.startswith(own)]
    where = f"hydra.sweep.dir={shown(plan.parent)}"
    return shlex.join(["lightning-mnn", "-m", *_settings(overrides["task"]), *more, where, "resume=true"])


def _swept(root: Path, jobs: Sequence[Job]) -> dict[str, tuple[Any, ...]]:
    """What was given to the jobs and differs between them; where a job was not given it, what its config says."""
    given = [dict(map(_parsed, _settings(job.overrides))) for job in jobs]
    swept = {}
    for key in dict.fromkeys(key for values in given for key in values):
        if len({json.dumps(values.get(key), default=str) for values in given}) == 1 and all(key in v for v in given):
            continue
        places = zip(given, jobs, strict=True)
        values = tuple(of[key] if key in of else _configured(root, job, key) for of, job in places)
        if len({json.dumps(value, default=str) for value in values}) > 1:
            swept[key] = values
    return swept


@lru_cache(maxsize=4096)
def _parsed(override: str) -> tuple[str, Any]:
    """Key and typed value of an override.

    >>> _parsed("+model.hidden_dims=[20,'30']")
    ('model.hidden_dims', [20, '30'])
    """
    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, parsed.value()


def _configured(root: Path, job: Job, key: str) -> Any:
    """The value of a key in a job's config, or the option of a group; None where a running job alone knows it."""
    if job.folder is None:
        return None
    notes = root / job.folder / ".hydra"
    hydra, config = _yaml(notes / "hydra.yaml"), _yaml(notes / "config.yaml")
    choices = hydra["hydra"]["runtime"]["choices"] if hydra else {}
    if key in choices:
        return choices[key]
    try:
        value = OmegaConf.select(OmegaConf.create(config or {}), key)
    except OmegaConfBaseException:
        return None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _in_order(job: Job) -> tuple[bool, list[tuple[int, str]]]:
    """By numbers as numbers, jobs that have no folder yet last."""
    parts = () if job.folder is None else job.folder.parts
    return job.folder is None, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _nothing(folder: Path, jobs: Sequence[Job]) -> str:
    if not jobs:
        return (
            f"sweep={shown(folder)} holds no jobs: give the folder of a sweep (hydra.sweep.dir), or one above several"
        )
    places = defaultdict(list)
    for job in jobs:
        places[job.task].append(job.name)
    found = "; ".join(f"{task}: {', '.join(names)}" for task, names in places.items())
    return (
        f"sweep={shown(folder)} holds no training runs, but {found}: task=report folder=DIR draws the results of each"
    )


def _of_replica(summary: Mapping[str, Any], key: str, replica: int | None) -> Any:
    value = summary.get(key)
    if replica is None or key in _LISTS or not isinstance(value, list) or summary["replicas"] == 1:
        return value
    return value[replica]


def _as_text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _column(values: Sequence[Any]) -> pa.Array:
    """A typed column; what is of several types becomes text."""
    if len({isinstance(value, bool) for value in values if value is not None}) < 2:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError):
            pass
    return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])


def _yaml(path: Path) -> Any:
    """What Hydra wrote, with references as they are written; None where there is nothing, or a kill tore it."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.exists() else None
    except YAMLError:
        return None


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
