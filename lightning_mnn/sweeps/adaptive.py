"""Sweeps whose next jobs depend on the results of earlier ones, by hydra-optuna-sweeper, made repeatable.

Such a sweep is resumed by running it again from its beginning. Its sampler makes the same choices, as it has the same
seed, and each job that has finished returns its result at once. So no trial runs twice and none is lost, and the sweep
goes on as if it had not been interrupted.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf, open_dict, read_write

from lightning_mnn.config.mistakes import UserError
from lightning_mnn.launchers.jobs.records import JOB_RECORD, JobState, read_record, returned
from lightning_mnn.utilities.files import relative, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

SAMPLER_RECORD = "sampler.json"  # in the sweep's folder: the seed of its sampler


def prepare(config: DictConfig, folder: Path) -> None:
    """Seed the sampler of an adaptive sweep; to resume one with a storage, empty its study, which is then told again.

    Args:
        config: the config of the sweep; the sampler's seed is set in it.
        folder: the folder of the sweep.

    Raises:
        UserError: the study contains trials that are not in the folder.
    """
    sweeper = OmegaConf.select(config, "hydra.sweeper")
    if not str(sweeper.get("_target_")).endswith("OptunaSweeper"):
        return
    resumes = OmegaConf.select(config, "resume") is True
    if "seed" in sweeper.sampler and sweeper.sampler.seed is None:
        known = read_record(folder / SAMPLER_RECORD).get("seed") if resumes else None
        seed = secrets.randbits(31) if known is None else int(known)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SAMPLER_RECORD, {"seed": seed})
        with read_write(sweeper), open_dict(sweeper):
            sweeper.sampler.seed = seed
    if resumes and sweeper.get("storage") and sweeper.get("study_name"):
        _empty_study(str(sweeper.study_name), sweeper.storage, folder)


def _empty_study(name: str, storage: Any, folder: Path) -> None:
    """Delete a study, all of whose finished trials are in the sweep's folder."""
    import optuna  # noqa: PLC0415 (installed with the sweeper)

    optuna.logging.set_verbosity(logging.WARNING)
    if name not in [found.study_name for found in optuna.get_all_study_summaries(storage)]:
        return
    study = optuna.load_study(study_name=name, storage=storage)
    for trial in study.get_trials(deepcopy=False):
        if trial.state == optuna.trial.TrialState.COMPLETE and not _is_in(folder / str(trial.number), trial):
            raise UserError(
                f"hydra.sweeper.study_name={name}: trial {trial.number} of this study is not a job in "
                f"{relative(folder)}, so that the sweep cannot be repeated to where it was: choose another study_name"
            )
    optuna.delete_study(study_name=name, storage=storage)


def _is_in(job: Path, trial: Any) -> bool:
    """Whether a job's folder has the result of a trial."""
    record, summary = read_record(job / JOB_RECORD), read_record(job / "summary.json")
    if record.get("status") == JobState.FINISHED:
        overrides, value = record["overrides"], returned(record["return_value"])
    elif summary.get("finished"):  # a launcher without records
        overrides = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text())
        value = summary["mse"]
    else:
        return False
    chosen = {f"{name}={choice}" for name, choice in trial.params.items()}
    return chosen <= set(overrides) and value in (trial.value, trial.values)
