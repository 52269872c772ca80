"""MNIST with its classes in two groups: the first row of the paper's Table 1."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity
from typing_extensions import override

from lightning_mnn.data.resident import ResidentData
from lightning_mnn.data.whitening import whitening_matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS = {"train": (True,), "test": (False,), "all": (True, False)}
_NUM_CLASSES = 10


class MNISTData(ResidentData):
    """MNIST digits, flattened to 784 numbers, with the classes in two groups.

    Images are centred by the mean image and scaled to mean variance 1, optionally whitened in between; all of it is
    computed from the samples that are trained on.

    Args:
        root: folder that holds ``MNIST/raw`` with the four archives (``train-images-idx3-ubyte.gz``, …), or their
            unpacked files. It is only read, unless ``download`` is set.
        part: "train" (60,000), "test" (10,000) or "all" (70,000, as in the paper).
        groups: the classes of label 0 and those of label 1; other classes are left out.
        labels: "zero_one" or "plus_minus".
        whiten: floor of :func:`whitening_matrix`; None: no whitening.
        download: fetch missing archives through torchvision.
        **options: see :class:`ResidentData`.

    Raises:
        ValueError: an unknown part or labels, groups that overlap or are empty.
        FileNotFoundError: (in setup) files that are missing, with what to put where.
        OSError: (in setup) an archive whose checksum is wrong.
    """

    input_dim = 784

    def __init__(
        self,
        root: str | Path = "data",
        part: str = "all",
        groups: Sequence[Sequence[int]] = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)),
        labels: str = "zero_one",
        whiten: float | None = None,
        *,
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if part not in PARTS:
            raise ValueError(f"part must be one of {sorted(PARTS)}, got {part!r}")
        if labels not in ("zero_one", "plus_minus"):
            raise ValueError(f"labels must be zero_one or plus_minus, got {labels!r}")
        self.root = Path(root)
        self.part = part
        self.groups = _checked_groups(groups)
        self.labels = labels
        self.whiten = whiten
        self.download = download

    @override
    def prepare_data(self) -> None:
        if self.download and not self._archives() and not self._unpacked():
            MNIST(str(self.root), download=True)

    @override
    def tensors(self) -> tuple[Tensor, Tensor]:
        images, digits = self._read()
        group_of = torch.full((_NUM_CLASSES,), -1)
        for label, classes in enumerate(self.groups):
            group_of[list(classes)] = label
        groups = group_of[digits]
        chosen = groups >= 0
        ones = groups[chosen].double()
        targets = ones if self.labels == "zero_one" else 2 * ones - 1
        return self._scaled(images[chosen].flatten(1).float()), targets

    def _scaled(self, inputs: Tensor) -> Tensor:
        inputs = inputs / 255
        inputs -= inputs.mean(0, dtype=torch.float64).float()
        if self.whiten is not None:
            rank_zero_info(f"whitening {inputs.shape[0]} images with floor {self.whiten}")
            inputs = inputs @ whitening_matrix(inputs, self.whiten).float()
        return inputs / inputs.square().mean(dtype=torch.float64).sqrt().float()

    def _read(self) -> tuple[Tensor, Tensor]:
        if archives := self._archives():
            for archive, md5 in archives.items():
                if not check_integrity(str(archive), md5):
                    raise OSError(
                        f"{archive} is corrupt or truncated: its md5 is not {md5}. "
                        "Replace it by the original archive (or delete it and set data.download=true)"
                    )
            with tempfile.TemporaryDirectory() as folder:  # torchvision unpacks beside the archives; leave those alone
                raw = Path(folder) / "MNIST" / "raw"
                raw.mkdir(parents=True)
                for archive in archives:
                    (raw / archive.name).symlink_to(archive.resolve())
                return self._through_torchvision(folder, download=True)
        if self._unpacked():
            return self._through_torchvision(str(self.root), download=False)
        names = ", ".join(name for name, _ in MNIST.resources)
        raise FileNotFoundError(
            f"no MNIST in {self._raw().resolve()}: put the archives {names} there, "
            "or set data.root to the folder that holds MNIST/raw, or data.download=true"
        )

    def _through_torchvision(self, root: str, *, download: bool) -> tuple[Tensor, Tensor]:
        sets = [MNIST(root, train=train, download=download) for train in PARTS[self.part]]
        return torch.cat([s.data for s in sets]), torch.cat([s.targets for s in sets])

    def _raw(self) -> Path:
        return self.root / "MNIST" / "raw"

    def _archives(self) -> dict[Path, str]:
        found = {self._raw() / name: md5 for name, md5 in MNIST.resources}
        return found if all(path.is_file() for path in found) else {}

    def _unpacked(self) -> bool:
        return all((self._raw() / name.removesuffix(".gz")).is_file() for name, _ in MNIST.resources)


def _checked_groups(groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    checked = tuple(tuple(int(c) for c in group) for group in groups)
    classes = [c for group in checked for c in group]
    if len(checked) != 2 or not all(checked) or len(set(classes)) < len(classes):
        raise ValueError(f"groups must be two lists of classes that share none, got {checked}")
    if not set(classes) <= set(range(_NUM_CLASSES)):
        raise ValueError(f"groups must hold classes 0 to {_NUM_CLASSES - 1}, got {checked}")
    return checked[0], checked[1]
