"""``hydra/launcher=batched``: jobs of a sweep in few processes, whose optimiser steps are computed together.

Hydra finds the launcher in every environment with lightning_mnn; it is for programs that train an MNN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from typing_extensions import override

from lightning_mnn.launchers.device_pool import DevicePool, DevicePoolConf
from lightning_mnn.launchers.jobs.records import JobState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from lightning_mnn.launchers.jobs.batch import JobBatch
    from lightning_mnn.launchers.jobs.devices import Devices, Request
    from lightning_mnn.launchers.jobs.job import Job
    from lightning_mnn.launchers.jobs.turns import JobPlan

_MODEL = "lightning_mnn.MNN"
_BYTES = 8_000_000  # of a run: its Trainer, callbacks and logs
_COPIES = 8  # of a run's inputs and activations: data set, batches, gradients, certificates


@dataclass
class BatchedConf(DevicePoolConf):
    """Config of the launcher: that of ``device_pool``, and ``max_replicas``.

    Attributes:
        max_replicas: number of jobs of a process that run at the same time; null: as many as half of the free memory
            allows.
    """

    _target_: str = "hydra_plugins.lightning_mnn.Batched"
    max_replicas: int | None = None


class Batched(DevicePool):
    """Runs the jobs of a sweep in one process per device, where they have their optimiser steps computed together.

    Each job is a whole run, with its folder, files and W&B run, as if it had run alone; its numbers are the same up to
    rounding. Jobs need not have the same settings: steps are computed together for networks with equal shapes. A job
    that fails or diverges does not affect the others. A job that cannot take part, as one with several devices, runs
    as under ``device_pool``.

    Args:
        **options: see :class:`BatchedConf`.

    Raises:
        LaunchError: see :class:`DevicePool`.
    """

    _manner = ", those of a device together in one process"

    def __init__(self, **options: Any) -> None:
        most = options.pop("max_replicas", None)
        super().__init__(**options)
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(f"hydra.launcher.max_replicas={most}: must be a positive number or null")
        self._max_replicas = most
        self._batchable: dict[int, _Batchable] = {}  # by the job's number

    @override
    def _job(self, number: int, overrides: list[str], pool: Devices, common: set[str]) -> Job:
        from lightning_mnn.config.job_configs import fill, numbered  # noqa: PLC0415

        assert self._configs is not None  # noqa: S101 (for the type checker)
        template, values = self._configs.template(overrides)
        fill(template, overrides, values)  # it is this job's config until the next job
        if not _can_be_batched(template, self._options.trainer_key):
            return super()._job(number, overrides, pool, common)
        job = self._job_with(numbered(template, number, self._sweep_dir), number, overrides, pool, common)
        threads = OmegaConf.select(template, "threads")
        self._batchable[number] = _Batchable(overrides, values, (job.request, threads), _bytes_of(template))
        return job

    @override
    def _processes(self, jobs: Sequence[Job], pool: Devices) -> Sequence[Job | JobBatch]:
        from lightning_mnn.launchers.jobs.batch import JobBatch  # noqa: PLC0415

        known = self._batchable
        own = [job for job in jobs if job.number in known and job.state is JobState.WAITING]
        own.sort(key=lambda job: known[job.number].order)  # neighbours have the same settings and other seeds
        batches: list[JobBatch] = []
        for kind in dict.fromkeys(known[job.number].kind for job in own):
            same = [job for job in own if known[job.number].kind == kind]
            number = min(pool.capacity(kind[0]), len(same))
            for index in range(number):
                part = same[index * len(same) // number : (index + 1) * len(same) // number]
                most = self._max_replicas or _by_memory(max(known[job.number].bytes for job in part), number)
                options = {"max_replicas": most, "fail_fast": self._options.fail_fast}
                output = Path(self._sweep_dir, f"batch-{len(batches)}.log").absolute()
                batches.append(JobBatch(part, [known[job.number].plan(job) for job in part], options, output))
        return [*batches, *(job for job in jobs if job.number not in known)]


@dataclass(frozen=True)
class _Batchable:
    """What makes a template's config that of a job; jobs of the same kind can share a process."""

    overrides: list[str]
    values: dict[str, Any]
    kind: tuple[Request, Any]  # devices, and the threads that the job sets for its process
    bytes: int

    @property
    def order(self) -> str:
        return repr(sorted(self.values.items(), key=lambda item: item[0] == "seed"))

    def plan(self, job: Job) -> JobPlan:
        from lightning_mnn.launchers.jobs.turns import JobPlan  # noqa: PLC0415

        return JobPlan(job.number, job.config, self.overrides, self.values, job.log)


def _can_be_batched(config: DictConfig, trainer_key: str) -> bool:
    """Whether a job trains one MNN on one device, and changes nothing else in its process."""

    def value(key: str, default: Any = None) -> Any:
        return OmegaConf.select(config, key, default=default)

    trainer = OmegaConf.select(config, trainer_key)
    return bool(
        value("model._target_") == _MODEL
        and value("task", "train") == "train"
        and value("model.replicas", 1) == 1
        and trainer is not None
        and trainer.get("devices") in (1, "1")
        and trainer.get("num_nodes", 1) in (1, None)
        and trainer.get("strategy", "auto") == "auto"
        and trainer.get("precision") in (None, 32, "32", "32-true")
        and not trainer.get("fast_dev_run")
        and not trainer.get("detect_anomaly")
        and not value("hydra.job.env_set")
        and not value("hydra.job.chdir")
    )


def _bytes_of(config: DictConfig) -> int:
    """Rough estimate of the memory of a job."""
    samples, inputs = (OmegaConf.select(config, f"data.{key}") or 0 for key in ("num_samples", "input_dim"))
    units = sum(OmegaConf.select(config, "model.hidden_dims") or ())
    return int(_BYTES + _COPIES * 8 * samples * (inputs + units))


def _by_memory(needed: int, processes: int) -> int:
    """How many jobs that need so much memory half of what is free allows, in each of several processes."""
    import torch  # noqa: PLC0415 (Hydra imports this module in all programs)

    from lightning_mnn.utilities.resources import free_memory  # noqa: PLC0415

    return max(1, int(free_memory(torch.device("cpu")) / 2 / processes / needed))
