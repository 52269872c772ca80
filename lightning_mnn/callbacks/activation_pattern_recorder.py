"""ActivationPatternRecorder: which linear regions does training pass through?"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mnn.callbacks.long_pass import long_pass
from lightning_mnn.callbacks.pattern_store import PatternStore
from lightning_mnn.callbacks.probe import KinkProbe, checked_probe, chosen_samples
from lightning_mnn.callbacks.schedule import Schedule, ScheduledCallback
from lightning_mnn.callbacks.training_set import patterns_of_training_set, states_network
from lightning_mnn.data.shards import num_samples
from lightning_mnn.landscape.kink_patterns import KinkLayer
from lightning_mnn.landscape.kink_trace import PatternError
from lightning_mnn.landscape.pattern import PackedPattern, count_flips, distinct_patterns
from lightning_mnn.loggers import log_scalars
from lightning_mnn.utilities.transfer import to_host
from lightning_mnn.validation import MisfitError, positive_integer, seed_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.model_pass import ModelFunction
    from lightning_mnn.callbacks.probe import Samples
    from lightning_mnn.landscape.kink_trace import Names


class ActivationPatternRecorder(ScheduledCallback):
    """Records activation patterns of the training set, bit-packed, in a ``patterns.zarr`` store.

    Works with any module that calls piecewise-linear functions: ReLU and its kin, clamp, maximum, max-pooling, as
    modules or as functions (see :class:`lightning_mnn.landscape.kink_trace.KinkTrace`). A module that states its
    network by a method ``network()``, as MNN does, is evaluated in float64. Any other runs over the samples in eval
    mode, without gradients, in the precision of training, at the scheduled times only; nothing of that stays on it, and
    training goes on bit for bit as without the recorder.

    Each unit of a layer is on one of two pieces, or of more: ReLU6 has three, a window of max-pooling as many as it has
    inputs. A layer with more is stored by binary digits (see :class:`lightning_mnn.landscape.PackedPattern`). The
    three snapshots that are held on the module's device, the first, the last and the one that is taken, are

        3 × samples × Σ over the layers of (binary digits of a piece) × ⌈units / 8⌉ bytes,

    which ``memory_budget`` bounds; beside them there is one layer of one of them, or what it gives for one batch.

    Where there is no pattern to compare after the first snapshot (weights that are NaN, a layer that is new or is met
    no longer, a training set that became smaller), a warning says so, and that snapshot is left out.

    Logs, means over the replicas:

    - ``pattern/flips``: (sample, unit) pairs whose piece is another than at the last snapshot; ``flips_from_start``,
      and ``hamming_from_start``, which is a fraction of all pairs;
    - ``pattern/never_active_units`` and ``always_active_units``: units that are active on no recorded sample, and those
      that are on one and the same active piece on all (of functions that have active pieces: a maximum has none);
    - ``pattern/unactivated_samples``, on which no unit of some layer is active;
    - ``pattern/distinct``: different patterns among the recorded samples, all layers together: how many linear regions
      of input space they are in;
    - ``pattern/regions_visited``: different patterns of all the samples among the snapshots;
    - ``pattern/<layer>/flips``, ``flips_from_start``, ``hamming_from_start``, ``never_active_units``,
      ``always_active_units`` and ``distinct``: the same of each layer.

    Args:
        schedule: when to record, besides the start and the end; None: after 1, 2, 4, 8, … epochs.
        probe: record a fixed random subset of this many samples; None: the whole training set of a module that states
            its network, and of any other min(N, 1024, what the budget allows), in whole batches where the loader leaves
            out others (``drop_last``). Or a batch of samples as the training
            loader gives it, the first axis of each of its tensors being the samples, the same on every process: for
            data whose samples cannot be enumerated, as those of an ``IterableDataset``.
        dirpath: folder of ``patterns.zarr``; None: the folder of the first logger's run, or without a logger the
            Trainer's ``default_root_dir``, where that is not the current folder: then nothing is written. A store that
            another run left there is not touched: ``patterns-v1.zarr`` and so on is written instead. A ``fast_dev_run``
            writes nothing.
        seed: seed of the probe.
        modules: names or patterns (``*``, ``?``) of the layers to record, or of modules whose layers are; None: all.
        memory_budget: bytes that the recorder may hold on the device, 32 MiB by default.
        forward_fn: ``forward_fn(module, batch)``, what to run on a batch; None: the module's ``forward`` on as many
            leading parts of the batch as it requires, or its ``training_step`` where that cannot be or meets other
            layers, as of an autoencoder whose forward is the encoder alone. Both run once on three samples before
            training; what is chosen is said.
        strict: let an error that the callback meets end the run; else it warns once, and training goes on without it.

    Attributes:
        store: where the snapshots are; None before training, on processes other than the first, in a fast_dev_run, and
            where nothing is written.
        layers: what is recorded, by name: number of units, of pieces, and which pieces count as active.

    Raises:
        ValueError: ``probe`` or ``memory_budget`` < 1; (at the start of training) a probe beyond the budget, or layers
            in which it cannot be told which numbers belong to which sample.
        TypeError: (at the start of training) a module without kinks, data whose samples cannot be enumerated, or
            ``modules``, ``forward_fn`` or a batch as ``probe`` for a module that states its network.
    """

    missing = "no activation patterns are recorded"
    remedy = (
        "forward_fn(module, batch), where the module's forward takes something else than a batch; probe=batch, a batch "
        "of samples, where those of the training set cannot be enumerated; modules=, the layers to record"
    )

    def __init__(
        self,
        schedule: Schedule | None = None,
        probe: Samples = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
        *,
        modules: Names = None,
        memory_budget: int = 2**25,
        forward_fn: ModelFunction | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(schedule or Schedule(growth=2.0), strict=strict)
        self.probe = checked_probe(probe)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.seed = seed_number("seed", seed)
        self.modules = modules if modules is None or isinstance(modules, str) else list(modules)
        self.memory_budget = positive_integer("memory_budget", memory_budget)
        self.forward_fn = forward_fn
        self.store: PatternStore | None = None
        self.layers: dict[str, KinkLayer] = {}
        self._kinks: KinkProbe | None = None  # of a module that states no network
        self._first: dict[str, PackedPattern] = {}
        self._last: dict[str, PackedPattern] = {}
        self._regions: list[list[str]] = []  # of each replica, distinct digests in the order of visit
        self._recorded_step: int | None = None
        self._skipped = False  # a snapshot

    @property
    @override
    def state_key(self) -> str:
        probe = self.probe if self.probe is None or isinstance(self.probe, int) else "batch"
        narrowed = {} if self.modules is None else {"modules": self.modules}
        return self._generate_state_key(probe=probe, seed=self.seed, **narrowed)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._first, self._last, self._regions, self.store = {}, {}, [], None
            self.layers, self._kinks, self._recorded_step, self._skipped = {}, None, None, False

    @override
    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log_dir = trainer.log_dir  # a collective
        folder = self.dirpath or _folder_of_run(trainer, log_dir)
        if trainer.is_global_zero and folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            digests = _digests(self._last) if self._last else []
            self.store = _open_store(folder, self._last_step, digests)
        super().start(trainer, pl_module)

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            patterns = self._patterns(trainer, pl_module)
        except PatternError as error:
            if not self._last:
                raise
            self._skip(trainer, error)
            return
        self._recorded_step = trainer.global_step
        bits = to_host([pattern.bits for pattern in patterns.values()])
        on_host = {name: replace(p, bits=own) for (name, p), own in zip(patterns.items(), bits, strict=True)}
        digests = _digests(on_host)
        self._regions = self._regions or [[] for _ in digests]
        for visited, digest in zip(self._regions, digests, strict=True):
            if digest not in visited:
                visited.append(digest)
        self._first = {name: self._first.get(name, p).to(p.bits.device) for name, p in patterns.items()}
        last, self._last = self._last or patterns, patterns
        if self.store is not None:
            replicated = bool(next(iter(patterns.values())).lead)
            self.store.write(trainer.global_step, self.completed_epochs, on_host, digests if replicated else digests[0])
        self._log(trainer, on_host, last)

    def _skip(self, trainer: pl.Trainer, error: PatternError) -> None:
        """Go on without this snapshot: what happens in the midst of training is no reason to end it."""
        self._last_step = self._recorded_step  # which a resumed run looks for in the store
        if not self._skipped:
            why = "; ".join([str(error), *getattr(error, "__notes__", [])])
            rank_zero_warn(
                f"Activation patterns: none are recorded after {trainer.global_step} steps, nor where the same happens "
                f"again: {why}"
            )
        self._skipped = True

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        visited = [len(digests) for digests in self._regions]
        replicated = any(pattern.lead for pattern in self._last.values())
        found = {"regions_visited": (visited if replicated else visited[0]) if visited else None}
        return found if self.failure is None else {**found, "patterns_reason": self.failure}

    @override
    def state_dict(self) -> dict[str, Any]:
        def plain(patterns: dict[str, PackedPattern]) -> dict[str, Any]:
            return {
                name: {"bits": p.bits.cpu(), "width": p.width, "num_pieces": p.num_pieces}
                for name, p in patterns.items()
            }

        own = {"first": plain(self._first), "last": plain(self._last), "regions": self._regions}
        return super().state_dict() | own

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._first = {name: PackedPattern(**p) for name, p in state_dict.get("first", {}).items()}
        self._last = {name: PackedPattern(**p) for name, p in state_dict.get("last", {}).items()}
        self._regions = state_dict.get("regions", [])
        self._recorded_step = self._last_step

    @override
    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers; in a resumed run, forget snapshots of other ones."""
        if states_network(pl_module):
            if self.modules is not None or self.forward_fn is not None or not isinstance(self.probe, int | None):
                raise MisfitError(
                    "modules, forward_fn and a batch as probe are for modules that run as they are; "
                    f"{type(pl_module).__name__} states its network by a method network(), of which every layer is "
                    "recorded: leave them out"
                )
            return
        self._kinks = KinkProbe(self.probe, self.memory_budget, self.seed, self.modules, self.forward_fn)
        self._kinks.prepare(trainer, pl_module)
        self.layers = dict(self._kinks.layers)
        samples = self._kinks.num_samples
        expected = {name: (layer.num_units, layer.num_pieces, samples) for name, layer in self.layers.items()}
        resumed = {name: (p.width, p.num_pieces, p.bits.shape[-2]) for name, p in self._last.items()}
        if resumed and resumed != expected:
            rank_zero_warn(
                f"Activation patterns: those of the checkpoint are of other layers or samples ({_told(resumed)}; now "
                f"{_told(expected)}); they are recorded anew, and flips are counted from here"
            )
            self._first, self._last, self._regions = {}, {}, []
            self._last_step = None  # so that there is a snapshot at the start

    def _patterns(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, PackedPattern]:
        """The pattern of every layer on the recorded samples, in the data set's order, on every process."""
        if self._kinks is not None:
            return self._kinks.patterns(trainer, pl_module)
        with long_pass(trainer, f"Activation patterns after {trainer.global_step} steps, of the whole training set"):
            layers = enumerate(patterns_of_training_set(trainer, pl_module), start=1)
        found = {f"layer_{i}": pattern for i, pattern in layers}
        self.layers = {name: KinkLayer(pattern.width) for name, pattern in found.items()}
        if not isinstance(self.probe, int):
            return found
        total = num_samples(trainer.train_dataloader)
        chosen = chosen_samples(total, self.probe, self.seed)
        return {name: PackedPattern(p.bits[..., chosen, :], p.width) for name, p in found.items()}

    def _log(self, trainer: pl.Trainer, now: dict[str, PackedPattern], last: dict[str, PackedPattern]) -> None:
        flips, from_start = (
            dict(zip(now, count_flips([(self._last[name], before[name]) for name in now]), strict=True))
            for before in (last, self._first)
        )
        pairs = {name: p.width * p.bits.shape[-2] for name, p in now.items()}
        activity = {
            name: pattern.activity(pieces)
            for name, pattern in now.items()
            if (pieces := self.layers[name].active_pieces) is not None
        }
        scalars: dict[str, Tensor | None] = {
            "pattern/flips": _total(flips.values()),
            "pattern/flips_from_start": _total(from_start.values()),
            "pattern/hamming_from_start": _total(from_start.values()).to(torch.float64) / sum(pairs.values()),
            "pattern/regions_visited": torch.tensor([len(visited) for visited in self._regions]),
            "pattern/distinct": distinct_patterns(list(now.values())),
        }
        if activity:
            scalars |= {
                "pattern/never_active_units": _total(a.never_active for a in activity.values()),
                "pattern/always_active_units": _total(a.always_active for a in activity.values()),
                "pattern/unactivated_samples": _any_layer(a.unactivated for a in activity.values()).sum(-1),
            }
        for name, pattern in now.items():
            of_layer = {
                "flips": flips[name],
                "flips_from_start": from_start[name],
                "hamming_from_start": from_start[name].to(torch.float64) / pairs[name],
                "distinct": distinct_patterns([pattern]),
            }
            if name in activity:
                of_layer["never_active_units"] = activity[name].never_active
                of_layer["always_active_units"] = activity[name].always_active
            scalars |= {f"pattern/{name}/{quantity}": value for quantity, value in of_layer.items()}
        log_scalars(trainer, dict(scalars))


