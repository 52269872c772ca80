"""Requeueing on a SLURM cluster: a job that is pre-empted or out of time saves a checkpoint and is requeued.

During a run only this module's caller answers the signal. Submitit's handler would requeue at once, and Lightning's
would save at a moment from which a run cannot continue exactly.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# The signals that Lightning and submitit use for time-outs and pre-emption. Windows does not have them.
SIGNALS = tuple(signal.Signals[name] for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


def was_requeued() -> bool:
    """Whether SLURM has requeued this job, after a signal, a time-out or a node's failure."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def requeue_by(handlers: Mapping[int, Any]) -> Callable[[], None] | None:
    """How to requeue the job: by submitit's handler if submitit runs the job, because the handler counts time-outs.

    Args:
        handlers: the signals' handlers before the run.

    Returns:
        A function that requeues the job; None: this is not a SLURM job.
    """
    if "SLURM_PROCID" not in os.environ:
        return None
    for number in SIGNALS:
        if callable(handler := handlers.get(number)):
            return lambda: handler(number, None)
    return _requeue_by_scontrol


def _requeue_by_scontrol() -> None:
    if os.environ["SLURM_PROCID"] == "0":
        command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
        subprocess.run(command, check=True)  # noqa: S603 (no user's text)
