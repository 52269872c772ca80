"""Where a run stands: what an earlier process left of it in its folder, and what a new one does with that."""

from __future__ import annotations

import secrets
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from lightning_mnn.callbacks import PatternStore
from lightning_mnn.loggers.csv_logs import ResumableCSVLogger
from lightning_mnn.runs import footprint
from lightning_mnn.runs.checkpoints import read_checkpoint
from lightning_mnn.runs.folders import folder_option, is_user_choice
from lightning_mnn.runs.processes.requeue import was_requeued
from lightning_mnn.utilities.files import differences, locked_if_free, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from omegaconf import DictConfig

# Keys that change no result, or that say where a run is and how it was started.
_INDIFFERENT = ("resume", "run_dir", "threads", "logger")

# Callbacks that change no result but by their class: one that is to see every step changes how steps are computed
# together, and with it their rounding.
_CLASS_ALONE = ("checkpoint", "progress")

# Of the data, where files are kept that can be made anew, and how fast they are.
_INDIFFERENT_DATA = ("cache", "workers")

_RESULTS = ("metrics.csv", "summary.json", "checkpoints")


@dataclass(frozen=True)
class RunState:
    """What an earlier process left of a run.

    Attributes:
        plan: all that the run's results depend on, as it is asked for now.
        begun: whether there was one.
        checkpoint: from which to go on; None: from the beginning.
        rows: that were logged up to the checkpoint.
        summary: of a run that is finished.
        wandb_id: the run's name in W&B.
    """

    plan: dict[str, Any]
    started: bool = False
    checkpoint: Path | None = None
    rows: int = 0
    summary: dict[str, Any] | None = None
    wandb_id: str = field(default_factory=lambda: secrets.token_hex(4))


def run_state(cfg: DictConfig) -> RunState:
    """Look at the run folder, the same on every process, and write nothing there.

    Where ``resume`` finds nothing to go on with, a line on standard error says so, if none did.

    Raises:
        ValueError: a checkpoint that another callback wrote.
        DamagedFileError: a file that the run goes on with was cut or changed.
        FileExistsError: the folder holds a run and ``resume`` is false, or one that was begun otherwise, or something
            else; the message names what differs.
    """
    run_dir = Path(cfg.run_dir)
    asked = _plan(cfg)
    if not any((run_dir / name).exists() for name in _RESULTS):  # a plan alone is of a run that never came to train
        if cfg.resume and is_user_choice(run_dir):
            _print_beginning(run_dir)
        return _never_trained(run_dir, asked)
    if not (cfg.resume or was_requeued()):
        raise FileExistsError(
            f"{run_dir} already holds a run: choose another {folder_option()}, or go on with this one by resume=true"
        )
    if not (run_dir / "plan.json").exists():
        raise FileExistsError(
            f"{run_dir} holds a run without plan.json, which cannot be gone on with: choose another {folder_option()}"
        )
    plan = _read_plan(run_dir)
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    if checkpoint.exists():  # what the run began with is past
        plan["config"]["ckpt_path"] = asked["config"]["ckpt_path"]
    if found := differences({key: plan[key] for key in asked}, asked):
        raise FileExistsError(f"{run_dir} was begun otherwise: {found}: choose another {folder_option()}")
    kept = RunState(asked, started=True, summary=_finished(run_dir), wandb_id=plan["wandb_id"])
    if kept.summary is not None or not checkpoint.exists():
        return kept
    rows = _logged_rows(checkpoint)
    if (run_dir / "metrics.csv").exists():
        ResumableCSVLogger(run_dir).check(rows)
    PatternStore(run_dir / "patterns.zarr").check()
    return replace(kept, checkpoint=checkpoint, rows=rows)


@rank_zero_only
def _print_beginning(run_dir: Path) -> None:
    sys.stderr.write(f"resume=true: nothing in {run_dir} to go on with: it begins\n")


def _never_trained(run_dir: Path, asked: dict[str, Any]) -> RunState:
    """A new run; if it is the one that was planned here, under the name that W&B may have of it already."""
    plan = _read_plan(run_dir) if (run_dir / "plan.json").exists() else {}
    if differences({key: plan.get(key) for key in asked}, asked):
        return RunState(asked)
    return RunState(asked, wandb_id=plan["wandb_id"])


def _read_plan(run_dir: Path) -> dict[str, Any]:
    needs = ("config", "versions", "wandb_id")
    return read_json(run_dir / "plan.json", needs, f"restore it, or choose another {folder_option()}")


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in a run folder meanwhile, until this one's end, be it by kill -9.

    Where the file system has no locks, nothing is kept.

    Raises:
        FileExistsError: one is at it.
    """
    if getattr(rank_zero_only, "rank", 0) != 0 or not run_dir.is_dir():
        yield
        return
    with locked_if_free(run_dir / footprint.LOCK) as alone:
        if not alone:
            raise FileExistsError(
                f"another process trains in {run_dir}: await its end, or choose another {folder_option()}"
            )
        yield


@rank_zero_only
def initialise(cfg: DictConfig, found: RunState) -> None:
    """Write ``plan.json``; clear away what the run will write again."""
    run_dir = Path(cfg.run_dir)
    if not found.started:
        write_json(run_dir / "plan.json", {"wandb_id": found.wandb_id, **found.plan})
        footprint.keep()
        return
    footprint.keep()
    (run_dir / "summary.json").unlink(missing_ok=True)
    if found.checkpoint is None:
        (run_dir / "metrics.csv").unlink(missing_ok=True)
        for name in ("patterns.zarr", "patterns.zarr.tmp"):
            shutil.rmtree(run_dir / name, ignore_errors=True)


def _plan(cfg: DictConfig) -> dict[str, Any]:
    """The config, with references as they are written, and the versions of what computes.

    It is asked for before anything is built: Hydra puts values in the place of some references as it builds.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    config = {key: value for key, value in config.items() if key not in _INDIFFERENT}
    callbacks = config.get("callbacks") or {}
    classes = {key: {"_target_": (callbacks.get(key) or {}).get("_target_")} for key in _CLASS_ALONE}
    config["callbacks"] = callbacks | classes
    config["data"] = {key: value for key, value in (config.get("data") or {}).items() if key not in _INDIFFERENT_DATA}
    return {
        "config": config,
        "versions": {name: version(name) for name in ("lightning_mnn", "pytorch_lightning", "torch")},
    }


def _finished(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "summary.json"
    remedy = "delete it, and resume=true goes on from the last checkpoint"
    summary = read_json(path, ("finished", "mse"), remedy) if path.exists() else {}
    return summary if summary.get("finished") else None


def _logged_rows(checkpoint: Path) -> int:
    state = read_checkpoint(checkpoint, f"delete it to begin anew, or choose another {folder_option()}")
    if "logged_rows" not in state:
        raise ValueError(
            f"{checkpoint} does not say what was logged: resume=true goes on from checkpoints of "
            f"lightning_mnn.callbacks.LastCheckpoint; begin from this one in another {folder_option()} by ckpt_path="
        )
    return int(state["logged_rows"])
