"""Read the jobs of a sweep from its folder: their states, results and commands."""

from __future__ import annotations

import json
import os
import shlex
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_mnn.launchers.jobs.records import JOB_RECORD, SWEEP_RECORD, JobState, SweepCommand, hydra_value
from lightning_mnn.runs.folders import jobs_of, sweep_record
from lightning_mnn.runs.logs import columns_to_draw, read_logs, results_of
from lightning_mnn.utilities.errors import EarlyEnd
from lightning_mnn.utilities.files import DamagedFileError, read_json, relative

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Row = dict[str, Any]

EVALUATION = "evaluation.json"  # of task=evaluate, in a run's folder

_MARKS = (".hydra", JOB_RECORD, "plan.json", "summary.json")  # a folder that contains any of these is a job's
_START_OVERRIDES = ("resume",)  # overrides that determine how a job is started, not what it computes
_TASK_OVERRIDES = ("task", "experiment")  # overrides that determine a job's task


class Status(StrEnum):
    """State of a job.

    Attributes:
        FINISHED: it ran to its end.
        FAILED: it ended with an error.
        UNFINISHED: it was started, and was stopped or is still running.
        WAITING: it was never started.
        UNRECORDED: it was started by a launcher that does not record how jobs of other programs end.
    """

    FINISHED = "finished"
    FAILED = "failed"
    UNFINISHED = "unfinished"
    WAITING = "waiting"
    UNRECORDED = "unrecorded"


_STATUS_OF_RECORD = {  # status of a job of another program, from its job.json
    JobState.FINISHED: Status.FINISHED,
    JobState.RETURNED: Status.FINISHED,
    JobState.FAILED: Status.FAILED,
    JobState.INTERRUPTED: Status.UNFINISHED,
}


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    Attributes:
        folder: path below the sweep's folder; of a waiting job, the folder that it will have, or None.
        overrides: its part of the command, as it is written.
        status: its state.
        task: its task; empty if its files do not say. Jobs of other programs count as training.
        summary: its ``summary.json``, empty if there is none; for another program, what it logged and returned.
        error: why it failed, or what is wrong with its files, if known.
        foreign: whether it belongs to another program.
    """

    folder: Path | None
    overrides: tuple[str, ...]
    status: Status
    task: str
    summary: dict[str, Any] | None = None
    error: str | None = None
    foreign: bool = False

    @property
    def results(self) -> dict[str, Any]:
        """Its results: the summary; empty if the job is known not to be finished."""
        return self.summary or {} if self.status in (Status.FINISHED, Status.UNRECORDED) else {}

    @property
    def name(self) -> str:
        """Its name for the user: the folder, else the overrides."""
        return str(self.folder) if self.folder is not None else " ".join(self.overrides)

    @property
    def number(self) -> int | None:
        """Hydra's number of the job, if its folder is named by it."""
        return int(self.folder.name) if self.folder is not None and self.folder.name.isdigit() else None


@dataclass(frozen=True)
class Sweep:
    """The jobs below a folder.

    Attributes:
        folder: the folder.
        jobs: all training jobs, in the order of their numbers.
        swept: names of what differs between the jobs, in the order of the command, and each job's value.
        logged: columns of the table that come from other programs' logs and return values.
        sweeps: folders of the sweeps to which the jobs belong.
        others: jobs below the folder that are not training.
    """

    folder: Path
    jobs: tuple[SweepJob, ...]
    swept: dict[str, tuple[Any, ...]]
    logged: tuple[str, ...] = ()
    sweeps: tuple[Path, ...] = ()
    others: tuple[SweepJob, ...] = ()

    @property
    def is_run(self) -> bool:
        """Whether the folder is that of its only job."""
        return len(self.jobs) == 1 and self.jobs[0].folder == Path()

    def having(self, status: Status) -> list[SweepJob]:
        """The jobs with this status."""
        return [job for job in self.jobs if job.status is status]


