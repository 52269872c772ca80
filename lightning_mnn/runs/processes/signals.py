"""How signals end a run, on all of its processes: SIGTERM and Ctrl-C, and those by which SLURM wants a job back.

The first signal is a request: training ends at the next step from which it can go on (see
:mod:`lightning_mnn.utilities.interruption`), in the middle of a callback's long computation too. A second SIGTERM or
Ctrl-C ends all processes at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from lightning_mnn.runs.processes import requeue
from lightning_mnn.runs.processes.peers import connect
from lightning_mnn.runs.processes.watch import STOPPING, Phase, Watch
from lightning_mnn.utilities.compat.lightning_internals import leave_out_exchange_of_signals, take_launched_processes
from lightning_mnn.utilities.interruption import Interrupted, forget, request

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARENT = "LIGHTNING_MNN_PARENT"  # the first process, for those that Lightning starts beside it
_NEWS_LATE = 2.0  # seconds by which an error may come before the news of the death that is its cause

_open: list[RunSignals] = []  # of this process


class LostProcessError(SystemExit):
    """The end, with exit code 1, of a run one of whose processes is gone; that was said already.

    Args:
        rank: of the process.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(1)
        self.rank = rank


@contextmanager
def interruptible() -> Iterator[RunSignals]:
    """Within: a run's signals are handled by what this gives, which is to be the first of its Trainer's callbacks.

    Raises:
        Interrupted: (from within) the run was ended by SIGTERM or Ctrl-C; or, at the end, it was finished all the same.
        SystemExit: with code 0, a job of SLURM's was ended and put back into the queue.
        UncompletedJobError: (submitit's) it would have been, but has run out of time too often.
    """
    signals = RunSignals()
    signals.open()
    requeued = False
    try:
        yield signals
    except Interrupted as stop:
        requeued = stop.number not in STOPPING
        if not requeued:
            raise
    finally:
        signals.close(ignore_requeue=requeued)
    if requeued and signals.requeue is not None:
        signals.requeue()
        raise SystemExit(0)
    if signals.watch.number in STOPPING:
        raise Interrupted(signals.watch.number)


class RunSignals(pl.Callback):
    """Handles the signals of a run.

    Attributes:
        watch: the thread that sees to it.
        requeue: puts the job back into SLURM's queue; None: it is none.
    """

    def __init__(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()  # which alone gets signals
        before: dict[int, Any] = {number: signal.getsignal(number) for number in (*STOPPING, *requeue.SIGNALS)}
        self.requeue = requeue.requeue_by(before)
        numbers = STOPPING if self.requeue is None else (*STOPPING, *requeue.SIGNALS)
        self._before = {number: before[number] for number in numbers if in_main}
        self._wakeup_before = -1
        self._raised = False
        rank, parent = getattr(rank_zero_only, "rank", 0), os.environ.get(_PARENT)
        self.watch = Watch(int(parent) if rank and parent is not None else None)
        self.watch.requeue = self.requeue
        if not rank:
            os.environ[_PARENT] = str(os.getpid())

    def open(self) -> None:
        """Take the signals."""
        forget()
        self.watch.start()
        if self._before:
            self._wakeup_before = signal.set_wakeup_fd(self.watch.wakeup_fd, warn_on_full_buffer=False)
        self._take()
        _open.append(self)

    def close(self, *, ignore_requeue: bool) -> None:
        """Give them back; the signals of SLURM may be ignored, which may reach one process later than another."""
        _open.remove(self)
        for number, handler in self._before.items():
            ignored = ignore_requeue and number in requeue.SIGNALS
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        self.watch.close()
        forget()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if peers := connect(trainer):
            self.watch.connected(peers, trainer.global_rank, take_launched_processes(trainer))
            leave_out_exchange_of_signals(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.phase = Phase.TRAINING
        self._take()  # from Lightning, whose handler waits for the other processes

    def end_training(self, error: BaseException | None = None) -> BaseException | None:
        """Take note that training has ended; from now on signals are no requests any more.

        Args:
            error: by which it has ended; None: it has come to its end.

        Returns:
            The error or, where that is only its effect, a signal or the loss of another process.
        """
        cause = self.cause()
        if isinstance(error, RuntimeError) and self.watch.has_peers:  # as of a collective
            deadline = time.monotonic() + _NEWS_LATE
            while (cause := self.cause()) is None and time.monotonic() < deadline:
                time.sleep(0.02)
        self.watch.end_training(failed=error is not None and not isinstance(error, Interrupted))
        forget()
        if isinstance(error, Exception) and cause is not None:
            sys.stderr.write(f"training ended by {type(error).__name__}: {error}\n")
            return cause
        return error

    def cause(self) -> BaseException | None:
        """Why training has to end: a signal or the loss of another process; None: it has not."""
        if self.watch.number:
            return Interrupted(self.watch.number)
        return None if self.watch.lost is None else LostProcessError(self.watch.lost)

    def release_after_fork(self) -> None:
        """Handle no signals in a process that was forked from this one."""
        self.watch.release_after_fork()
        with suppress(ValueError):  # not in the main thread
            signal.set_wakeup_fd(-1)
            for number in self._before:
                signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)

    def _take(self) -> None:
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        """What the main thread does on a signal; the other thread sees it, too."""
        if self.watch.phase is Phase.BEFORE and not self._raised:
            self._raised = True
            raise Interrupted(number)
        if self.watch.phase is Phase.TRAINING:
            request(number)


def _in_forked_child() -> None:
    """A worker of a data loader is no process of the run: Ctrl-C is for its parent, which ends it."""
    for signals in _open:
        signals.release_after_fork()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
