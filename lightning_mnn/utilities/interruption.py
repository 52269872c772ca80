"""Stopping long work on request, at points where nothing is half done.

A request may arrive at any time, from a signal handler or a thread, and is only recorded. Long work calls
:func:`safe_point` between its pieces. Of several processes that work in step, none may stop alone, because the others
would wait for it: they exchange their requests when they exchange results, and stop together.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MAX_PAUSE = 100  # calls from one exchange to the next, at most, because later calls may take longer


class Interrupted(SystemExit):
    """Work was stopped on request.

    Its exit code is the one that a shell reports for a process that was ended by the signal.

    >>> Interrupted(15).code
    143

    Args:
        number: of the signal that requested it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)  # pickle makes a copy from these arguments
        self.number = number
        self.code = 128 + number


class TimeLimitError(Exception):
    """Work took longer than :func:`time_limit` allows."""


@dataclass
class _State:
    requested: int = 0
    stopping: int = 0
    alone: bool = False
    deadline: float = math.inf  # of the monotonic clock
    on_safe_point: Callable[[], None] | None = None


_state = _State()


def request(number: int) -> None:
    """Record that a signal asks this process to stop; only the first one counts."""
    _state.requested = _state.requested or number


def requested() -> int:
    """The number of the signal that asked this process to stop; 0 if none did."""
    return _state.requested


def stop_at_this_step(number: int) -> None:
    """Record that work was skipped at this step, so training must stop here: a resumed run has to do that work."""
    _state.stopping = number


def stopping() -> int:
    """The signal because of which training must stop at this step, the same on all processes; 0: it may continue."""
    return _state.stopping


def forget() -> None:
    """Clear all requests."""
    _state.requested = _state.stopping = 0


def safe_point() -> None:
    """Stop here if a stop was requested or the time is up, provided that no other process waits for this one.

    Raises:
        Interrupted: a stop was requested.
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
    if _state.on_safe_point is not None:
        _state.on_safe_point()
    if (_state.requested or is_over_time()) and (_state.alone or not _works_in_step()):
        stop_if_any([_state.requested])
        raise TimeLimitError


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """A context in which :func:`safe_point` raises an error after this many seconds; None: no limit.

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


@contextmanager
def shorter_time_limit(seconds: float | None) -> Iterator[None]:
    """A :func:`time_limit` within another one, which stays; None: no other limit.

    >>> with time_limit(0.0), shorter_time_limit(1.0):
    ...     is_over_time()
    True
    """
    left = seconds_left()
    with time_limit(min(left, math.inf if seconds is None else seconds)):
        yield


def seconds_left() -> float:
    """Seconds to the end of the :func:`time_limit`; infinite without one, negative after it."""
    return _state.deadline - time.monotonic()


@contextmanager
def at_safe_points(action: Callable[[], None]) -> Iterator[None]:
    """A context in which each :func:`safe_point` runs an action, which must be short.

    >>> with at_safe_points(lambda: print("still at work")):
    ...     safe_point()
    still at work
    """
    before, _state.on_safe_point = _state.on_safe_point, action
    try:
        yield
    finally:
        _state.on_safe_point = before


def is_over_time() -> bool:
    """Whether the limit of :func:`time_limit` is exceeded."""
    return _state.deadline < math.inf and time.monotonic() >= _state.deadline


@contextmanager
def alone() -> Iterator[None]:
    """A context in which :func:`safe_point` may stop one process of several: the caller notifies the others."""
    before, _state.alone = _state.alone, True
    try:
        yield
    finally:
        _state.alone = before


def stop_if_any(numbers: Iterable[int]) -> None:
    """Stop if any of the processes was asked to; all of them call this with the same numbers.

    Args:
        numbers: the value of :func:`requested` on each process.

    Raises:
        Interrupted: one of them was asked to stop.
    """
    number = max(numbers)
    if number:
        raise Interrupted(number)


class Pace:
    """Decides how often processes that work in step exchange requests, by the first process's clock.

    Args:
        seconds: approximate time from one exchange to the next.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart(1)

    def restart(self, pause: int) -> None:
        """Restart the count; the next exchange is after ``pause`` calls of :meth:`is_time`."""
        self.pause = self._left = pause
        self._since = time.monotonic()

    def is_time(self) -> bool:
        """Count this call, and return whether it is time for an exchange; the same on all processes."""
        self._left -= 1
        return self._left <= 0

    def proposal(self) -> int:
        """Calls until the next exchange; all processes use the value of the first one."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        return max(1, min(int(self.pause * self.seconds / elapsed), _MAX_PAUSE))


def _works_in_step() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
