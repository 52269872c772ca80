"""A thread that sees signals and the death of other processes, also while the main thread waits in a collective."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from enum import Enum, auto
from typing import TYPE_CHECKING

from lightning_mnn.runs.processes.peers import News
from lightning_mnn.utilities.interruption import request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_mnn.runs.processes.peers import Peer

STOPPING = (signal.SIGTERM, signal.SIGINT)
_AGAIN = 1.0  # seconds after a signal before which another is the same one: `timeout`, for one, sends each twice
_PATIENCE = 8.0  # seconds for training to end on a request
_PATIENCE_BEFORE = 2.0  # the same for what comes before training
_PATIENCE_REQUEUE = 30.0  # the same where a SLURM job is to be requeued: SLURM's own notice is of minutes
_GRACE = 5.0  # seconds for the main thread to fail by itself when another process is gone
_LOOK = 1.0  # seconds from one look at the parent process to the next


class Phase(Enum):
    """How far a run is."""

    BEFORE = auto()  # training: a request ends the main thread by an exception
    TRAINING = auto()  # it ends at a step
    AFTER = auto()  # training: what is left is finished


class Watch(threading.Thread):
    """Notes requests to stop, passes them on to the run's other processes, and sees that they are answered.

    A second signal ends the process at once. It also ends without its main thread where that answers no request in
    time, or neither fails nor ends when another process of the run is gone.

    Args:
        parent: the process whose death ends this one; None: none.

    Attributes:
        phase: how far the run is.
        number: of the first signal that reached any process of the run; 0: none did.
        lost: rank of a process that is gone; None: none is.
        children: processes that this one has started, which end with it.
        requeue: what answers another signal than SIGTERM and SIGINT where training does not.
        on_forced_end: what is done when the run ends without the first process's main thread.
    """

    def __init__(self, parent: int | None = None) -> None:
        super().__init__(name="lightning-mnn-signals", daemon=True)
        self.phase = Phase.BEFORE
        self.number = 0
        self.lost: int | None = None
        self.children: list[subprocess.Popen[bytes]] = []
        self.requeue: Callable[[], None] | None = None
        self.on_forced_end: Callable[[], None] | None = None
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(0.0)
        self._sender.settimeout(0.0)
        self._parent = parent
        self._peers: list[Peer] = []
        self._rank = 0
        self._since = 0.0  # when the first signal came
        self._deadline: float | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._receiver, selectors.EVENT_READ)

    @property
    def wakeup_fd(self) -> int:
        """Where Python is to write the signals that come."""
        return self._sender.fileno()

    @property
    def has_peers(self) -> bool:
        """Whether other processes are connected."""
        return bool(self._peers) or self.lost is not None

    def connected(self, peers: Sequence[Peer], rank: int, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """Listen to other processes from now on."""
        with self._lock:
            self._rank, self._peers, self.children = rank, list(peers), list(children)
            for peer in peers:
                self._selector.register(peer.connection, selectors.EVENT_READ, peer)
            if self.number:  # from before
                self._tell(News.STOP, self.number)

    def end_training(self, *, failed: bool) -> None:
        """Let requests that are answered rest, and take leave of the other processes; a failure tells them nothing."""
        with self._lock:
            self.phase, self._deadline = Phase.AFTER, None
            if not failed:
                self._tell(News.FAREWELL)
            for peer in list(self._peers):
                self._drop(peer)

    def close(self) -> None:
        """End the thread, and then the processes that this one has started, if they do not by themselves."""
        self._closed = True
        with suppress(OSError):
            self._sender.send(b"\0")
        self.join()
        for part in (self._selector, self._receiver, self._sender):
            part.close()
        deadline = time.monotonic() + _PATIENCE
        for child in self.children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(deadline - time.monotonic(), 0.0))
            child.kill()

    def release_after_fork(self) -> None:
        """Let go of all connections, in a child that was forked: they must end with this process."""
        for peer in self._peers:
            peer.connection.close()
        for end in (self._receiver, self._sender):
            end.close()

    def run(self) -> None:
        """Wait for signals and news."""
        while not self._closed:
            events = self._selector.select(self._timeout())
            with self._lock:
                for key, _ in events:
                    if key.data is None:
                        for number in self._receiver.recv(4096):
                            self._signalled(number)
                    elif key.data in self._peers:  # and has not been dropped meanwhile
                        self._hear(key.data)
                if self._parent is not None and os.getppid() != self._parent:
                    self._parent = None
                    self._lose(0)
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._deadline = None
                    self._give_up()

    def _timeout(self) -> float | None:
        looks = [_LOOK] if self._parent is not None else []
        deadline = self._deadline
        return min([*looks, *([max(deadline - time.monotonic(), 0.0)] if deadline is not None else [])], default=None)

    def _signalled(self, number: int, source: Peer | None = None) -> None:
        """Take note of a signal to this process, or of news of one to another."""
        if number not in STOPPING and (number == 0 or self.requeue is None):
            return  # to wake the thread, or for another handler
        now = time.monotonic()
        if self.number == 0:
            self.number, self._since = number, now
            if self.phase is not Phase.AFTER:
                request(number)
            self._tell(News.STOP, number, source)
            patience = _PATIENCE_BEFORE if self.phase is Phase.BEFORE else _PATIENCE
            self._deadline = now + (patience if number in STOPPING else _PATIENCE_REQUEUE)
            if self._rank == 0 and self.phase is Phase.TRAINING and number in STOPPING:
                _say(f"{_name(number)}: the run ends at its next step; a second signal ends it at once")
        elif now - self._since >= _AGAIN and number in STOPPING and self.number in STOPPING:
            self._tell(News.STOP_NOW, number, source)
            self._end(128 + number)

    def _hear(self, peer: Peer) -> None:
        told = peer.hear()
        if told is None:
            self._drop(peer)
            self._lose(peer.rank)
            return
        news, number = told
        if news is News.STOP:
            self._signalled(number, peer)
        elif news is News.STOP_NOW:
            self._tell(News.STOP_NOW, number, peer)
            self._end(128 + number)
        elif news is News.LOST:
            self._lose(number)
        elif news is News.FAREWELL:
            self._drop(peer)

    def _lose(self, rank: int) -> None:
        """Another process is gone without a farewell: this one cannot go on."""
        if self.lost is not None or self.phase is Phase.AFTER:
            return
        self.lost = rank
        self._tell(News.LOST, rank)
        self._deadline = time.monotonic() + _GRACE
        if not self.number and 0 in (rank, self._rank):
            _say(f"error: process {rank} of the run is gone (an error, kill -9, no memory): process {self._rank} ends")

    def _give_up(self) -> None:
        """End without the main thread."""
        if self.requeue is not None and self.number not in (0, *STOPPING):
            with suppress(Exception, SystemExit):
                self.requeue()
            return
        if self.phase is Phase.TRAINING and self._rank == 0 and self.on_forced_end is not None:
            with suppress(Exception):  # of what the main thread is doing
                self.on_forced_end()
        self._end(128 + self.number if self.number else 1)

    def _end(self, code: int) -> None:
        for child in self.children:
            with suppress(OSError):
                child.kill()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)

    def _tell(self, news: News, number: int = 0, source: Peer | None = None) -> None:
        for peer in self._peers:
            if peer is not source:
                peer.tell(news, number)

    def _drop(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()


def _say(words: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{words}\n")
        sys.stderr.flush()


def _name(number: int) -> str:
    return signal.Signals(number).name