def read_sweep(folder: Path) -> Sweep:
    """Find the training jobs below a folder, at any depth, and those that their sweeps have not started.

    Raises:
        FileNotFoundError: there are none; the message says what there is.
    """
    if any((folder / mark).exists() for mark in _MARKS):
        raise FileNotFoundError(
            f"sweep={relative(folder)} is the folder of one run or experiment, not of a sweep: use task=report "
            f"folder={relative(folder)}, or sweep={relative(folder.parent)}"
        )
    folders, plans = _walk(folder)
    jobs = [_read_job(folder, place, _plan_of(place, plans)) for place in folders]
    for sweep, hydra in plans.items():
        jobs = _with_planned(jobs, list(_planned(folder, sweep, hydra)), sweep.relative_to(folder))
    jobs = sorted((job if job.task else replace(job, task=_task_of(job.overrides)) for job in jobs), key=_in_order)
    training = tuple(job for job in jobs if job.task == "train")
    others = tuple(job for job in jobs if job.task != "train")
    if not training:
        raise FileNotFoundError(_no_training(folder, others))
    logged = columns_to_draw(key for job in training if job.foreign for key in job.results)
    return Sweep(folder, training, _swept(folder, training), tuple(logged), tuple(plans), others)


def read_run(folder: Path) -> Sweep:
    """The run in a folder as the only job of a sweep."""
    job = _read_job(folder, folder, _hydra_of(folder / ".hydra" / "hydra.yaml"))
    return Sweep(folder, (replace(job, task="train"),), {}, tuple(columns_to_draw(job.results)) if job.foreign else ())


def resume_commands(sweep: Sweep) -> dict[Path, str | None]:
    """Commands that finish the unfinished jobs, by the folders of their sweeps; None: the program is not known."""
    done = (Status.FINISHED, Status.UNRECORDED)
    left = [job for job in sweep.jobs if job.status not in done]
    return {
        folder: _command(folder)
        for folder in sweep.sweeps
        if any(job.folder is None or (sweep.folder / job.folder).is_relative_to(folder) for job in left)
    }


def commands_of(sweep: Sweep) -> list[str]:
    """The commands that started the jobs, as far as they are recorded."""
    if sweep.is_run:
        hydra = _hydra_of(sweep.folder / ".hydra" / "hydra.yaml")
        own = not sweep.jobs[0].foreign
        return [shlex.join(["lightning-mnn", *sweep.jobs[0].overrides, *_given(hydra)])] if own else []
    return [command for folder in sweep.sweeps if (command := _first_command(folder)) is not None]


def versions_of(sweep: Sweep) -> dict[str, str]:
    """Versions of the packages that computed the first job of this program that records them."""
    folders = [sweep.folder / job.folder for job in sweep.jobs if job.folder is not None and not job.foreign]
    plans = (_read(folder / "plan.json")[0].get("versions") for folder in folders)
    return next((plan for plan in plans if isinstance(plan, dict)), {})


def is_foreign(run: Path) -> bool:
    """Whether a run's folder belongs to another program, by the record that Hydra wrote there."""
    return _main_config(_hydra_of(run / ".hydra" / "hydra.yaml")) != "lightning_mnn.conf"


def is_finished(summary: Mapping[str, Any]) -> bool:
    """Whether a training run reached its end.

    Older summaries have no ``finished``; they count as finished, except a summary without data.
    """
    return bool(summary.get("finished", True)) and summary.get("num_samples") is not None


def by_task(jobs: Sequence[SweepJob]) -> str:
    """The names of jobs, grouped by their tasks.

    >>> by_task([SweepJob(Path("0"), (), Status.FINISHED, "scan"), SweepJob(Path("2"), (), Status.WAITING, "scan")])
    'scan: 0, 2'
    """
    names = defaultdict(list)
    for job in jobs:
        names[job.task].append(job.name)
    return "; ".join(f"{task}: {', '.join(found)}" for task, found in names.items())


