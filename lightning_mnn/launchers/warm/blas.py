"""The number of threads of OpenBLAS, which NumPy and SciPy bring along, after it is loaded.

OpenBLAS starts its threads when it is loaded, and a process with threads must not fork. So the server loads it with one
thread, and each job sets the number of its environment. (torch's libraries start theirs at the first product.)
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mnn.utilities.resources import cores

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMES = tuple(f"{prefix}openblas_{{}}_num_threads{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", ""))


def problem(wanted: str | None) -> str | None:
    """Why the number of threads cannot be set in this process; None: it can."""
    if _number(wanted) == 1 or all(_function(library, "set") is not None for library in _libraries()):
        return None
    return "a copy of OpenBLAS does not let its number of threads be set"


def set_threads(wanted: str | None) -> None:
    """Set the number of threads as OpenBLAS would read it from its environment: no more than there are cores."""
    number = _number(wanted)
    for library in _libraries() if number > 1 else ():
        if (function := _function(library, "set")) is not None:
            function(number)


def threads() -> list[int]:
    """The number of threads of each copy of OpenBLAS in this process."""
    found = [_function(library, "get") for library in _libraries()]
    return [int(function()) for function in found if function is not None]


def _number(wanted: str | None) -> int:
    """The number of threads for the value of its variable."""
    number = int(wanted) if wanted is not None and wanted.strip().isdigit() else 0
    return min(number, cores()) if number > 0 else cores()


def _libraries() -> Iterator[ctypes.CDLL]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "openblas" in line.rpartition("/")[2]}
    yield from (ctypes.CDLL(path) for path in sorted(paths) if ".so" in path)


def _function(library: ctypes.CDLL, verb: str) -> Any:
    found = (getattr(library, name.format(verb), None) for name in _NAMES)
    return next((function for function in found if function is not None), None)
