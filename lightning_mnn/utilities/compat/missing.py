"""What is raised where a library lacks a private part that is used here."""

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
    """A library has no longer, or not yet, a private part that lightning-mnn uses.

    >>> print(MissingPartError("no-such-library", "Trainer._loop"))
    no-such-library (not installed) does not have Trainer._loop, a private part of it that lightning-mnn needs

    Args:
        library: the name that pip knows.
        part: what is missing.
        detail: what is there instead.
    """

    def __init__(self, library: str, part: str, detail: str = "") -> None:
        tested = _tested(library)
        super().__init__(
            f"{library} {_version(library)} does not have {part}, a private part of it that lightning-mnn needs"
            + (f" ({detail})" if detail else "")
            + (f": install a version that it was tested with, {tested}" if tested else "")
        )


def attribute(owner: Any, path: str, library: str) -> Any:
    """The attribute of an object at a path with dots.

    Raises:
        MissingPartError: there is none.

    >>> attribute(1j, "imag.real", "python")
    1.0
    """
    found = owner
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            of = getattr(owner, "__name__", type(owner).__name__)
            raise MissingPartError(library, f"{of}.{path}") from None
    return found


def private_part(library: str, part: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of functions that do nothing but use one part: what they raise where it is missing is named."""

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
    """A context in which something is tried that may fail in any way; a missing part is told all the same."""
    try:
        yield
    except MissingPartError:
        raise
    except Exception:  # noqa: BLE001, S110 (which is what it is for)
        pass


def disagree(library: str, part: str, found: object, expected: object) -> NoReturn:
    """Raise the error for a public property that does not say what was set by hand."""
    raise MissingPartError(library, part, f"it says {found!r} and not {expected!r}")


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "(not installed)"


def _tested(library: str) -> str | None:
    """The requirement by which lightning-mnn is installed."""
    try:
        needed = requires("lightning-mnn") or []
    except PackageNotFoundError:  # it runs from its sources
        return None
    plain = (one.partition(";")[0].strip() for one in needed)
    return next((one for one in plain if re.match(rf"{re.escape(library)}[<>=~!]", one)), None)
