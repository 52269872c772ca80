"""Local volumes in any LightningModule: the pattern of a probe set, under random moves of all parameters.

What :class:`~lightning_mnn.callbacks.AngularVolumeMonitor` does where a module's regions are no products of cones.
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
_FIRST = 4  # samples of the probe that a move is first tried on: most large moves change every layer there
_SMALL = 1e-3  # σ of a move that tells which layers move with the parameters
_AT_ZERO = frozenset({"relu", "leaky_relu", "prelu", "rrelu", "abs", "absolute"})  # two pieces that meet at 0


@dataclass(frozen=True)
class ProbeSettings:
    """What is measured, and how.

    Attributes:
        probe: so many samples of the training set, or a batch as the training loader yields it.
        sigmas: sizes σ of the moves; None: half decades from 1e-6 to 1, those that the dtype of the weights resolves.
        num_draws: moves at each σ.
        modules: names or patterns of the layers; None: all.
        forward_fn: how to run the module on a batch; None: see :func:`pass_of_training`.
        target_standard_error: of the log measure of a cone of the first layer.
        budget: most multiplications for the cones of the first layer.
        seed: of the probe, the moves and the cones.
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
    def of_passes(self) -> list[str]:
        """The arguments given that say how a module's passes are run and looked at."""
        given = {
            "modules": self.modules is not None,
            "forward_fn": self.forward_fn is not None,
            "a batch as probe": not isinstance(self.probe, int),
        }
        return [name for name, yes in given.items() if yes]


@dataclass(frozen=True)
class Found:
    """What was found at some weights; of weights that nothing was measured at, by default.

    Attributes:
        volume: keep probabilities; None where there are none.
        reason: why there are none, or none of some σ.
        first_layer: name of the layer whose cones were to be measured.
        cones: their volume; None where there is none.
        cones_reason: why there is none.
    """

    volume: LocalVolume | None = None
    reason: str | None = _NOT_MEASURED
    first_layer: str | None = None
    cones: RegionVolume | None = None
    cones_reason: str | None = _NOT_MEASURED

    def plain(self) -> dict[str, Any]:
        """For ``summary.json``."""
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
    """Run the module once on its probe, so that what cannot work is said before training.

    Returns:
        The settings, with what is to be run in them.

    Raises:
        NoKinksError: no kink was met, or none of those asked for.
        TypeError: the samples of the training set cannot be enumerated, or the module cannot be run.
    """
    if settings.forward_fn is None and not isinstance(pl_module, NetworkModule):

        def batch() -> Any:
            return apply_to_collection(_probe_parts(trainer, pl_module, settings)[0], torch.Tensor, torch.clone)

        chosen = pass_of_training(trainer, pl_module, batch, settings.modules, "AngularVolumeMonitor")
        settings = replace(settings, forward_fn=chosen)
    with isolated(trainer, pl_module):
        _Passes(trainer, pl_module, settings).look()
    return settings


