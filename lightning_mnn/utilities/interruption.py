"""Stopping long work on request, where nothing is left half done.

A request may come at any time, from a signal handler or a thread, and is only noted. Long work calls
:func:`safe_point` between its pieces. Of several processes that work in step none may stop alone, or the others would
wait for it: they exchange their requests when they exchange results, and stop together.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LONGEST = 100  # calls from one exchange to the next, at most: the next ones may take longer


class Interrupted(SystemExit):
    """Work was stopped on request.

    Its exit code is the one that a shell reports for a process that the signal ended.

    >>> Interrupted(15).code
    143

    Args:
        number: of the signal that requested it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)  # by which a copy is made for another process
        self.number = number
        self.code = 128 + number


class TimeLimitError(Exception):
    """Work took longer than :func:`time_limit` allows."""


@dataclass
class _State:
    requested: int = 0
    stopping: int = 0
    alone: bool = False
    deadline: float = math.inf  # by the monotonic clock


_state = _State()


def request(number: int) -> None:
    """Note that a signal asks this process to stop; the first one counts."""
    _state.requested = _state.requested or number


def requested() -> int:
    """The signal that asked this process to stop; 0: none did."""
    return _state.requested


def stop_at_this_step(number: int) -> None:
    """Note that work was left out at this step, which a resumed run has to do: training must not go on."""
    _state.stopping = number


def stopping() -> int:
    """The signal for which training must not go on from this step, the same on all processes; 0: it may."""
    return _state.stopping


def forget() -> None:
    """Drop all requests."""
    _state.requested = _state.stopping = 0


def safe_point() -> None:
    """Stop here, if that was requested or the time is up, and no other process waits for this one.

    Raises:
        Interrupted: it was requested.
        TimeLimitError: the time is up.

    >>> safe_point()
    >>> request(2)
    >>> try:
    ...     safe_point()
    ... except Interrupted as stop:
    ...     print(stop.number)
    2
    >>> forget()
    """
    if (_state.requested or is_over_time()) and (_state.alone or not _works_in_step()):
        stop_if_any([_state.requested])
        raise TimeLimitError


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Inside, :func:`safe_point` raises an error once so many seconds have passed; None: no limit.

    >>> with time_limit(0.0):
    ...     safe_point()
    Traceback (most recent call last):
    lightning_mnn.utilities.interruption.TimeLimitError
    """
    before, _state.deadline = _state.deadline, math.inf if seconds is None else time.monotonic() + seconds
    try:
        yield
    finally:
        _state.deadline = before


def is_over_time() -> bool:
    """Whether the time of :func:`time_limit` is up."""
    return _state.deadline < math.inf and time.monotonic() >= _state.deadline


@contextmanager
def alone() -> Iterator[None]:
    """Inside, :func:`safe_point` may stop one process of several: the caller tells the others."""
    before, _state.alone = _state.alone, True
    try:
        yield
    finally:
        _state.alone = before


def stop_if_any(numbers: Iterable[int]) -> None:
    """Stop, if any of the processes was asked to; all of them call this with the same numbers.

    Args:
        numbers: what :func:`requested` returned on each process.

    Raises:
        Interrupted: one was.
    """
    number = max(numbers)
    if number:
        raise Interrupted(number)


class Pace:
    """How often processes that work in step ask one another: about every so many seconds, by the first one's clock.

    Args:
        seconds: from one exchange to the next, about.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart(1)

    def restart(self, pause: int) -> None:
        """Begin to count anew; the next exchange is after ``pause`` calls of :meth:`is_time`."""
        self.pause = self._left = pause
        self._since = time.monotonic()

    def is_time(self) -> bool:
        """Count a call; whether this is the one for an exchange, the same on all processes."""
        self._left -= 1
        return self._left <= 0

    def proposal(self) -> int:
        """Calls until the next exchange, of which all take that of the first process."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        return max(1, min(int(self.pause * self.seconds / elapsed), _LONGEST))


def _works_in_step() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
