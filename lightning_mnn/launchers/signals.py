"""What the launchers have in common: errors told in a line, and signals collected while jobs run."""

from __future__ import annotations

import contextlib
import functools
import signal
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hydra.errors import CompactHydraException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


P = ParamSpec("P")

R = TypeVar("R")


class LaunchError(CompactHydraException, ValueError):
    """A sweep cannot be launched; Hydra shows the message alone."""


def one_line_errors(method: Callable[P, R]) -> Callable[P, R]:
    """Let a launcher's method raise what a user can mend as a LaunchError."""

    @functools.wraps(method)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            raise LaunchError(str(error)) from error

    return told


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM meanwhile, instead of dying of them."""
    received: list[int] = []

    def hear(number: int, _: FrameType | None) -> None:
        received.append(number)

    try:
        before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, which alone hears signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
