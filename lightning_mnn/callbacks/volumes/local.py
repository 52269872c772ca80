"""Local volumes in any LightningModule: the pattern of a probe set, under random moves of all parameters.

:class:`~lightning_mnn.callbacks.AngularVolumeMonitor` uses it if a module's regions are not products of cones.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn

from lightning_mnn.callbacks.evaluation.choose_pass import pass_of_training
from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.kink_probe import chosen_samples, first_batch
from lightning_mnn.callbacks.evaluation.module_network import NetworkModule
from lightning_mnn.callbacks.evaluation.run_module import as_in_training, forward_on, precision_context
from lightning_mnn.callbacks.evaluation.snapshots import seed_generators
from lightning_mnn.callbacks.volumes.cones import ConePlan, OverBudgetError, is_plain_linear
from lightning_mnn.data.loaders.shards import NotEnumerableError, draws, exact_shard, flat_batch, num_samples
from lightning_mnn.landscape.kinks.layers import no_kinks
from lightning_mnn.landscape.kinks.tracing import Kink, KinkTrace
from lightning_mnn.landscape.perturbation import finest_sigma, moved
from lightning_mnn.landscape.volumes.random_moves import ALL_LAYERS, SIGMAS, LocalVolume, count_kept
from lightning_mnn.loggers.media import log_image, log_scalars, shows_images
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.compat.torch_internals import has_forward_hooks
from lightning_mnn.utilities.distributed import gather_results, on_first_process
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.callbacks.volumes.cones import VolumeOrReason
    from lightning_mnn.landscape.kinks.tracing import Names
    from lightning_mnn.landscape.volumes.region_volume import RegionVolume

_NOT_MEASURED = "not measured at the last weights"
_FIRST = 4  # samples of the probe on which a move is tried first: most large moves already change every layer there
_SMALL = 1e-3  # σ of the move that finds which layers depend on the parameters
_AT_ZERO = frozenset({"relu", "leaky_relu", "prelu", "rrelu", "abs", "absolute"})  # two pieces that meet at 0


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a measurement.

    Attributes:
        probe: number of samples of the training set, or a batch as the training loader yields it.
        sigmas: sizes σ of the moves; None: half decades from 1e-6 to 1, those that the dtype of the weights resolves.
        num_draws: number of moves at each σ.
        modules: names or patterns of the layers; None: all.
        forward_fn: how to run the module on a batch; None: see :func:`pass_of_training`.
        target_standard_error: standard error of the log measure of a cone of the first layer.
        budget: maximal number of multiplications for the cones of the first layer.
        seed: seed of the probe, the moves and the cones.
    """

    probe: Any = 32
    sigmas: Sequence[float] | None = None
    num_draws: int = 20
    modules: Names = None
    forward_fn: ModelFunction | None = None
    target_standard_error: float = 0.5
    budget: float = 3e9
    seed: int = 0

    @property
    def forward_arguments(self) -> list[str]:
        """Names of the given arguments that control how a module's passes are run and evaluated."""
        given = {
            "modules": self.modules is not None,
            "forward_fn": self.forward_fn is not None,
            "a batch as probe": not isinstance(self.probe, int),
        }
        return [name for name, yes in given.items() if yes]


@dataclass(frozen=True)
class Found:
    """Results at some weights; the default is that nothing was measured there.

    Attributes:
        volume: keep probabilities; None if there are none.
        reason: why there are none, or none for some σ.
        first_layer: name of the layer whose cones were to be measured.
        cones: their volume; None if there is none.
        cones_reason: why there is none.
    """

    volume: LocalVolume | None = None
    reason: str | None = _NOT_MEASURED
    first_layer: str | None = None
    cones: RegionVolume | None = None
    cones_reason: str | None = _NOT_MEASURED

    def plain(self) -> dict[str, Any]:
        """Plain values for ``summary.json``."""
        curves = None
        if self.volume is not None:
            both = {ALL_LAYERS: self.volume.total} | self.volume.layers
            curves = {name: curve.plain() for name, curve in both.items()}
        return {
            "local_volume": curves,
            "local_volume_reason": self.reason,
            "first_layer": {
                "layer": self.first_layer,
                "log_volume": self.cones and self.cones.value,
                "log_volume_standard_error": self.cones and self.cones.standard_error,
                "log_volume_reason": self.cones_reason,
            },
        }


