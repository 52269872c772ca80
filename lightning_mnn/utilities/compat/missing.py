"""The error for a library that lacks a private part that lightning-mnn uses."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
R = TypeVar("R")


class MissingPartError(RuntimeError):
    """A library does not have, or no longer has, a private part that lightning-mnn uses.

    >>> print(MissingPartError("no-such-library", "Trainer._loop"))
    no-such-library (not installed) does not have Trainer._loop, a private part of it that lightning-mnn needs

    Args:
        library: its name for pip.
        part: the missing part.
        detail: what was found instead.
    """

    def __init__(self, library: str, part: str, detail: str = "") -> None:
        tested = _tested(library)
        super().__init__(
            f"{library} {_version(library)} does not have {part}, a private part of it that lightning-mnn needs"
            + (f" ({detail})" if detail else "")
            + (f": install a version that it was tested with, {tested}" if tested else "")
        )


def attribute(owner: Any, path: str, library: str) -> Any:
    """The attribute of an object at a dotted path.

    Raises:
        MissingPartError: there is no such attribute.

    >>> attribute(1j, "imag.real", "python")
    1.0
    """
    found = owner
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            owner_name = getattr(owner, "__name__", type(owner).__name__)
            raise MissingPartError(library, f"{owner_name}.{path}") from None
    return found


def private_part(library: str, part: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for functions that only use one private part: their errors become a MissingPartError."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (AttributeError, ImportError, KeyError, TypeError) as error:
                raise MissingPartError(library, part, str(error)) from error

        return guarded

    return decorate


@contextmanager
def ignored_errors() -> Iterator[None]:
    """A context that ignores all exceptions except MissingPartError."""
    try:
        yield
    except MissingPartError:
        raise
    except Exception:  # noqa: BLE001, S110 (this is its purpose)
        pass


def disagree(library: str, part: str, found: object, expected: object) -> NoReturn:
    """Raise the error for a public property whose value differs from what was set through a private part."""
    raise MissingPartError(library, part, f"it is {found!r} and not {expected!r}")


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "(not installed)"


def _tested(library: str) -> str | None:
    """The requirement of lightning-mnn for a library; None if it is not known."""
    try:
        needed = requires("lightning-mnn") or []
    except PackageNotFoundError:  # it runs from a source folder
        return None
    plain = (one.partition(";")[0].strip() for one in needed)
    return next((one for one in plain if re.match(rf"{re.escape(library)}[<>=~!]", one)), None)
