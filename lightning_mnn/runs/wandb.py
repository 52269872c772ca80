"""A run in W&B: its name, its settings and its results there."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console

from lightning_mnn.launchers.jobs.records import read_record
from lightning_mnn.loggers.media import log_table
from lightning_mnn.loggers.wandb import ResumableWandbLogger
from lightning_mnn.utilities.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SUMMARY_RECORD = "wandb_summary.json"  # in a folder: id of its summary run, how often and what it logged

# Keys for a run's place and start, for other tasks, and those that other keys only refer to.
_NO_SETTINGS = (
    "run_dir",
    "logger",
    "resume",
    "folder",
    "sweep",
    "x",
    "y",
    "color",
    "band",
    "watch",
    "report",
    "figure",
    "dry_run",
    "dashboard",
    "row",
    "table_1",
)

# Overrides that a run's name leaves out.
_NOT_IN_NAME = (*_NO_SETTINGS, "experiment", "name", "task", "threads", "ckpt_path", "data.root", "data.cache")

_LONGEST_NAME = 120  # characters; W&B accepts 128
_LONGEST_TAG = 64


def is_wandb(node: DictConfig) -> bool:
    """Whether a config node is a W&B logger."""
    return str(node["_target_"]).endswith("WandbLogger")


def wandb_options(cfg: DictConfig, node: DictConfig, wandb_id: str) -> dict[str, Any]:
    """Missing options of a W&B logger's node: ``id``, ``name``, ``group``; additional ``tags``; the config to show.

    A run is named by its experiment and overrides; in a sweep also by its job's number, and it is grouped by the
    sweep's folder. Tags are cut to the length that W&B accepts.
    """
    choices = HydraConfig.get().runtime.choices
    own = {
        "id": None if node.get("version") else wandb_id,
        "name": _run_name(
            cfg.name if (job := _job()) is None else f"{cfg.name} {job}", HydraConfig.get().overrides.task
        ),
        "group": _group(cfg.name),
    }
    shown = {"run_config": wandb_settings(cfg, choices)} if is_resumable(node) else {}
    given = node.get("tags") or ()
    tags = [*([given] if isinstance(given, str) else given), cfg.name, choices.get("data")]
    return (
        shown
        | {key: value for key, value in own.items() if node.get(key) is None}
        | {"tags": list(dict.fromkeys(_cut(str(tag), _LONGEST_TAG) for tag in tags if tag))}
    )


def only_known(node: DictConfig) -> DictConfig:
    """A W&B logger's node without arguments that its class does not have.

    >>> only_known(OmegaConf.create({"_target_": "pytorch_lightning.loggers.WandbLogger", "best": {}, "project": "p"}))
    {'_target_': 'pytorch_lightning.loggers.WandbLogger', 'project': 'p'}
    """
    if not is_wandb(node) or is_resumable(node):
        return node
    kept = node.copy()
    with open_dict(kept):
        kept.pop("best", None)
    return kept


def is_resumable(node: DictConfig) -> bool:
    """Whether a config node is the W&B logger of this package."""
    return str(node["_target_"]).endswith("ResumableWandbLogger")


def wandb_settings(cfg: DictConfig, choices: Mapping[str, Any]) -> dict[str, Any]:
    """The config in a form for sorting and filtering runs: nested, resolved, each setting once.

    Left out are classes (the ``name`` of a group is the chosen option), paths in the run folder, and references to a
    top-level key of the same name, such as ``model.seed: ${seed}``.

    >>> cfg = OmegaConf.create({"seed": 3, "run_dir": "a/b", "model": {"_target_": "M", "seed": "${seed}", "width": 2}})
    >>> wandb_settings(cfg, {"model": "mnn"})
    {'seed': 3, 'model': {'name': 'mnn', 'width': 2}}
    """
    settings: dict[str, Any] = {}
    for key in (str(key) for key in cfg if key not in _NO_SETTINGS):
        settings[key] = value = _plain(cfg, key, str(cfg.get("run_dir")))
        if isinstance(value, dict) and "_target_" in cfg[key] and isinstance(choices.get(key), str):
            settings[key] = {"name": choices[key]} | value
    return {key: value for key, value in settings.items() if value != {}}


def _plain(parent: DictConfig | ListConfig, key: Any, run_dir: str) -> Any:
    """A value as plain data."""
    node = parent[key]
    if isinstance(node, ListConfig):
        return [_plain(node, i, run_dir) for i in range(len(node))]
    if not isinstance(node, DictConfig):
        return node
    kept = {
        str(name): _plain(node, name, run_dir)
        for name in node
        if name != "_target_" and not _is_copy(node, name) and not str(node[name]).startswith(run_dir)
    }
    return {name: value for name, value in kept.items() if value != {}}


def _is_copy(node: DictConfig, name: Any) -> bool:
    written: Any = OmegaConf.to_container(node, resolve=False)
    return bool(written[name] == f"${{{name}}}")


def verdicts(summary: dict[str, Any], measures: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """A run's measures as a table with a row per replica: its columns and rows.

    >>> verdicts({"replicas": 2, "seed": 5, "mse": [0.25, 0.5], "mce": None}, ["mse", "mce"])
    (['replica', 'seed', 'mse', 'mce'], [[0, 5, 0.25, None], [1, 6, 0.5, None]])
    """
    several = summary["replicas"] > 1

    def measured(name: str, replica: int) -> Any:
        value = summary.get(name)
        return value[replica] if several and isinstance(value, list) else value

    rows = [[r, summary["seed"] + r, *(measured(m, r) for m in measures)] for r in range(summary["replicas"])]
    return ["replica", "seed", *measures], rows


@rank_zero_only
def leave_in_wandb(loggers: Sequence[Any], summary: dict[str, Any], measures: Sequence[str]) -> None:
    """Pass the results to W&B: the summary, without ``finished``, which W&B records itself, and a table of verdicts."""
    columns, rows = verdicts(summary, measures)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            log_table(logger, "verdict", columns, rows, summary["steps"])
            values = {key: value for key, value in summary.items() if key != "finished"}
            if isinstance(logger, ResumableWandbLogger):
                logger.log_summary(values)
            else:
                logger.experiment.summary.update(values)


@rank_zero_only
def end_wandb_runs(loggers: Sequence[Any], *, failed: bool) -> None:
    """End the W&B runs, so that the next job of this process does not log into them; print the address if online."""
    for logger in loggers:
        if isinstance(logger, ResumableWandbLogger):
            logger.finish(int(failed))
            if logger.url is not None:
                Console().print(f"[bold]in W&B at[/] {logger.url}", soft_wrap=True, highlight=False)
        elif isinstance(logger, WandbLogger):
            import wandb  # noqa: PLC0415 (slow, and only used with its logger)

            wandb.finish(exit_code=int(failed))


def log_summary_again(folder: Path, table: Path, make: Callable[[str], Any], fill: Callable[[Any, int], None]) -> bool:
    """Log the results in a folder to its summary run, if its table is not the one that was logged last.

    The run of a folder that was resumed continues: the new table and figures replace the old ones. Offline, the files
    of the old ones are removed, unless they were uploaded, so that one folder has everything.

    Args:
        folder: the folder.
        table: the file that changes if the results change.
        make: builds the W&B logger of the run with the given id.
        fill: logs everything to it; the second argument is the step.

    Returns:
        Whether anything was logged.
    """
    record = read_record(folder / SUMMARY_RECORD)
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    if record.get("table") == digest:
        return False
    run_id, times = str(record.get("id") or secrets.token_hex(4)), int(record.get("times") or 0)
    write_json(folder / SUMMARY_RECORD, {"id": run_id, "times": times + 1, "table": None})
    before = list(folder.glob(f"wandb/offline-run-*-{run_id}"))
    logger, failed = make(run_id), True
    try:
        logger.rows = times  # its steps in W&B follow those of the former times
        logger.begin()
        fill(logger, times)
        failed = False
    finally:
        end_wandb_runs([logger], failed=failed)
    for old in before:
        if not any(old.glob("*.synced")):
            shutil.rmtree(old, ignore_errors=True)
    write_json(folder / SUMMARY_RECORD, {"id": run_id, "times": times + 1, "table": digest})
    return True


def _job() -> int | None:
    """The number of the sweep's job."""
    hydra = HydraConfig.get()
    return int(hydra.job.num) if hydra.mode is RunMode.MULTIRUN else None


