"""Images with their classes in two groups: centred, optionally whitened, scaled; in memory or streamed from a file.

Shapes: N images that are trained on, d0 numbers each.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mnn.data.loader import ExactData, ExactLoader, part_of
from lightning_mnn.data.resident import ResidentLoader
from lightning_mnn.data.rows import RowFile, Rows, naming, rows_of, written_rows
from lightning_mnn.data.streaming import BUFFER_BYTES, StreamedLoader
from lightning_mnn.data.whitening import ROWS, InputMap, check_floor, input_map, moments, team_moments
from lightning_mnn.landscape.team import ProcessTeam, Team
from lightning_mnn.utilities.memory import free_memory
from lightning_mnn.validation import ArgumentError, one_of, positive_integer, truth_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_mnn.data.store import LabelledImages

LABELS = ("zero_one", "plus_minus")
RESIDENCIES = ("auto", "memory", "stream")
STORAGES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MEMORY_SHARE = 0.5  # of the free memory, that mapped inputs may take
_COMPARED_ROWS = 256  # of a file, by which other data are told from those of a checkpoint
_BLOCK_NUMBERS = 1 << 25  # of samples whose moments are taken at a time: 256 MiB in float64


class ImageData(ExactData):
    """Images, flattened, with their classes in two groups; a subclass says by :meth:`source` which images.

    They are centred by the mean image and scaled to mean variance 1, optionally whitened in between
    (:func:`~lightning_mnn.data.whitening.input_map`); all of it is computed from the samples that are trained on.

    In memory, the mapped inputs lie on the device as one tensor. Streamed, batches are read from a file in a random
    order that disks like (:class:`~lightning_mnn.data.streaming.StreamedLoader`) and mapped as they come, or read from
    a file of mapped inputs that is written once. A sample is the same numbers either way: they come from the same map,
    with whitening to the last bit as far as :meth:`InputMap.apply` says, and are rounded to ``storage``. Without
    ``shuffle`` the batches are the same, too. With it, streamed data come in an order of their own, that depends on
    ``buffer_bytes`` and not on ``materialise``: so a run that is resumed must find the residency that it began with,
    which its checkpoints keep together with what tells these data from others.

    Args:
        groups: the classes of label 0 and those of label 1, each by its name, or by its index if no name reads like
            that number; other classes are left out. None: the first half of the sorted names, and the others.
        labels: "zero_one" or "plus_minus".
        whiten: floor of :func:`~lightning_mnn.data.whitening.whitening_matrix`; None: no whitening.
        equal_norms: bring every image to the norm √d0 at last, so that faint images weigh as much as
            others. The class that a network without biases gives an image, with labels ±1, does not depend on its norm.
        residency: "memory", "stream", or "auto": in memory where the mapped inputs take at most half of what is free,
            on the training device, when the run begins.
        storage: "float32", "bfloat16" or "float16", to which mapped inputs are rounded; None: ``dtype``. The network
            computes in its own precision.
        materialise: of streamed data, write the mapped inputs to a file in ``cache``, which may be stopped at any time
            and goes on when started again.
        cache: folder for files that are made once: the map of streamed data, and the mapped inputs. None:
            ``$LIGHTNING_MNN_CACHE``, or else ``~/.cache/lightning-mnn``.
        buffer_bytes: of streamed data, samples that are shuffled together, counted in float32 whatever they are stored
            in; two such buffers are in memory, over all processes, in bytes a quarter of that.
        **options: see :class:`ExactData`.

    Attributes:
        inputs: (N, d0) in memory; None of streamed data, and before setup.
        targets: (N,); None before setup.

    Raises:
        ValueError: an argument out of its range. In setup: classes that are not there, images that are all the same.
            Of streamed data: the full batch, and a shuffled order for each of several replicas. In load_state_dict:
            a checkpoint of other data, or of another residency.
    """

    def __init__(
        self,
        *,
        groups: Sequence[Sequence[int | str]] | None = None,
        labels: str = "zero_one",
        whiten: float | None = None,
        equal_norms: bool = False,
        residency: str = "auto",
        storage: str | None = None,
        materialise: bool = False,
        cache: str | Path | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, value, known in (
            ("labels", labels, LABELS),
            ("residency", residency, RESIDENCIES),
            ("storage", storage, (None, *STORAGES)),
        ):
            one_of(name, value, known)
        if whiten is not None:
            check_floor(whiten)
        self.groups = None if groups is None else check_groups(groups)
        self.labels = labels
        self.whiten = whiten
        self.equal_norms = truth_value("equal_norms", equal_norms)
        self.residency = residency
        self.storage = self.dtype if storage is None else STORAGES[storage]
        self.materialise = truth_value("materialise", materialise)
        self.cache = Path(cache or os.environ.get("LIGHTNING_MNN_CACHE") or "~/.cache/lightning-mnn").expanduser()
        self.buffer_bytes = positive_integer("buffer_bytes", buffer_bytes)
        self.inputs: Tensor | None = None
        self.targets: Tensor | None = None
        self._streamed: dict[str, Any] = {}  # what StreamedLoader takes
        self._facts: dict[str, Any] = {}  # what must stay as it is from one start of a run to the next
        self._facts_before: dict[str, Any] = {}

    @abstractmethod
    def source(self) -> LabelledImages:
        """All images with their classes; the files of ``prepare_data`` are there by then."""

    @override
    def prepare_data(self) -> None:
        """Write the mapped inputs, if so asked; a subclass whose source has files to make does that before."""
        if self.materialise and self.residency != "memory":
            samples = _Samples(self.source(), self.groups)
            if self._streams(samples, Team()):
                self._written(samples)

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.targets is not None:
            return
        samples = _Samples(self.source(), self.groups)
        team = ProcessTeam(samples.count) if dist.is_available() and dist.is_initialized() else Team()
        if self._streams(samples, team):
            if self.batch_size is None:
                raise ValueError(
                    f"the {samples.count} images are streamed, so that the full batch is never in memory: "
                    "set a batch_size (or residency=memory)"
                )
            self._streamed = self._written(samples) if self.materialise else self._on_the_fly(samples, team)
        else:
            self.inputs = self._mapped(samples, self._found_map(samples, team))
        ones = torch.from_numpy(samples.ones).to(self.dtype)
        self.targets = ones if self.labels == "zero_one" else 2 * ones - 1
        self._facts = self._found_facts(samples)
        self._check_facts()

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"data": self._facts}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "data"})
        self._facts_before = state_dict.get("data", {})
        self._check_facts()  # Lightning calls setup before; else that will do it

    @override
    def loader(self, device: torch.device, **options: Any) -> ExactLoader:
        assert self.targets is not None  # noqa: S101 (for the type checker)
        if self.inputs is not None:
            return ResidentLoader(self.inputs.to(device), self.targets.to(device), **options)
        mapping = self._streamed.get("mapping")
        return StreamedLoader(
            targets=self.targets,
            device=device,
            buffer_bytes=self.buffer_bytes,
            **self._streamed | {"mapping": mapping and mapping.to(device, self._precision)},
            **options,
        )

    @property
    def _device(self) -> torch.device:
        """Where the samples are mapped: the training device, if it knows float64."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return torch.device("cpu") if device.type == "mps" else device

    @property
    def _precision(self) -> torch.dtype:
        """In which the samples are mapped."""
        return torch.promote_types(self.dtype, torch.float32)

    def _streams(self, samples: _Samples, team: Team) -> bool:
        """Whether the samples are to be streamed: the same answer on all processes."""
        if self.residency != "auto":
            return self.residency == "stream"
        processes = 1 if self.trainer is None or self._device.type == "cuda" else self.trainer.num_devices
        free = torch.tensor(free_memory(self._device) / processes, dtype=torch.float64, device=self._device)
        return samples.count * samples.shape[1] * self.storage.itemsize > _MEMORY_SHARE * float(team.least(free))

    def _found_facts(self, samples: _Samples) -> dict[str, Any]:
        order: dict[str, Any] = {}
        if self.shuffle and self.inputs is not None:
            order = {"residency": "memory"}
        elif self.shuffle:
            order = {"residency": "stream", "buffer_bytes": self.buffer_bytes}
        options = {"labels": self.labels, "whiten": self.whiten, "equal_norms": self.equal_norms}
        ones = int(samples.ones.sum())
        counts = {"samples": samples.count, "samples of label 0 and 1": [samples.count - ones, ones]}
        return order | options | counts | {"digest of the images": samples.digest()}

    def _check_facts(self) -> None:
        """Refuse to go on from a checkpoint with other data, or with the same in another order."""
        before, now = self._facts_before, self._facts
        for name in (name for name in now if name in before and now[name] != before[name]):
            remedy = "resume it on the data that it was trained on, or begin anew without it"
            if hasattr(self, name):  # an option
                remedy = f"set data.{name}={'null' if before[name] is None else str(before[name]).lower()}"
            raise ValueError(
                f"the checkpoint is of a run on other data, or on these in another order: {name} was {before[name]}, "
                f"and is {now[name]}: {remedy}"
            )

    def _mapped(self, samples: _Samples, mapping: InputMap) -> Tensor:
        mapping = mapping.to(self._device, self._precision)
        inputs = torch.empty(samples.shape, dtype=self.storage, device=self._device)
        for low, high in spans(0, samples.count, ROWS):
            mapping.apply(samples.read(low, high).to(self._device), inputs[low:high])
        return inputs

    def _on_the_fly(self, samples: _Samples, team: Team) -> dict[str, Any]:
        mapping = self._kept_map(samples, team)
        return {"rows": samples.rows, "chosen": samples.chosen, "mapping": mapping, "dtype": self.storage}

    def _written(self, samples: _Samples) -> dict[str, Any]:
        """The file of mapped inputs; by one process at a time, so that the others find it there."""
        content = [self._name_of_map(samples), str(self.equal_norms), str(self.storage), str(self._precision)]
        path = self.cache / f"inputs-{_digest(content)}.rows"
        mapping: InputMap | None = None

        def block_of(low: int, high: int) -> Tensor:
            nonlocal mapping
            if mapping is None:
                mapping = self._kept_map(samples, Team()).to(self._device, self._precision)
            out = torch.empty(high - low, samples.shape[1], dtype=self.storage, device=self._device)
            return mapping.apply(samples.read(low, high).to(self._device), out).cpu()

        return {"rows": written_rows(path, samples.shape, self.storage, block_of)}

    def _kept_map(self, samples: _Samples, team: Team) -> InputMap:
        """The map of streamed samples, from a file if an earlier run has found it."""
        path = self.cache / f"{self._name_of_map(samples)}.npz"
        kept = _load_map(path) if path.exists() else None
        known = torch.tensor(float(kept is not None), device=self._device)
        if team.least(known) == 1 and kept is not None:
            return replace(kept, equal_norms=self.equal_norms)
        mapping = self._found_map(samples, team)
        if self.trainer is None or self.trainer.local_rank == 0:
            try:
                _save_map(path, mapping)
            except OSError as error:
                rank_zero_warn(
                    f"the map of the inputs is not kept, and is found anew at the next start: {error}: "
                    "set cache (data.cache) to a folder that can be written"
                )
        return mapping

    def _name_of_map(self, samples: _Samples) -> str:
        return f"map-{_digest([samples.identity(), repr(self.whiten)])}"

    def _found_map(self, samples: _Samples, team: Team) -> InputMap:
        """The map, by a pass over the samples that the processes share."""
        rank = dist.get_rank() if team.size > 1 else 0
        what = "mean and variance" if self.whiten is None else f"whitening with floor {self.whiten}"
        rank_zero_info(f"{what} of {samples.count} images of {samples.shape[1]} numbers")
        size = max(1, _BLOCK_NUMBERS // samples.shape[1])
        blocks = (samples.read(*span) for span in spans(*part_of(samples.count, rank, team.size), size))
        own = moments(blocks, samples.shape[1], products=self.whiten is not None, device=self._device)
        return replace(input_map(team_moments(own, team), self.whiten), equal_norms=self.equal_norms)


class _Samples:
    """The images of a source that are trained on.

    Attributes:
        rows: of the source.
        chosen: the numbers of those that are trained on; None: all.
        ones: whether a sample is in the second group, (N,).
    """

    def __init__(self, source: LabelledImages, groups: Groups | None) -> None:
        group_of = np.full(len(source.names), -1)
        for group, classes in enumerate(group_classes(groups, source.names)):
            group_of[list(classes)] = group
        found = group_of[source.classes]
        if (counts := [int((found == group).sum()) for group in (0, 1)]) and not all(counts):
            raise ValueError(f"groups must both hold images, got {counts[0]} of label 0 and {counts[1]} of label 1")
        self.rows: Rows = rows_of(source.images)
        self.chosen = None if (found >= 0).all() else np.flatnonzero(found >= 0)
        self.ones: NDArray[np.bool_] = (found if self.chosen is None else found[self.chosen]) == 1
        self._source = source

    @property
    def count(self) -> int:
        """N."""
        return len(self.ones)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, d0)."""
        return self.count, self.rows.shape[1]

    def read(self, low: int, high: int) -> Tensor:
        """Samples low to high: uint8 (high − low, d0)."""
        numbers = np.arange(low, high) if self.chosen is None else self.chosen[low:high]
        out = torch.empty(len(numbers), self.rows.shape[1], dtype=self.rows.dtype)
        self.rows.read(numbers, out)
        return out

    @cached_property
    def content(self) -> str:
        """A digest of the source's images, wherever they lie; of a file that no one made a digest of, of some rows."""
        if self._source.digest is not None:
            return self._source.digest
        if not isinstance(self.rows, RowFile):
            return hashlib.sha256(np.ascontiguousarray(self._source.images).data).hexdigest()
        numbers = np.unique(np.linspace(0, self.rows.shape[0] - 1, _COMPARED_ROWS).astype(np.int64))
        out = torch.empty(len(numbers), self.rows.shape[1], dtype=self.rows.dtype)
        self.rows.read(numbers, out)
        return _digest([str(self.rows.shape), hashlib.sha256(out.view(torch.uint8).numpy().data).hexdigest()])

    def digest(self) -> str:
        """Of the samples: their content, which they are and their groups; the same wherever they lie."""
        return _digest([self.content, self._which(), hashlib.sha256(self.ones.data).hexdigest()])

    def identity(self) -> str:
        """What the samples are: of a file its path, size and time, of an array its content; and which of them."""
        if isinstance(self.rows, RowFile):
            stat = self.rows.path.stat()
            where = [str(self.rows.path.resolve()), str(stat.st_size), str(stat.st_mtime_ns), str(self.rows.offset)]
        else:
            where = [self.content]
        return _digest([*where, str(self.rows.shape), self._which()])

    def _which(self) -> str:
        return "all" if self.chosen is None else hashlib.sha256(self.chosen.data).hexdigest()


