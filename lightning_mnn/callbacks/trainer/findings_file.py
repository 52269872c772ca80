"""What callbacks found in a fit, in ``findings.json`` in the folders of its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_warn

from lightning_mnn.findings import FINDINGS
from lightning_mnn.utilities.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pytorch_lightning as pl

    from lightning_mnn.findings import CallbackFindings


def folder_of_run(trainer: pl.Trainer, log_dir: str | None) -> Path | None:
    """The folder of the first logger's run, where Lightning's checkpoints are, too; None: no files are wanted."""
    logger = trainer.logger
    if logger is None and Path(trainer.default_root_dir).absolute() == Path.cwd():
        return None
    if logger is None or logger.save_dir is None or logger.log_dir is not None:
        return Path(log_dir or trainer.default_root_dir)
    return Path(logger.save_dir, str(logger.name), str(logger.version))  # for W&B, which has many runs in one folder


def folders_of_findings(trainer: pl.Trainer) -> list[Path]:
    """The folders that get ``findings.json``: that of the first logger's run, and that of each ``CSVLogger``.

    Every process calls it. There is none in a ``fast_dev_run``, without a logger in the current folder, in a store
    behind a URL, and in a run folder of this program, whose ``summary.json`` has the same.
    """
    log_dir = trainer.log_dir  # a collective
    run: Any = trainer
    if run.fast_dev_run:
        return []
    first = folder_of_run(trainer, log_dir)
    tables = [logger for logger in trainer.loggers if _is_csv(logger)]
    addresses = [str(log_dir or ""), *(str(logger.log_dir) for logger in tables)]
    found = [*([] if first is None else [first]), *(Path(str(logger.log_dir)) for logger in tables)]
    if any("://" in address for address in addresses):
        return []
    return [folder for folder in dict.fromkeys(found) if not (folder / "plan.json").exists()]


def write_findings(
    folders: Iterable[Path], findings: Sequence[CallbackFindings], *, error: BaseException | None = None, **facts: Any
) -> None:
    """Write ``findings.json``; where that is impossible, warn.

    Args:
        folders: where to.
        findings: of each callback.
        error: what ended training before its end; None: nothing did.
        facts: on the fit.
    """
    ended_by = None if error is None else f"{type(error).__name__}: {error}".strip().removesuffix(":")
    content = {"format": 1, **facts, "ended_by": ended_by, "callbacks": [found.plain() for found in findings]}
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / FINDINGS, content)
        except OSError as problem:
            rank_zero_warn(f"{FINDINGS} cannot be written: {problem}. task=report then lacks what was found")


def _is_csv(logger: object) -> bool:
    """Whether a logger is a ``CSVLogger`` of either namespace."""
    return any(kind.__name__ == "CSVLogger" for kind in type(logger).__mro__)