def _walk(folder: Path) -> tuple[list[Path], dict[Path, dict[str, Any]]]:
    """Folders of jobs, none inside another, and folders of sweeps with Hydra's part of their record."""
    jobs, plans = [], {}
    for place, below, files in os.walk(folder):
        if any(mark in below or mark in files for mark in _MARKS):
            jobs.append(Path(place))
            below.clear()
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        hydra = _hydra_of(sweep_record(Path(place)))
        if hydra or SWEEP_RECORD in files:
            plans[Path(place)] = hydra
    return jobs, plans


def _plan_of(place: Path, plans: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    """Hydra's part of the record of the sweep to which a job belongs, else of the job's own record."""
    plan = next((plans[above] for above in place.parents if above in plans), {})
    return plan or _hydra_of(place / ".hydra" / "hydra.yaml")


def _read_job(root: Path, place: Path, hydra: Mapping[str, Any]) -> SweepJob:
    record, torn_record = _read(place / JOB_RECORD)
    summary, torn_summary = _read(place / "summary.json")
    if summary:
        summary |= {f"evaluated.{key}": value for key, value in _read(place / EVALUATION)[0].items()}
    recorded = record.get("overrides")
    overrides = _yaml(place / ".hydra" / "overrides.yaml") or (recorded if isinstance(recorded, list) else ())
    job = SweepJob(place.relative_to(root), tuple(map(str, overrides)), Status.UNFINISHED, task="")
    if _is_foreign(place, summary, hydra):
        return _with_logs(job, place, record, torn_record)
    reason = record.get("error")
    if is_finished(summary):
        status, error = Status.FINISHED, None
    elif record.get("status") == JobState.FAILED or _diverged(summary):
        status, error = Status.FAILED, str(reason or _reason(summary))
    else:
        status, error = Status.UNFINISHED, torn_summary or torn_record or reason
    return replace(job, status=status, task=_task(place, summary), summary=summary, error=error)


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a file, empty if there is no file, and what is wrong with the file, if anything."""
    try:
        return read_json(path) if path.exists() else {}, None
    except DamagedFileError as damage:
        return {}, str(damage)


def _main_config(hydra: Mapping[str, Any]) -> str | None:
    """The source of the main config of a job or sweep, if its record contains it."""
    sources = (hydra.get("runtime") or {}).get("config_sources") or []
    return next((source.get("path") for source in sources if source.get("provider") == "main"), None)


def _is_foreign(place: Path, summary: Mapping[str, Any], hydra: Mapping[str, Any]) -> bool:
    """Whether a job belongs to another program, by the source of its main config; if that is lost, by its files."""
    if _is_training(summary) or (place / "plan.json").exists():
        return False
    main = _main_config(hydra)
    return main != "lightning_mnn.conf" if main else (place / JOB_RECORD).exists() and not summary


def _with_logs(job: SweepJob, place: Path, record: Mapping[str, Any], torn_record: str | None) -> SweepJob:
    """A job of another program: its status from ``job.json``, its results from ``job.json`` and its logs."""
    error = torn_record or record.get("error")
    code = record.get("status")
    if code in [str(known) for known in _STATUS_OF_RECORD]:
        status = _STATUS_OF_RECORD[JobState(code)]
    elif record or torn_record or (place / "console.log").exists():  # of hydra/launcher=device_pool
        status = Status.UNFINISHED
        error = error or (f"{relative(place / JOB_RECORD)} has an unknown status, {code!r}" if record else None)
    else:
        status = Status.UNRECORDED
    logs, torn_logs = {}, None
    try:
        logs = read_logs(place)
    except ValueError as unreadable:
        torn_logs = str(unreadable)
    results = results_of(record, logs)
    return replace(job, status=status, task="train", summary=results, error=error or torn_logs, foreign=True)


def _reason(summary: Mapping[str, Any]) -> str:
    reasons = summary.get("reason")
    return str(reasons[0] if isinstance(reasons, list) else reasons)


def _diverged(summary: Mapping[str, Any]) -> bool:
    if "ended_by" in summary:
        return bool(summary["ended_by"] == EarlyEnd.DIVERGENCE)
    return summary.get("finished") is False and _reason(summary).startswith("training diverged")  # of version 0.1


def _task(place: Path, summary: Mapping[str, Any]) -> str:
    """A job's task, from its summary or its config; empty if neither determines it."""
    if _is_training(summary):
        return "train"
    task = _selected(_yaml(place / ".hydra" / "config.yaml"), "task")
    return str(task) if task else "another task" if summary else ""


def _is_training(summary: Mapping[str, Any]) -> bool:
    return summary.keys() >= {"mse", "mce", "hidden_dims", "num_samples", "seconds"}


def _task_of(overrides: Sequence[str]) -> str:
    """A job's task, from its part of the command."""
    return _composed_task(tuple(override for override in overrides if _key(override) in _TASK_OVERRIDES))


@lru_cache(maxsize=256)
def _composed_task(choice: tuple[str, ...]) -> str:
    """The task of a config; training if the config cannot be composed, because most jobs are training.

    >>> _composed_task(()), _composed_task(("experiment=figure_5_1",)), _composed_task(("task=census",))
    ('train', 'scan', 'census')
    """
    running = GlobalHydra.instance().is_initialized()  # then the user's own configs are found too
    try:
        with nullcontext() if running else initialize_config_module("lightning_mnn.conf", version_base="1.3"):
            return str(compose("config", list(choice)).task)
    except (HydraException, OmegaConfBaseException):
        return "train"


def _with_planned(jobs: Sequence[SweepJob], planned: Sequence[SweepJob], where: Path) -> list[SweepJob]:
    """The jobs below a sweep's folder, and those that the sweep has not started.

    A job that was killed before its overrides were written is recognised by its folder.
    """
    given: dict[Path | None, tuple[str, ...]] = {job.folder: job.overrides for job in planned if job.folder}
    jobs = [job if job.overrides else replace(job, overrides=given.get(job.folder, ())) for job in jobs]
    started = {
        _settings(job.overrides)
        for job in jobs
        if job.status is not Status.WAITING and job.folder and job.folder.is_relative_to(where)
    }
    return [*jobs, *(job for job in planned if job.overrides not in started)]


def _planned(root: Path, sweep: Path, hydra: Mapping[str, Any]) -> Iterator[SweepJob]:
    """All jobs of a sweep, as Hydra's own sweeper makes them from the command; none if another sweeper chooses them."""
    if not hydra:
        return
    named = str(hydra["sweep"].get("subdir")).replace(":", ".") == "${hydra.job.num}"
    foreign = _is_foreign(sweep, {}, hydra)
    for number, job in enumerate(jobs_of(hydra)):
        folder = (sweep / str(number)).relative_to(root) if named else None
        yield SweepJob(folder, _settings(job), Status.WAITING, task="train" if foreign else "", foreign=foreign)


def _settings(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that determine what a job computes."""
    return tuple(override for override in overrides if _key(override) not in _START_OVERRIDES)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _command(sweep: Path) -> str | None:
    """The command that resumes a sweep; None: it belongs to another program and is not recorded."""
    hydra = _hydra_of(sweep_record(sweep))
    if not hydra or _is_foreign(sweep, {}, hydra):
        recorded = SweepCommand.read(sweep)
        return None if recorded is None else recorded.resumed(sweep)
    where = f"hydra.sweep.dir={hydra_value(str(relative(sweep)))}"
    given = _given(hydra, without=("hydra.sweep.dir=",))
    return shlex.join(["lightning-mnn", "-m", *_settings(hydra["overrides"]["task"]), *given, where, "resume=true"])


def _first_command(sweep: Path) -> str | None:
    """The command that started a sweep; None: it is not recorded."""
    hydra = _hydra_of(sweep_record(sweep))
    if hydra and not _is_foreign(sweep, {}, hydra):
        return shlex.join(["lightning-mnn", "-m", *_settings(hydra["overrides"]["task"]), *_given(hydra)])
    recorded = SweepCommand.read(sweep)
    return None if recorded is None else shlex.join([*recorded.program, *recorded.arguments])


def _given(hydra: Mapping[str, Any], without: tuple[str, ...] = ()) -> list[str]:
    """The overrides of Hydra's own node in a command."""
    given = (hydra.get("overrides") or {}).get("hydra") or ()
    return [override for override in given if not override.startswith(("hydra.mode=", *without))]


def _swept(root: Path, jobs: Sequence[SweepJob]) -> dict[str, tuple[Any, ...]]:
    """What was given to the jobs and differs between them; for a job without it, the value in its config."""
    given = [dict(map(_parsed, _settings(job.overrides))) for job in jobs]
    swept = {}
    for key in dict.fromkeys(key for values in given for key in values):
        if len({json.dumps(values.get(key), default=str) for values in given}) == 1 and all(key in v for v in given):
            continue
        values = tuple(_value(root, job, key, of) for job, of in zip(jobs, given, strict=True))
        if len({json.dumps(value, default=str) for value in values}) > 1:
            swept[key] = values
    return swept


def _value(root: Path, job: SweepJob, key: str, given: Mapping[str, Any]) -> Any:
    """A job's value of a key: as given; from its config, if it was not given or given as a reference."""
    if key not in given:
        return _configured(root, job, key)
    value = given[key]
    if "${" not in json.dumps(value, default=str):
        return value
    referred = _configured(root, job, key)
    return value if referred is None else referred


@lru_cache(maxsize=4096)
def _parsed(override: str) -> tuple[str, Any]:
    """Key and typed value of an override.

    >>> _parsed("+model.hidden_dims=[20,'30']")
    ('model.hidden_dims', [20, '30'])
    """
    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, parsed.value()


def _configured(root: Path, job: SweepJob, key: str) -> Any:
    """The value of a key in a job's config, or the option of a group; None if only a running job can resolve it."""
    if job.folder is None:
        return None
    record = root / job.folder / ".hydra"
    option = _selected(_yaml(record / "hydra.yaml"), f"hydra.runtime.choices.{key}")
    return _selected(_yaml(record / "config.yaml"), key) if option is None else option


def _selected(config: Any, key: str) -> Any:
    """A value of a config, its references resolved; None if there is none, or it cannot be resolved."""
    try:
        value = OmegaConf.select(OmegaConf.create(config or {}), key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return None


def _in_order(job: SweepJob) -> tuple[bool, list[tuple[int, str]]]:
    """Sort key: numbers as numbers; jobs without a folder last."""
    parts = () if job.folder is None else job.folder.parts
    return job.folder is None, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _no_training(folder: Path, jobs: Sequence[SweepJob]) -> str:
    if not jobs:
        return (
            f"sweep={relative(folder)} contains no jobs: give the folder of a sweep (hydra.sweep.dir), or a folder "
            "above several sweeps"
        )
    return (
        f"sweep={relative(folder)} contains no training runs, but {by_task(jobs)}: task=report folder=DIR draws the "
        "results of each"
    )


def _yaml(path: Path) -> Any:
    """The content of a file that Hydra wrote, references unresolved; None if there is no file or a kill cut it off."""
    text = path.read_text() if path.exists() else ""
    if not text.endswith("\n"):
        return None
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException):
        return None


def _hydra_of(plan: Path) -> dict[str, Any]:
    """Hydra's part of a ``multirun.yaml``, empty if that is not complete."""
    found = _yaml(plan)
    hydra = found.get("hydra") if isinstance(found, dict) else None
    return hydra if isinstance(hydra, dict) and hydra.keys() >= {"sweep", "sweeper", "overrides", "runtime"} else {}
