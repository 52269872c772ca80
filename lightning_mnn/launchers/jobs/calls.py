"""What a job's process has to do: written by the launcher, read by :mod:`lightning_mnn.launchers.jobs.main`."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
from typing_extensions import override

from lightning_mnn.utilities.compat.python_internals import preparation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class TaskReference:
    """A function by its module, qualified name and number of decorators; one without these by its value.

    The job imports the module, or the script that was started, again: what that registers is registered in the job too.
    """

    module: str
    name: str
    depth: int
    value: Callable[..., Any] | None = None

    @classmethod
    def to(cls, function: Callable[..., Any]) -> TaskReference:
        """A reference to a function."""
        module, name = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
        found, depth = _find_by_name(module, name), 0
        while found is not None and found is not function:
            found, depth = getattr(found, "__wrapped__", None), depth + 1
        return cls(module, name, depth, function if found is None else None)

    def resolve(self) -> Callable[..., Any]:
        """The function."""
        found = self.value
        if found is None:
            __import__(self.module)
            found = _find_by_name(self.module, self.name)
            for _ in range(self.depth):
                found = found.__wrapped__
        return found


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles classes of the started script by name: the job imports the script, and must not get its classes twice."""

    @override
    def reducer_override(self, obj: Any) -> Any:
        if (
            isinstance(obj, type)
            and obj.__module__ == "__main__"
            and _find_by_name("__main__", obj.__qualname__) is obj
        ):
            return obj.__qualname__
        return super().reducer_override(obj)


def write_call(path: Path, call: dict[str, Any], watched: int) -> None:
    """Write what a job has to do, after what its process needs first.

    Args:
        path: path of the file.
        call: arguments for Hydra's ``run_job``.
        watched: file descriptor, in the job's process, that reaches its end when the launcher ends.
    """
    with path.open("wb") as file:
        pickle.dump(preparation() | {"watched": watched}, file)
        _Pickler(file).dump(call)


def _is_imported_by_jobs() -> bool:
    """Whether jobs import the program that was started; not a package's `__main__` or an interactive session."""
    spec, path = (getattr(sys.modules["__main__"], key, None) for key in ("__spec__", "__file__"))
    return path is not None if spec is None else spec.name.rpartition(".")[2] != "__main__"


def _find_by_name(module: str, name: str) -> Any:
    if module == "__main__" and not _is_imported_by_jobs():
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