def check_kinks(trainer: pl.Trainer, pl_module: pl.LightningModule, settings: ProbeSettings) -> ProbeSettings:
    """Run the module once on its probe, so that errors are raised before training.

    Returns:
        The settings, completed with the ``forward_fn`` to run.

    Raises:
        NoKinksError: no kink was met, or none that ``modules`` names.
        TypeError: the samples of the training set cannot be enumerated, or the module cannot be run.
    """
    if settings.forward_fn is None and not isinstance(pl_module, NetworkModule):

        def batch() -> Any:
            return apply_to_collection(_probe_parts(trainer, pl_module, settings)[0], torch.Tensor, torch.clone)

        chosen = pass_of_training(trainer, pl_module, batch, settings.modules, "AngularVolumeMonitor")
        settings = replace(settings, forward_fn=chosen)
    with isolated(trainer, pl_module):
        _Passes(trainer, pl_module, settings).find_layers()
    return settings


def measure_local_volume(trainer: pl.Trainer, pl_module: pl.LightningModule, settings: ProbeSettings) -> Found:
    """Measure a module's keep probabilities and its first layer's cones, the same on every process.

    The draws are divided among the processes.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        settings: as :func:`check_kinks` returned them.

    Raises:
        NoKinksError: see :func:`check_kinks`.
        TypeError: see :func:`check_kinks`.
    """
    with isolated(trainer, pl_module):
        passes = _Passes(trainer, pl_module, settings)
        layers = passes.find_layers()
        volume, reason = _keep_probabilities(trainer, settings, passes, layers)
    cones = on_first_process(trainer, lambda: _first_cones(layers.first, settings, trainer.global_step))
    return Found(volume, reason, layers.first.name if layers.first else None, *cones)


def log_local_volume(trainer: pl.Trainer, pl_module: pl.LightningModule, found: Found, settings: ProbeSettings) -> None:
    """Log the results, and a picture of them to loggers that can show pictures."""
    scalars: dict[str, Tensor | float | None] = {}
    if found.volume is not None:
        total = found.volume.total
        scalars |= {f"volume/half_sigma{side}": getattr(total, f"half_sigma{side}") for side in ("", "_low", "_high")}
        scalars |= {f"volume/{name}/half_sigma": curve.half_sigma for name, curve in found.volume.layers.items()}
        names = keep_names(total.sigmas)
        scalars |= {name: kept.value for name, kept in zip(names, total.kept, strict=True)}
    if found.cones is not None:
        scalars[f"volume/{found.first_layer}/log_volume"] = found.cones.value
        scalars[f"volume/{found.first_layer}/log_volume_standard_error"] = found.cones.standard_error
    log_scalars(trainer, scalars)
    if found.volume is None or not trainer.is_global_zero or not any(map(shows_images, trainer.loggers)):
        return
    from lightning_mnn.figures.local_volume import local_volume_figure  # noqa: PLC0415 (matplotlib is slow to import)

    title = f"{type(pl_module).__name__} after {trainer.global_step} steps, {settings.num_draws} draws"
    with TemporaryDirectory() as folder:
        picture = local_volume_figure(found.volume, Path(folder) / "local_volume.png", title)
        for logger in trainer.loggers:
            log_image(logger, "volume/local", picture, trainer.global_step)


