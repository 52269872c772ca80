"""Lockstep: many runs in one process, whose optimiser steps are computed together as batched products.

Each run is a whole run of its own, with its Trainer, callbacks, loggers and files, in a thread. Only one thread works
at a time. A run that comes to its next bundle of optimiser steps waits; when all do, the steps of runs with equal
shapes are computed in batches (see :mod:`lightning_mnn.model.batched_steps`), and the runs go on. So a run in a batch
differs from the same run alone by rounding at most, and a run that ends, early or by an error, leaves the others as
they are.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from lightning_mnn.model.batched_steps import Steps, take_together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_this_thread = threading.local()


class Member:
    """One run: a function in a thread, which works only while it has the turn.

    Args:
        work: the run; it must handle its own errors.
        on_turn: called before each turn, with the member's number.
        after_turn: called after each turn, also with the number.
        number: of the member.
    """

    def __init__(
        self,
        work: Callable[[], object],
        number: int = 0,
        on_turn: Callable[[int], object] = lambda _: None,
        after_turn: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.steps: Steps | None = None
        self._work, self._number, self._on_turn, self._after_turn = work, number, on_turn, after_turn
        self._starts, self._pauses = threading.Lock(), threading.Lock()  # released by the other side
        self._starts.acquire()
        self._pauses.acquire()
        self._thread = threading.Thread(target=self._run, name=f"run {number}", daemon=True)
        self._is_started = False

    def turn(self) -> bool:
        """Let the run work until it waits for its next steps; whether it does, or has ended."""
        self._on_turn(self._number)
        self.steps = None
        try:
            if self._is_started:
                self._starts.release()
            else:
                self._is_started = True
                self._thread.start()
            self._pauses.acquire()
        finally:
            self._after_turn(self._number)
        if self.steps is None:
            self._thread.join()
        return self.steps is not None

    def wait_for(self, steps: Steps) -> None:
        """(In the run's thread) give up the turn until the steps are done."""
        self.steps = steps
        self._pauses.release()
        self._starts.acquire()

    def _run(self) -> None:
        _this_thread.member = self
        try:
            self._work()
        finally:
            self.steps = None
            self._pauses.release()


def lockstep() -> Member | None:
    """The member whose thread this is; None: this run is alone."""
    return getattr(_this_thread, "member", None)


def run_in_lockstep(
    works: Iterable[Callable[[], object]],
    *,
    max_replicas: int,
    on_turn: Callable[[int], object] = lambda _: None,
    after_turn: Callable[[int], object] = lambda _: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Run functions that train networks, at most ``max_replicas`` at a time, and compute their steps together.

    Args:
        works: the functions, in the order in which they start.
        max_replicas: how many run at the same time; when one ends, the next starts.
        on_turn: called with a function's number before it works for a while.
        after_turn: called with its number after that.
        is_stopped: whether no further function is to start.

    >>> run_in_lockstep([lambda: print("a"), lambda: print("b")], max_replicas=2)
    a
    b
    """
    ahead = deque(Member(work, number, on_turn, after_turn) for number, work in enumerate(works))
    waiting: list[Member] = []
    while waiting or ahead:
        while ahead and len(waiting) < max_replicas and not is_stopped():
            if (member := ahead.popleft()).turn():
                waiting.append(member)
        if is_stopped():
            ahead.clear()
        ended = set()
        for together in take_together([_steps_of(member) for member in waiting]):
            ended |= {index for index in together if not waiting[index].turn()}
        waiting = [member for index, member in enumerate(waiting) if index not in ended]


def _steps_of(member: Member) -> Steps:
    assert member.steps is not None  # noqa: S101 (for the type checker)
    return member.steps
