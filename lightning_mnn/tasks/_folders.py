"""In which folder a command works: a new one, or with `resume=true` the newest that the same command began."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from yaml import YAMLError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_TIME = "%Y-%m-%d_%H-%M-%S-%f"  # of the beginning: a folder's name; names sort as times do
_TRAINED = ("metrics.csv", "checkpoints")


def register_resolvers() -> None:
    """Let configs say ``${run_folder:…}`` and ``${record_folder:…}``.

    A config, its copies and those of a sweep's jobs keep what ``run_folder`` answered first, as they do of Hydra's
    ``now``: nobody looks again when the folder is there.
    """
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("record_folder", record_folder, replace=True)


def run_folder(parent: str, resume: object, overrides: Sequence[str], mode: RunMode | None = None) -> str:
    """The folder of a run or a sweep, named by the time at which it was begun; it need not exist.

    Args:
        parent: of all such folders.
        resume: True: the newest that the same command began, if there is one; on standard error a line says which.
        overrides: the command but for ``hydra.…``, as Hydra keeps it.
        mode: MULTIRUN where a single run's folder is asked for in a sweep, which makes no use of it.

    >>> Path(run_folder("outputs/quickstart", resume=False, overrides=["seed=1"])).parent.as_posix()
    'outputs/quickstart'
    """
    new = Path(parent, datetime.now().strftime(_TIME))  # noqa: DTZ005 (the clock on the wall, as of Hydra's folders)
    if resume is not True or mode is RunMode.MULTIRUN:
        return str(new)
    asked = _essential(overrides)
    found = next((folder for folder in _newest_first(Path(parent)) if _begun_by(folder) == asked), None)
    if found is None:
        sys.stderr.write(f"resume=true: nothing in {parent} was begun by this command: it begins in {new}\n")
        return str(new)
    sys.stderr.write(f"resume=true goes on in {found}\n")
    return str(found)


def record_folder(run_dir: str | None) -> str | None:
    """The folder, in that of a run, of what Hydra writes of the command; None: the record there is to stay.

    Where training has begun, it says by which command: another one may be refused, and a kill may tear what is written.

    >>> record_folder(None)
    '.hydra'
    """
    folder = None if run_dir is None else Path(run_dir)
    kept = folder and (folder / ".hydra" / "overrides.yaml").exists() and any((folder / n).exists() for n in _TRAINED)
    return None if kept else ".hydra"


def _newest_first(parent: Path) -> Iterable[Path]:
    folders = parent.iterdir() if parent.is_dir() else ()
    return sorted((folder for folder in folders if _is_time(folder.name)), reverse=True)


def _is_time(name: str) -> bool:
    try:
        datetime.strptime(name, _TIME)  # noqa: DTZ007 (read, and not used)
    except ValueError:
        return False
    return True


def _begun_by(folder: Path) -> list[str] | None:
    """By which command a run or a sweep was begun; None: that is not known."""
    sweep, run = folder / "multirun.yaml", folder / ".hydra" / "overrides.yaml"
    try:
        if sweep.exists():
            return _essential(OmegaConf.select(OmegaConf.load(sweep), "hydra.overrides.task"))
        return _essential(OmegaConf.load(run)) if run.exists() else None
    except (YAMLError, HydraException, TypeError, ValueError):  # torn by a kill, as Hydra writes it
        option = "hydra.sweep.dir" if sweep.exists() else "hydra.run.dir"
        sys.stderr.write(f"{folder} does not say which command began it: {option}={folder} goes on there\n")
        return None


def _essential(overrides: Any) -> list[str]:
    """Those that a command is known by: without ``resume``, in one order, but what is swept in that of the jobs."""
    parsed = OverridesParser.create().parse_overrides([str(override) for override in overrides])
    kept = [override for override in parsed if override.key_or_group != "resume"]
    kept.sort(key=lambda override: "" if override.is_sweep_override() else str(override.input_line))
    return [str(override.input_line) for override in kept]
