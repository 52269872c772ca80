"""Several jobs of a sweep in one process: they take turns, and their optimiser steps are computed together."""

from __future__ import annotations

import copy
import gc
import io
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job

from lightning_mnn.config.job_configs import fill, numbered
from lightning_mnn.launchers.jobs.progress import VARIABLE
from lightning_mnn.model.lockstep import run_in_lockstep
from lightning_mnn.runs.processes.signals import shared_signals
from lightning_mnn.utilities.compat.hydra_internals import result_of
from lightning_mnn.utilities.interruption import Interrupted, requested
from lightning_mnn.utilities.resources import raise_file_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from omegaconf import DictConfig

_JOBS_PER_COLLECTION = 100  # jobs that end between two collections of garbage


@dataclass(frozen=True)
class JobPlan:
    """What a job in a batch is to do.

    Attributes:
        number: its number in the sweep.
        template: a config that is the job's but for its values and its number.
        overrides: all its overrides.
        values: values of the config's keys.
        output: file for its output.
    """

    number: int
    template: DictConfig
    overrides: list[str]
    values: dict[str, Any]
    output: Path

    def config(self) -> DictConfig:
        """The job's config."""
        config = copy.deepcopy(self.template)
        fill(config, self.overrides, self.values)
        return numbered(config, self.number, str(self.template.hydra.sweep.dir))


class Turn:
    """What a job must find in its process during its turns: Hydra's config, handlers of logs, and output of its own.

    Args:
        output: file to which its output is added.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._hydra: Any = None
        self._handlers: list[logging.Handler] = []
        self._outside: tuple[Any, ...] = ()

    def begin(self) -> None:
        """Put the job's things in place."""
        root, hydra = logging.getLogger(), HydraConfig.instance()
        self._outside = root.handlers[:], hydra.cfg, sys.stdout, sys.stderr
        root.handlers[:], hydra.cfg = self._handlers, self._hydra
        self._written = sys.stdout = sys.stderr = io.StringIO()

    def end(self) -> None:
        """Keep the job's things, and put back what was there before."""
        root, hydra = logging.getLogger(), HydraConfig.instance()
        self._handlers, self._hydra = root.handlers[:], hydra.cfg
        handlers, hydra.cfg, sys.stdout, sys.stderr = self._outside
        root.handlers[:] = handlers
        if written := self._written.getvalue():
            with suppress(OSError), self._output.open("a") as file:
                file.write(written)

    def close(self) -> None:
        """Close the job's logs, after its last turn."""
        for handler in self._handlers:
            handler.close()


def run_jobs(
    plans: Sequence[JobPlan],
    call: dict[str, Any],
    report: Callable[[int, JobReturn], None],
    *,
    max_replicas: int,
    fail_fast: bool = False,
) -> int:
    """Run jobs in this process.

    Args:
        plans: the jobs.
        call: arguments for Hydra's ``run_job``: ``hydra_context`` and ``task_function``.
        report: called with a job's number and its return when it has ended; an error is given as text. A job that a
            signal stops is not reported.
        max_replicas: how many run at a time.
        fail_fast: after the first job that fails, start no further ones.

    Returns:
        The number of the signal that stopped them; 0: none did.
    """
    raise_file_limit()  # each job has a log, a lock and files that it writes
    os.environ["WANDB_REINIT"] = "create_new"  # each job has a W&B run of its own
    os.environ.pop(VARIABLE, None)  # the jobs would all write the same report
    failed: list[int] = []
    ended: list[int] = []
    gc.freeze()
    gc.disable()  # it would look through the objects of all jobs again and again: a fifth of the time and more
    turns = [Turn(plan.output) for plan in plans]

    def work(index: int) -> None:
        began = time.time()
        try:
            found = run_job(
                config=plans[index].config(),
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                **call,
            )
        except Interrupted:
            return
        except BaseException as error:  # noqa: BLE001 (it ends this job only)
            found = JobReturn(status=JobStatus.FAILED)
            found.return_value = error
        if found.status is JobStatus.FAILED:
            failed.append(index)
            cause = result_of(found)
            traceback.print_exception(cause)
            found.return_value = f"{type(cause).__name__}: {cause}"
        found.cfg = found.hydra_cfg = None  # they would take longer to pass on than the job
        found.seconds = time.time() - began  # type: ignore[attr-defined]
        report(plans[index].number, found)
        ended.append(index)
        if len(ended) % _JOBS_PER_COLLECTION == 0:
            gc.collect()

    with shared_signals():
        run_in_lockstep(
            [lambda index=index: work(index) for index in range(len(plans))],  # type: ignore[misc]
            max_replicas=max_replicas,
            on_turn=lambda index: turns[index].begin(),
            after_turn=lambda index: turns[index].end(),
            is_stopped=lambda: bool(requested() or (fail_fast and failed)),
        )
        number = requested()
    for turn in turns:
        turn.close()
    return number
