"""The command ``lightning-mnn``: compose a config and run its task."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from lightning_mnn.config.choices import drop_arguments_of_other_names
from lightning_mnn.config.mistakes import UserError, explained, nearest, one_line, print_error
from lightning_mnn.runs import footprint
from lightning_mnn.runs.folders import check_names, register_resolvers
from lightning_mnn.runs.quiet import quieten
from lightning_mnn.sweeps import ending
from lightning_mnn.tasks import TASKS
from lightning_mnn.utilities.compat.hydra_internals import errors_told_by
from lightning_mnn.utilities.compat.wandb_internals import IMPORTED_WHEN_A_RUN_STARTS

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What jobs of a sweep will import, for hydra/launcher=device_pool, which imports it once for all of them.
__preload__ = (
    *("lightning_mnn.tasks.train", "lightning_mnn.launchers.jobs.progress"),
    *("lightning_mnn.data", "lightning_mnn.model.mnn"),
    *("wandb", *IMPORTED_WHEN_A_RUN_STARTS, "PIL.PngImagePlugin", "requests"),
)

register_resolvers()


def main() -> None:
    """Run the command line. A user's mistake gives one line on standard error and leaves no files behind."""
    try:
        with errors_told_by(_print_mistake, _print_usage):
            compose_and_run()
    except Exception as error:
        if not _print_mistake(error):
            raise
        sys.exit(1)
    finally:
        if sys.exc_info()[0] is not None:
            footprint.remove()
        footprint.keep()
        ending.finish(sys.exc_info()[1])


@hydra.main(version_base="1.3", config_path="pkg://lightning_mnn.conf", config_name="config")
def compose_and_run(cfg: DictConfig) -> float | None:
    """Run the task of a composed config and return its objective, which a sweeper can optimise."""
    quieten()
    atexit.register(gc.freeze)  # else garbage collection at exit takes 1.5 s
    try:
        return run(cfg)
    except Exception as error:
        in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        line = explained(error, cfg, HydraConfig.get().overrides.task)
        if line is None and not (in_sweep or footprint.is_kept()):  # no work was done yet: the command is wrong
            line = f"{type(error).__name__}: {one_line(str(error))} (HYDRA_FULL_ERROR=1 shows the traceback)"
        if line is None or _wants_traceback():
            raise
        if in_sweep:  # Hydra and the launchers report which job failed
            raise UserError(line) from error
        print_error(line)
        sys.exit(1)  # Hydra prints a comment after an exception, but not after this


def run(cfg: DictConfig) -> float | None:
    """Run ``cfg.task``: the function of that name in :mod:`lightning_mnn.tasks`.

    Raises:
        ValueError: there is no such task, or ``resume`` or ``name`` has an invalid value.
    """
    check_names(cfg)
    drop_arguments_of_other_names(cfg)
    if cfg.task not in TASKS:
        near = "|".join(dict.fromkeys([*nearest(str(cfg.task), TASKS, 1), *TASKS]))
        raise UserError(f"task={cfg.task}: there is no such task: choose task={near}")
    module = importlib.import_module(f"lightning_mnn.tasks.{cfg.task}")
    objective: float | None = getattr(module, cfg.task)(cfg)
    return objective


def _print_mistake(error: Exception) -> bool:
    """Print one line for an error that is a user's mistake; return whether it was one and should have no traceback."""
    line = explained(error, command=sys.argv[1:])
    if line is None or _wants_traceback():
        return False
    print_error(line)
    return True


def _print_usage(problem: str) -> NoReturn:
    print_error(f"{problem}: write lightning-mnn [-m] [KEY=VALUE ...]; see lightning-mnn --help")
    sys.exit(2)


def _wants_traceback() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR", "0") == "1"


if __name__ == "__main__":
    main()
