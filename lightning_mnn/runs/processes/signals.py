"""How signals end a run, on all of its processes: SIGTERM, Ctrl-C, and SLURM's signals for time-outs and pre-emption.

The first signal is a request: training ends at the next step from which it can continue (see
:mod:`lightning_mnn.utilities.interruption`), even in the middle of a callback's long computation. A second SIGTERM or
Ctrl-C ends all processes at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace
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

_PARENT = "LIGHTNING_MNN_PARENT"  # id of the first process, for the processes that Lightning starts
_NEWS_DELAY = 2.0  # seconds by which the news of another process's death may follow the error that the death causes

_open: list[RunSignals] = []  # of this process
_shared: list[RunSignals] = []  # of all runs of this process, if they take turns


class LostProcessError(SystemExit):
    """Ends a run, with exit code 1, because one of its processes is gone; the message was printed before.

    Args:
        rank: rank of that process.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(1)
        self.rank = rank


@contextmanager
def interruptible() -> Iterator[RunSignals]:
    """Handle a run's signals within the context; it yields the handler, which must be the Trainer's first callback.

    Raises:
        Interrupted: (from within) SIGTERM or Ctrl-C ended the run; or, at the end, one was received but the run
            finished.
        SystemExit: with code 0, a SLURM job was ended and requeued.
        UncompletedJobError: (submitit's) the job would have been requeued, but has run out of time too often.
    """
    if _shared:  # of several runs in this process
        yield SharedSignals(_shared[-1])
        return
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
        watch: the thread that watches for signals and for the death of other processes.
        requeue: requeues the SLURM job; None: it is not a SLURM job.
    """

    def __init__(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()  # the only thread that receives signals
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
        """Install the signal handlers."""
        forget()
        self.watch.start()
        if self._before:
            self._wakeup_before = signal.set_wakeup_fd(self.watch.wakeup_fd, warn_on_full_buffer=False)
        self._install_handlers()
        _open.append(self)

    def close(self, *, ignore_requeue: bool) -> None:
        """Restore the previous handlers.

        With ``ignore_requeue`` SLURM's signals are ignored instead: they may reach one process later than another.
        """
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
        self._install_handlers()  # again: Lightning has installed one that waits for the other processes

    def end_training(self, error: BaseException | None = None) -> BaseException | None:
        """Record that training has ended; from now on signals are no longer requests.

        Args:
            error: the error that ended it; None: it ended normally.

        Returns:
            The error or, if that is only a consequence, the signal or lost process that caused it.
        """
        cause = self.cause()
        if isinstance(error, RuntimeError) and self.watch.has_peers:  # a failed collective, for example
            deadline = time.monotonic() + _NEWS_DELAY
            while (cause := self.cause()) is None and time.monotonic() < deadline:
                time.sleep(0.02)
        self.watch.end_training(failed=error is not None and not isinstance(error, Interrupted))
        forget()
        if isinstance(error, Exception) and cause is not None:
            sys.stderr.write(f"training ended by {type(error).__name__}: {error}\n")
            return cause
        return error

    def cause(self) -> BaseException | None:
        """Why training has to end: a signal or the loss of another process; None: it need not end."""
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

    def _install_handlers(self) -> None:
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        """Handle a signal in the main thread; the watch thread sees it too."""
        if self.watch.phase is Phase.BEFORE and not self._raised:
            self._raised = True
            raise Interrupted(number)
        if self.watch.phase is Phase.TRAINING:
            request(number)


class SharedSignals(RunSignals):
    """What a run sees of the signals of a process in which several runs take turns.

    Args:
        process: handles the signals of the process.
    """

    def __init__(self, process: RunSignals) -> None:
        self.requeue, self._process = None, process
        self.watch: Any = SimpleNamespace(on_forced_end=None)  # not a watch of its own

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing to connect: such a run has one process."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing to install: Lightning has installed no handler in this thread."""

    @override
    def end_training(self, error: BaseException | None = None) -> BaseException | None:
        return error

    @override
    def cause(self) -> BaseException | None:
        return self._process.cause()


@contextmanager
def shared_signals() -> Iterator[RunSignals]:
    """A context in which all runs of this process, which take turns, are stopped by the same signals.

    The first signal is a request to all of them: each ends at its next step.
    """
    signals = RunSignals()
    signals.open()
    signals.watch.phase = Phase.TRAINING
    _shared.append(signals)
    try:
        yield signals
    finally:
        _shared.remove(signals)
        signals.watch.end_training(failed=False)
        signals.close(ignore_requeue=False)


def _in_forked_child() -> None:
    """Release the handlers in a data loader's worker: Ctrl-C is for its parent, which ends it."""
    for signals in _open:
        signals.release_after_fork()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