def keep_names(sigmas: Sequence[float]) -> list[str]:
    """The logged names of the probabilities at some σ, with as few digits as distinguish them.

    >>> keep_names([0.001, 0.00316]), keep_names([0.0010, 0.0011])
    (['volume/keep/1e-03', 'volume/keep/3e-03'], ['volume/keep/1.0e-03', 'volume/keep/1.1e-03'])
    """
    digits = 0
    while len({f"{sigma:.{digits}e}" for sigma in sigmas}) < len(sigmas):
        digits += 1
    return [f"volume/keep/{sigma:.{digits}e}" for sigma in sigmas]


@dataclass
class _FirstLayer:
    """The first layer of kinks whose input depends on the parameters."""

    name: str
    reason: str | None  # why its units have no cones
    linear: nn.Linear | None = None
    rows: Tensor | None = None  # (d1, d0), with the bias as one more column
    inputs: list[Tensor] = field(default_factory=list)  # (n, d0) for each part of the probe


@dataclass
class _LayersOfProbe:
    """The layers found by a pass over the probe with gradients, and by one with moved parameters.

    Gradients alone are not enough: what torch recomputes in the backward pass (checkpointing) has none in the forward.
    """

    moved: set[str]  # layers whose input changes when the parameters move
    moved_sources: set[str]  # layers for which the input of the preceding module changes
    hooked: set[int] = field(default_factory=set)  # ids of modules with forward hooks
    layers: list[str] = field(default_factory=list)  # layers that depend on the parameters
    first: _FirstLayer | None = None
    opaque: tuple[str, ...] = ()
    nan: dict[str, Tensor] = field(default_factory=dict)  # whether a layer's input has NaN; read at the end
    nan_layers: list[str] = field(default_factory=list)  # layers whose input has NaN

    def record(self, kink: Kink) -> None:
        """Record a kink call."""
        is_nan = kink.input.isnan().any()
        self.nan[kink.name] = self.nan.get(kink.name, is_nan) | is_nan
        if not (kink.depends_on_weights or kink.name in self.moved):
            return
        if kink.name not in self.layers:
            self.layers.append(kink.name)
        if self.first is None:
            moves, hooked = kink.name in self.moved_sources, id(kink.source) in self.hooked
            self.first = _first_layer(kink, moves=moves, hooked=hooked)
        if kink.name == self.first.name and self.first.linear is not None:
            self.first.inputs.append(kink.source_input.detach().reshape(-1, self.first.linear.in_features))


