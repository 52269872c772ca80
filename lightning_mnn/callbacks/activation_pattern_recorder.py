"""ActivationPatternRecorder: which linear regions does training pass through?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from lightning_mnn.callbacks.pattern_store import PatternStore
from lightning_mnn.callbacks.schedule import Schedule, ScheduledCallback
from lightning_mnn.callbacks.training_set import gather, network_of, patterns_of_training_set
from lightning_mnn.data.shards import exact_shard, num_samples
from lightning_mnn.landscape.pattern import ActivationPattern, PackedPattern
from lightning_mnn.loggers import log_scalars
from lightning_mnn.seeding import generator

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

KINKS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)


class ActivationPatternRecorder(ScheduledCallback):
    """Records activation patterns of the training set, bit-packed, in a ``patterns.zarr`` store.

    Works with any module whose kinks are ``nn.ReLU``, ``nn.LeakyReLU`` or ``nn.PReLU``. A piecewise-linear network
    such as MNN is evaluated in float64; another module runs once over the samples in eval mode, with hooks that are
    removed afterwards.

    Logs ``pattern/flips`` (since the last snapshot), ``pattern/flips_from_start``, ``pattern/hamming_from_start`` (as a
    fraction of all samples and units), ``pattern/regions_visited`` (distinct patterns among the snapshots),
    ``pattern/never_active_units``, ``pattern/always_active_units`` and ``pattern/unactivated_samples`` (on which no
    unit of some layer is active): means over the replicas.

    Args:
        schedule: when to record, besides the start and the end; None: after 1, 2, 4, 8, … epochs.
        probe: record a fixed random subset of this many samples; None: the whole training set.
        dirpath: folder of ``patterns.zarr``; None: the run's log folder. A store that another run left there is not
            touched: ``patterns-v1.zarr`` and so on is written instead. A ``fast_dev_run`` writes nothing.
        seed: seed of the probe.

    Attributes:
        store: where the snapshots are; None before training, on processes other than the first, and in a fast_dev_run.

    Raises:
        ValueError: ``probe`` < 1.
        TypeError: (at the start of training) a module without kinks, data whose samples cannot be enumerated, or
            batches whose first part is not a tensor.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        probe: int | None = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(schedule or Schedule(growth=2.0))
        if probe is not None and probe < 1:
            raise ValueError(f"probe must be at least 1 sample, got {probe}")
        self.probe = probe
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.seed = seed
        self.store: PatternStore | None = None
        self._first: dict[str, PackedPattern] = {}
        self._last: dict[str, PackedPattern] = {}
        self._regions: list[list[str]] = []  # of each replica, distinct digests in the order of visit

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(probe=self.probe, seed=self.seed)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._first, self._last, self._regions, self.store = {}, {}, [], None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = self.dirpath or trainer.log_dir or trainer.default_root_dir  # log_dir is a collective
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            digests = _digests(self._last) if self._last else []
            self.store = _open_store(Path(folder), self._last_step, digests)
        super().on_train_start(trainer, pl_module)

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        patterns = self._patterns(trainer, pl_module)
        digests = _digests(patterns)
        self._regions = self._regions or [[] for _ in digests]
        for visited, digest in zip(self._regions, digests, strict=True):
            if digest not in visited:
                visited.append(digest)
        self._first = self._first or patterns
        last, self._last = self._last or patterns, patterns
        if self.store is not None:
            replicated = next(iter(patterns.values())).bits.ndim > 2
            self.store.write(
                trainer.global_step, self.completed_epochs, patterns, digests if replicated else digests[0]
            )
        self._log(trainer, last)

    @override
    def summary(self) -> dict[str, Any]:
        visited = [len(digests) for digests in self._regions]
        replicated = any(pattern.bits.ndim > 2 for pattern in self._last.values())
        return {"regions_visited": (visited if replicated else visited[0]) if visited else None}

    @override
    def state_dict(self) -> dict[str, Any]:
        def plain(patterns: dict[str, PackedPattern]) -> dict[str, Any]:
            return {name: {"bits": p.bits, "width": p.width} for name, p in patterns.items()}

        own = {"first": plain(self._first), "last": plain(self._last), "regions": self._regions}
        return super().state_dict() | own

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._first = {name: PackedPattern(**p) for name, p in state_dict.get("first", {}).items()}
        self._last = {name: PackedPattern(**p) for name, p in state_dict.get("last", {}).items()}
        self._regions = state_dict.get("regions", [])

    def _patterns(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, PackedPattern]:
        """The pattern of every layer on the recorded samples, in the data set's order, on every process."""
        chosen = self._chosen(trainer)
        if network_of(pl_module) is None:
            parts = gather(record_patterns(pl_module, trainer, chosen))
            layers = next(part for part in parts if part).keys()
            widths = {name: next(part for part in parts if part)[name].width for name in layers}
            joined = {name: torch.cat([part[name].bits for part in parts if part], dim=-2) for name in layers}
            return {name: PackedPattern(bits, widths[name]) for name, bits in joined.items()}
        layers = enumerate(patterns_of_training_set(trainer, pl_module), start=1)
        whole = {f"layer_{i}": pattern for i, pattern in layers}
        if chosen is None:
            return whole
        return {name: PackedPattern(p.bits[..., chosen, :], p.width) for name, p in whole.items()}

    def _chosen(self, trainer: pl.Trainer) -> Tensor | None:
        if self.probe is None:
            return None
        total = num_samples(trainer.train_dataloader)
        order = torch.randperm(total, generator=generator(self.seed, "probe"))
        return order[: self.probe].sort().values

    def _log(self, trainer: pl.Trainer, last: dict[str, PackedPattern]) -> None:
        flips = _total([self._last[name].flips(last[name]) for name in last])
        from_start = _total([self._last[name].flips(self._first[name]) for name in last])
        active = {name: pattern.unpack().active for name, pattern in self._last.items()}
        pairs = sum(a.shape[-2] * a.shape[-1] for a in active.values())
        log_scalars(
            trainer,
            {
                "pattern/flips": flips,
                "pattern/flips_from_start": from_start,
                "pattern/hamming_from_start": from_start.to(torch.float64) / pairs,
                "pattern/regions_visited": torch.tensor([len(visited) for visited in self._regions]),
                "pattern/never_active_units": _total([(~a.any(-2)).sum(-1) for a in active.values()]),
                "pattern/always_active_units": _total([a.all(-2).sum(-1) for a in active.values()]),
                "pattern/unactivated_samples": _any_layer([~a.any(-1) for a in active.values()]).sum(-1),
            },
        )


