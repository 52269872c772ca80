"""In which folder a command works: a new one, or with `resume=true` the newest that the same command began."""

from __future__ import annotations

import shutil
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
from lightning_mnn.runs import footprint
from lightning_mnn.utilities.compat.hydra_internals import split_sweep

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from omegaconf import DictConfig


_TIME = "%Y-%m-%d_%H-%M-%S-%f"  # of the beginning: a folder's name; names sort as times do

_BEGUN = ("metrics.csv", "checkpoints", "summary.json", "parts")  # any of which tells a folder with results

# Raised by what a kill has torn as Hydra wrote it.
_TORN = (YAMLError, HydraException, OmegaConfBaseException, OSError, TypeError, ValueError, LookupError, AttributeError)

_WITHOUT_FOLDER = ("report", "dashboard")  # tasks that remove it at once


def register_resolvers() -> None:
    """Let configs say ``${run_folder:…}`` and ``${record_folder:…}``.

    A config, its copies and those of a sweep's jobs keep what ``run_folder`` answered first, as they do of Hydra's
    ``now``: nobody looks again when the folder is there.
    """
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("record_folder", record_folder, replace=True)


def run_folder(
    parent: str, resume: object, overrides: Sequence[str], mode: RunMode | None = None, task: str | None = None
) -> str:
    """The folder of a run or a sweep, named by the time at which it was begun; it need not exist.

    Args:
        parent: of all such folders.
        resume: True: the newest that the same command began, if there is one; on standard error a line says which.
        overrides: the command but for ``hydra.…``, as Hydra keeps it.
        mode: MULTIRUN where a single run's folder is asked for in a sweep, which makes no use of it.
        task: what is to be done there; some tasks leave nothing that could be gone on with.

    >>> Path(run_folder("outputs/quickstart", resume=False, overrides=["seed=1"])).parent.as_posix()
    'outputs/quickstart'
    """
    new = Path(parent, datetime.now().strftime(_TIME))  # noqa: DTZ005 (the clock on the wall, as of Hydra's folders)
    if resume is not True or mode is RunMode.MULTIRUN or task in _WITHOUT_FOLDER:
        return str(new)
    asked = _essential(overrides)
    found = next((folder for folder in _newest_first(Path(parent)) if _started_by(folder) == asked), None)
    if found is None:
        sys.stderr.write(f"resume=true: nothing in {parent} was begun by this command: it begins in {new}\n")
        return str(new)
    sys.stderr.write(f"resume=true goes on in {found}\n")
    return str(found)


def check_names(cfg: DictConfig) -> None:
    """Refuse what would be taken for something else, or could not be written.

    Raises:
        UserError: ``resume`` is neither true nor false, or together with ``ckpt_path``; or ``name`` cannot be the name
            of a folder.
    """
    if not isinstance(cfg.resume, bool):
        raise UserError(f"resume={shown(cfg.resume)}: must be true or false: choose resume=true or leave it out")
    if cfg.resume and cfg.ckpt_path is not None:
        problem = "is where a new run begins, and resume=true goes on from the run folder's own checkpoint"
        raise UserError(f"ckpt_path={cfg.ckpt_path}: {problem}: leave one of them out")
    name = "" if cfg.name is None else str(cfg.name)
    if name in ("", "..") or Path(name).name != name:
        raise UserError(
            f"name={shown(cfg.name)}: must be that of one folder in outputs, without a slash: choose another, or give "
            "the whole path by hydra.run.dir"
        )


def folder_option() -> str:
    """The override that gives the present job another folder."""
    return "hydra.sweep.dir" if _in_sweep() else "hydra.run.dir"


def is_user_choice(run_dir: Path) -> bool:
    """Whether the present job's folder is one that the user named, or of a single run an experiment, by no time."""
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else ()
    named = any(option.startswith(f"{folder_option()}=") for option in given)
    return named or not (_in_sweep() or _is_time(run_dir.name))


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def record_folder(run_dir: str | None) -> str | None:
    """The folder, in that of a run, of what Hydra writes of the command; None: the record there is to stay.

    Where work has begun, it says by which command: another one may be refused, and a kill may tear what is written.

    >>> record_folder(None)
    '.hydra'
    """
    folder = None if run_dir is None else Path(run_dir)
    kept = folder and (folder / ".hydra" / "overrides.yaml").exists() and _has_started(folder)
    return None if kept else ".hydra"


def sweep_record(folder: Path) -> Path:
    """The file that says by which command a sweep was begun; it need not exist."""
    first = folder / "multirun.first.yaml"
    return first if first.exists() else folder / "multirun.yaml"


def jobs_of(hydra: Mapping[str, Any]) -> list[list[str]]:
    """The overrides of each job of a sweep, as Hydra's own sweeper makes them of the command.

    Empty where another sweeper chooses them, or the command does not say: ``glob(*)`` needs the configs of the program.

    Args:
        hydra: the node ``hydra`` of a config, with references as they are written.
    """
    if not str(hydra["sweeper"]["_target_"]).endswith("BasicSweeper"):
        return []
    given = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
    try:
        return split_sweep([*given, *hydra["overrides"]["task"]])
    except HydraException:
        return []


