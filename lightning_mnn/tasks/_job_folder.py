"""The folder that Hydra makes for a job, where the job's task has no use for one."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig


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
