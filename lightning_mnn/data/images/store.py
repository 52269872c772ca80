"""A store of labelled images: made once from a tree of image files, then mapped into memory.

Shapes: N images, d0 = H · W · C numbers each.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import shutil
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lightning_mnn.data.loaders.rows import some_blocks
from lightning_mnn.utilities.files import locked, naming
from lightning_mnn.utilities.resources import cores
from lightning_mnn.utilities.validation import one_of, positive_integer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

MODES = {"rgb": "RGB", "grey": "L"}
_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".gif", ".ppm")
_BLOCK = 512  # images that a worker takes at a time, and that share a checksum
_IMAGES, _CLASSES, _INDEX, _SKIPPED = "images.bin", "classes.npy", "index.json", "skipped.txt"
_UNFINISHED, _JOURNAL, _LOCK = "images.bin.tmp", "journal.jsonl", "lock"
_OF_A_BEGINNING = {_JOURNAL, _JOURNAL + ".tmp", _LOCK}


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        images: uint8 (N, d0), an array or a ``np.memmap``: rows are images, flattened H · W · C.
        classes: int64 (N,): indices into the names.
        names: of the classes.
        digest: of the images, where it is known without reading them.
    """

    images: NDArray[np.uint8]
    classes: NDArray[np.int64]
    names: tuple[str, ...]
    digest: str | None = None


def build_store(
    root: str | Path,
    folder: str | Path,
    *,
    size: int = 64,
    colour: str = "rgb",
    classes: Sequence[str] | None = None,
    workers: int | None = None,
    skip_corrupt: bool = False,
) -> LabelledImages:
    """The images ``root/<class>/**/<image>``, sorted by class and path, from a store that is made if it is not there.

    Of each image the largest square in the middle is averaged down to size × size pixels (a box filter). Of an
    animation it is the first frame; transparency and rotation marks are ignored. Hidden files and files without an
    image's suffix are left out, and so are classes without images; links are followed.

    Making a store may be killed at any time and goes on where it was when it is called again; a process that finds
    another at it waits. A finished store needs the tree no more, which may be gone, and does not see what is changed in
    it: delete the folder to make it again. It is not taken for a store of another tree that is there.

    Args:
        root: folder with one folder a class.
        folder: of the store: its own.
        size: pixels of a side.
        colour: "rgb" or "grey".
        classes: names of the classes to take, a number for the name that reads so; None: all.
        workers: threads that decode images; None: one a processor, 16 at most.
        skip_corrupt: leave out images that cannot be read and name them in ``skipped.txt``; while that is done, the
            disk holds the images twice. A store that lacks images is not taken without it.

    Raises:
        ValueError: a bad argument, or a tree without images.
        FileNotFoundError: no folder ``root``.
        FileExistsError: the folder holds something else, or a store made otherwise; the message names what differs.
        OSError: images that cannot be read, or that the store was made without; too little room on the disk; a store
            that is damaged.

    >>> import tempfile
    >>> tree = Path(tempfile.mkdtemp())
    >>> for name, grey in (("cats", 10), ("dogs", 20)):
    ...     (tree / name).mkdir()
    ...     Image.new("L", (30, 20), grey).save(tree / name / "1.png")
    >>> store = build_store(tree, tempfile.mkdtemp(), size=2, colour="grey", workers=1)
    >>> store.images.tolist(), store.classes.tolist(), store.names
    ([[10, 10, 10, 10], [20, 20, 20, 20]], [0, 1], ('cats', 'dogs'))
    """
    size = positive_integer("size", size)
    one_of("colour", colour, sorted(MODES))
    workers = min(cores(), 16) if workers is None else positive_integer("workers", workers)
    chosen = None if classes is None else sorted(map(str, classes))
    root, folder = Path(root).expanduser(), Path(folder).expanduser()
    if not (folder / _INDEX).exists() or (folder / _JOURNAL).exists():
        tree = list_images(root, chosen)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / _LOCK, lambda: _say(f"another process is making the store {folder}: waiting for it")):
            if not (folder / _INDEX).exists():
                _Build(root, folder, tree, size, colour).run(workers, skip_corrupt=skip_corrupt)
            for left in (_UNFINISHED, _JOURNAL):
                (folder / left).unlink(missing_ok=True)
    asked: dict[str, Any] = {"size": size, "colour": colour}
    if chosen is not None:
        asked["names"] = chosen
    index = _read_index(folder)
    _check_same(folder, index, asked)
    made_of = index.get("root", str(root.resolve()))
    if root.is_dir() and made_of != str(root.resolve()):
        raise FileExistsError(
            f"the store {folder} was made of another tree: {made_of}, not {root.resolve()}: "
            "choose another folder or delete it (or, if the tree was but moved, keep to its old name as root)"
        )
    if root.is_dir() and (unknown := [name for name in index["names"] if not (root / name).is_dir()]):
        raise FileExistsError(
            f"the store {folder} was made of another tree: {root.absolute()} has no {reprlib.repr(unknown)}: "
            "choose another folder or delete it"
        )
    if index.get("skipped", 0) and not skip_corrupt:
        raise OSError(
            f"the store {folder} was made without {index['skipped']} images that could not be read, which "
            f"{folder / _SKIPPED} names: allow that by skip_corrupt=true, or repair them and delete the store"
        )
    return open_store(folder)


