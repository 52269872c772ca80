"""A store of labelled images: it is made once from a tree of image files, and then mapped into memory.

Shapes: N images with d0 = H · W · C numbers each.
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
from lightning_mnn.utilities.files import locked, naming, to_disk, write_bytes
from lightning_mnn.utilities.resources import cores
from lightning_mnn.utilities.validation import one_of, positive_integer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

MODES = {"rgb": "RGB", "grey": "L"}
_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".gif", ".ppm")
_BLOCK = 512  # images that a worker decodes at a time, and that share a checksum
_IMAGES, _CLASSES, _INDEX, _SKIPPED = "images.bin", "classes.npy", "index.json", "skipped.txt"
_UNFINISHED, _JOURNAL, _LOCK = "images.bin.tmp", "journal.jsonl", "lock"
_ALLOWED_AT_START = {_JOURNAL, _JOURNAL + ".tmp", _LOCK}


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        images: uint8 (N, d0), an array or a ``np.memmap``: each row is an image, flattened H · W · C.
        classes: int64 (N,): indices into the names.
        names: of the classes.
        digest: of the images; None if it is not known without reading them.
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
    """The images ``root/<class>/**/<image>``, sorted by class and path, from a store that is made if it does not exist.

    The largest central square of each image is averaged down to size × size pixels (a box filter). Only the first frame
    of an animation is used; transparency and rotation marks are ignored. Hidden files, files without an image suffix
    and classes without images are left out; links are followed.

    If the process is killed while it makes a store, the next call continues. If another process is making the store,
    this one waits. A finished store no longer needs the tree, which may be deleted, and does not notice changes in it:
    delete the store's folder to make it again. If ``root`` exists, the store must have been made from it.

    Args:
        root: folder with one subfolder per class.
        folder: of the store; it must not contain anything else.
        size: pixels per side.
        colour: "rgb" or "grey".
        classes: names of the classes to use; a number means the name that is written so. None: all.
        workers: threads that decode images; None: one per processor, at most 16.
        skip_corrupt: whether to leave out images that cannot be read, and list them in ``skipped.txt``; meanwhile, the
            images are on the disk twice. Without it, a store that lacks images is an error.

    Raises:
        ValueError: an argument is invalid, or the tree has no images.
        FileNotFoundError: there is no folder ``root``.
        FileExistsError: the folder contains something else, or a store made with other arguments; the message names
            what differs.
        OSError: images cannot be read, or the store was made without some; there is too little space on the disk; the
            store is damaged.

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
        waiting = f"another process is making the store {folder}: waiting for it"
        with locked(folder / _LOCK, lambda: _print_progress(waiting)):
            if not (folder / _INDEX).exists():
                _Build(root, folder, tree, size, colour).run(workers, skip_corrupt=skip_corrupt)
            for name in (_UNFINISHED, _JOURNAL):
                (folder / name).unlink(missing_ok=True)
    requested: dict[str, Any] = {"size": size, "colour": colour}
    if chosen is not None:
        requested["names"] = chosen
    index = _read_index(folder)
    _check_same(folder, index, requested)
    made_from = index.get("root", str(root.resolve()))
    if root.is_dir() and made_from != str(root.resolve()):
        raise FileExistsError(
            f"the store {folder} was made from another tree: {made_from}, not {root.resolve()}: "
            "choose another folder or delete it (or, if the tree was only moved, give its old path as root)"
        )
    if root.is_dir() and (unknown := [name for name in index["names"] if not (root / name).is_dir()]):
        raise FileExistsError(
            f"the store {folder} was made from another tree: {root.absolute()} has no {reprlib.repr(unknown)}: "
            "choose another folder or delete it"
        )
    if index.get("skipped", 0) and not skip_corrupt:
        raise OSError(
            f"the store {folder} was made without {index['skipped']} images that could not be read, listed in "
            f"{folder / _SKIPPED}: allow that by skip_corrupt=true, or repair them and delete the store"
        )
    return open_store(folder)


def open_store(folder: str | Path, *, verify: bool = False) -> LabelledImages:
    """The labelled images of a finished store, mapped into memory.

    Args:
        folder: of the store.
        verify: whether to check the checksums of all images, not only those of 16 blocks spread over them.

    Raises:
        FileNotFoundError: there is no finished store in the folder.
        OSError: a file is damaged; if it is the file of images, the message names the damaged block.
    """
    folder = Path(folder).expanduser()
    index = _read_index(folder)
    if zlib.crc32((folder / _CLASSES).read_bytes()) != index["classes_crc32"]:
        raise _damaged(folder, f"{_CLASSES} has a wrong checksum")
    shape = index["count"], _row_bytes(index["size"], index["colour"])
    expected, found = shape[0] * shape[1], (folder / _IMAGES).stat().st_size
    if found != expected:
        raise _damaged(folder, f"{_IMAGES} has {found} bytes, not {expected}")
    images = np.memmap(folder / _IMAGES, np.uint8, "r", shape=shape)
    checksums = index["crc32"]
    with (folder / _IMAGES).open("rb") as file:  # not through the map, whose pages would stay in memory
        for block in range(len(checksums)) if verify else some_blocks(len(checksums)):
            first, last = block * index["block"], min((block + 1) * index["block"], shape[0]) - 1
            file.seek(first * shape[1])
            if zlib.crc32(file.read((last + 1 - first) * shape[1])) != checksums[block]:
                raise _damaged(folder, f"block {block}, images {first} to {last}, has a wrong checksum")
    digest = hashlib.sha256(json.dumps([shape, checksums]).encode()).hexdigest()
    return LabelledImages(images, np.load(folder / _CLASSES, allow_pickle=False), tuple(index["names"]), digest)


