"""A thread that notices signals and the death of other processes, even while the main thread waits in a collective."""

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
_AGAIN = 1.0  # seconds within which a second signal counts as the same one: `timeout` sends each twice
_PATIENCE = 8.0  # seconds for training to end on a request
_PATIENCE_BEFORE = 2.0  # the same before training
_PATIENCE_REQUEUE = 30.0  # the same for requeueing a SLURM job: SLURM itself gives minutes
_GRACE = 5.0  # seconds for the main thread to fail by itself when another process is gone
_PARENT_INTERVAL = 1.0  # seconds between two checks of the parent process


class Phase(Enum):
    """Phase of a run."""

    BEFORE = auto()  # before training: a request raises an exception in the main thread
    TRAINING = auto()  # a request ends training at a step
    AFTER = auto()  # after training: the remaining work is finished


class Watch(threading.Thread):
    """Records requests to stop, forwards them to the run's other processes, and checks that they are answered.

    A second signal ends the process at once. The thread also ends the process without its main thread if that does not
    answer a request in time, or if another process of the run is gone and the main thread neither fails nor ends.

    Args:
        parent: id of the process whose death ends this one; None: none.

    Attributes:
        phase: phase of the run.
        number: number of the first signal that reached any process of the run; 0: none did.
        lost: rank of a process that is gone; None: none is.
        children: processes that this one has started; they end with it.
        requeue: called for a signal other than SIGTERM and SIGINT if training does not answer it.
        on_forced_end: called when the run ends without the main thread of the first process.
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
        self._since = 0.0  # time of the first signal
        self._deadline: float | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._receiver, selectors.EVENT_READ)

    @property
    def wakeup_fd(self) -> int:
        """File descriptor to which Python writes the numbers of signals."""
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
            if self.number:  # it came before the connections
                self._broadcast(News.STOP, self.number)

    def end_training(self, *, failed: bool) -> None:
        """Cancel pending requests and say farewell to the other processes; after a failure they get no message."""
        with self._lock:
            self.phase, self._deadline = Phase.AFTER, None
            if not failed:
                self._broadcast(News.FAREWELL)
            for peer in list(self._peers):
                self._drop(peer)

    def close(self) -> None:
        """End the thread, then the processes that this one has started, if they do not end by themselves."""
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
        """Close all connections in a forked child: they must end with this process."""
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
                            self._handle_signal(number)
                    elif key.data in self._peers:  # unless it was dropped meanwhile
                        self._receive(key.data)
                if self._parent is not None and os.getppid() != self._parent:
                    self._parent = None
                    self._handle_loss(0)
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._deadline = None
                    self._force_end()

    def _timeout(self) -> float | None:
        waits = [_PARENT_INTERVAL] if self._parent is not None else []
        deadline = self._deadline
        return min([*waits, *([max(deadline - time.monotonic(), 0.0)] if deadline is not None else [])], default=None)

    def _handle_signal(self, number: int, source: Peer | None = None) -> None:
        """Record a signal to this process, or a message about a signal to another."""
        if number not in STOPPING and (number == 0 or self.requeue is None):
            return  # only wakes the thread, or is for another handler
        now = time.monotonic()
        if self.number == 0:
            self.number, self._since = number, now
            if self.phase is not Phase.AFTER:
                request(number)
            self._broadcast(News.STOP, number, source)
            patience = _PATIENCE_BEFORE if self.phase is Phase.BEFORE else _PATIENCE
            self._deadline = now + (patience if number in STOPPING else _PATIENCE_REQUEUE)
            if self._rank == 0 and self.phase is Phase.TRAINING and number in STOPPING:
                _print(f"{_name(number)}: the run ends at its next step; a second signal ends it at once")
        elif now - self._since >= _AGAIN and number in STOPPING and self.number in STOPPING:
            self._broadcast(News.STOP_NOW, number, source)
            self._end(128 + number)

    def _receive(self, peer: Peer) -> None:
        message = peer.receive()
        if message is None:
            self._drop(peer)
            self._handle_loss(peer.rank)
            return
        news, number = message
        if news is News.STOP:
            self._handle_signal(number, peer)
        elif news is News.STOP_NOW:
            self._broadcast(News.STOP_NOW, number, peer)
            self._end(128 + number)
        elif news is News.LOST:
            self._handle_loss(number)
        elif news is News.FAREWELL:
            self._drop(peer)

    def _handle_loss(self, rank: int) -> None:
        """Another process is gone without a farewell: this one cannot continue."""
        if self.lost is not None or self.phase is Phase.AFTER:
            return
        self.lost = rank
        self._broadcast(News.LOST, rank)
        self._deadline = time.monotonic() + _GRACE
        if not self.number and 0 in (rank, self._rank):
            _print(
                f"error: process {rank} of the run is gone (error, kill -9, out of memory): process {self._rank} ends"
            )

    def _force_end(self) -> None:
        """End without the main thread."""
        if self.requeue is not None and self.number not in (0, *STOPPING):
            with suppress(Exception, SystemExit):
                self.requeue()
            return
        if self.phase is Phase.TRAINING and self._rank == 0 and self.on_forced_end is not None:
            with suppress(Exception):  # any error: the main thread is still running
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

    def _broadcast(self, news: News, number: int = 0, source: Peer | None = None) -> None:
        for peer in self._peers:
            if peer is not source:
                peer.send(news, number)

    def _drop(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()


def _print(words: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{words}\n")
        sys.stderr.flush()


def _name(number: int) -> str:
    return signal.Signals(number).name