def open_store(folder: str | Path, *, verify: bool = False) -> LabelledImages:
    """The labelled images of a finished store, mapped into memory.

    Args:
        folder: of the store.
        verify: read all images and compare their checksums, not only those of 16 blocks spread over them.

    Raises:
        FileNotFoundError: no finished store there.
        OSError: a file that is damaged; of the images, the message names the damaged block.
    """
    folder = Path(folder).expanduser()
    index = _read_index(folder)
    if zlib.crc32((folder / _CLASSES).read_bytes()) != index["classes_crc32"]:
        raise _damaged(folder, f"{_CLASSES} has another checksum")
    shape = index["count"], _row_bytes(index["size"], index["colour"])
    expected, found = shape[0] * shape[1], (folder / _IMAGES).stat().st_size
    if found != expected:
        raise _damaged(folder, f"{_IMAGES} has {found} bytes, not {expected}")
    images = np.memmap(folder / _IMAGES, np.uint8, "r", shape=shape)
    checksums = index["crc32"]
    with (folder / _IMAGES).open("rb") as file:  # beside the map, whose pages would stay in memory
        for block in range(len(checksums)) if verify else some_blocks(len(checksums)):
            first, last = block * index["block"], min((block + 1) * index["block"], shape[0]) - 1
            file.seek(first * shape[1])
            if zlib.crc32(file.read((last + 1 - first) * shape[1])) != checksums[block]:
                raise _damaged(folder, f"block {block}, images {first} to {last}, has another checksum")
    digest = hashlib.sha256(json.dumps([shape, checksums]).encode()).hexdigest()
    return LabelledImages(images, np.load(folder / _CLASSES, allow_pickle=False), tuple(index["names"]), digest)