def list_images(root: Path, classes: Sequence[str] | None = None) -> list[str]:
    """Paths, relative to the root, of the images ``<class>/**/<image>``, sorted by class and path.

    Args:
        root: folder with one subfolder per class.
        classes: names of the classes to use; None: all classes with images.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no images, or none of a class in ``classes``.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root.absolute()}: set data.root to a folder with one subfolder per class")
    folders = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = {name: sorted(_images_below(root, name)) for name in sorted(folders) if classes is None or name in classes}
    if classes is not None and (empty := [name for name in classes if not found.get(name)]):
        raise ValueError(f"no images of the classes {reprlib.repr(empty)} in {root.absolute()}")
    if not any(found.values()):
        raise ValueError(
            f"no images in {root.absolute()}: its subfolders must contain files with suffixes {', '.join(_SUFFIXES)}"
        )
    return [path for paths in found.values() for path in paths]


def _images_below(root: Path, name: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error  # without it, an unreadable folder would count as empty

    seen = set()
    for folder, below, files in os.walk(root / name, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder would loop for ever
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
        block: its index.
        crc32: checksum of its bytes.
        corrupt: the errors of images that could not be read, keyed by path; the rows of these images are zero.
    """

    block: int
    crc32: int
    corrupt: dict[str, str]


class _Build:
    """An unfinished store: ``images.bin.tmp`` and a journal, which contains the plan and one line per finished block.

    Images that could not be read may be removed or replaced before the next start: their blocks are decoded again.
    """

    def __init__(self, root: Path, folder: Path, tree: Sequence[str], size: int, colour: str) -> None:
        self.root = root
        self.folder = folder
        self.size = size
        self.colour = colour
        self.present = set(tree)
        plan, self.done = self._read_journal()
        known = self.present.union(*(block.corrupt for block in self.done.values()))
        self.files = sorted(known, key=lambda file: (_class_of(file), file))
        self.names = sorted({_class_of(file) for file in self.files})
        self.num_blocks = -(-len(self.files) // _BLOCK)
        if plan is None:
            self._create()
        else:
            _check_same(folder, plan, self._plan())

    def run(self, workers: int, *, skip_corrupt: bool) -> None:
        """Decode the missing blocks and finish the store.

        Raises:
            OSError: images cannot be read and are not skipped; the decoded ones are kept for the next start.
        """
        missing = [i for i in range(self.num_blocks) if i not in self.done or self.done[i].corrupt]
        self._check_space(len(missing) * _BLOCK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata of readable images
            self._decode(missing, workers)
        corrupt = {file: why for block in self.done.values() for file, why in block.corrupt.items()}
        unread = {file: why for file, why in sorted(corrupt.items()) if file in self.present}
        if unread and not skip_corrupt:
            raise OSError(
                f"{len(unread)} of {len(self.files)} images in {self.root.absolute()} cannot be read: "
                f"{_first(unread)}: replace or remove them, or leave them out by skip_corrupt=true; "
                "the other images need not be read again"
            )
        if len(corrupt) == len(self.files):
            raise OSError(f"none of the {len(corrupt)} images in {self.root.absolute()} can be read: {_first(unread)}")
        self._finish([file not in corrupt for file in self.files], unread)

    def _plan(self) -> dict[str, Any]:
        listing = hashlib.sha256(b"\0".join(map(os.fsencode, self.files))).hexdigest()
        plan = {"size": self.size, "colour": self.colour, "names": self.names, "images": len(self.files)}
        return plan | {"root": str(self.root.resolve()), "listing": listing, "block": _BLOCK}

    def _read_journal(self) -> tuple[dict[str, Any] | None, dict[int, _Block]]:
        """The plan and the finished blocks of an interrupted build; None and {} if there is none."""
        journal, images = self.folder / _JOURNAL, self.folder / _UNFINISHED
        if not images.exists() and (self.folder / _IMAGES).exists() and journal.exists():
            (self.folder / _IMAGES).rename(images)  # interrupted when only the index was missing
        if not images.exists():
            return None, {}
        text = journal.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        os.truncate(journal, len(complete))  # after a kill, the last line may be incomplete
        plan, *lines = map(json.loads, complete.splitlines())
        return plan, {line["block"]: _Block(**line) for line in lines}

    def _create(self) -> None:
        other_files = {path.name for path in self.folder.iterdir()} - _ALLOWED_AT_START
        if other_files:
            raise FileExistsError(
                f"{self.folder} contains {reprlib.repr(sorted(other_files))} and no store: choose an empty folder"
            )
        write_bytes(self.folder / _JOURNAL, _line(self._plan()))
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
                to_disk(journal)
                advance(_BLOCK)

    def _finish(self, good: Sequence[bool], skipped: Collection[str]) -> None:
        unfinished, images = self.folder / _UNFINISHED, self.folder / _IMAGES
        if all(good):
            checksums = [self.done[block].crc32 for block in range(self.num_blocks)]
            unfinished.rename(images)
            (self.folder / _SKIPPED).unlink(missing_ok=True)  # from an earlier start that was killed at its end
        else:
            checksums = self._compact(np.flatnonzero(good))
            write_bytes(self.folder / _SKIPPED, b"".join(os.fsencode(file) + b"\n" for file in skipped))
        number = {name: label for label, name in enumerate(self.names)}
        files = [file for file, kept in zip(self.files, good, strict=True) if kept]
        with (self.folder / _CLASSES).open("wb") as file:
            np.save(file, np.array([number[_class_of(path)] for path in files], np.int64), allow_pickle=False)
            to_disk(file)
        index = self._plan() | {"count": len(files), "skipped": len(skipped), "crc32": checksums}
        index["classes_crc32"] = zlib.crc32((self.folder / _CLASSES).read_bytes())
        write_bytes(self.folder / _INDEX, _line(index))

    def _compact(self, rows: NDArray[np.intp]) -> list[int]:
        """Copy the good rows and return the checksums of their blocks."""
        self._check_space(len(rows))
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
                to_disk(file)
            unfinished.rename(self.folder / _IMAGES)
        finally:
            unfinished.unlink(missing_ok=True)
        return checksums

    def _check_space(self, rows: int) -> None:
        needed, free = rows * _row_bytes(self.size, self.colour), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder} needs {needed / 1e9:.1f} GB more and has {free / 1e9:.1f} GB left: "
                "choose a store on another disk, or a smaller size"
            )


