"""VitalProbe: local complexity, dormant units and effective rank of a module on some of the recorded samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.kink_probe import select
from lightning_mnn.callbacks.evaluation.module_network import network_of
from lightning_mnn.callbacks.evaluation.snapshots import restoring_generators, seed_generators
from lightning_mnn.data.loaders.shards import batch_size_of, exact_shard, flat_batch
from lightning_mnn.landscape.kinks.layers import PatternRows
from lightning_mnn.landscape.kinks.tracing import Kink, KinkTrace, PatternError
from lightning_mnn.landscape.pattern import ActivationPattern, PackedPattern
from lightning_mnn.landscape.vitals.signs import (
    dormant_units,
    effective_rank_of_gram,
    local_complexity,
    random_frame,
    sample_gram,
)
from lightning_mnn.utilities.distributed import local_result
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import to_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.kink_probe import KinkProbe
    from lightning_mnn.landscape.network import Network

_BYTES = 4  # of an activation


@dataclass(frozen=True)
class VitalSettings:
    """What vital signs are measured on.

    Attributes:
        samples: number of samples for dormant units and the effective rank; 0: neither is measured.
        centres: number of samples around which the local complexity is measured; 0: it is not.
        directions: directions of the frame; each needs two passes over these samples.
        radius: of the local complexity, relative to the root mean square of the samples' norms.
    """

    samples: int = 128
    centres: int = 32
    directions: int = 4
    radius: float = 0.05


@dataclass(frozen=True)
class VitalSigns:
    """Vital signs at one step, by layer and in total; tensors (...) over replicas.

    Attributes:
        dormant: fraction of dormant units.
        rank: effective rank of the activations.
        complexity: local complexity.
        units: number of units of each layer with activations.
        samples: number of samples of the activations, the largest possible rank.
        total_dormant, total_rank, total_complexity: of all layers together; None: not measured.
        missing: what could not be measured, and why.
    """

    dormant: dict[str, Tensor] = field(default_factory=dict)
    rank: dict[str, Tensor] = field(default_factory=dict)
    complexity: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    total_dormant: Tensor | None = None
    total_rank: Tensor | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def total_complexity(self) -> Tensor | None:
        """The sum over the layers."""
        return torch.stack(list(self.complexity.values())).sum(0) if self.complexity else None

    def scalars(self) -> dict[str, Tensor | None]:
        """The values by their logged names."""
        found = {
            "pattern/dormant_fraction": self.total_dormant,
            "pattern/effective_rank": self.total_rank,
            "pattern/local_complexity": self.total_complexity,
        }
        for name, values in (
            ("dormant_fraction", self.dormant),
            ("effective_rank", self.rank),
            ("local_complexity", self.complexity),
        ):
            found |= {f"pattern/{layer}/{name}": value for layer, value in values.items()}
        return found


class VitalProbe:
    """Measures vital signs of a module; every process measures all of them on the same samples.

    Args:
        settings: what they are measured on.
        seed: seed of the directions.
        memory_budget: bytes for packed patterns and for the activations of a layer.
    """

    def __init__(self, settings: VitalSettings, seed: int, memory_budget: int) -> None:
        self.settings = settings
        self._seed = seed
        self._budget = memory_budget

    @torch.no_grad()
    def of_model(self, trainer: pl.Trainer, pl_module: pl.LightningModule, kinks: KinkProbe) -> VitalSigns:
        """Vital signs of any module, whose layers a KinkProbe has found.

        Raises:
            PatternError: activations or pre-activations are not finite, or the layers are not as before.
        """
        return local_result(lambda: _OfModel(self, trainer, pl_module, kinks).signs())

    @torch.no_grad()
    def of_network(self, trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Tensor) -> VitalSigns:
        """Vital signs of a module that defines its network, on these samples of its training set, in float64."""
        network = network_of(pl_module)
        assert network is not None  # noqa: S101 (the caller has checked)
        chosen = chosen[: max(self.settings.samples, self.settings.centres)]

        def read() -> Tensor:
            with restoring_generators(trainer):
                (batch,) = exact_shard(trainer.train_dataloader, chosen=chosen, batch_size=len(chosen))
            return flat_batch(batch, replicated=network.output_weights.ndim > 1)[0]

        if not len(chosen):
            return VitalSigns()
        device = network.output_weights.device
        inputs = local_result(read).to(device if device.type != "mps" else "cpu", network.output_weights.dtype)
        return self._of_network(network.to(inputs.device).to(torch.float64), inputs.to(torch.float64))

    def _of_network(self, network: Network, inputs: Tensor) -> VitalSigns:
        readers = _Activations()
        for i, z in enumerate(network.preactivations(inputs[..., : self.settings.samples, :]), start=1):
            readers.take(f"layer_{i}", torch.where(z > 0, z, network.negative_slope * z))

        def vertices() -> Iterator[Mapping[str, PackedPattern]]:
            centres = inputs[..., : self.settings.centres, :]
            shifts = torch.stack(list(self.shifts(centres, centres.ndim - 1)))
            moved = (centres[..., None, :, :] + shifts[:, None]).flatten(-3, -2)  # all vertices in one pass
            layers = [ActivationPattern(z > 0).pack() for z in network.preactivations(moved)]
            count = centres.shape[-2]
            for start in range(0, moved.shape[-2], count):
                yield {
                    f"layer_{i}": PackedPattern(pattern.bits[..., start : start + count, :], pattern.width)
                    for i, pattern in enumerate(layers, start=1)
                }

        complexity = local_complexity(vertices()) if self.settings.centres else {}
        return readers.signs(complexity, {})

    def shifts(self, samples: Tensor, first_axis: int = 1) -> Iterator[Tensor]:
        """± r v_j for each direction, of the shape of one sample: the axes from ``first_axis`` on."""
        shape = samples.shape[first_axis:]
        frame = random_frame(shape.numel(), self.settings.directions, generator(self._seed, "frame"))
        norms = torch.linalg.vector_norm(samples.flatten(first_axis), dim=-1, dtype=_at_least_float32(samples))
        radius = self.settings.radius * norms.square().mean().sqrt()
        for direction in frame.to(samples.device, radius.dtype):
            shift = (radius * direction).reshape(shape).to(samples.dtype)
            yield shift
            yield -shift

    def num_samples(self, trainer: pl.Trainer, kinks: KinkProbe) -> int:
        """Number of samples that run as one batch: as many as in training, or as fit into the budget."""
        largest = max(layer.num_units for layer in kinks.layers.values())
        trained = 0
        if not kinks.is_batch:
            trained = batch_size_of(trainer.train_dataloader)
        fit = max(1, trained, self._budget // (_BYTES * largest))
        return min(self.settings.samples, kinks.num_samples, fit)

    def num_centres(self, kinks: KinkProbe, samples: int) -> int:
        """Number of samples of the local complexity, whose three patterns fit beside two snapshots."""
        each = sum(layer.bytes_per_sample for layer in kinks.layers.values())
        left = (self._budget - 2 * kinks.num_samples * each) // (3 * each)
        return max(0, min(self.settings.centres, samples, left))


class _OfModel:
    """One measurement of a module."""

    def __init__(self, probe: VitalProbe, trainer: pl.Trainer, pl_module: pl.LightningModule, kinks: KinkProbe) -> None:
        self._probe, self._trainer, self._module, self._kinks = probe, trainer, pl_module, kinks

    def signs(self) -> VitalSigns:
        """The vital signs."""
        kinks, settings = self._kinks, self._probe.settings
        size = self._probe.num_samples(self._trainer, kinks)
        if size == 0:
            return VitalSigns()
        centres = self._probe.num_centres(kinks, size)
        missing = {}
        with isolated(self._trainer, self._module):
            batch = kinks.some_samples(self._trainer, self._module, size)
            activations = self._activations(batch)
            complexity: dict[str, Tensor] = {}
            if settings.centres:
                reason = _reason_not_shifted(batch, size)
                if centres == 0:
                    reason = "memory_budget has no room for it"
                if reason is None:
                    complexity = self._complexity(batch, size, centres)
                else:
                    missing["local_complexity"] = reason
        return activations.signs(complexity, missing)

    def _activations(self, batch: Any) -> _Activations:
        found = _Activations()
        layers = self._kinks.layers

        def take(kink: Kink, output: Any) -> None:
            layer = layers.get(kink.name)
            values = output[0] if isinstance(output, tuple) else output  # pooling may return indices, too
            if layer is not None and isinstance(values, Tensor) and layer.fits(values.shape):
                found.take(kink.name, layer.rows(values))

        seed_generators(0)
        with KinkTrace(self._module, _nothing, self._kinks.modules, take):
            self._kinks.run(self._trainer, self._module, batch)
        return found

    def _complexity(self, batch: Any, size: int, centres: int) -> dict[str, Tensor]:
        spaced = torch.arange(centres, device=self._module.device) * size // centres
        few = batch if centres == size else select(batch, spaced, size)
        samples = _samples_of(few, centres)
        assert samples is not None  # noqa: S101 (the whole batch has them)

        def shifted(shift: Tensor) -> Any:
            return apply_to_collection(few, Tensor, lambda t: t + shift if t is samples else t, allow_frozen=True)

        def vertices() -> Iterator[Mapping[str, PackedPattern]]:
            for shift in self._probe.shifts(samples):
                rows = PatternRows(
                    self._kinks.layers, centres, self._module.device, 0, self._kinks.layers_without_samples
                )
                seed_generators(0)
                with KinkTrace(self._module, rows.take, self._kinks.modules):
                    self._kinks.run(self._trainer, self._module, shifted(shift))
                rows.end_batch()
                rows.check()
                yield rows.patterns()

        return local_complexity(vertices())


class _Activations:
    """Dormant units and Gram matrices of the layers, one after another; only these stay in memory."""

    def __init__(self) -> None:
        self._dormant: dict[str, Tensor] = {}
        self._grams: dict[str, Tensor] = {}
        self._units: dict[str, int] = {}

    def take(self, name: str, activations: Tensor) -> None:
        """Read the activations of a layer, (..., N, d1)."""
        self._dormant[name] = dormant_units(activations).sum(-1)
        self._grams[name] = sample_gram(activations)
        self._units[name] = activations.shape[-1]

    def signs(self, complexity: dict[str, Tensor], missing: dict[str, str]) -> VitalSigns:
        """The vital signs.

        Raises:
            PatternError: an activation is not finite.
        """
        if not self._grams:
            return VitalSigns(complexity=complexity, missing=missing)
        grams = torch.stack(list(self._grams.values()))
        finite = grams.isfinite().all()
        grams = torch.where(finite, grams, 0.0)
        ranks = effective_rank_of_gram(torch.cat([grams, grams.sum(0, keepdim=True)]))
        ranks, counts, finite = to_host([ranks, torch.stack(list(self._dormant.values())), finite])
        if not finite:
            raise PatternError("activations are not finite: they have no effective rank")
        units = torch.tensor(list(self._units.values()), dtype=torch.float64)
        fractions = counts.movedim(0, -1) / units
        return VitalSigns(
            dormant=dict(zip(self._dormant, fractions.movedim(-1, 0), strict=True)),
            rank=dict(zip(self._grams, ranks[:-1], strict=True)),
            complexity=complexity,
            units=dict(self._units),
            samples=grams.shape[-1],
            total_dormant=counts.sum(0) / units.sum(),
            total_rank=ranks[-1],
            missing=missing,
        )


def _nothing(_: Kink) -> None:
    """Do nothing before a kink call."""


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _samples_of(batch: Any, size: int) -> Tensor | None:
    """The first tensor of a batch whose rows are the samples: the inputs, in nearly every batch."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim > 0 and len(batch) == size else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for part in parts if (found := _samples_of(part, size)) is not None), None)


def _reason_not_shifted(batch: Any, size: int) -> str | None:
    """Why there are no points around the samples of a batch; None if there are."""
    samples = _samples_of(batch, size)
    if samples is None:
        return "no tensor of a batch has a row for each sample"
    if not samples.is_floating_point():
        return f"the samples are not real numbers but {str(samples.dtype).removeprefix('torch.')}"
    return None