def list_images(root: Path, classes: Sequence[str] | None = None) -> list[str]:
    """Paths, relative to the root, of the images ``<class>/**/<image>``, sorted by class and path.

    Args:
        root: folder with one folder a class.
        classes: names of the classes to take; None: all that hold images.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images, or none of a class that is asked for.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root.absolute()}: set data.root to a folder that holds one folder a class")
    folders = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = {name: sorted(_images_below(root, name)) for name in sorted(folders) if classes is None or name in classes}
    if classes is not None and (empty := [name for name in classes if not found.get(name)]):
        raise ValueError(f"no images of the classes {reprlib.repr(empty)} in {root.absolute()}")
    if not any(found.values()):
        raise ValueError(
            f"no images in {root.absolute()}: they are looked for in its folders, as {', '.join(_SUFFIXES)}"
        )
    return [path for paths in found.values() for path in paths]


def _images_below(root: Path, name: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error  # a folder that may not be read is not an empty one

    seen = set()
    for folder, below, files in os.walk(root / name, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above would lead round for ever
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(part for part in below if not part.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix()
        for file in files:
            if not file.startswith(".") and file.lower().endswith(_SUFFIXES):
                yield f"{prefix}/{file}"


@dataclass(frozen=True)
class _Block:
    """A line of the journal: a block whose bytes are on the disk.

    Attributes:
        block: its number.
        crc32: of its bytes.
        corrupt: what is wrong with images that could not be read, by path; their rows are zero.
    """

    block: int
    crc32: int
    corrupt: dict[str, str]


class _Build:
    """A store in the making: ``images.bin.tmp`` and a journal, the plan and then one line a block that is done.

    Images that could not be read may be removed or replaced before the next start: their blocks are done again.
    """

    def __init__(self, root: Path, folder: Path, tree: Sequence[str], size: int, colour: str) -> None:
        self.root = root
        self.folder = folder
        self.size = size
        self.colour = colour
        self.present = set(tree)
        plan, self.done = self._journalled()
        known = self.present.union(*(block.corrupt for block in self.done.values()))
        self.files = sorted(known, key=lambda file: (_class_of(file), file))
        self.names = sorted({_class_of(file) for file in self.files})
        self.num_blocks = -(-len(self.files) // _BLOCK)
        if plan is None:
            self._begin()
        else:
            _check_same(folder, plan, self._plan())

    def run(self, workers: int, *, skip_corrupt: bool) -> None:
        """Do what is left to do.

        Raises:
            OSError: images that cannot be read and are not to be skipped; the others are kept for the next start.
        """
        missing = [i for i in range(self.num_blocks) if i not in self.done or self.done[i].corrupt]
        self._check_room(len(missing) * _BLOCK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata in images that can be read
            self._decode(missing, workers)
        corrupt = {file: why for block in self.done.values() for file, why in block.corrupt.items()}
        unread = {file: why for file, why in sorted(corrupt.items()) if file in self.present}
        if unread and not skip_corrupt:
            raise OSError(
                f"{len(unread)} of {len(self.files)} images in {self.root.absolute()} cannot be read: "
                f"{_first(unread)}: replace or remove them, or leave them out by skip_corrupt=true; "
                "the others need not be read again"
            )
        if len(corrupt) == len(self.files):
            raise OSError(f"none of the {len(corrupt)} images in {self.root.absolute()} can be read: {_first(unread)}")
        self._finish([file not in corrupt for file in self.files], unread)

    def _plan(self) -> dict[str, Any]:
        listing = hashlib.sha256(b"\0".join(map(os.fsencode, self.files))).hexdigest()
        plan = {"size": self.size, "colour": self.colour, "names": self.names, "images": len(self.files)}
        return plan | {"root": str(self.root.resolve()), "listing": listing, "block": _BLOCK}

    def _journalled(self) -> tuple[dict[str, Any] | None, dict[int, _Block]]:
        """The plan and the finished blocks of a build that was interrupted."""
        journal, images = self.folder / _JOURNAL, self.folder / _UNFINISHED
        if not images.exists() and (self.folder / _IMAGES).exists() and journal.exists():
            (self.folder / _IMAGES).rename(images)  # interrupted when all was done but the index
        if not images.exists():
            return None, {}
        text = journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        os.truncate(journal, len(whole))  # a kill may have torn the last line
        plan, *lines = map(json.loads, whole.splitlines())
        return plan, {line["block"]: _Block(**line) for line in lines}

    def _begin(self) -> None:
        strangers = {path.name for path in self.folder.iterdir()} - _OF_A_BEGINNING
        if strangers:
            raise FileExistsError(
                f"{self.folder} holds {reprlib.repr(sorted(strangers))} and no store: choose a folder of its own"
            )
        _write(self.folder / _JOURNAL, _line(self._plan()))
        with (self.folder / _UNFINISHED).open("wb") as file:
            file.truncate(len(self.files) * _row_bytes(self.size, self.colour))

    def _decode(self, missing: Sequence[int], workers: int) -> None:
        work = partial(_decode, self.root, size=self.size, colour=self.colour, path=self.folder / _UNFINISHED)
        jobs = [partial(work, self.files[i * _BLOCK : (i + 1) * _BLOCK], start=i * _BLOCK) for i in missing]
        advance = _progress(len(self.files), (self.num_blocks - len(missing)) * _BLOCK)
        with (self.folder / _JOURNAL).open("ab") as journal, closing(_in_parallel(jobs, workers)) as results:
            for start, crc32, corrupt in results:
                block = _Block(start // _BLOCK, crc32, corrupt)
                self.done[block.block] = block
                journal.write(_line(asdict(block)))
                journal.flush()
                os.fsync(journal.fileno())
                advance(_BLOCK)

    def _finish(self, good: Sequence[bool], skipped: Collection[str]) -> None:
        unfinished, images = self.folder / _UNFINISHED, self.folder / _IMAGES
        if all(good):
            checksums = [self.done[block].crc32 for block in range(self.num_blocks)]
            unfinished.rename(images)
            (self.folder / _SKIPPED).unlink(missing_ok=True)  # of a start that was killed at its end
        else:
            checksums = self._compact(np.flatnonzero(good))
            _write(self.folder / _SKIPPED, b"".join(os.fsencode(file) + b"\n" for file in skipped))
        number = {name: label for label, name in enumerate(self.names)}
        files = [file for file, kept in zip(self.files, good, strict=True) if kept]
        with (self.folder / _CLASSES).open("wb") as file:
            np.save(file, np.array([number[_class_of(path)] for path in files], np.int64), allow_pickle=False)
            _to_disk(file)
        index = self._plan() | {"count": len(files), "skipped": len(skipped), "crc32": checksums}
        index["classes_crc32"] = zlib.crc32((self.folder / _CLASSES).read_bytes())
        _write(self.folder / _INDEX, _line(index))

    def _compact(self, rows: NDArray[np.intp]) -> list[int]:
        """Copy the good rows and return the checksums of their blocks."""
        self._check_room(len(rows))
        shape = len(self.files), _row_bytes(self.size, self.colour)
        everything = np.memmap(self.folder / _UNFINISHED, np.uint8, "r", shape=shape)
        checksums = []
        unfinished = self.folder / "compact.tmp"
        try:
            with naming(unfinished), unfinished.open("wb") as file:
                for start in range(0, len(rows), _BLOCK):
                    block = everything[rows[start : start + _BLOCK]]
                    checksums.append(zlib.crc32(block.data))
                    file.write(block.data)
                _to_disk(file)
            unfinished.rename(self.folder / _IMAGES)
        finally:
            unfinished.unlink(missing_ok=True)
        return checksums

    def _check_room(self, rows: int) -> None:
        needed, free = rows * _row_bytes(self.size, self.colour), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder} needs {needed / 1e9:.1f} GB more and has {free / 1e9:.1f} GB left: "
                "choose a store on another disk, or a smaller size"
            )


def _decode(
    root: Path, files: Sequence[str], *, start: int, size: int, colour: str, path: Path
) -> tuple[int, int, dict[str, str]]:
    """Write images to their rows of the file; returns the first row, their checksum and what could not be read."""
    rows = np.zeros((len(files), _row_bytes(size, colour)), np.uint8)
    corrupt = {}
    for row, file in enumerate(files):
        name = str(root / file)
        try:
            rows[row] = _pixels(name, size, MODES[colour])
        except Exception as error:  # noqa: BLE001 (what readers of many formats raise on broken files)
            corrupt[file] = f"{type(error).__name__}: {error}".replace(repr(name), "").rstrip(" :")
    with naming(path), path.open("r+b") as images:
        images.seek(start * rows.shape[1])
        images.write(rows.data)
        _to_disk(images)
    return start, zlib.crc32(rows.data), corrupt


def _pixels(path: str, size: int, mode: str) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        opened.draft(mode, (2 * size, 2 * size))  # a large JPEG is decoded at ½, ¼ or ⅛ of its size
        image = _in_mode(opened, mode)
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))
    return np.asarray(square, np.uint8).reshape(-1)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    return image.convert(mode)


def _in_parallel(jobs: Sequence[Callable[[], Any]], workers: int) -> Generator[Any]:
    """Results of the jobs as they come, from threads: Pillow lets go of the interpreter while it works on pixels."""
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_same(folder: Path, kept: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    different = [name for name in asked if kept.get(name) != asked[name]]
    if different:
        differences = "; ".join(f"{n} is {reprlib.repr(kept.get(n))}, not {reprlib.repr(asked[n])}" for n in different)
        raise FileExistsError(
            f"the store {folder} was made otherwise: {differences}: choose another folder or delete it"
        )


def _progress(total: int, done: int) -> Callable[[int], None]:
    """A line at the start and each tenth of the work; returns what to call when more is done."""
    start, at_start = time.monotonic(), done
    if done < total:
        _say(f"{total - done} of {total} images to read")

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, min(done + count, total)
        if 10 * done // total > 10 * before // total:
            seconds = time.monotonic() - start
            _say(f"{done} of {total} images, {seconds:.0f} s, {(done - at_start) / seconds:.0f} a second")

    return advance


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _first(corrupt: Mapping[str, str], count: int = 5) -> str:
    named = [f"{file} ({why})" for file, why in list(corrupt.items())[:count]]
    return ", ".join(named) + (", …" if len(corrupt) > count else "")


def _class_of(file: str) -> str:
    return file.split("/", 1)[0]


def _row_bytes(size: int, colour: str) -> int:
    return size * size * len(MODES[colour])


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / _INDEX).exists():
        raise FileNotFoundError(f"no finished store in {folder.absolute()}: make it by build_store")
    index: dict[str, Any] = json.loads((folder / _INDEX).read_text())
    return index


def _damaged(folder: Path, what: str) -> OSError:
    return OSError(f"the store {folder} is damaged: {what}: delete the folder to make it again")


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with naming(path), unfinished.open("wb") as file:
            file.write(content)
            _to_disk(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
