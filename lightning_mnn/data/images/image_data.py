"""Images in two groups of classes: centred, optionally whitened, scaled; in memory or streamed from a file.

Shapes: N training images with d0 numbers each.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mnn.data.images.maps import load_map, save_map
from lightning_mnn.data.images.samples import BLOCK_NUMBERS, ImageSamples, check_groups, digest_of_words, spans
from lightning_mnn.data.loaders.exact import ExactData, ExactLoader
from lightning_mnn.data.loaders.resident import ResidentLoader
from lightning_mnn.data.loaders.rows import written_rows
from lightning_mnn.data.loaders.selection import held_out, subset
from lightning_mnn.data.loaders.streaming import BUFFER_BYTES, StreamedLoader
from lightning_mnn.data.loaders.whitening import ROWS, InputMap, check_floor, input_map, moments, moments_of_group
from lightning_mnn.utilities.distributed import DistributedGroup, ProcessGroup, is_initialised, part_of
from lightning_mnn.utilities.resources import free_memory
from lightning_mnn.utilities.validation import (
    ArgumentError,
    one_of,
    positive_integer,
    real_number,
    seed_number,
    truth_value,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_mnn.data.images.store import LabelledImages


LABELS = ("zero_one", "plus_minus")

RESIDENCIES = ("auto", "memory", "stream")

STORAGES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_TEST_BUFFER_BYTES = 1 << 26  # of a streamed test set, which is read in order

_MEMORY_SHARE = 0.5  # share of the free memory that mapped inputs may use


class ImageData(ExactData):
    """Flattened images with their classes split into two groups; a subclass returns the images from :meth:`source`.

    They are centred by the mean image, optionally whitened, and scaled to mean variance 1
    (:func:`~lightning_mnn.data.loaders.whitening.input_map`). All of this is computed from the training samples.

    In memory, the mapped inputs are one tensor on the device. Streamed batches are read from a file in a random order
    that is fast on disks (:class:`~lightning_mnn.data.loaders.streaming.StreamedLoader`); they are mapped after
    reading, or read from a file of mapped inputs that is written once. The numbers of a sample are the same in all
    cases: they come from the same map and are rounded to ``storage``. With whitening they are equal to the last bit
    under the condition in :meth:`InputMap.apply`. Without ``shuffle`` the batches are the same, too. With ``shuffle``,
    streamed data have an order of their own, which depends on ``buffer_bytes`` and not on ``materialise``. A resumed
    run must therefore use the residency that it started with; its checkpoints contain it, together with a digest of the
    data.

    Args:
        groups: the classes with label 0 and those with label 1, each by its name, or by its index if no name is written
            like that number; other classes are left out. None: the first half of the sorted names, and the others.
        labels: "zero_one" or "plus_minus".
        whiten: floor of :func:`~lightning_mnn.data.loaders.whitening.whitening_matrix`; None: no whitening.
        equal_norms: whether to scale every image to the norm √d0 as the last step, so that images with a small norm
            count as much as others. With labels ±1, the class that a network without biases gives an image does not
            depend on the image's norm.
        residency: "memory", "stream", or "auto": in memory if the mapped inputs need at most half of the free memory
            of the training device when the run starts.
        storage: "float32", "bfloat16" or "float16", to which mapped inputs are rounded; None: ``dtype``. The network
            computes in its own precision.
        materialise: for streamed data, whether to write the mapped inputs to a file in ``cache``. If the writing is
            stopped, the next start continues it.
        cache: folder for files that are written once: the map of streamed data, and the mapped inputs. None:
            ``$LIGHTNING_MNN_CACHE``, or else ``~/.cache/lightning-mnn``.
        buffer_bytes: for streamed data, the size of the samples that are shuffled together, computed as if they were
            float32. Two such buffers are in memory, over all processes; for images stored in bytes, each needs a
            quarter of this size.
        num_samples: size of a random subset of the training images, drawn with ``seed``; None: all.
        test_fraction: fraction of the images that are held out at random as a test set, if there is no other.
        split_seed: seed of that choice; it is the same for all replicas and, by default, for all seeds.
        **options: see :class:`ExactData`.

    Attributes:
        inputs: (N, d0) in memory; None for streamed data, and before setup.
        targets: (N,), or (R, N) if labels are changed and there are replicas; None before setup.
        test_inputs: of the test set, mapped as the training images; None as ``inputs``, and if there is no test set.
        test_targets: of the test set.

    Raises:
        ValueError: an argument is out of its range; a subset of shared images for several replicas. In setup: classes
            do not exist, or all images are the same; labels of their own for replicas of streamed data. For streamed
            data: the full batch, or a shuffled order for each of several replicas. In load_state_dict: the
            checkpoint is of other data, or of another residency.
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
        num_samples: int | None = None,
        test_fraction: float = 0.0,
        split_seed: int = 0,
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
        self.num_samples = None if num_samples is None else positive_integer("num_samples", num_samples)
        if num_samples is not None and self.replicas > 1:
            problem = "needs replicas=1: each replica would have its own subset, but the images are shared"
            raise ArgumentError("num_samples", num_samples, problem, "train the seeds one by one")
        self.test_fraction = real_number("test_fraction", test_fraction, at_least=0, below=1)
        self.split_seed = seed_number("split_seed", split_seed)
        self.inputs: Tensor | None = None
        self.targets: Tensor | None = None
        self.test_inputs: Tensor | None = None
        self.test_targets: Tensor | None = None
        self._streamed: dict[str, Any] = {}  # arguments of StreamedLoader
        self._streamed_test: dict[str, Any] = {}
        self._mapping: InputMap | None = None  # of streamed samples
        self._facts: dict[str, Any] = {}  # properties of the data that must be the same when a run is resumed
        self._facts_before: dict[str, Any] = {}

    @abstractmethod
    def source(self) -> LabelledImages:
        """All images with their classes; it is called after ``prepare_data`` has made its files."""

    def test_source(self) -> LabelledImages | None:
        """The images of a test set with the classes of :meth:`source`; None: there is none."""
        return None

    @override
    def prepare_data(self) -> None:
        """Write the mapped inputs if ``materialise`` is set; a subclass first makes the files that its source needs."""
        if self.materialise and self.residency != "memory":
            samples, test = self._samples()
            if self._streams(samples, test, ProcessGroup()):
                self._written(samples)

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.targets is not None:
            return
        samples, test = self._samples()
        process_group = DistributedGroup(samples.count) if is_initialised() else ProcessGroup()
        if self._streams(samples, test, process_group):
            self._check_streamed(samples)
            if not self.materialise or test is not None:
                self._mapping = self._stored_map(samples, process_group)
            self._streamed = self._written(samples) if self.materialise else self._on_the_fly(samples)
            self._streamed_test = {} if test is None else self._on_the_fly(test)
        else:
            mapping = self._found_map(samples, process_group)
            self.inputs = self._mapped(samples, mapping)
            self.test_inputs = None if test is None else self._mapped(test, mapping)
        self.targets = self.changed_labels(self._labels(samples))
        self.test_targets = None if test is None else self._labels(test)
        self._facts = self._found_facts(samples)
        self._check_facts()

    def _samples(self) -> tuple[ImageSamples, ImageSamples | None]:
        """The training samples and the test samples."""
        samples, source = ImageSamples(self.source(), self.groups), self.test_source()
        test = None if source is None else ImageSamples(source, self.groups)
        if self.test_fraction:
            if test is not None:
                raise ArgumentError("test_fraction", self.test_fraction, "must be 0 with data that have a test set")
            kept, held = held_out(samples.count, self.test_fraction, self.split_seed)
            samples, test = samples.part(kept.numpy()), samples.part(held.numpy())
        if self.num_samples is not None:
            samples = samples.part(subset(samples.count, self.num_samples, self.seed).numpy())
        return samples, test

    def _check_streamed(self, samples: ImageSamples) -> None:
        if self.batch_size is None:
            raise ValueError(
                f"the {samples.count} images are streamed, so the full batch is never in memory: "
                "set a batch_size (or residency=memory)"
            )
        if self.replicas > 1 and (self.label_noise or self.random_labels):
            raise ValueError(
                "streamed images have one list of labels, but label_noise and random_labels give each replica its own: "
                "set replicas=1, or keep the images in memory (residency=memory)"
            )

    def _labels(self, samples: ImageSamples) -> Tensor:
        ones = torch.from_numpy(samples.ones).to(self.dtype)
        return ones if self.labels == "zero_one" else 2 * ones - 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"data": self._facts}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "data"})
        self._facts_before = state_dict.get("data", {})
        self._check_facts()  # Lightning calls setup first; otherwise setup checks them later

    @override
    def loader(self, device: torch.device, **options: Any) -> ExactLoader:
        assert self.targets is not None  # noqa: S101 (for the type checker)
        if self.inputs is not None:
            return ResidentLoader(self.inputs.to(device), self.targets.to(device), **options)
        mapping = None if self.materialise else self._mapping_on(device)
        streamed: dict[str, Any] = self._streamed | {"mapping": mapping, "buffer_bytes": self.buffer_bytes}
        return StreamedLoader(targets=self.targets, device=device, **streamed, **options)

    @override
    def test_loader(self, device: torch.device, **options: Any) -> ExactLoader | None:
        if self.test_targets is None:
            return None
        if self.test_inputs is not None:
            return ResidentLoader(self.test_inputs.to(device), self.test_targets.to(device), **options)
        buffer_bytes = min(self.buffer_bytes, _TEST_BUFFER_BYTES)
        streamed: dict[str, Any] = self._streamed_test | {"mapping": self._mapping_on(device)}
        return StreamedLoader(
            targets=self.test_targets, device=device, buffer_bytes=buffer_bytes, **streamed, **options
        )

    def _mapping_on(self, device: torch.device) -> InputMap | None:
        """The map of streamed samples, moved to a device: both loaders use it, and it may be large."""
        self._mapping = self._mapping and self._mapping.to(device, self._precision)
        return self._mapping

    @property
    def _device(self) -> torch.device:
        """The device on which the samples are mapped: the training device if it supports float64, else the CPU."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return torch.device("cpu") if device.type == "mps" else device

    @property
    def _precision(self) -> torch.dtype:
        """The dtype in which the samples are mapped."""
        return torch.promote_types(self.dtype, torch.float32)

    def _streams(self, samples: ImageSamples, test: ImageSamples | None, process_group: ProcessGroup) -> bool:
        """Whether to stream the samples; the same on all processes."""
        if self.residency != "auto":
            return self.residency == "stream"
        processes = 1 if self.trainer is None or self._device.type == "cuda" else self.trainer.num_devices
        free = torch.tensor(free_memory(self._device) / processes, dtype=torch.float64, device=self._device)
        count = samples.count + (0 if test is None else test.count)
        return count * samples.shape[1] * self.storage.itemsize > _MEMORY_SHARE * float(process_group.min(free))

    def _found_facts(self, samples: ImageSamples) -> dict[str, Any]:
        order: dict[str, Any] = {}
        if self.shuffle and self.inputs is not None:
            order = {"residency": "memory"}
        elif self.shuffle:
            order = {"residency": "stream", "buffer_bytes": self.buffer_bytes}
        names = ("labels", "whiten", "equal_norms", "num_samples", "label_noise", "random_labels")
        options = {name: getattr(self, name) for name in names}
        ones = int(samples.ones.sum())
        counts = {"samples": samples.count, "samples of label 0 and 1": [samples.count - ones, ones]}
        return order | options | counts | {"digest of the images": samples.digest()}

    def _check_facts(self) -> None:
        """Raise an error if a checkpoint is of other data, or of the same data in another order."""
        before, now = self._facts_before, self._facts
        for name in (name for name in now if name in before and now[name] != before[name]):
            remedy = "resume it on the data that it was trained on, or start a new run without it"
            if hasattr(self, name):  # an option
                remedy = f"set data.{name}={'null' if before[name] is None else str(before[name]).lower()}"
            raise ValueError(
                f"the checkpoint is of a run on other data, or on these data in another order: {name} was "
                f"{before[name]}, and is now {now[name]}: {remedy}"
            )

    def _mapped(self, samples: ImageSamples, mapping: InputMap) -> Tensor:
        mapping = mapping.to(self._device, self._precision)
        inputs = torch.empty(samples.shape, dtype=self.storage, device=self._device)
        for low, high in spans(0, samples.count, ROWS):
            mapping.apply(samples.read(low, high).to(self._device), inputs[low:high])
        return inputs

    def _on_the_fly(self, samples: ImageSamples) -> dict[str, Any]:
        return {"rows": samples.rows, "chosen": samples.chosen, "dtype": self.storage}

    def _written(self, samples: ImageSamples) -> dict[str, Any]:
        """The file of mapped inputs; one process at a time writes it, and the others then find it complete."""
        content = [self._name_of_map(samples), str(self.equal_norms), str(self.storage), str(self._precision)]
        path = self.cache / f"inputs-{digest_of_words(content)}.rows"
        mapping: InputMap | None = None

        def block_of(low: int, high: int) -> Tensor:
            nonlocal mapping
            if mapping is None:
                mapping = self._stored_map(samples, ProcessGroup()).to(self._device, self._precision)
            out = torch.empty(high - low, samples.shape[1], dtype=self.storage, device=self._device)
            return mapping.apply(samples.read(low, high).to(self._device), out).cpu()

        return {"rows": written_rows(path, samples.shape, self.storage, block_of)}

    def _stored_map(self, samples: ImageSamples, process_group: ProcessGroup) -> InputMap:
        """The map of streamed samples, read from a file if an earlier run has saved it."""
        path = self.cache / f"{self._name_of_map(samples)}.npz"
        saved = load_map(path) if path.exists() else None
        known = torch.tensor(float(saved is not None), device=self._device)
        if process_group.min(known) == 1 and saved is not None:
            return replace(saved, equal_norms=self.equal_norms)
        mapping = self._found_map(samples, process_group)
        if self.trainer is None or self.trainer.local_rank == 0:
            try:
                save_map(path, mapping)
            except OSError as error:
                rank_zero_warn(
                    f"the map of the inputs is not saved, and will be computed again at the next start: {error}: "
                    "set cache (data.cache) to a folder that can be written"
                )
        return mapping

    def _name_of_map(self, samples: ImageSamples) -> str:
        return f"map-{digest_of_words([samples.identity(), repr(self.whiten)])}"

    def _found_map(self, samples: ImageSamples, process_group: ProcessGroup) -> InputMap:
        """Compute the map by a pass over the samples, which is split over the processes."""
        rank = dist.get_rank() if process_group.size > 1 else 0
        what = "mean and variance" if self.whiten is None else f"whitening with floor {self.whiten}"
        rank_zero_info(f"computing {what} of {samples.count} images of {samples.shape[1]} numbers")
        size = max(1, BLOCK_NUMBERS // samples.shape[1])
        blocks = (samples.read(*span) for span in spans(*part_of(samples.count, rank, process_group.size), size))
        own = moments(blocks, samples.shape[1], products=self.whiten is not None, device=self._device)
        return replace(input_map(moments_of_group(own, process_group), self.whiten), equal_norms=self.equal_norms)