def measure_local_volume(trainer: pl.Trainer, pl_module: pl.LightningModule, settings: ProbeSettings) -> Found:
    """Measure a module's keep probabilities and its first layer's cones, the same on every process.

    Processes share the draws.

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
        look = passes.look()
        volume, reason = _keep_probabilities(trainer, settings, passes, look)
    cones = on_first_process(trainer, lambda: _first_cones(look.first, settings, trainer.global_step))
    return Found(volume, reason, look.first.name if look.first else None, *cones)


def log_local_volume(trainer: pl.Trainer, pl_module: pl.LightningModule, found: Found, settings: ProbeSettings) -> None:
    """Log what was found, and a picture of it to loggers that can show it."""
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
    """The logged names of the probabilities at some σ, in as few digits as tell these apart.

    >>> keep_names([0.001, 0.00316]), keep_names([0.0010, 0.0011])
    (['volume/keep/1e-03', 'volume/keep/3e-03'], ['volume/keep/1.0e-03', 'volume/keep/1.1e-03'])
    """
    digits = 0
    while len({f"{sigma:.{digits}e}" for sigma in sigmas}) < len(sigmas):
        digits += 1
    return [f"volume/keep/{sigma:.{digits}e}" for sigma in sigmas]


@dataclass
class _FirstLayer:
    """The first layer of kinks that the parameters move."""

    name: str
    reason: str | None  # why its units have no cones
    linear: nn.Linear | None = None
    rows: Tensor | None = None  # (d1, d0), with the bias as one more column
    inputs: list[Tensor] = field(default_factory=list)  # (n, d0) of each part of the probe


@dataclass
class _Look:
    """What a pass over the probe with gradients tells, beside one with moved parameters.

    Gradients alone would not do: what torch computes anew in the backward pass (checkpoints) has none in the forward.
    """

    moved: set[str]  # layers whose input is another where the parameters move
    moved_sources: set[str]  # layers of which the input of the module before is
    hooked: set[int] = field(default_factory=set)  # ids of modules with hooks of others
    layers: list[str] = field(default_factory=list)  # that the parameters move
    first: _FirstLayer | None = None
    opaque: tuple[str, ...] = ()
    nan: dict[str, Tensor] = field(default_factory=dict)  # whether a layer meets NaN, which is read at the end
    not_a_number: list[str] = field(default_factory=list)  # that do

    def note(self, kink: Kink) -> None:
        """Take note of a kink call."""
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
    """Passes of a module over its probe, all alike; for use within ``isolated``."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: ProbeSettings) -> None:
        self._trainer, self._module, self._settings = trainer, pl_module, settings
        self._forward = settings.forward_fn or (_flat_forward if isinstance(pl_module, NetworkModule) else None)
        self.parts = _probe_parts(trainer, pl_module, settings)
        self.parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        self._take: Any = None
        self._trace = KinkTrace(pl_module, self._met, settings.modules)

    def look(self) -> _Look:
        """Which layers there are.

        Raises:
            NoKinksError: none was met.
        """
        look, met = (
            _Look(*self._moved_layers(), hooked={id(p) for p in self._module.modules() if has_forward_hooks(p)}),
            [],
        )

        def take(kink: Kink) -> None:
            if kink.num_pieces > 1:
                met.append(kink.name)
                look.note(kink)

        with torch.enable_grad():
            for part in self.parts:
                self._pass(part, take)
        if not met:
            raise no_kinks(self._module, self._trace, self._settings.modules)
        if (
            look.first is not None and isinstance(self._module, NetworkModule) and not self._trace.left_out
        ):  # it has no Linear
            inputs = [flat_batch(part)[0] for part in self.parts]
            look.first = _FirstLayer(look.first.name, None, None, self._module.network().rows, inputs)
        look.opaque = tuple(sorted(self._trace.opaque))
        look.not_a_number = [name for name, is_nan in zip(look.nan, fetched(*look.nan.values()), strict=True) if is_nan]
        return look

    def _moved_layers(self) -> tuple[set[str], set[str]]:
        """The layers whose input, and those of which the input of the module before, a small move changes."""
        if not (self.parameters and _are_plain(self.parameters)):
            return set(), set()
        here, there = self._inputs(), {}
        with moved(self.parameters, max(_SMALL, finest_sigma(self.parameters))):
            there = self._inputs()
        pairs = [(name, place) for name in here for place in range(2)]
        same = fetched(*(_same(here[name][place], there.get(name, (None, None))[place]) for name, place in pairs))
        differ = [
            {name for (name, at), holds in zip(pairs, same, strict=True) if at == place and not holds}
            for place in (0, 1)
        ]
        return differ[0], differ[1]

    def _inputs(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Of each layer its input, and that of the module before, on the first part of the probe."""
        found: dict[str, tuple[Tensor | None, Tensor | None]] = {}

        def take(kink: Kink) -> None:
            source = kink.source_input if isinstance(kink.source_input, torch.Tensor) else None
            found[kink.name] = (kink.input.clone(), source if source is None else source.clone())

        with torch.no_grad():
            self._pass(self.parts[0], take)
        return found

    def pattern(self, part: Any, layers: Sequence[str]) -> dict[str, Tensor]:
        """The pieces of the units of some layers; where a layer met NaN, other numbers than any pieces."""
        found: dict[str, Tensor] = {}

        def take(kink: Kink) -> None:
            if kink.name in layers:
                pieces, is_nan = kink.pieces_or_nan()
                found[kink.name] = torch.where(is_nan, ~pieces, pieces)  # none that a unit can be on

        with torch.no_grad():
            self._pass(part, take)
        return found

    def _met(self, kink: Kink) -> None:
        self._take(kink)

    def _pass(self, part: Any, take: Any) -> None:
        self._take = take
        seed_generators(0)  # each pass draws the same
        batch = apply_to_collection(part, torch.Tensor, torch.clone)  # which a pass may change
        with warnings.catch_warnings(), precision_context(self._trainer, autocast=False), full_precision(), self._trace:
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # of checkpointed blocks
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
        told = f"{error}; or give AngularVolumeMonitor a batch of the training set, probe=batch"
        raise NotEnumerableError(told) from error
    chosen = chosen_samples(total, settings.probe, settings.seed)
    parts = [part for part in (chosen[:_FIRST], chosen[_FIRST:]) if len(part)]
    return [as_in_training(trainer, pl_module, batch) for part in parts for batch in exact_shard(loader, chosen=part)]


def _first_layer(kink: Kink, *, moves: bool, hooked: bool) -> _FirstLayer:
    """Whether the units of the first layer have cones: f(W x + b) at inputs that no parameter moves, kinks at 0."""
    linear, inputs = kink.source, kink.source_input
    if kink.num_pieces != 2 or kink.function not in _AT_ZERO:
        return _FirstLayer(kink.name, f"{kink.function} has other kinks than one at 0")
    if type(linear) is not nn.Linear:
        what = "nobody's output" if linear is None else f"the output of a {type(linear).__name__}"
        return _FirstLayer(kink.name, f"its input is {what}, and not that of a Linear: a unit has no cone of its own")
    if not is_plain_linear(linear):
        return _FirstLayer(kink.name, "the weights of its Linear are no parameters but computed (parametrized, pruned)")
    if hooked:
        return _FirstLayer(kink.name, "its Linear has forward hooks, which may change what it gives")
    if moves or not isinstance(inputs, torch.Tensor) or inputs.requires_grad:
        return _FirstLayer(kink.name, "the inputs of its Linear depend on parameters themselves")
    rows = linear.weight.detach()
    if linear.bias is not None:
        rows = torch.cat([rows, linear.bias.detach()[:, None]], dim=1)
    return _FirstLayer(kink.name, None, linear, rows)


def _are_plain(parameters: Sequence[Tensor]) -> bool:
    """Whether each parameter is here as a whole, and not a shard of one."""
    return all(type(parameter.data) is torch.Tensor for parameter in parameters)


def _same(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Whether two tensors are equal, or both missing, bool ()."""
    if a is None or b is None or (a.shape, a.device) != (b.shape, b.device):
        return torch.tensor(a is b)
    return (a == b).all()


def _keep_probabilities(
    trainer: pl.Trainer, settings: ProbeSettings, passes: _Passes, look: _Look
) -> tuple[LocalVolume | None, str | None]:
    """The curves, or why there are none; with curves, what they leave out."""
    parameters = passes.parameters
    if not look.layers:
        return None, "no kink depends on a parameter that requires a gradient"
    if look.not_a_number:
        return None, f"the input of {look.not_a_number[0]} contains NaN"
    if not _are_plain(parameters):
        return None, "the parameters are no plain tensors, each whole on its device"
    finest = finest_sigma(parameters)
    wanted = SIGMAS if settings.sigmas is None else tuple(settings.sigmas)
    sigmas = tuple(sigma for sigma in wanted if sigma >= finest)
    hidden = f"σ below {finest:.1e} would be lost in the rounding of the weights" if sigmas != wanted else None
    if not sigmas:
        return None, hidden
    unseen = f"kinks of {', '.join(look.opaque)} are not seen" if look.opaque else None
    runs = [lambda part=part: passes.pattern(part, look.layers) for part in passes.parts]
    draws = range(trainer.global_rank, settings.num_draws, trainer.world_size)
    seed = generator(settings.seed, "local volume", trainer.global_step).initial_seed()

    def own() -> Mapping[str, Tensor] | str:
        try:
            return count_kept(parameters, runs, sigmas, draws, seed=seed)
        except (ValueError, ArithmeticError) as error:
            return str(error)

    counts = gather_results(own)
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
    device = "cpu" if first.rows.device.type == "mps" else first.rows.device  # which has no float64
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
