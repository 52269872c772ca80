"""ActivationPatternRecorder: which linear regions does training pass through?"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.kink_probe import (
    MAX_SAMPLES,
    AwaitsForwardError,
    KinkProbe,
    checked_probe,
    chosen_samples,
    limits,
)
from lightning_mnn.callbacks.evaluation.module_network import network_of, states_network
from lightning_mnn.callbacks.evaluation.training_set import patterns_of_training_set
from lightning_mnn.callbacks.pattern_store import (
    LostSnapshotError,
    PatternStore,
    StoredSnapshot,
    digest_of,
    found_snapshot,
    store_of_run,
)
from lightning_mnn.callbacks.patterns.first_batch import ForwardCapture, call_with_captured
from lightning_mnn.callbacks.patterns.history import PatternHistory
from lightning_mnn.callbacks.patterns.pattern_scalars import pattern_scalars
from lightning_mnn.callbacks.patterns.vital_report import VitalReport
from lightning_mnn.callbacks.patterns.vital_signs import VitalSettings
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.cost import CostTier
from lightning_mnn.callbacks.trainer.findings_file import folder_of_run
from lightning_mnn.callbacks.trainer.long_pass import long_pass
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.findings import Unknown, UnknownCode
from lightning_mnn.landscape.kinks.layers import KinkLayer
from lightning_mnn.landscape.kinks.tracing import PatternError
from lightning_mnn.landscape.pattern import PackedPattern
from lightning_mnn.loggers.media import log_scalars
from lightning_mnn.utilities.distributed import on_first_process
from lightning_mnn.utilities.transfer import to_host
from lightning_mnn.utilities.validation import MisfitError, positive_integer, seed_number

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.kink_probe import Samples
    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.findings import Fact, Finding, Freeze
    from lightning_mnn.landscape.kinks.tracing import Names

_LIGHT_PROBE = 256  # samples

_VITALS = {
    CostTier.LIGHT: VitalSettings(samples=0, centres=0),
    CostTier.STANDARD: VitalSettings(samples=64, centres=16),
    CostTier.FULL: VitalSettings(),
}


class ActivationPatternRecorder(ScheduledCallback):
    """Records activation patterns of the training set, bit-packed, in a ``patterns.zarr`` store.

    Works with any module that calls piecewise-linear functions: ReLU and its variants, clamp, maximum, max-pooling, as
    modules or as functions (see :class:`lightning_mnn.landscape.kinks.tracing.KinkTrace`). A module that defines its
    network by a method ``network()``, as MNN does, is evaluated in float64. Any other module runs over the samples in
    eval mode, without gradients, in the precision of training, at the scheduled times only.

    Each unit of a layer is on one of two pieces, or of more: ReLU6 has three, a window of max-pooling as many as it has
    inputs. A layer with more than two is stored in binary digits (see :class:`lightning_mnn.landscape.PackedPattern`).
    Three snapshots are in memory on the module's device: the first, the last and the current one. They take

        3 × samples × Σ over the layers of (binary digits of a piece) × ⌈units / 8⌉ bytes,

    which ``memory_budget`` bounds; in addition there is one layer of one snapshot, or the layer's output for one batch.

    If there is no comparable pattern after the first snapshot (weights that are NaN, a layer that is new or is not
    called any more, a training set that became smaller), the recorder warns and leaves out that snapshot.

    Beside the patterns it measures vital signs of the layers: dead and dormant units, local complexity, the effective
    rank of the activations (see :mod:`lightning_mnn.landscape`), and at the end of training the step at which patterns
    froze, and that at which the weights settled. What is out of the ordinary is logged at the end, and is in
    ``summary()["findings"]``. A vital sign that cannot be measured is named there, and does not end the recording.

    What is logged is listed in the page Logged names; what checkpoints and files hold, in Files.

    Args:
        schedule: when to record, besides the start and the end; None: after 1, 2, 4, 8, … epochs, and with a tier
            other than "full" after as many steps.
        probe: number of samples to record, a fixed random subset; None: the whole training set if the module defines
            its network, and otherwise min(N, 1024, what the budget allows), in whole batches if the loader drops
            incomplete ones (``drop_last``). Or a batch of samples as the training loader yields it, the same on every
            process, where the first axis of each tensor is the samples. If the samples cannot be enumerated, as those
            of an ``IterableDataset``, None takes those of the first batch of training.
        dirpath: folder of ``patterns.zarr`` (if another run left one there, of ``patterns-v1.zarr`` and so on); None:
            the folder of the first logger's run, or without a logger the Trainer's ``default_root_dir``; if that is the
            current folder, nothing is written.
        seed: seed of the probe.
        modules: names or patterns (``*``, ``?``) of the layers to record, or of modules that contain them; None: all.
        memory_budget: bytes that the recorder may use on the device, 32 MiB by default.
        forward_fn: ``forward_fn(module, batch)``, what to run on a batch; None: the module's ``forward`` on as many
            leading parts of the batch as it requires, or its ``training_step`` if ``forward`` cannot be run or calls
            other layers, as in an autoencoder whose forward is the encoder alone. Both run once on three samples before
            training; a choice that may be unexpected is logged. If none of them can be run, as in a GAN whose forward
            takes noise, what the first batch of training calls the forward with is kept, and recording begins after it.
        strict: if true, an error in the callback ends the run; otherwise it warns once, and training goes on without
            the callback.
        tier: "light": at most 1 % of training's time, of 256 samples, dead units only; "standard": at most 5 %, all
            vital signs, of fewer samples; "full": everything, without a limit. What does not fit, by the clock, is left
            out, at the start and the end, too, so two runs may record different steps.
        end_seconds: time limit of the work at the end of training; None: what the tier leaves, and with "full" 30 s or
            5 % of training's time, whichever is more, for an MNN no limit; ``math.inf``: no limit.

    Attributes:
        store: the store of the snapshots; None before training, on processes other than the first, in a fast_dev_run,
            and if nothing is written.
        layers: the recorded layers by name: number of units, number of pieces, and which pieces count as active.

    Raises:
        ValueError: ``probe`` or ``memory_budget`` < 1; (at the start of training) a probe beyond the budget, or layers
            in which the numbers cannot be assigned to samples.
        TypeError: (at the start of training) a module without kinks, or ``modules``, ``forward_fn`` or a batch as
            ``probe`` for a module that defines its network.
    """

    missing = "no activation patterns are recorded"
    remedy = (
        "forward_fn(module, batch), if the module's forward takes something other than a batch; probe=batch, a batch "
        "of samples, if those of the training set cannot be enumerated; modules=, the layers to record"
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
        tier: str = "full",
        end_seconds: float | None = None,
    ) -> None:
        unit = "epoch" if tier == CostTier.FULL else "step"
        schedule = schedule or Schedule(growth=2.0, unit=unit)
        super().__init__(schedule, strict=strict, tier=tier, end_seconds=end_seconds)
        self.probe = checked_probe(_LIGHT_PROBE if probe is None and self.tier is CostTier.LIGHT else probe)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.seed = seed_number("seed", seed)
        self.modules = modules if modules is None or isinstance(modules, str) else list(modules)
        self.memory_budget = positive_integer("memory_budget", memory_budget)
        self.forward_fn = forward_fn
        self.store: PatternStore | None = None
        self.layers: dict[str, KinkLayer] = {}
        self._kinks: KinkProbe | None = None  # for a module that does not define its network
        self._first: dict[str, PackedPattern] = {}
        self._last: dict[str, PackedPattern] = {}
        self._stored: dict[str, StoredSnapshot] = {}  # "first" and "last", if they are in a store
        self._store_path: str | None = None  # on every process
        self._regions: list[list[str]] = []  # for each replica: distinct digests in the order of visit
        self._recorded_step: int | None = None
        self._skipped = False  # whether a snapshot was left out
        self._vitals = VitalReport(_VITALS[self.tier], self.seed, self.memory_budget)
        self._history = PatternHistory(self.seed)
        self._first_batch: Any = None  # while it is in training
        self._capture: ForwardCapture | None = None  # while it is not known what training calls the forward with

    @property
    def findings(self) -> list[list[Finding]]:
        """What is out of the ordinary at the last snapshot, one list for each replica."""
        return self._vitals.findings

    @property
    def freezes(self) -> list[Freeze]:
        """When patterns and weights settled, one for each replica."""
        return self._vitals.freezes

    @property
    def not_measured(self) -> dict[str, str]:
        """What could not be measured, and why."""
        return self._vitals.missing

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
            self._clear()
            self.store, self._store_path = None, None
            self.layers, self._kinks, self._recorded_step, self._skipped = {}, None, None, False
            self._first_batch, self._capture = None, None
            self._vitals = VitalReport(_VITALS[self.tier], self.seed, self.memory_budget)  # the old one may be kept

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self._capture is not None:
            self._capture.end()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._capture is None:
            self._first_batch = batch if self._waits else None
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self._first_batch = None
        if self._capture is not None:
            self._capture.begin(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._capture is not None:
            self._capture.end()
            self.observe(lambda: self._start_late(trainer, pl_module))
            self._capture = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def _start_late(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with suppress(AwaitsForwardError):  # then it starts at the end of this batch
            super()._start_late(trainer, pl_module)

    @override
    def least_seconds(self, trainer: pl.Trainer) -> float:
        """A pass forwards over the probe: a third of what training takes for it."""
        of_default = 0 if states_network(trainer.lightning_module) else MAX_SAMPLES
        samples = self.probe if isinstance(self.probe, int) else of_default
        return self._seconds_of_samples(trainer, samples) / 3

    @override
    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = self._folder(trainer)
        if folder is None:
            rank_zero_info("Activation patterns: without a logger no patterns.zarr is written; dirpath= is its folder")
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._store_path = on_first_process(trainer, lambda: self._open_store(folder))
        super().start(trainer, pl_module)

    def _folder(self, trainer: pl.Trainer) -> Path | None:
        log_dir = trainer.log_dir  # a collective
        return self.dirpath or folder_of_run(trainer, log_dir)

    def _open_store(self, folder: Path) -> str:
        """Open the store, on the first process; return its path, for all processes."""
        if self._last:
            self.store = store_of_run(folder, self._recorded_step, digest_of(self._last))
            self.store.create()  # so that another recorder that does not record yet chooses a different store
        else:
            self.store = store_of_run(folder, None, "")
        return str(self.store.path.absolute())

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            signs = self._vitals.measure(trainer, pl_module, self._kinks, self._chosen(trainer), strict=self.strict)
            patterns = self._patterns(trainer, pl_module)
        except PatternError as error:
            if not self._last:
                raise
            self._skip(trainer, error)
            return
        self._recorded_step = trainer.global_step
        bits = to_host([pattern.bits for pattern in patterns.values()])
        on_host = {name: replace(p, bits=copy) for (name, p), copy in zip(patterns.items(), bits, strict=True)}
        digest = digest_of(on_host)
        if self.store is not None:
            self.store.write(trainer.global_step, self.completed_epochs, on_host, digest)
        self._name_stored(trainer.global_step, list(patterns), digest)
        lead = next(iter(patterns.values())).lead
        stored = None if self._store_path is None else (self._store_path, digest)
        self._history.record(trainer, pl_module, lead.numel() if lead else 0, stored)
        digests = [digest] if isinstance(digest, str) else digest
        self._regions = self._regions or [[] for _ in digests]
        for visited, digest in zip(self._regions, digests, strict=True):
            if digest not in visited:
                visited.append(digest)
        self._first = {name: self._first.get(name, p).to(p.bits.device) for name, p in patterns.items()}
        last, self._last = self._last or patterns, patterns
        counts = [len(digests) for digests in self._regions]
        log_scalars(trainer, pattern_scalars(patterns, on_host, last, self._first, self.layers, counts))
        log_scalars(trainer, self._vitals.take(signs, on_host, self.layers))

    @override
    def recall(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the vital signs again, without logging."""
        if not self._last:
            return
        signs = self._vitals.measure(trainer, pl_module, self._kinks, self._chosen(trainer), strict=self.strict)
        bits = to_host([pattern.bits for pattern in self._last.values()])
        last = {name: replace(p, bits=copy) for (name, p), copy in zip(self._last.items(), bits, strict=True)}
        if not self.layers:
            self._name_layers(pl_module, last)
        self._vitals.take(signs, last, self.layers)

    @override
    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().finish(trainer, pl_module)
        if not self._last:
            return
        layers = list(self._last)

        def read(path: str, step: int, digest: str | list[str]) -> dict[str, PackedPattern]:
            return found_snapshot(StoredSnapshot(path, step, layers, digest), folder)[1]

        folder = self._folder(trainer)
        self._vitals.take_freezes(on_first_process(trainer, lambda: self._history.freeze(read)))
        log_scalars(trainer, self._vitals.freeze_scalars())
        for line in self._vitals.lines():
            rank_zero_info(f"ActivationPatternRecorder: {line}")

    def _name_stored(self, step: int, layers: list[str], digest: str | list[str]) -> None:
        """Make checkpoints name the snapshot that was written, instead of containing its bits."""
        named = {}
        if self._store_path is not None:
            snapshot = StoredSnapshot(self._store_path, step, layers, digest)
            named = {"last": snapshot} if self._first else {"first": snapshot, "last": snapshot}
        self._stored = {key: self._stored[key] for key in self._stored if key == "first"} | named

    def _skip(self, trainer: pl.Trainer, error: PatternError) -> None:
        """Continue without this snapshot: an error during training is not a reason to end it."""
        self._last_step = self._recorded_step  # a resumed run searches for this step in the store
        if not self._skipped:
            reason = "; ".join([str(error), *getattr(error, "__notes__", [])])
            rank_zero_warn(
                f"Activation patterns: none are recorded after {trainer.global_step} steps, nor if the same happens "
                f"again: {reason}"
            )
        self._skipped = True

    @override
    def summary(self) -> dict[str, Any]:
        if (received := self.received()) is not None:
            return received
        visited = [len(digests) for digests in self._regions]
        replicated = any(pattern.lead for pattern in self._last.values()) or any(
            isinstance(snapshot.digest, list) for snapshot in self._stored.values()
        )
        found: dict[str, Any] = {"regions_visited": (visited if replicated else visited[0]) if visited else None}
        found |= self._vitals.summary(replicated=replicated)
        missing = self.failure or (self.over_time and f"none at the end: {self.over_time}")
        return found if missing is None else {**found, "patterns_reason": missing}

    @override
    def facts(self) -> list[Fact]:
        return self._vitals.facts()

    @override
    def unknowns(self) -> list[Unknown]:
        left_out = [] if self._kinks is None or self._kinks.found is None else limits(self._kinks.found)
        return [
            *(Unknown("patterns of all layers", UnknownCode.NOT_MEASURED, reason) for reason in left_out),
            *(Unknown(name, UnknownCode.NOT_MEASURED, reason) for name, reason in self.not_measured.items()),
        ]

    @override
    def state_dict(self) -> dict[str, Any]:
        bits = {
            key: {
                name: {"bits": p.bits.cpu(), "width": p.width, "num_pieces": p.num_pieces}
                for name, p in patterns.items()
                if key not in self._stored
            }
            for key, patterns in (("first", self._first), ("last", self._last))
        }
        stored = {key: asdict(snapshot) for key, snapshot in self._stored.items()}
        own = {"stored": stored, "regions": self._regions, "history": self._history.state()}
        return super().state_dict() | bits | own | {"findings": self._vitals.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._first = {name: PackedPattern(**p) for name, p in state_dict.get("first", {}).items()}
        self._last = {name: PackedPattern(**p) for name, p in state_dict.get("last", {}).items()}
        self._stored = {key: StoredSnapshot(**named) for key, named in state_dict.get("stored", {}).items()}
        self._regions = state_dict.get("regions", [])
        self._history.load(state_dict.get("history", {}))
        self._vitals.load(state_dict.get("findings", []))
        self._recorded_step = self._stored["last"].step if "last" in self._stored else self._last_step

    @override
    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers; in a resumed run, read the snapshots, and drop those of other layers."""
        self._read_stored(trainer)
        if states_network(pl_module):
            if self.modules is not None or self.forward_fn is not None or not isinstance(self.probe, int | None):
                raise MisfitError(
                    "modules, forward_fn and a batch as probe are for modules without a method network(); "
                    f"{type(pl_module).__name__} has one, and every layer of its network is recorded: leave them out"
                )
            return
        self._kinks = self._probe()
        try:
            self._kinks.prepare(trainer, pl_module, self._first_batch)
        except AwaitsForwardError as error:
            if trainer.world_size > 1:  # a process knows only its own batches
                raise error.error from None
            self._capture = ForwardCapture(error.error)
            raise
        self.layers = dict(self._kinks.layers)
        samples = self._kinks.num_samples
        expected = {name: (layer.num_units, layer.num_pieces, samples) for name, layer in self.layers.items()}
        resumed = {name: (p.width, p.num_pieces, p.bits.shape[-2]) for name, p in self._last.items()}
        if resumed and (resumed != expected or self._kinks.was_in_training):
            rank_zero_warn(
                f"Activation patterns: the checkpoint has other layers or samples ({_described(resumed)}; now "
                f"{_described(expected)}); recording starts again, and flips are counted from here"
            )
            self._start_again()

    def _probe(self) -> KinkProbe:
        """The samples; those that the forward was called with, if it could not be run on others."""
        if self._capture is None:
            return KinkProbe(self.probe, self.memory_budget, self.seed, self.modules, self.forward_fn)
        inputs, error = self._capture.inputs, self._capture.error
        if inputs is None:
            raise error
        rank_zero_info(
            f"Activation patterns: {type(error).__name__} on a batch of the training set: what training called forward "
            "with in its first batch is recorded; for another choice give a forward_fn(module, batch)"
        )
        call = call_with_captured
        return KinkProbe(inputs, self.memory_budget, self.seed, self.modules, call, was_in_training=True)

    def _read_stored(self, trainer: pl.Trainer) -> None:
        """Read the snapshots that the checkpoint names, on the first process, and send them to all."""
        unread = {key: named for key, named in self._stored.items() if not getattr(self, f"_{key}")}
        if not unread:
            return
        folder = self._folder(trainer)
        try:
            found = on_first_process(
                trainer, lambda: {key: found_snapshot(named, folder) for key, named in unread.items()}
            )
        except LostSnapshotError as error:
            rank_zero_warn(
                f"Activation patterns: the snapshots that the checkpoint names cannot be read: {error}. Recording "
                "starts again, and flips are counted from here. To continue from them, restore the store and resume "
                "from the checkpoint again"
            )
            self._start_again()
            return
        self._stored = self._stored | {key: named for key, (named, _) in found.items()}
        for key, (_, patterns) in found.items():
            setattr(self, f"_{key}", patterns)

    def _start_again(self) -> None:
        self._clear()
        self._last_step = None  # so that there is a snapshot at the start

    def _clear(self) -> None:
        self._first, self._last, self._stored, self._regions = {}, {}, {}, []
        self._history = PatternHistory(self.seed)

    def _patterns(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, PackedPattern]:
        """The pattern of every layer on the recorded samples, in the data set's order, on every process."""
        if self._kinks is not None:
            return self._kinks.patterns(trainer, pl_module)
        with long_pass(trainer, f"Activation patterns after {trainer.global_step} steps, of the whole training set"):
            layers = enumerate(patterns_of_training_set(trainer, pl_module), start=1)
        found = {f"layer_{i}": pattern for i, pattern in layers}
        self._name_layers(pl_module, found)
        if not isinstance(self.probe, int):
            return found
        chosen = self._chosen(trainer)
        return {name: PackedPattern(p.bits[..., chosen, :], p.width) for name, p in found.items()}

    def _name_layers(self, pl_module: pl.LightningModule, patterns: dict[str, PackedPattern]) -> None:
        """Set the layers of a module that defines its network."""
        network = network_of(pl_module)
        blocks = network is not None and network.negative_slope == 0
        self.layers = {name: KinkLayer(pattern.width, blocks=blocks) for name, pattern in patterns.items()}

    def _chosen(self, trainer: pl.Trainer) -> Tensor:
        """Indices of the recorded samples of a module that defines its network."""
        if self._kinks is not None:
            return torch.empty(0, dtype=torch.int64)
        total = num_samples(trainer.train_dataloader)
        return chosen_samples(total, self.probe, self.seed) if isinstance(self.probe, int) else torch.arange(total)


def _described(layers: dict[str, tuple[int, int, int]]) -> str:
    """Names of layers and their number of samples, as text."""
    names = list(layers)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} of {next(iter(layers.values()))[-1]} samples"
