"""What experiments in parts have in common: checks of their settings, the command that resumes them, Ctrl-C, W&B."""

from __future__ import annotations

import shlex
from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_mnn.config.build import build
from lightning_mnn.config.mistakes import UserError
from lightning_mnn.figures.tables import read_table
from lightning_mnn.loggers.media import log_image, log_table
from lightning_mnn.runs.wandb import is_resumable, log_summary_again, wandb_options
from lightning_mnn.tasks.parts import finish_parts
from lightning_mnn.utilities.files import read_csv, relative
from lightning_mnn.utilities.resources import cores
from lightning_mnn.utilities.validation import ArgumentError, positive_integer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lightning_mnn.tasks.parts import Part


def task_settings(cfg: DictConfig, task: str, experiment: str) -> dict[str, Any]:
    """The task's node of the config as a dictionary.

    Raises:
        ValueError: the config has no such node.
    """
    if cfg.get(task) is None:
        raise UserError(f"task={task}: has no settings: choose experiment={experiment}, which has them")
    settings: dict[str, Any] = OmegaConf.to_container(cfg[task], resolve=True)  # type: ignore[assignment]
    return settings


def refuse_unused(cfg: DictConfig, task: str, unused: Mapping[str, Any]) -> None:
    """Refuse settings that the task would ignore: `threads`, `ckpt_path`, and those in ``unused``.

    Args:
        cfg: the config.
        task: name of the task.
        unused: keys and groups of the config that the task does not use, with their default values.

    Raises:
        ValueError: one of them has another value, or `threads` or `ckpt_path` is given.

    >>> refuse_unused(OmegaConf.create({"data": None, "replicas": 1}), "census", {"data": None, "replicas": 1})
    """
    for key, default in {**unused, "ckpt_path": None}.items():
        if (value := cfg.get(key, default)) == default:
            continue
        if (debug := _debug_choice()) is not None:
            raise UserError(f"debug={debug}: sets {key}, which task={task} does not use: choose debug=limit")
        given = key if OmegaConf.is_config(value) else f"{key}={value}"
        remedy = f"leave {key} out, or choose {key}={'null' if default is None else default}"
        raise UserError(f"{given}: task={task} does not use it: {remedy}")
    if cfg.get("threads") is not None:
        raise UserError(
            f"threads={cfg.threads}: each worker process of task={task} uses one thread: leave threads out, and "
            f"choose the number of workers by {task}.processes"
        )


def _debug_choice() -> str | None:
    choice: str | None = HydraConfig.get().runtime.choices.get("debug") if HydraConfig.initialized() else None
    return choice


def different(key: str, values: Any, what: str, *, at_least: int = 1) -> list[Any]:
    """A list without repetitions.

    Raises:
        ValueError: it is not a list, has fewer than ``at_least`` entries, or contains an entry twice, or true or false.

    >>> different("census.epsilons", [0.0, 0.1], "numbers")
    [0.0, 0.1]
    """
    given = isinstance(values, list) and len(values) >= at_least
    if not given or any(isinstance(value, bool) or value in values[:n] for n, value in enumerate(values)):
        many = f"{at_least} or more " if at_least else ""
        raise ArgumentError(key, values, f"must be a list of {many}different {what}")
    return list(values)


def number_of_processes(key: str, processes: int | None) -> int:
    """The number of worker processes; for None, one per core."""
    if processes is None:
        return cores()
    return positive_integer(key, processes)


def command_of_run(run_dir: Path) -> str:
    """The command line that repeats or resumes the present command."""
    return shlex.join(words_of_command(run_dir))


def words_of_command(run_dir: Path, more: Sequence[str] = ()) -> list[str]:
    """The words of the present command with its folder; ``more`` overrides replace those with the same keys."""
    keys = {override.partition("=")[0] for override in (*more, "hydra.run.dir=")}
    given = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] not in keys]
    return ["lightning-mnn", *given, *more, f"hydra.run.dir={relative(run_dir)}"]


def finish_experiment(parts: Sequence[Part], run_dir: Path, processes: int, command: str) -> dict[str, dict[str, Any]]:
    """Finish the parts of an experiment, in `parts/` of its folder; on Ctrl-C print the command that resumes it.

    Returns:
        What each part returned, by its name (see :func:`~lightning_mnn.tasks.parts.finish_parts`).
    """
    try:
        return finish_parts(parts, run_dir / "parts", processes)
    except KeyboardInterrupt:
        Console(soft_wrap=True, highlight=False).print(
            f"interrupted: finished parts are kept. Resume with\n  {command}", markup=False
        )
        raise SystemExit(130) from None


def check_loggers(cfg: DictConfig, task: str) -> None:
    """Refuse loggers other than W&B's: an experiment in parts has a table and a figure, but no rows of metrics.

    Raises:
        ValueError: there is another logger.
    """
    for key, node in (cfg.get("logger") or {}).items():
        if isinstance(node, DictConfig) and not ("_target_" in node and is_resumable(node)):
            raise UserError(f"logger.{key}: task={task} logs to W&B only: leave it out, or choose logger.{key}=null")


def log_to_wandb(cfg: DictConfig, run_dir: Path, tables: Sequence[str], summary: Mapping[str, Any]) -> None:
    """Log tables, the figure and the summary of a finished experiment to one W&B run, unless W&B is disabled.

    An experiment that is run again continues its W&B run; if its first table is the same, nothing is logged.

    Args:
        cfg: the config.
        run_dir: the experiment's folder.
        tables: names of its tables, without the suffix .csv.
        summary: values for the run's summary.
    """
    for key, node in (cfg.get("logger") or {}).items():
        if isinstance(node, DictConfig) and node.get("mode") != "disabled":
            make = partial(_wandb_logger, cfg, str(key), node)
            fill = partial(_fill, run_dir, tables, summary)
            log_summary_again(run_dir, run_dir / f"{tables[0]}.csv", make, fill)


def _wandb_logger(cfg: DictConfig, key: str, node: DictConfig, run_id: str) -> Any:
    return build(cfg, f"logger.{key}", node, **wandb_options(cfg, node, run_id) | {"id": run_id})


def _fill(run_dir: Path, tables: Sequence[str], summary: Mapping[str, Any], logger: Any, step: int) -> None:
    for name in tables:
        path = run_dir / f"{name}.csv"
        rows, texts = read_table(path), read_csv(path)
        if not rows:
            continue
        words = {column for row in rows for column, value in row.items() if isinstance(value, str)}
        # A column of W&B's has one type: widths such as 10x10 make that of 10 a text.
        data = [
            [texts[number][column] or None if column in words else value for column, value in row.items()]
            for number, row in enumerate(rows)
        ]
        log_table(logger, name, list(rows[0]), data, step)
    log_image(logger, "figure", run_dir / "figure.png", step)
    logger.log_summary(summary)