def _told(layers: dict[str, tuple[int, int, int]]) -> str:
    """Layers, and how many samples of them, in words."""
    names = list(layers)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} of {next(iter(layers.values()))[-1]} samples"


def _digests(patterns: dict[str, PackedPattern]) -> list[str]:
    """One digest a replica, of all layers together; with one layer that layer's own digest."""
    by_layer = [[d] if isinstance(d := p.digest(), str) else d for p in patterns.values()]
    if len(by_layer) == 1:
        return by_layer[0]
    return [
        hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
        for digests in zip(*by_layer, strict=True)
    ]


def _total(counts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(counts)).sum(0)


def _any_layer(flags: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(flags)).any(0)


def _folder_of_run(trainer: pl.Trainer, log_dir: str | None) -> Path | None:
    """The folder of the first logger's run, where Lightning's checkpoints are, too; None: nothing asks for files."""
    logger = trainer.logger
    if logger is None and Path(trainer.default_root_dir).absolute() == Path.cwd():
        rank_zero_info("Activation patterns: without a logger no patterns.zarr is written; dirpath= says where to")
        return None
    if logger is None or logger.save_dir is None or logger.log_dir is not None:
        return Path(log_dir or trainer.default_root_dir)
    return Path(logger.save_dir, str(logger.name), str(logger.version))  # W&B's, which has many runs in one folder


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