def _group(name: str) -> str:
    """The group of a sweep's jobs: the last two parts of its folder, to distinguish sweeps of the same name."""
    if _job() is None:
        return _cut(name, _LONGEST_NAME)
    hydra = HydraConfig.get()
    return group_of_sweep(Path(hydra.runtime.cwd, hydra.sweep.dir))


def group_of_sweep(folder: Path) -> str:
    """The group of the runs of the sweep in a folder, and of its summary run."""
    return _cut(f"sweep {'/'.join(folder.resolve().parts[-2:])}", _LONGEST_NAME)


def _run_name(name: str, overrides: Sequence[str]) -> str:
    """The experiment and its overrides, with shortened keys if the name would be too long.

    >>> _run_name("a 0", ["model.threshold=0.1", "resume=true"])
    'a 0 model.threshold=0.1'
    """
    shown = [override.lstrip("+~") for override in overrides]
    shown = [o for o in shown if not any(o.startswith((f"{key}=", f"{key}.")) or o == key for key in _NOT_IN_NAME)]
    if len(full := f"{name} {','.join(shown)}".strip()) <= _LONGEST_NAME:
        return full
    pairs = [override.partition("=") for override in shown]
    short = ",".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs)
    return _cut(f"{name} {short}".strip(), _LONGEST_NAME)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