def _decode(
    root: Path, files: Sequence[str], *, start: int, size: int, colour: str, path: Path
) -> tuple[int, int, dict[str, str]]:
    """Write images to their rows of the file; return the first row, their checksum and the errors by path."""
    rows = np.zeros((len(files), _row_bytes(size, colour)), np.uint8)
    corrupt = {}
    for row, file in enumerate(files):
        name = str(root / file)
        try:
            rows[row] = _pixels(name, size, MODES[colour])
        except Exception as error:  # noqa: BLE001 (readers of many formats raise various errors on broken files)
            corrupt[file] = f"{type(error).__name__}: {error}".replace(repr(name), "").rstrip(" :")
    with naming(path), path.open("r+b") as images:
        images.seek(start * rows.shape[1])
        images.write(rows.data)
        to_disk(images)
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
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    return image.convert(mode)


def _in_parallel(jobs: Sequence[Callable[[], Any]], workers: int) -> Generator[Any]:
    """Results of the jobs as they finish, computed in threads: Pillow releases the GIL while it processes pixels."""
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_same(folder: Path, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    different = [name for name in requested if stored.get(name) != requested[name]]
    if different:
        differences = "; ".join(
            f"{n} is {reprlib.repr(stored.get(n))}, not {reprlib.repr(requested[n])}" for n in different
        )
        raise FileExistsError(
            f"the store {folder} was made with other settings: {differences}: choose another folder or delete it"
        )


def _progress(total: int, done: int) -> Callable[[int], None]:
    """Print a line at the start and after each tenth of the work; return a function to call when images are done."""
    start, at_start = time.monotonic(), done
    if done < total:
        _print_progress(f"{total - done} of {total} images to read")

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, min(done + count, total)
        if 10 * done // total > 10 * before // total:
            seconds = time.monotonic() - start
            rate = (done - at_start) / seconds
            _print_progress(f"{done} of {total} images, {seconds:.0f} s, {rate:.0f} per second")

    return advance


def _print_progress(text: str) -> None:
    sys.stderr.write(text + "\n")


def _first(corrupt: Mapping[str, str], count: int = 5) -> str:
    texts = [f"{file} ({why})" for file, why in list(corrupt.items())[:count]]
    return ", ".join(texts) + (", …" if len(corrupt) > count else "")


def _class_of(file: str) -> str:
    return file.split("/", 1)[0]


def _row_bytes(size: int, colour: str) -> int:
    return size * size * len(MODES[colour])


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / _INDEX).exists():
        raise FileNotFoundError(f"no finished store in {folder.absolute()}: make it with build_store")
    index: dict[str, Any] = json.loads((folder / _INDEX).read_text())
    return index


def _damaged(folder: Path, what: str) -> OSError:
    return OSError(f"the store {folder} is damaged: {what}: delete the folder to make it again")


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