class RunFolderCallback(Callback):
    """What is done before Hydra makes or changes any folder.

    Where Hydra is about to write another record into the folder of a sweep, it keeps the one by which the sweep is
    found. That may change as long as no job has begun, and as jobs are added at the end; otherwise ``multirun.yaml``
    is kept as ``multirun.first.yaml``: the new command's jobs may all be refused.

    Raises:
        SystemExit: a value is refused by :func:`check_names`.
    """

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _refusals():
            check_names(config)
            footprint.begin(_resolved(config, "hydra.run.dir"), is_sweep=False)

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _refusals():
            check_names(config)
            footprint.begin(_resolved(config, "hydra.sweep.dir"), is_sweep=True)
        try:
            record = sweep_record(Path(config.hydra.sweep.dir))
            if not record.exists():
                return
            before, now = _plan(OmegaConf.load(record)), _plan(config)
        except _TORN:  # or what Hydra meets next, and tells
            return
        if now[: len(before)] == before:
            if record.name != "multirun.yaml":
                record.replace(record.with_name("multirun.yaml"))
        elif record.name == "multirun.yaml" and any(path.name in _BEGUN for path in record.parent.rglob("*")):
            unfinished = record.with_name("multirun.first.yaml.tmp")
            shutil.copyfile(record, unfinished)
            unfinished.replace(record.with_name("multirun.first.yaml"))


def _resolved(config: DictConfig, key: str) -> Path:
    """A path of Hydra's own node, which may depend on what Hydra knows of the run."""
    hydra_config = HydraConfig.instance()
    before = hydra_config.cfg
    try:
        hydra_config.set_config(config)
        return Path(str(OmegaConf.select(config, key)))
    finally:
        hydra_config.cfg = before


@contextmanager
def _refusals() -> Iterator[None]:
    """End the process with a line where a command is refused: Hydra makes warnings of a callback's exceptions."""
    try:
        yield
    except (UserError, OmegaConfBaseException) as error:
        print_error(explained(error) or str(error))
        sys.exit(1)


def _plan(config: Any) -> list[list[str]]:
    """What each job of a sweep is known by; where that cannot be told what the command is, as if it were one job."""
    hydra: dict[str, Any] = OmegaConf.to_container(config.hydra, resolve=False)  # type: ignore[assignment]
    jobs = [sorted(one for one in job if one.split("=", 1)[0].lstrip("+") != "resume") for job in jobs_of(hydra)]
    return jobs or [_essential(hydra["overrides"]["task"])]


def _has_started(folder: Path) -> bool:
    return any((folder / name).exists() for name in _BEGUN)


def _newest_first(parent: Path) -> Iterable[Path]:
    folders = parent.iterdir() if parent.is_dir() else ()
    return sorted((folder for folder in folders if _is_time(folder.name)), reverse=True)


def _is_time(name: str) -> bool:
    try:
        datetime.strptime(name, _TIME)  # noqa: DTZ007 (read, and not used)
    except ValueError:
        return False
    return True


def _started_by(folder: Path) -> list[str] | None:
    """By which command a run or a sweep was begun; None: that is not known."""
    sweep, run = sweep_record(folder), folder / ".hydra" / "overrides.yaml"
    try:
        if sweep.exists():
            return _essential(OmegaConf.select(OmegaConf.load(sweep), "hydra.overrides.task"))
        if run.exists() or not _has_started(folder):
            return _essential(OmegaConf.load(run)) if run.exists() else None
    except _TORN:
        pass
    option = "hydra.sweep.dir" if sweep.exists() else "hydra.run.dir"
    sys.stderr.write(f"{folder} does not say which command began it: {option}={folder} goes on there\n")
    return None


def _essential(overrides: Any) -> list[str]:
    """Those that a command is known by, as they are written: without ``resume``, in one order.

    What is swept stays in the order that numbers the jobs, and what is given for a key again, where the last counts.
    """
    written = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_config(overrides) else overrides
    parsed = OverridesParser.create().parse_overrides([str(one) for one in written])  # type: ignore[union-attr]
    swept = {one.key_or_group for one in parsed if one.is_sweep_override()}
    kept = [one for one in parsed if one.key_or_group != "resume"]
    kept.sort(key=lambda one: "" if one.key_or_group in swept else one.key_or_group)
    return [str(one.input_line) for one in kept]


def remove_job_folder(run_dir: Path) -> None:
    """Remove the folder that Hydra made for this job, and empty ones above it, unless anything else is in it."""
    if not HydraConfig.initialized():
        return
    config = HydraConfig.get()
    notes, log = run_dir / (config.output_subdir or ""), run_dir / f"{config.job.name}.log"
    own = {log, *(notes / f"{name}.yaml" for name in ("config", "hydra", "overrides"))}
    if set(run_dir.rglob("*")) - own - {notes} or (log.exists() and log.stat().st_size):
        return
    for path in own:
        path.unlink(missing_ok=True)
    above = [parent for parent in run_dir.parents if parent.is_relative_to(Path.cwd())]
    for empty in dict.fromkeys((notes, run_dir, *above)):
        if empty == Path.cwd() or any(empty.iterdir()):
            return
        empty.rmdir()
