"""The summary run of a sweep in W&B: its table and figures, in the group of its runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_mnn.config.build import build
from lightning_mnn.figures.scales import label_of
from lightning_mnn.loggers.media import log_image, log_table
from lightning_mnn.runs.wandb import group_of_sweep, is_wandb, log_summary_again
from lightning_mnn.sweeps.jobs import Status

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_mnn.sweeps.jobs import Sweep
    from lightning_mnn.sweeps.report import Report

_LOGGER = "lightning_mnn.loggers.ResumableWandbLogger"


def log_summary_run(config: DictConfig, sweep: Sweep, report: Report) -> bool:
    """Log the table and the figures of a sweep to its summary run, if the config has a W&B logger that is not disabled.

    A sweep that is resumed continues its run: the new table and figures replace the old ones. Offline, the files of
    the old ones are removed, unless they were uploaded, so that one folder has everything. If the table is the same as
    before, nothing is logged.

    Args:
        config: the config of the sweep.
        sweep: its jobs.
        report: the files of its report.

    Returns:
        Whether anything was logged.
    """
    node = OmegaConf.select(config, "logger.wandb")
    if not isinstance(node, DictConfig) or "_target_" not in node or not is_wandb(node):
        return False
    if node.get("mode") == "disabled":
        return False
    return log_summary_again(
        sweep.folder,
        sweep.folder / "sweep.csv",
        lambda run_id: _logger(config, sweep, run_id),
        lambda logger, step: _log(logger, sweep, report, step),
    )


def _logger(config: DictConfig, sweep: Sweep, run_id: str) -> Any:
    """The logger of the summary run, with the settings of the jobs' loggers."""
    cfg = config.copy()
    with open_dict(cfg):
        cfg.run_dir = str(sweep.folder)
        cfg.logger.wandb._target_ = _LOGGER
        cfg.logger.wandb.name = f"{cfg.name} sweep"
    node = cfg.logger.wandb
    given = node.get("tags") or ()
    tags = [*([given] if isinstance(given, str) else given), cfg.name, "sweep"]
    settings = {"swept": {key: sorted(set(map(label_of, values))) for key, values in sweep.swept.items()}}
    own: dict[str, Any] = {
        "id": run_id,
        "group": node.get("group") or group_of_sweep(sweep.folder),
        "job_type": "sweep",
    }
    return build(cfg, "logger.wandb", **own, tags=list(dict.fromkeys(map(str, tags))), run_config=settings)


def _log(logger: Any, sweep: Sweep, report: Report, step: int) -> None:
    columns, rows = _table(report.typed)
    log_table(logger, "sweep", columns, rows, step)
    for figure in report.figures:
        log_image(logger, figure.stem, figure, step)
    logger.log_summary({f"jobs_{status}": len(sweep.having(status)) for status in Status if sweep.having(status)})


def _table(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of ``sweep.parquet``; lists are JSON."""
    table = pq.read_table(path)
    rows = [
        [json.dumps(value) if isinstance(value, list) else value for value in row.values()] for row in table.to_pylist()
    ]
    return table.column_names, rows
