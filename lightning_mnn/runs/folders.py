"""The folder in which a command works: a new one, or with `resume=true` the newest that the same command started."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override
from yaml import YAMLError

from lightning_mnn.config.mistakes import UserError, explained, print_error, shown
from lightning_mnn.config.paths import hydra_path
from lightning_mnn.runs import footprint
from lightning_mnn.utilities.compat.hydra_internals import split_sweep
from lightning_mnn.utilities.files import write_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from omegaconf import DictConfig


_TIME = "%Y-%m-%d_%H-%M-%S-%f"  # start time, the name of a folder; names sort in the order of time

_RESULTS = ("metrics.csv", "checkpoints", "summary.json", "parts")  # a folder that contains any of these has results

# Errors from reading a file that Hydra was writing when it was killed.
_INCOMPLETE = (
    YAMLError,
    HydraException,
    OmegaConfBaseException,
    OSError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
)

_WITHOUT_FOLDER = ("report", "dashboard")  # tasks that remove their folder at once


def register_resolvers() -> None:
    """Register the resolvers ``${run_folder:…}`` and ``${record_folder:…}`` for configs.

    A config, its copies and those of a sweep's jobs keep the first result of ``run_folder``, as with Hydra's ``now``:
    it is not evaluated again when the folder exists.
    """
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("record_folder", record_folder, replace=True)


def run_folder(
    parent: str, resume: object, overrides: Sequence[str], mode: RunMode | None = None, task: str | None = None
) -> str:
    """The folder of a run or a sweep, named by its start time; it need not exist.

    Args:
        parent: parent of all such folders.
        resume: True: use the newest folder that the same command started, if there is one; a line on standard error
            names it.
        overrides: the command without its ``hydra.…`` overrides, as Hydra stores it.
        mode: MULTIRUN if a sweep evaluates a single run's folder, which it does not use.
        task: the task; some tasks leave nothing that could be resumed.

    >>> Path(run_folder("outputs/quickstart", resume=False, overrides=["seed=1"])).parent.as_posix()
    'outputs/quickstart'
    """
    new = Path(parent, datetime.now().strftime(_TIME))  # noqa: DTZ005 (local time, as in Hydra's folders)
    if resume is not True or mode is RunMode.MULTIRUN or task in _WITHOUT_FOLDER:
        return str(new)
    command = _essential(overrides)
    found = next((folder for folder in _newest_first(Path(parent)) if _started_by(folder) == command), None)
    if found is None:
        sys.stderr.write(f"resume=true: nothing in {parent} was started by this command: starting a new run in {new}\n")
        return str(new)
    sys.stderr.write(f"resume=true continues in {found}\n")
    return str(found)


def check_names(cfg: DictConfig) -> None:
    """Refuse values that would be misinterpreted or could not be written.

    Raises:
        UserError: ``resume`` is neither true nor false, or is set together with ``ckpt_path``; or ``name`` cannot be
            the name of a folder.
    """
    if not isinstance(cfg.resume, bool):
        raise UserError(f"resume={shown(cfg.resume)}: must be true or false: choose resume=true or leave it out")
    if cfg.resume and cfg.ckpt_path is not None:
        problem = "starts a new run, but resume=true continues from the run folder's own checkpoint"
        raise UserError(f"ckpt_path={cfg.ckpt_path}: {problem}: leave one of them out")
    name = "" if cfg.name is None else str(cfg.name)
    if name in ("", "..") or Path(name).name != name:
        raise UserError(
            f"name={shown(cfg.name)}: must be the name of one folder in outputs, without a slash: choose another, or "
            "set the whole path by hydra.run.dir"
        )


def folder_option() -> str:
    """The override that sets the present job's folder."""
    return "hydra.sweep.dir" if _in_sweep() else "hydra.run.dir"


def is_user_choice(run_dir: Path) -> bool:
    """Whether the present job's folder was named by the user or, for a single run, by the experiment; not by a time."""
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else ()
    named = any(option.startswith(f"{folder_option()}=") for option in given)
    return named or not (_in_sweep() or _is_time(run_dir.name))


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def record_folder(run_dir: str | None) -> str | None:
    """The subfolder of a run folder for Hydra's record of the command; None: keep the record that is there.

    If work has started in the folder, the record there identifies the command of that work: the present command may
    still be refused, and a kill may interrupt the writing.

    >>> record_folder(None)
    '.hydra'
    """
    folder = None if run_dir is None else Path(run_dir)
    kept = folder and (folder / ".hydra" / "overrides.yaml").exists() and _has_started(folder)
    return None if kept else ".hydra"


def sweep_record(folder: Path) -> Path:
    """The file with the command that started a sweep; it need not exist."""
    first = folder / "multirun.first.yaml"
    return first if first.exists() else folder / "multirun.yaml"


def jobs_of(hydra: Mapping[str, Any]) -> list[list[str]]:
    """The overrides of each job of a sweep, as Hydra's own sweeper makes them from the command.

    Empty if another sweeper chooses them, or the command does not determine them: ``glob(*)`` needs the program's
    configs.

    Args:
        hydra: the node ``hydra`` of a config, with references unresolved.
    """
    if not str(hydra["sweeper"]["_target_"]).endswith("BasicSweeper"):
        return []
    given = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
    try:
        return split_sweep([*given, *hydra["overrides"]["task"]])
    except HydraException:
        return []


