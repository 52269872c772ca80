"""A folder of labelled images, one subfolder per class, as a training set with two groups of classes."""

from __future__ import annotations

import hashlib
import os
import reprlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from lightning_mnn.data.images.image_data import ImageData
from lightning_mnn.data.images.samples import is_list
from lightning_mnn.data.images.store import MODES, build_store
from lightning_mnn.utilities.validation import ArgumentError, one_of, positive_integer, truth_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_mnn.data.images.store import LabelledImages


class ImageFolderData(ImageData):
    """Images ``root/<class>/**/<image>``, resized to one size, with the classes split into two groups.

    ``prepare_data`` decodes them once into a store, which later runs map into memory (see
    :func:`~lightning_mnn.data.images.store.build_store`). If it is killed, the next start continues it.

    Args:
        root: folder with one subfolder per class.
        size: pixels per side: the central square of an image is averaged down to size × size.
        colour: "rgb" (d0 = 3 · size²) or "grey" (d0 = size²).
        classes: names of the classes to put into the store; a number means the name that is written so. None: all.
        store: folder of the store; None: one in ``cache`` whose name depends on root, size, colour and classes.
        test_root: folder of the test set, with the same subfolders; it gets a store of its own. None: the test set is
            the ``test_fraction`` of the images in ``root``, if that is not 0.
        workers: threads that decode images; None: one per processor, at most 16.
        skip_corrupt: whether to leave out images that cannot be read, and list them in the store's ``skipped.txt``.
            Without it, a store that lacks images is an error.
        **options: see :class:`~lightning_mnn.data.images.image_data.ImageData`.

    Raises:
        ValueError: ``size`` or ``colour`` is invalid, or ``classes`` is not a list.
        FileNotFoundError: (in prepare_data) there is no folder ``root``.
        OSError: (in prepare_data) images cannot be read; the message names the first ones.
    """

    test_set_remedy = "give a test_root (data.test_root) or a test_fraction"

    def __init__(
        self,
        root: str | Path,
        size: int = 32,
        colour: str = "rgb",
        *,
        classes: Sequence[str] | None = None,
        store: str | Path | None = None,
        test_root: str | Path | None = None,
        workers: int | None = None,
        skip_corrupt: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if classes is not None and not is_list(classes):
            raise ArgumentError("classes", classes, "must be a list of names, or null", "as [cat, dog]")
        self.root = Path(root).expanduser().resolve()
        self.size = positive_integer("size", size)
        self.colour = one_of("colour", colour, sorted(MODES))
        self.classes = None if classes is None else sorted(map(str, classes))
        self.workers = None if workers is None else positive_integer("workers", workers)
        self.skip_corrupt = truth_value("skip_corrupt", skip_corrupt)
        self.store = self._default_store(self.root) if store is None else Path(store).expanduser().resolve()
        self.test_root = None if test_root is None else Path(test_root).expanduser().resolve()
        if self.test_root is not None:
            self.test_store = (
                self._default_store(self.test_root)
                if store is None
                else self.store.with_name(f"{self.store.name}-test")
            )

    @property
    @override
    def input_dim(self) -> int:
        return self.size**2 * len(MODES[self.colour])

    @override
    def prepare_data(self) -> None:
        self.test_source()  # which makes the store of the training images, too
        super().prepare_data()

    @override
    def source(self) -> LabelledImages:
        return self._built(self.root, self.store)

    @override
    def test_source(self) -> LabelledImages | None:
        names = self.source().names
        if self.test_root is None:
            return None
        found = self._built(self.test_root, self.test_store)
        if unknown := [name for name in found.names if name not in names]:
            problem = f"has classes that {self.root} lacks: {reprlib.repr(unknown)}"
            raise ArgumentError("test_root", str(self.test_root), problem, "name the classes to use by classes=[…]")
        indices = np.array([names.index(name) for name in found.names])
        return replace(found, classes=indices[found.classes], names=names)

    def _built(self, root: Path, store: Path) -> LabelledImages:
        return build_store(
            root,
            store,
            size=self.size,
            colour=self.colour,
            classes=self.classes,
            workers=self.workers,
            skip_corrupt=self.skip_corrupt,
        )

    def _default_store(self, root: Path) -> Path:
        content = repr((str(root), self.size, self.colour, self.classes))
        return self.cache / f"{root.name}-{hashlib.sha256(os.fsencode(content)).hexdigest()[:12]}"