Groups = tuple[tuple[int | str, ...], tuple[int | str, ...]]


def check_groups(groups: Sequence[Sequence[int | str]]) -> Groups:
    """Two groups of classes, as tuples.

    Raises:
        ValueError: they are not two lists of names and numbers, one is empty, or a class is named twice.
    """
    checked = [tuple(group) if is_list(group) else () for group in groups] if is_list(groups) else []
    classes = [c for group in checked for c in group]
    known = all(isinstance(c, int | str) for c in classes)
    if len(checked) != 2 or not all(checked) or not known or len(set(classes)) < len(classes):
        raise ArgumentError("groups", groups, "must be two lists of classes that share none", "as [[cat, cow], [dog]]")
    return checked[0], checked[1]


def is_list(value: Any) -> bool:
    """Whether it is a list of things, and not a text, which is one of letters."""
    return isinstance(value, Iterable) and not isinstance(value, str)


def group_classes(groups: Groups | None, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the classes of two groups.

    Args:
        groups: by name, or by index; a number that reads like a name is that name. None: the first half of the sorted
            names, and the others.
        names: of all classes.

    Raises:
        ValueError: a class that is not there, or that is in both groups.

    >>> group_classes((("cat",), (0, "bat")), ("ant", "bat", "cat"))
    ((2,), (0, 1))
    >>> group_classes(((10,), (2,)), ("0", "10", "2"))
    ((1,), (2,))
    >>> group_classes(None, ("ant", "cat", "bat"))
    ((0,), (1, 2))
    """
    if groups is None:
        order = sorted(range(len(names)), key=lambda index: names[index])
        groups = tuple(order[: len(names) // 2]), tuple(order[len(names) // 2 :])
        if len(names) < 2:
            raise ArgumentError("groups", None, f"needs two classes at least, and there is {list(names)} alone")
    known: dict[int | str, int] = {index: index for index in range(len(names))}
    known |= {name: index for index, name in enumerate(names)}
    known |= {number: known[str(number)] for group in groups for number in group if str(number) in known}
    if unknown := [c for group in groups for c in group if c not in known]:
        some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        problem = f"must not hold {unknown}, of which there is no class"
        remedy = f"name classes 0 to {len(names) - 1}, or {some}"
        raise ArgumentError("groups", [list(group) for group in groups], problem, remedy)
    first, second = (tuple(sorted(known[c] for c in group)) for group in groups)
    check_groups((first, second))
    return first, second


def spans(low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of a size, the last one smaller.

    >>> list(spans(1, 6, 2))
    [(1, 3), (3, 5), (5, 6)]
    """
    for start in range(low, high, size):
        yield start, min(start + size, high)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _save_map(path: Path, mapping: InputMap) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {"mean": mapping.mean.cpu().numpy(), "scale": np.float64(mapping.scale)}
    if mapping.matrix is not None:
        numbers["matrix"] = mapping.matrix.cpu().numpy()
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **numbers)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _load_map(path: Path) -> InputMap | None:
    """The map that a file holds; None if it is damaged."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            matrix = torch.from_numpy(file["matrix"]) if "matrix" in file else None
            return InputMap(torch.from_numpy(file["mean"]), matrix, float(file["scale"]))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        rank_zero_warn(f"{path} is damaged, so the map of the inputs is found anew: {error}")
        return None