class RunFolderCallback(Callback):
    """Runs before Hydra makes or changes any folder: checks the names, and keeps the record by which a sweep is found.

    When Hydra is about to write another record into the folder of a sweep, the existing record may be replaced only if
    no job has started, or if jobs are only added at the end. Otherwise ``multirun.yaml`` is kept as
    ``multirun.first.yaml``, because all jobs of the new command may be refused.

    Raises:
        SystemExit: a value is refused by :func:`check_names`.
    """

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with refusals():
            check_names(config)
            footprint.begin(hydra_path(config, "run.dir"), is_sweep=False)

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with refusals():
            check_names(config)
            footprint.begin(hydra_path(config, "sweep.dir"), is_sweep=True)
        try:
            record = sweep_record(Path(config.hydra.sweep.dir))
            if not record.exists():
                return
            before, now = _plan(OmegaConf.load(record)), _plan(config)
        except _INCOMPLETE:  # or an error that Hydra meets next, and reports
            return
        if now[: len(before)] == before:
            if record.name != "multirun.yaml":
                record.replace(record.with_name("multirun.yaml"))
        elif record.name == "multirun.yaml" and any(path.name in _RESULTS for path in record.parent.rglob("*")):
            write_bytes(record.with_name("multirun.first.yaml"), record.read_bytes())


@contextmanager
def refusals() -> Iterator[None]:
    """End the process with one line if a command is refused: Hydra turns exceptions of a callback into warnings."""
    try:
        yield
    except (UserError, OmegaConfBaseException) as error:
        print_error(explained(error) or str(error))
        sys.exit(1)


def _plan(config: Any) -> list[list[str]]:
    """The essential overrides of each job of a sweep; if the jobs cannot be determined, of the command as one job."""
    hydra: dict[str, Any] = OmegaConf.to_container(config.hydra, resolve=False)  # type: ignore[assignment]
    jobs = [sorted(one for one in job if one.split("=", 1)[0].lstrip("+") != "resume") for job in jobs_of(hydra)]
    return jobs or [_essential(hydra["overrides"]["task"])]


def _has_started(folder: Path) -> bool:
    return any((folder / name).exists() for name in _RESULTS)


def _newest_first(parent: Path) -> Iterable[Path]:
    folders = parent.iterdir() if parent.is_dir() else ()
    return sorted((folder for folder in folders if _is_time(folder.name)), reverse=True)


def _is_time(name: str) -> bool:
    try:
        datetime.strptime(name, _TIME)  # noqa: DTZ007 (the time is only parsed)
    except ValueError:
        return False
    return True


def _started_by(folder: Path) -> list[str] | None:
    """The command that started a run or a sweep; None: it is not known."""
    sweep, run = sweep_record(folder), folder / ".hydra" / "overrides.yaml"
    try:
        if sweep.exists():
            return _essential(OmegaConf.select(OmegaConf.load(sweep), "hydra.overrides.task"))
        if run.exists() or not _has_started(folder):
            return _essential(OmegaConf.load(run)) if run.exists() else None
    except _INCOMPLETE:
        pass
    option = "hydra.sweep.dir" if sweep.exists() else "hydra.run.dir"
    sys.stderr.write(f"{folder} does not record which command started it: resume it with {option}={folder}\n")
    return None


def _essential(overrides: Any) -> list[str]:
    """The overrides that identify a command, as they are written: without ``resume``, sorted by key.

    Swept overrides keep their order, because it numbers the jobs. Repeated overrides of a key keep theirs, because the
    last one counts.
    """
    written = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_config(overrides) else overrides
    parsed = OverridesParser.create().parse_overrides([str(one) for one in written])  # type: ignore[union-attr]
    swept = {one.key_or_group for one in parsed if one.is_sweep_override()}
    kept = [one for one in parsed if one.key_or_group != "resume"]
    kept.sort(key=lambda one: "" if one.key_or_group in swept else one.key_or_group)
    return [str(one.input_line) for one in kept]


def remove_job_folder(run_dir: Path) -> None:
    """Remove the folder that Hydra made for this job, and empty folders above it, unless anything else is in it."""
    if not HydraConfig.initialized():
        return
    config = HydraConfig.get()
    record, log = run_dir / (config.output_subdir or ""), run_dir / f"{config.job.name}.log"
    own = {log, *(record / f"{name}.yaml" for name in ("config", "hydra", "overrides"))}
    if set(run_dir.rglob("*")) - own - {record} or (log.exists() and log.stat().st_size):
        return
    for path in own:
        path.unlink(missing_ok=True)
    above = [parent for parent in run_dir.parents if parent.is_relative_to(Path.cwd())]
    for empty in dict.fromkeys((record, run_dir, *above)):
        if empty == Path.cwd() or any(empty.iterdir()):
            return
        empty.rmdir()
