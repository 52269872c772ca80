"""What a command adds to its folder, so that a refused command leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LOCK = "run.lock"  # in a folder while a process trains there

# Files of Hydra and the launchers, written before any job of a command starts.
_RECORDS = (".hydra", "multirun.yaml", "multirun.first.yaml", "sweep.json", "sweep.lock")

_RANKS = ("LOCAL_RANK", "NODE_RANK", "RANK", "SLURM_PROCID")  # each is 0 in the first process


class Footprint:
    """A folder as it is before a command works in it; it need not exist.

    Args:
        folder: folder of a run or a sweep.
        is_sweep: whether the folder is for several jobs, with a folder each.
    """

    def __init__(self, folder: Path, *, is_sweep: bool = False) -> None:
        self.folder = folder.absolute()
        self.is_sweep = is_sweep
        self._new = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self._was_empty = not _inside(self.folder)
        self._before = set(self._entries())
        self._records = {path: path.read_bytes() for path in _records(self.folder)}

    def remove(self) -> None:
        """Restore the folder; for a sweep only if no job has written more than Hydra's record.

        If another process works in the folder, nothing is removed.
        """
        if not self.folder.is_dir() or (self.folder / LOCK).exists():
            return
        if self.is_sweep and not self._contains_only_records():
            return
        for path in set(self._entries()) - self._before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path, content in self._records.items():
            path.write_bytes(content)
        for path in self._new:  # from the folder upwards
            if path.is_dir() and not _inside(path):
                path.rmdir()

    def _entries(self) -> list[Path]:
        """What the command may have added; in a folder that was not empty, only Hydra's record and W&B's files."""
        if self._was_empty:
            return _inside(self.folder)
        own = [path for path in (self.folder / ".hydra", self.folder / "wandb") if path.exists()]
        return [*own, *(path for folder in own for path in _inside(folder)), *self.folder.glob("*.log")]

    def _contains_only_records(self) -> bool:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return all(
            path.suffix == ".log" or any(part in _RECORDS for part in path.relative_to(self.folder).parts)
            for path in files
        )


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _records(folder: Path) -> list[Path]:
    return [path for path in (*_inside(folder / ".hydra"), folder / "multirun.yaml") if path.is_file()]


_current: Footprint | None = None


def begin(folder: Path, *, is_sweep: bool) -> None:
    """Store the state of a folder before the present command works in it; only the first process of a run does this."""
    global _current  # noqa: PLW0603 (a process has one command)
    if all(os.environ.get(variable, "0") == "0" for variable in _RANKS):
        _current = Footprint(folder, is_sweep=is_sweep)


def keep() -> None:
    """Keep what the command has written and will write: its work has started."""
    global _current  # noqa: PLW0603
    _current = None


def is_kept() -> bool:
    """Whether the command's work has started."""
    return _current is None


def remove() -> None:
    """Restore the folder, unless the command's work has started."""
    if _current is not None:
        _current.remove()
    keep()
