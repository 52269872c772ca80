"""Reading and writing files: atomic writes, file locks, and errors that name the file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence


_RESTORE = "restore it, or start again in another folder"


class DamagedFileError(ValueError):
    """A file does not contain what it should: it was truncated or changed, or is of another kind.

    Args:
        path: of the file.
        reason: what is wrong with it.
        remedy: what to do.

    >>> print(DamagedFileError(Path("a/plan.json"), "it is empty", "choose another folder"))
    a/plan.json is damaged (it is empty): choose another folder
    """

    def __init__(self, path: Path, reason: str, remedy: str = _RESTORE) -> None:
        super().__init__(f"{relative(path)} is damaged ({reason}): {remedy}")
        self.path = path
        self.reason = reason
        self.remedy = remedy

    @override
    def __reduce__(self) -> tuple[Any, ...]:  # so that it can be sent to another process
        return type(self), (self.path, self.reason, self.remedy)


def relative(path: Path) -> Path:
    """A path as messages show it: relative to the current folder if it is inside that folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextmanager
def whole_file(path: Path, *, writes: bool = True, durable: bool = True) -> Iterator[Path]:
    """A context that writes a file atomically: it yields a temporary path, and renames it to ``path`` at the end.

    If writing fails, the temporary file is removed. A file named ``path`` is always complete and on disk, also after a
    kill, a power cut or on a full disk.

    Args:
        path: the file to write.
        writes: whether this process writes; the other processes of a collective write do not touch the file.
        durable: whether the file must survive a power cut; False saves the wait for the disk.

    Raises:
        OSError: the file cannot be written; the error has the path.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a.txt")
    >>> with whole_file(path) as unfinished:
    ...     _ = unfinished.write_text("all of it")
    >>> [found.name for found in path.parent.iterdir()]
    ['a.txt']
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        yield unfinished
        if writes:
            if durable:
                with unfinished.open("rb+") as file:
                    to_disk(file)
            unfinished.replace(path)
    except BaseException as error:
        if writes:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def to_disk(file: IO[bytes]) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file atomically, as :func:`whole_file` does."""
    with whole_file(path, durable=durable) as unfinished:
        unfinished.write_bytes(content)


def write_json(path: Path, content: dict[str, Any], *, durable: bool = True) -> None:
    """Write JSON atomically; infinite and undefined numbers become null."""
    write_bytes(path, json_text(content).encode(), durable=durable)


def json_text(content: dict[str, Any]) -> str:
    """JSON text; infinite and undefined numbers become null.

    >>> json_text({"a": [1, math.inf]}).split()
    ['{', '"a":', '[', '1,', 'null', ']', '}']
    """
    return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table atomically; its columns are the first row's keys, and None becomes an empty field."""
    with whole_file(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_json(path: Path, needs: Collection[str] = (), remedy: str = _RESTORE) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        needs: keys that the object must have.
        remedy: what the user should do if the file is damaged, for the error message.

    Raises:
        DamagedFileError: the file is not JSON, is not an object, or lacks one of the keys.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFileError(path, f"it is not JSON: {error}", remedy) from error
    if not isinstance(content, dict):
        raise DamagedFileError(path, "it is not a JSON object", remedy)
    if missing := [key for key in needs if key not in content]:
        raise DamagedFileError(path, f"it lacks {', '.join(missing)}", remedy)
    return content


def read_csv(path: Path, needs: Collection[str] = (), remedy: str = _RESTORE) -> list[dict[str, str]]:
    """The rows of a CSV table, keyed by the column names in its first line; an incomplete last line is left out.

    Args:
        path: the file.
        needs: columns that the table must have.
        remedy: what the user should do if the file is damaged, for the error message.

    Raises:
        DamagedFileError: the file is not text, a row has more or fewer fields than there are columns, or a column is
            missing.
    """
    rows: list[dict[str, str]] = []
    try:
        text = path.read_bytes().decode()
        table = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), strict=True)
        for row in table:
            if None in row or None in row.values():
                raise DamagedFileError(path, f"line {table.line_num} has a wrong number of fields", remedy)
            rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DamagedFileError(path, f"it is not a table: {error}", remedy) from error
    if missing := [name for name in needs if name not in (table.fieldnames or ())]:
        raise DamagedFileError(path, f"it lacks the column {', '.join(missing)}", remedy)
    return rows


def check_archive(path: Path, remedy: str = _RESTORE) -> None:
    """Check the checksum of every entry of a zip file, such as a torch checkpoint; torch itself does not check them.

    Args:
        path: the file.
        remedy: what the user should do if the file is damaged, for the error message.

    Raises:
        DamagedFileError: the file is not a zip file, was truncated, or a checksum is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        reason = f"it is not a torch checkpoint, or it was truncated or changed: {error}"
        raise DamagedFileError(path, reason, remedy) from error
    if broken is not None:
        raise DamagedFileError(path, f"the checksum of its entry {broken} is wrong", remedy)


def finite(value: Any) -> Any:
    """A value for JSON: infinite and undefined numbers in it are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differences(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The differences between two nested dictionaries as text, with dotted names; empty if there are none.

    >>> differences({"data": {"seed": 1, "size": 5}}, {"data": {"seed": 2, "size": 5}})
    'data.seed is 1, not 2'
    """
    old, new = _flat(kept), _flat(asked)
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} is {old.get(name)}, not {new.get(name)}" for name in names)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, keyed by their dotted names."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {leaf: v for key, item in value.items() for leaf, v in _flat(item, f"{name}.{key}".lstrip(".")).items()}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context that adds a path to system errors that have none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """A context that only one process at a time can enter; the others wait.

    Args:
        path: an empty lock file; it may exist before and is not removed.
        on_wait: called once if this process has to wait for another one.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """A context that yields whether this process got the lock; it never waits.

    Args:
        path: an empty lock file; it is removed when the context ends.

    Yields:
        False if another process has the lock. True otherwise, also if the file system has no locks or is read-only.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError):
        yield True
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows cannot remove an open file
            path.unlink()  # before the release: a process that opened it earlier notices that and opens a new file
        lock.release()
