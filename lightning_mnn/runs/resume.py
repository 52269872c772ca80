"""The state of a run: what an earlier process left in its folder, and how a new process uses it."""

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

# Keys that change no result, or only determine a run's place and start.
_INDIFFERENT = ("resume", "run_dir", "threads", "logger", "x", "y", "color", "band", "watch", "report", "figure")

# Callbacks that change results only by their class: a callback that must see every step changes how steps are bundled,
# and thus their rounding.
_CLASS_ONLY = ("checkpoint", "progress")

# Keys of the data that determine only where reproducible files are kept, and how fast they are read.
_INDIFFERENT_DATA = ("cache", "workers")

_RUN_FILES = ("metrics.csv", "summary.json", "checkpoints")


@dataclass(frozen=True)
class RunState:
    """What an earlier process left of a run.

    Attributes:
        plan: all that the results of the present command depend on.
        started: whether an earlier process started the run.
        checkpoint: the checkpoint from which to continue; None: start from the beginning.
        rows: number of rows that were logged up to the checkpoint.
        summary: the summary, if the run is finished.
        wandb_id: the run's name in W&B.
    """

    plan: dict[str, Any]
    started: bool = False
    checkpoint: Path | None = None
    rows: int = 0
    summary: dict[str, Any] | None = None
    wandb_id: str = field(default_factory=lambda: secrets.token_hex(4))


def run_state(cfg: DictConfig) -> RunState:
    """Read the state of a run from its folder, the same on every process; write nothing there.

    If ``resume`` finds nothing to resume, a line on standard error says so, unless :func:`run_folder` did.

    Raises:
        ValueError: the checkpoint was written by another callback.
        DamagedFileError: a file that is needed to resume was cut or changed.
        FileExistsError: the folder contains a run and ``resume`` is false, or a run that was started with a different
            configuration, or something else; the message names what differs.
    """
    run_dir = Path(cfg.run_dir)
    plan_now = _plan(cfg)
    if not any((run_dir / name).exists() for name in _RUN_FILES):  # plan.json alone: the run never started to train
        if cfg.resume and is_user_choice(run_dir):
            _print_new_run(run_dir)
        return _never_trained(run_dir, plan_now)
    if not (cfg.resume or was_requeued()):
        raise FileExistsError(
            f"{run_dir} already contains a run: choose another {folder_option()}, or continue it by resume=true"
        )
    if not (run_dir / "plan.json").exists():
        raise FileExistsError(
            f"{run_dir} contains a run without plan.json, which cannot be resumed: choose another {folder_option()}"
        )
    plan = _read_plan(run_dir)
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    if checkpoint.exists():  # the checkpoint from which the run started no longer matters
        plan["config"]["ckpt_path"] = plan_now["config"]["ckpt_path"]
    before, now = (found["versions"].get("lightning_mnn") for found in (plan, plan_now))
    if before != now:  # its config has other keys, too
        raise FileExistsError(
            f"{run_dir} was started by lightning_mnn {before}, and this is {now}: resume it with that version, or "
            f"choose another {folder_option()}"
        )
    if found := differences({key: plan[key] for key in plan_now}, plan_now):
        raise FileExistsError(
            f"{run_dir} was started with a different configuration: {found}: choose another {folder_option()}"
        )
    kept = RunState(plan_now, started=True, summary=_finished(run_dir), wandb_id=plan["wandb_id"])
    if kept.summary is not None or not checkpoint.exists():
        return kept
    rows = _logged_rows(checkpoint)
    if (run_dir / "metrics.csv").exists():
        ResumableCSVLogger(run_dir).check(rows)
    PatternStore(run_dir / "patterns.zarr").check()
    return replace(kept, checkpoint=checkpoint, rows=rows)


@rank_zero_only
def _print_new_run(run_dir: Path) -> None:
    sys.stderr.write(f"resume=true: nothing to resume in {run_dir}: starting a new run\n")


def _never_trained(run_dir: Path, plan_now: dict[str, Any]) -> RunState:
    """A new run; if its plan is the one in the folder, with the W&B name from there, which W&B may already have."""
    plan = _read_plan(run_dir) if (run_dir / "plan.json").exists() else {}
    if differences({key: plan.get(key) for key in plan_now}, plan_now):
        return RunState(plan_now)
    return RunState(plan_now, wandb_id=plan["wandb_id"])


def _read_plan(run_dir: Path) -> dict[str, Any]:
    needs = ("config", "versions", "wandb_id")
    return read_json(run_dir / "plan.json", needs, f"restore it, or choose another {folder_option()}")


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep other processes from working in a run folder until this process ends, even by kill -9.

    On a file system without locks, nothing is locked.

    Raises:
        FileExistsError: another process works there.
    """
    if getattr(rank_zero_only, "rank", 0) != 0 or not run_dir.is_dir():
        yield
        return
    with locked_if_free(run_dir / footprint.LOCK) as acquired:
        if not acquired:
            raise FileExistsError(
                f"another process works in {run_dir}: wait until it ends, or choose another {folder_option()}"
            )
        yield


@rank_zero_only
def initialise(cfg: DictConfig, found: RunState) -> None:
    """Write ``plan.json``; remove files that the run will write again."""
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
    """The config, with references unresolved, and the versions of the packages that compute.

    It must be called before anything is built: while Hydra builds objects, it replaces some references by values.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    config = {key: value for key, value in config.items() if key not in _INDIFFERENT}
    callbacks = config.get("callbacks") or {}
    classes = {key: {"_target_": (callbacks.get(key) or {}).get("_target_")} for key in _CLASS_ONLY}
    config["callbacks"] = callbacks | classes
    config["data"] = {key: value for key, value in (config.get("data") or {}).items() if key not in _INDIFFERENT_DATA}
    return {
        "config": config,
        "versions": {name: version(name) for name in ("lightning_mnn", "pytorch_lightning", "torch")},
    }


def _finished(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "summary.json"
    remedy = "delete it, and resume=true continues from the last checkpoint"
    summary = read_json(path, ("finished", "mse"), remedy) if path.exists() else {}
    return summary if summary.get("finished") else None


def _logged_rows(checkpoint: Path) -> int:
    state = read_checkpoint(checkpoint, f"delete it to start again, or choose another {folder_option()}")
    if "logged_rows" not in state:
        raise ValueError(
            f"{checkpoint} does not record what was logged: resume=true needs a checkpoint of "
            f"lightning_mnn.callbacks.LastCheckpoint; start from this one in another {folder_option()} by ckpt_path="
        )
    return int(state["logged_rows"])
