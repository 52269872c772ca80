"""Giving way on a SLURM cluster: a job that is told to go saves a checkpoint and is put back into the queue.

Of those who could answer the signal only one does: while a run is under way neither submitit's handler, which would
requeue at once, nor Lightning's, which would save at a moment from which a run cannot go on exactly.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_mnn.callbacks.last_checkpoint import SavedAndStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lightning_mnn.callbacks import LastCheckpoint

# Lightning's and submitit's, for time-outs and pre-emption. Windows has none.
_SIGNALS = [signal.Signals[name] for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
_PATIENCE = 30.0  # seconds in which a checkpoint must have been saved; SLURM's own notice is of minutes


def was_requeued() -> bool:
    """Whether this is a job that SLURM has put back into its queue, after a signal, a time-out or a node's failure."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


@contextmanager
def requeued_on_signal() -> Iterator[list[LastCheckpoint]]:
    """Within: on SIGUSR1 or SIGUSR2 a SLURM job's run saves a checkpoint and stops, and the job is requeued.

    The callback that is to save goes into the list that this gives. Where there is none, or none has saved within half
    a minute, the job is requeued all the same, and goes on from the checkpoint before. A run that has come to its end
    by then is left alone. A signal to one process of several does for all. Elsewhere than in a SLURM job signals stay
    as they are.

    Raises:
        SavedAndStopped: (from within) the job goes.
        UncompletedJobError: (submitit's) it would, but has run out of time too often.
    """
    savers: list[LastCheckpoint] = []
    if "SLURM_PROCID" not in os.environ:
        yield savers
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    requeue = _how_to_requeue(before)
    impatient = threading.Timer(_PATIENCE, requeue)
    impatient.daemon = True

    def heed(*_: Any) -> None:
        if not savers:
            requeue()
        for saver in savers:
            saver.stop_soon()
        if impatient.ident is None:  # not started yet
            impatient.start()

    _handle(dict.fromkeys(_SIGNALS, heed))
    after: Mapping[signal.Signals, Any] = before
    try:
        yield savers
    except SavedAndStopped:
        impatient.cancel()
        after = dict.fromkeys(_SIGNALS, signal.SIG_IGN)  # a signal may come later to this process than to another
        _handle(after)
        requeue()
        raise
    finally:
        impatient.cancel()
        _handle(after)


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _how_to_requeue(handlers: Mapping[signal.Signals, Any]) -> Callable[[], None]:
    """Submitit's way where it runs the job, for it counts time-outs."""
    for number, handler in handlers.items():
        if callable(handler):
            return lambda: handler(number, None)
    return _requeue_by_scontrol


def _requeue_by_scontrol() -> None:
    if os.environ["SLURM_PROCID"] == "0":
        command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
        subprocess.run(command, check=True)  # noqa: S603 (no user's text)