class _Passes:
    """Identical passes of a module over its probe; for use within ``isolated``."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: ProbeSettings) -> None:
        self._trainer, self._module, self._settings = trainer, pl_module, settings
        self._forward = settings.forward_fn or (_flat_forward if isinstance(pl_module, NetworkModule) else None)
        self.parts = _probe_parts(trainer, pl_module, settings)
        self.parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        self._take: Any = None
        self._trace = KinkTrace(pl_module, self._met, settings.modules)

    def find_layers(self) -> _LayersOfProbe:
        """Find the layers.

        Raises:
            NoKinksError: none was met.
        """
        hooked = {id(p) for p in self._module.modules() if has_forward_hooks(p)}
        found, met = _LayersOfProbe(*self._moved_layers(), hooked=hooked), []

        def take(kink: Kink) -> None:
            if kink.num_pieces > 1:
                met.append(kink.name)
                found.record(kink)

        with torch.enable_grad():
            for part in self.parts:
                self._pass(part, take)
        if not met:
            raise no_kinks(self._module, self._trace, self._settings.modules)
        if (
            found.first is not None and isinstance(self._module, NetworkModule) and not self._trace.left_out
        ):  # it has no Linear
            inputs = [flat_batch(part)[0] for part in self.parts]
            found.first = _FirstLayer(found.first.name, None, None, self._module.network().rows, inputs)
        found.opaque = tuple(sorted(self._trace.opaque))
        found.nan_layers = [
            name for name, is_nan in zip(found.nan, fetched(*found.nan.values()), strict=True) if is_nan
        ]
        return found

    def _moved_layers(self) -> tuple[set[str], set[str]]:
        """Layers whose input changes by a small move, and layers for which the preceding module's input changes."""
        if not (self.parameters and _are_plain(self.parameters)):
            return set(), set()
        here, there = self._inputs(), {}
        with moved(self.parameters, max(_SMALL, finest_sigma(self.parameters))):
            there = self._inputs()
        pairs = [(name, place) for name in here for place in range(2)]
        same = fetched(*(_same(here[name][place], there.get(name, (None, None))[place]) for name, place in pairs))
        differ = [
            {name for (name, at), equal in zip(pairs, same, strict=True) if at == place and not equal}
            for place in (0, 1)
        ]
        return differ[0], differ[1]

    def _inputs(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """For each layer its input, and that of the preceding module, on the first part of the probe."""
        found: dict[str, tuple[Tensor | None, Tensor | None]] = {}

        def take(kink: Kink) -> None:
            source = kink.source_input if isinstance(kink.source_input, torch.Tensor) else None
            found[kink.name] = (kink.input.clone(), source if source is None else source.clone())

        with torch.no_grad():
            self._pass(self.parts[0], take)
        return found

    def pattern(self, part: Any, layers: Sequence[str]) -> dict[str, Tensor]:
        """The pieces of the units of some layers; for a NaN input, a number that is not a piece."""
        found: dict[str, Tensor] = {}

        def take(kink: Kink) -> None:
            if kink.name in layers:
                pieces, is_nan = kink.pieces_or_nan()
                found[kink.name] = torch.where(is_nan, ~pieces, pieces)  # not a piece that a unit can be on

        with torch.no_grad():
            self._pass(part, take)
        return found

    def _met(self, kink: Kink) -> None:
        self._take(kink)

    def _pass(self, part: Any, take: Any) -> None:
        self._take = take
        seed_generators(0)  # each pass draws the same numbers
        batch = apply_to_collection(part, torch.Tensor, torch.clone)  # a pass may change it
        with warnings.catch_warnings(), precision_context(self._trainer, autocast=False), full_precision(), self._trace:
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # from checkpointed blocks
            forward_on(self._module, batch, self._forward)


def _flat_forward(pl_module: pl.LightningModule, batch: Any) -> Any:
    return pl_module(flat_batch(batch)[0])


def _probe_parts(trainer: pl.Trainer, pl_module: pl.LightningModule, settings: ProbeSettings) -> list[Any]:
    """The probe in batches as in training, the same on every process."""
    if not isinstance(settings.probe, int):
        return [as_in_training(trainer, pl_module, settings.probe)]
    loader = trainer.train_dataloader
    if draws(loader):
        return [as_in_training(trainer, pl_module, first_batch(trainer))]
    try:
        total = num_samples(loader)
    except NotEnumerableError as error:
        remedy = "or give AngularVolumeMonitor a batch of the training set, probe=batch"
        raise NotEnumerableError(f"{error}; {remedy}") from error
    chosen = chosen_samples(total, settings.probe, settings.seed)
    parts = [part for part in (chosen[:_FIRST], chosen[_FIRST:]) if len(part)]
    return [as_in_training(trainer, pl_module, batch) for part in parts for batch in exact_shard(loader, chosen=part)]


def _first_layer(kink: Kink, *, moves: bool, hooked: bool) -> _FirstLayer:
    """The first layer; units have cones if it is f(W x + b) with kinks at 0 and inputs that no parameter changes."""
    linear, inputs = kink.source, kink.source_input
    if kink.num_pieces != 2 or kink.function not in _AT_ZERO:
        return _FirstLayer(kink.name, f"{kink.function} has kinks other than one at 0")
    if type(linear) is not nn.Linear:
        what = "no module's output" if linear is None else f"the output of a {type(linear).__name__}"
        return _FirstLayer(kink.name, f"its input is {what}, and not that of a Linear: a unit has no cone of its own")
    if not is_plain_linear(linear):
        reason = "the weights of its Linear are not parameters but computed (parametrized, pruned)"
        return _FirstLayer(kink.name, reason)
    if hooked:
        return _FirstLayer(kink.name, "its Linear has forward hooks, which may change its output")
    if moves or not isinstance(inputs, torch.Tensor) or inputs.requires_grad:
        return _FirstLayer(kink.name, "the inputs of its Linear depend on parameters themselves")
    rows = linear.weight.detach()
    if linear.bias is not None:
        rows = torch.cat([rows, linear.bias.detach()[:, None]], dim=1)
    return _FirstLayer(kink.name, None, linear, rows)


def _are_plain(parameters: Sequence[Tensor]) -> bool:
    """Whether each parameter is a whole tensor of this process, and not a shard."""
    return all(type(parameter.data) is torch.Tensor for parameter in parameters)


def _same(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Whether two tensors are equal, or both missing, bool ()."""
    if a is None or b is None or (a.shape, a.device) != (b.shape, b.device):
        return torch.tensor(a is b)
    return (a == b).all()


def _keep_probabilities(
    trainer: pl.Trainer, settings: ProbeSettings, passes: _Passes, found: _LayersOfProbe
) -> tuple[LocalVolume | None, str | None]:
    """The curves, or why there are none; with curves, what they leave out."""
    parameters = passes.parameters
    if not found.layers:
        return None, "no kink depends on a parameter that requires a gradient"
    if found.nan_layers:
        return None, f"the input of {found.nan_layers[0]} contains NaN"
    if not _are_plain(parameters):
        return None, "the parameters are not plain tensors, each whole on its device"
    finest = finest_sigma(parameters)
    wanted = SIGMAS if settings.sigmas is None else tuple(settings.sigmas)
    sigmas = tuple(sigma for sigma in wanted if sigma >= finest)
    hidden = f"σ below {finest:.1e} would be lost in the rounding of the weights" if sigmas != wanted else None
    if not sigmas:
        return None, hidden
    unseen = f"kinks of {', '.join(found.opaque)} cannot be seen" if found.opaque else None
    runs = [lambda part=part: passes.pattern(part, found.layers) for part in passes.parts]
    draws = range(trainer.global_rank, settings.num_draws, trainer.world_size)
    seed = generator(settings.seed, "local volume", trainer.global_step).initial_seed()

    def local_counts() -> Mapping[str, Tensor] | str:
        try:
            return count_kept(parameters, runs, sigmas, draws, seed=seed)
        except (ValueError, ArithmeticError) as error:
            return str(error)

    counts = gather_results(local_counts)
    errors = [part for part in counts if isinstance(part, str)]
    if errors:
        return None, errors[0]
    kept = [part for part in counts if not isinstance(part, str)]
    summed = {name: cast("Tensor", sum(part[name] for part in kept)) for name in kept[0]}
    return LocalVolume.of_counts(sigmas, summed, settings.num_draws), "; ".join(filter(None, (hidden, unseen))) or None


def _first_cones(first: _FirstLayer | None, settings: ProbeSettings, step: int) -> VolumeOrReason:
    """The volume of the first layer's cones on the probe, or why there is none."""
    if first is None:
        return None, "no kink depends on a parameter that requires a gradient"
    if first.rows is None:
        return None, first.reason
    device = "cpu" if first.rows.device.type == "mps" else first.rows.device  # MPS has no float64
    rows, inputs = (tensor.to(device).double() for tensor in (first.rows, torch.cat(first.inputs)))
    if rows.shape[1] > inputs.shape[1]:  # a bias
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    try:
        plan = ConePlan.within(
            settings.budget,
            settings.target_standard_error,
            replicas=1,
            num_samples=len(inputs),
            width=len(rows),
            dim=rows.shape[1],
        )
    except OverBudgetError as error:
        return None, str(error)
    return plan.measure(inputs, rows, generator(settings.seed, "volume", step).initial_seed())
