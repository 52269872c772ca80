"""The command ``lightning-mnn``: compose a config and run its task."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import pkgutil
import sys
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from lightning_mnn.tasks._folders import check_names, register_resolvers
from lightning_mnn.tasks._quiet import quieten

if TYPE_CHECKING:
    from omegaconf import DictConfig

register_resolvers()


@hydra.main(version_base="1.3", config_path="pkg://lightning_mnn.conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the task of a composed config; a sweeper optimises what it returns."""
    quieten()
    atexit.register(gc.freeze)  # or the interpreter ends by a search of all modules for garbage, which takes 1.5 s
    try:
        return run(cfg)
    except (ValueError, OSError, ArithmeticError, OmegaConfBaseException) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN or "HYDRA_FULL_ERROR" in os.environ:
            raise  # Hydra notes which job failed, and shows where
        sys.exit(f"error: {error}\n(HYDRA_FULL_ERROR=1 shows where it was raised)")


def run(cfg: DictConfig) -> float | None:
    """Run ``cfg.task``: the function of that name in :mod:`lightning_mnn.tasks`.

    Raises:
        ValueError: there is no such task, or ``resume`` or ``name`` is no value for them.
    """
    check_names(cfg)
    tasks = importlib.import_module("lightning_mnn.tasks")
    known = sorted(m.name for m in pkgutil.iter_modules(tasks.__path__) if not m.name.startswith("_"))
    if cfg.task not in known:
        raise ValueError(f"task must be one of {known}, got {cfg.task!r}")
    module = importlib.import_module(f"lightning_mnn.tasks.{cfg.task}")
    objective: float | None = getattr(module, cfg.task)(cfg)
    return objective


if __name__ == "__main__":
    main()
