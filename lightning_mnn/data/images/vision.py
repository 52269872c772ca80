"""MNIST, the first row of the paper's Table 1, and CIFAR-10, with their classes split into two groups."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torchvision.datasets import CIFAR10, MNIST
from typing_extensions import override

from lightning_mnn.data.images.image_data import ImageData
from lightning_mnn.data.images.samples import group_classes
from lightning_mnn.data.images.store import LabelledImages
from lightning_mnn.utilities.compat.torchvision_internals import cifar10_archive, cifar10_folder, mnist_archives
from lightning_mnn.utilities.validation import one_of, truth_value

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS = {"train": (True,), "test": (False,), "all": (True, False)}
_REMEDY = "choose part=train (data.part), and the other part is the test set, or a test_fraction"


class _ArchiveData(ImageData):
    """A published data set: see :class:`MNISTData` and :class:`CIFAR10Data`."""

    test_set_remedy = _REMEDY
    names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        root: str | Path = "data",
        part: str = "all",
        groups: Sequence[Sequence[int | str]] | None = None,
        *,
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(groups=groups, **options)
        group_classes(self.groups, self.names)
        self.root = Path(root)
        self.part = _checked_part(part)
        self.download = truth_value("download", download)


class MNISTData(_ArchiveData):
    """MNIST digits, flattened to 784 numbers, with the classes split into two groups.

    Args:
        root: folder that contains ``MNIST/raw`` with the four archives (``train-images-idx3-ubyte.gz``, …), or their
            unpacked files. Nothing is written to it unless ``download`` is set.
        part: "train" (60,000), "test" (10,000) or "all" (70,000, as in the paper). With "train", the other 10,000 are
            the test set.
        groups: the digits with label 0 and those with label 1; other digits are left out. None: the digits below 5, and
            the others.
        download: whether to download missing archives with torchvision.
        **options: ``labels``, ``whiten`` and the others of :class:`~lightning_mnn.data.images.image_data.ImageData`.

    Raises:
        ValueError: ``part`` or ``labels`` is unknown, or groups overlap or are empty.
        FileNotFoundError: (in setup) files are missing; the message explains which files to put where.
        OSError: (in setup) the checksum of an archive is wrong.
    """

    input_dim = 784
    names = tuple("0123456789")

    @override
    def prepare_data(self) -> None:
        if self.download and not self._archives() and not self._unpacked():
            MNIST(str(self.root), download=True)
        super().prepare_data()

    @override
    def source(self) -> LabelledImages:
        return self._read(PARTS[self.part])

    @override
    def test_source(self) -> LabelledImages | None:
        return self._read(PARTS["test"]) if self.part == "train" else None

    def _read(self, parts: Sequence[bool]) -> LabelledImages:
        if archives := self._archives():
            for archive, md5 in archives.items():
                _check_md5(archive, md5)
            with tempfile.TemporaryDirectory() as folder:  # torchvision unpacks files beside the archives
                raw = Path(folder) / "MNIST" / "raw"
                raw.mkdir(parents=True)
                for archive in archives:
                    _place(archive, raw)
                return self._through_torchvision(folder, parts, download=True)
        if self._unpacked():
            return self._through_torchvision(str(self.root), parts, download=False)
        names = ", ".join(mnist_archives())
        raise FileNotFoundError(
            f"no MNIST in {self._raw().resolve()}: put the archives {names} there, "
            "or set data.root to the folder that contains MNIST/raw, or data.download=true"
        )

    def _through_torchvision(self, root: str, parts: Sequence[bool], *, download: bool) -> LabelledImages:
        sets = [MNIST(root, train=train, download=download) for train in parts]
        images = np.concatenate([s.data.flatten(1).numpy() for s in sets])
        return LabelledImages(images, np.concatenate([s.targets.numpy() for s in sets]), self.names)

    def _raw(self) -> Path:
        return self.root / "MNIST" / "raw"

    def _archives(self) -> dict[Path, str]:
        found = {self._raw() / name: md5 for name, md5 in mnist_archives().items()}
        return found if all(path.is_file() for path in found) else {}

    def _unpacked(self) -> bool:
        return all((self._raw() / name.removesuffix(".gz")).is_file() for name in mnist_archives())


class CIFAR10Data(_ArchiveData):
    """CIFAR-10 images, flattened to 3072 numbers (rows, columns, colours), with the classes split into two groups.

    The batches are pickle files. torchvision checks the md5 of each one before it is unpickled.

    Args:
        root: folder that contains ``cifar-10-batches-py``, the unpacked batches, or ``cifar-10-python.tar.gz``, from
            which they are then read. Nothing is written to it unless ``download`` is set.
        part: "train" (50,000), "test" (10,000) or "all" (60,000). With "train", the other 10,000 are the test set.
        groups: the classes with label 0 and those with label 1, by name (airplane, …) or index; other classes are left
            out. None: the first five (airplane to deer), and the others.
        download: whether to download a missing archive with torchvision.
        **options: ``labels``, ``whiten`` and the others of :class:`~lightning_mnn.data.images.image_data.ImageData`.

    Raises:
        ValueError: ``part`` or ``labels`` is unknown, or groups overlap or are empty.
        FileNotFoundError: (in setup) files are missing; the message explains which files to put where.
        OSError: (in setup) the checksum of an archive or batch is wrong.
    """

    input_dim = 3072
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    @override
    def prepare_data(self) -> None:
        names = cifar10_archive()[0], cifar10_folder()[0]
        if self.download and not any((self.root / name).exists() for name in names):
            CIFAR10(str(self.root), download=True)
        super().prepare_data()

    @override
    def source(self) -> LabelledImages:
        return self._read(PARTS[self.part])

    @override
    def test_source(self) -> LabelledImages | None:
        return self._read(PARTS["test"]) if self.part == "train" else None

    def _read(self, parts: Sequence[bool]) -> LabelledImages:
        unpacked, batches = cifar10_folder()
        if (self.root / unpacked).is_dir():
            for name, md5 in batches.items():
                _check_md5(self.root / unpacked / name, md5)
            return self._through_torchvision(str(self.root), parts, download=False)
        archive, md5 = cifar10_archive()
        if (self.root / archive).is_file():
            _check_md5(self.root / archive, md5)
            with tempfile.TemporaryDirectory() as folder:
                _place(self.root / archive, Path(folder))
                return self._through_torchvision(folder, parts, download=True)
        raise FileNotFoundError(
            f"no CIFAR-10 in {self.root.resolve()}: put {archive} there, or its folder {unpacked}, "
            "or set data.root to the folder that contains them, or data.download=true"
        )

    def _through_torchvision(self, root: str, parts: Sequence[bool], *, download: bool) -> LabelledImages:
        sets = [CIFAR10(root, train=train, download=download) for train in parts]
        images = np.concatenate([s.data.reshape(len(s.data), -1) for s in sets])
        return LabelledImages(images, np.concatenate([s.targets for s in sets]), self.names)


def _checked_part(part: str) -> str:
    checked: str = one_of("part", part, sorted(PARTS))
    return checked


def _place(archive: Path, folder: Path) -> None:
    """Put an archive into another folder, as a symbolic link if the system allows that, else as a copy."""
    try:
        (folder / archive.name).symlink_to(archive.resolve())
    except OSError:  # Windows requires a privilege
        shutil.copyfile(archive, folder / archive.name)


def _check_md5(file: Path, md5: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: put the original file there, or set data.root or data.download")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise OSError(
            f"{file} is corrupt or truncated: its md5 is not {md5}. "
            "Replace it with the original (or delete it and set data.download=true)"
        )
