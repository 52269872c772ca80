"""Passes of a module over a probe set, and the layers of kinks that they meet."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn

from lightning_mnn.callbacks.evaluation.kink_probe import checked_probe, chosen_samples, first_batch
from lightning_mnn.callbacks.evaluation.module_network import NetworkModule
from lightning_mnn.callbacks.evaluation.run_module import as_in_training, forward_on, precision_context
from lightning_mnn.callbacks.evaluation.snapshots import seed_generators
from lightning_mnn.callbacks.volumes.cones import is_plain_linear
from lightning_mnn.data.loaders.shards import NotEnumerableError, draws, exact_shard, flat_batch, num_samples
from lightning_mnn.landscape.kinks.layers import no_kinks
from lightning_mnn.landscape.kinks.tracing import Kink, KinkTrace
from lightning_mnn.landscape.perturbation import finest_sigma, moved
from lightning_mnn.landscape.volumes.random_moves import check_sigmas
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.compat.torch_internals import has_forward_hooks
from lightning_mnn.utilities.transfer import fetched
from lightning_mnn.utilities.validation import positive_integer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl
    from torch import Tensor

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.kinks.tracing import Names

_FIRST = 4  # samples of the probe on which a move is tried first: most large moves already change every layer there
_SMALL = 1e-3  # σ of the move that finds which layers depend on the parameters
_AT_ZERO = frozenset({"relu", "leaky_relu", "prelu", "rrelu", "abs", "absolute"})  # two pieces that meet at 0


@dataclass(frozen=True)
class LocalVolumeSettings:
    """How local volumes are measured.

    A measurement takes at most ``len(sigmas) * num_draws`` forward passes over the probe (those of large moves end
    after its first four samples), which are divided among the processes, and while it runs twice the memory of the
    parameters in addition.

    Attributes:
        probe: number of samples of the training set whose pattern counts, drawn by the seed; or a batch as the training
            loader yields it, which an IterableDataset needs.
        sigmas: sizes σ of the moves, ascending; None: half decades from 1e-6 to 1. Those below 8 spacings of the
            weights' floating-point numbers are left out, and the summary states this.
        num_draws: number of moves at each σ.
        modules: names or patterns of the layers whose pattern counts (see
            :class:`~lightning_mnn.landscape.kinks.tracing.KinkTrace`); None: all that the module calls.
        forward_fn: ``forward_fn(module, batch)`` runs the module; None: its forward on the leading parts of a batch, or
            its ``training_step`` if ``forward`` cannot be run or calls other layers (see
            :func:`~lightning_mnn.callbacks.evaluation.choose_pass.pass_of_training`).

    Raises:
        ValueError: a value is out of range.
    """

    probe: Any = 32
    sigmas: Sequence[float] | None = None
    num_draws: int = 20
    modules: Names = None
    forward_fn: ModelFunction | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        checked_probe(self.probe)
        if self.sigmas is not None:
            check_sigmas(self.sigmas)
        positive_integer("num_draws", self.num_draws)

    @property
    def forward_arguments(self) -> list[str]:
        """Names of the given arguments that control how a module's passes are run and evaluated."""
        given = {
            "modules": self.modules is not None,
            "forward_fn": self.forward_fn is not None,
            "a batch as probe": not isinstance(self.probe, int),
        }
        return [name for name, yes in given.items() if yes]


@dataclass
class FirstLayer:
    """The first layer of kinks whose input depends on the parameters."""

    name: str
    reason: str | None  # why its units have no cones
    linear: nn.Linear | None = None
    rows: Tensor | None = None  # (d1, d0), with the bias as one more column
    inputs: list[Tensor] = field(default_factory=list)  # (n, d0) for each part of the probe


