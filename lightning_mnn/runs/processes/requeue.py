"""Giving way on a SLURM cluster: a job that is told to go saves a checkpoint and is put back into the queue.

Of those who could answer the signal only one does: while a run is under way neither submitit's handler, which would
requeue at once, nor Lightning's, which would save at a moment from which a run cannot go on exactly.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Lightning's and submitit's, for time-outs and pre-emption. Windows has none.
SIGNALS = tuple(signal.Signals[name] for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


def was_requeued() -> bool:
    """Whether this is a job that SLURM has put back into its queue, after a signal, a time-out or a node's failure."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def requeue_by(handlers: Mapping[int, Any]) -> Callable[[], None] | None:
    """How a job is put back into the queue: by submitit's handler where it runs the job, for it counts time-outs.

    Args:
        handlers: what answered the signals before the run.

    Returns:
        A function that does it; None: this is no job of SLURM's.
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
