"""``hydra/launcher=batched``: jobs of a sweep in few processes, whose optimiser steps are computed together.

Hydra finds the launcher in every environment with lightning_mnn; it is for programs that train an MNN.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import filter_overrides
from omegaconf import OmegaConf
from typing_extensions import override

from lightning_mnn.config.paths import hydra_path
from lightning_mnn.launchers.device_pool import DevicePool, DevicePoolConf, request_of
from lightning_mnn.launchers.jobs.records import JobState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from lightning_mnn.launchers.jobs.batch import JobBatch
    from lightning_mnn.launchers.jobs.devices import Devices
    from lightning_mnn.launchers.jobs.job import Job

log = logging.getLogger(__name__)

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
        self._values: dict[int, tuple[list[str], dict[str, Any]]] = {}  # of each job that can be batched

    @override
    def _job(self, number: int, overrides: list[str], pool: Devices, common: set[str]) -> Job:
        from lightning_mnn.config.job_configs import fill, numbered  # noqa: PLC0415
        from lightning_mnn.launchers.jobs.job import Job, digest_of  # noqa: PLC0415

        assert self._configs is not None  # noqa: S101 (for the type checker)
        template, values = self._configs.template(overrides)
        fill(template, overrides, values)  # until the next job
        if not _can_be_batched(template, self._options.trainer_key):
            return super()._job(number, overrides, pool, common)
        self._values[number] = overrides, values
        numbered(template, number, self._sweep_dir)
        own = list(filter_overrides(overrides))
        label = " ".join(one for one in own if one not in common)
        folder = hydra_path(template, "sweep.dir", "sweep.subdir").resolve()
        request = request_of(template, self._options.trainer_key, pool)
        return Job(number, own, label, template, folder, request, digest_of(template))

    @override
    def _processes(self, jobs: Sequence[Job], pool: Devices) -> Sequence[Job | JobBatch]:
        from lightning_mnn.launchers.jobs.batch import JobBatch  # noqa: PLC0415
        from lightning_mnn.launchers.jobs.turns import JobPlan  # noqa: PLC0415

        own = [job for job in jobs if job.number in self._values and job.state is JobState.WAITING]
        alone = [job for job in jobs if job.number not in self._values]
        batches: list[JobBatch] = []
        kinds = {(repr(job.request), repr(job.config.threads)): job.request for job in own if "threads" in job.config}
        for (asked, threads), request in kinds.items():
            same = [job for job in own if (repr(job.request), repr(job.config.threads)) == (asked, threads)]
            same.sort(
                key=lambda job: repr(sorted(self._values[job.number][1].items(), key=lambda item: item[0] == "seed"))
            )
            number = min(pool.capacity(request), len(same))
            for index in range(number):
                part = same[index * len(same) // number : (index + 1) * len(same) // number]
                plans = [JobPlan(job.number, job.config, *self._values[job.number], job.log) for job in part]
                output = Path(str(job_dir(part[0])), f"batch-{len(batches)}.log")
                most = self._max_replicas or _by_memory(part[0].config, number)
                options = {"max_replicas": most, "fail_fast": self._options.fail_fast}
                batches.append(JobBatch(part, plans, options, output))
        return [*batches, *alone]


def job_dir(job: Job) -> Path:
    """The folder of the sweep."""
    return hydra_path(job.config, "sweep.dir").resolve()


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


def _by_memory(config: DictConfig, processes: int) -> int:
    """How many jobs like this one half of the free memory allows, in each of several processes."""
    import torch  # noqa: PLC0415 (Hydra imports this module in all programs)

    from lightning_mnn.utilities.resources import free_memory  # noqa: PLC0415

    samples, inputs = (OmegaConf.select(config, f"data.{key}") or 0 for key in ("num_samples", "input_dim"))
    units = sum(OmegaConf.select(config, "model.hidden_dims") or ())
    needed = _BYTES + _COPIES * 8 * samples * (inputs + units)
    return max(1, int(free_memory(torch.device("cpu")) / 2 / processes / needed))