@dataclass
class LayersOfProbe:
    """The layers found by a pass over the probe with gradients, and by one with moved parameters.

    Gradients alone are not enough: what torch recomputes in the backward pass (checkpointing) has none in the forward.
    """

    moved: set[str]  # layers whose input changes when the parameters move
    moved_sources: set[str]  # layers for which the input of the preceding module changes
    hooked: set[int] = field(default_factory=set)  # ids of modules with forward hooks
    layers: list[str] = field(default_factory=list)  # layers that depend on the parameters
    first: FirstLayer | None = None
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


class ProbePasses:
    """Identical passes of a module over its probe; for use within ``isolated``."""

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: LocalVolumeSettings, seed: int
    ) -> None:
        self._trainer, self._module, self._settings = trainer, pl_module, settings
        self._forward = settings.forward_fn or (_flat_forward if isinstance(pl_module, NetworkModule) else None)
        self.parts = probe_parts(trainer, pl_module, settings, seed)
        self.parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        self._take: Any = None
        self._trace = KinkTrace(pl_module, self._met, settings.modules)

    def find_layers(self) -> LayersOfProbe:
        """Find the layers.

        Raises:
            NoKinksError: none was met.
        """
        hooked = {id(p) for p in self._module.modules() if has_forward_hooks(p)}
        found, met = LayersOfProbe(*self._moved_layers(), hooked=hooked), []

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
            found.first = FirstLayer(found.first.name, None, None, self._module.network().rows, inputs)
        found.opaque = tuple(sorted(self._trace.opaque))
        found.nan_layers = [
            name for name, is_nan in zip(found.nan, fetched(*found.nan.values()), strict=True) if is_nan
        ]
        return found

    def _moved_layers(self) -> tuple[set[str], set[str]]:
        """Layers whose input changes by a small move, and layers for which the preceding module's input changes."""
        if not (self.parameters and are_plain(self.parameters)):
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


def probe_parts(
    trainer: pl.Trainer, pl_module: pl.LightningModule, settings: LocalVolumeSettings, seed: int
) -> list[Any]:
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
    chosen = chosen_samples(total, settings.probe, seed)
    parts = [part for part in (chosen[:_FIRST], chosen[_FIRST:]) if len(part)]
    return [as_in_training(trainer, pl_module, batch) for part in parts for batch in exact_shard(loader, chosen=part)]


def _first_layer(kink: Kink, *, moves: bool, hooked: bool) -> FirstLayer:
    """The first layer; units have cones if it is f(W x + b) with kinks at 0 and inputs that no parameter changes."""
    linear, inputs = kink.source, kink.source_input
    if kink.num_pieces != 2 or kink.function not in _AT_ZERO:
        return FirstLayer(kink.name, f"{kink.function} has kinks other than one at 0")
    if type(linear) is not nn.Linear:
        what = "no module's output" if linear is None else f"the output of a {type(linear).__name__}"
        return FirstLayer(kink.name, f"its input is {what}, and not that of a Linear: a unit has no cone of its own")
    if not is_plain_linear(linear):
        reason = "the weights of its Linear are not parameters but computed (parametrized, pruned)"
        return FirstLayer(kink.name, reason)
    if hooked:
        return FirstLayer(kink.name, "its Linear has forward hooks, which may change its output")
    if moves or not isinstance(inputs, torch.Tensor) or inputs.requires_grad:
        return FirstLayer(kink.name, "the inputs of its Linear depend on parameters themselves")
    rows = linear.weight.detach()
    if linear.bias is not None:
        rows = torch.cat([rows, linear.bias.detach()[:, None]], dim=1)
    return FirstLayer(kink.name, None, linear, rows)


def are_plain(parameters: Sequence[Tensor]) -> bool:
    """Whether each parameter is a whole tensor of this process, and not a shard."""
    return all(type(parameter.data) is torch.Tensor for parameter in parameters)


def _same(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Whether two tensors are equal, or both missing, bool ()."""
    if a is None or b is None or (a.shape, a.device) != (b.shape, b.device):
        return torch.tensor(a is b)
    return (a == b).all()
