"""What the launchers have in common: one-line error messages, and signals collected while jobs run."""

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
    """Let a launcher's method raise errors that the user can fix as LaunchError."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            raise LaunchError(str(error)) from error

    return wrapped


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM within the context, instead of ending."""
    received: list[int] = []

    def collect(number: int, _: FrameType | None) -> None:
        received.append(number)

    try:
        before = {number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, the only one that receives signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