def record_patterns(
    pl_module: pl.LightningModule, trainer: pl.Trainer, chosen: Tensor | None = None
) -> dict[str, PackedPattern]:
    """Patterns of this process's part of the training set at every kink module, by a forward pass with hooks.

    The module runs in eval mode without gradients; its modes and its hooks are afterwards as before. A kink that a
    forward pass meets several times is one layer each time (``relu``, ``relu.call_2``, …). Empty where the process has
    no samples.

    Raises:
        TypeError: no kink was met.
    """
    kinks = {name: part for name, part in pl_module.named_modules() if isinstance(part, KINKS)}
    met: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls = sum(key == name or key.startswith(f"{name}.call_") for key in met)
            met[name if calls == 0 else f"{name}.call_{calls + 1}"] = args[0].flatten(1)

        return hook

    batches: dict[str, list[PackedPattern]] = {}
    modes = {part: part.training for part in pl_module.modules()}
    hooks = [part.register_forward_pre_hook(hook_of(name)) for name, part in kinks.items()]
    try:
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for batch in exact_shard(trainer.train_dataloader, trainer.global_rank, trainer.world_size, chosen):
                met.clear()
                pl_module(_inputs(batch, trainer))
                for name, preactivations in met.items():
                    batches.setdefault(name, []).append(ActivationPattern.from_preactivations(preactivations).pack())
                if not met:
                    raise TypeError(
                        f"{type(pl_module).__name__} met no kink in its forward pass: ActivationPatternRecorder knows "
                        f"modules of type {', '.join(kink.__name__ for kink in KINKS)}"
                    )
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes.items():
            part.training = training
    return {
        name: PackedPattern(torch.cat([p.bits.cpu() for p in parts], dim=-2), parts[0].width)
        for name, parts in batches.items()
    }


def _inputs(batch: Any, trainer: pl.Trainer) -> Any:
    """What a forward pass takes of a batch: its first part, on the device and in the precision of training."""
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(inputs, torch.Tensor):
        raise TypeError(
            "ActivationPatternRecorder passes a batch, or the first part of a tuple, to the module's forward, and "
            f"expects a tensor there, got {type(inputs).__name__}"
        )
    return trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(inputs))


def _digests(patterns: dict[str, PackedPattern]) -> list[str]:
    """One digest a replica, of all layers together; with one layer that layer's own digest."""
    by_layer = [[d] if isinstance(d := p.digest(), str) else d for p in patterns.values()]
    if len(by_layer) == 1:
        return by_layer[0]
    return [
        hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
        for digests in zip(*by_layer, strict=True)
    ]


def _total(counts: list[Tensor]) -> Tensor:
    return torch.stack(counts).sum(0)


def _any_layer(flags: list[Tensor]) -> Tensor:
    return torch.stack(flags).any(0)


def _open_store(folder: Path, resumed_step: int | None, digests: list[str]) -> PatternStore:
    """The store to write: the one that a resumed run was writing in this folder, or one that does not exist yet."""
    path, version = folder / "patterns.zarr", 0
    while path.exists():
        store = PatternStore(path)
        if resumed_step in store.steps and store.attributes(resumed_step)["digest"] in (digests, *digests[:1]):
            store.discard_after(resumed_step)
            return store
        version += 1
        path = folder / f"patterns-v{version}.zarr"
    return PatternStore(path)
