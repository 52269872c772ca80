"""KinkDistance: how far a point of weight space is from the nearest kink of the network, over all samples."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_mnn.landscape.team import Team
from lightning_mnn.seeding import generator as seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from lightning_mnn.landscape.kink_trace import Kink

_ROUNDINGS = 16.0  # spacings of floats at a layer's root mean square, within which a unit may be on its kink
_WIDE = 64.0  # times that, a band in which units are counted to know how dense they lie
_COARSE = 1e-4  # spacing of floats from which no step is both above rounding and small
_NAME = 256  # bytes of a layer's name that processes tell each other


@dataclass(frozen=True)
class KinkDistance:
    """How far the units of a network are from their kinks, over all samples.

    Units that are tied identically (on their kink at all weights nearby, as windows of zeros in a max-pooling are)
    bend nothing, and are left out.

    Attributes:
        nearest: smallest distance of a unit, in units of its function's input; infinite without units.
        relative: smallest distance relative to the root mean square of the layer's input.
        layer: where ``relative`` is attained; empty without units.
        count: units on their kink within rounding.
        ties: units that are tied identically.
        units: number of units looked at, tied ones included.
        by_chance: how many units would be on their kink within rounding by chance, as dense as others lie near theirs.
        spacing: ε of the coarsest floats in which one is; 0 where none is.
    """

    nearest: float = math.inf
    relative: float = math.inf
    layer: str = ""
    count: int = 0
    ties: int = 0
    units: int = 0
    by_chance: float = 0.0
    spacing: float = 0.0


def kink_distance(
    passes: Iterable[Callable[[Callable[[Kink], None]], None]],
    parameters: Sequence[Tensor],
    team: Team | None = None,
    *,
    seed: int = 0,
) -> KinkDistance:
    """The distance of the parameters θ from the nearest kink.

    A unit is on its kink within rounding if its distance is at most 16 ε times the root mean square of its layer's
    input over the batches so far, where ε is the spacing of that dtype at 1: the error of a dot product of some hundred
    terms, and a cautious bound for channels much smaller than the rest of their layer. Whether such a unit is tied
    identically is seen from the same batch at θ ± s, where s is random and √ε relative to the weights of each tensor
    (where all are zero, of the network): a kink opens on both sides, a tie stays closed on one at least. So does a
    maximum of two zeros that ReLUs put out, one of which is about to leave. In float32 about one kink in a hundred
    opens too little to be told from a tie. In half precision, where no step is both small and above rounding, all
    such units count as on their kink.

    The batches with such units are passed through three times, others once. Memory is that of a few numbers for each
    of these units, of one batch at a time.

    Args:
        passes: of each batch of this process's samples a function that runs one forward pass, the same each time it is
            called, and calls its argument with each kink call: ``with KinkTrace(module, on_kink): module(inputs)``.
        parameters: θ; those that require a gradient are moved, and put back bit for bit.
        team: the processes.
        seed: of the direction of s.

    >>> from torch import nn
    >>> from lightning_mnn.landscape import KinkTrace
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    >>> _ = nn.init.constant_(net[0].weight, 2.0)
    >>> def run(on_kink):
    ...     with KinkTrace(net, on_kink):
    ...         net(torch.tensor([[1.0], [-0.5], [0.0]]))
    >>> found = kink_distance([run], [*net.parameters()])
    >>> found.nearest, found.layer, found.count, found.ties, found.units
    (1.0, '1', 0, 2, 6)
    """
    layers: dict[str, _Layer] = {}
    jitter = Jitter(parameters, seed)
    for run in passes:
        first = _FirstPass(layers)
        run(first)
        opened = {name: torch.ones_like(closed.units, dtype=torch.bool) for name, closed in first.closed.items()}
        if opened and first.eps < _COARSE:
            for step in (first.eps**0.5, -(first.eps**0.5)):
                with jitter.moved(step):
                    run(_SecondPass(first.closed, opened))
        for name, layer in first.settled(opened).items():
            layers[name] = layers[name].joined(layer) if name in layers else layer
    return _summary(_gathered(layers, Team() if team is None else team))


class Jitter:
    """A random direction in which each number θ of a tensor moves by r · max(|θ|, root mean square), r from a normal.

    Where all of a tensor is zero, the root mean square is that of all tensors. Those that do not require a gradient
    stay. The direction is drawn when it is first needed, and takes the memory of the parameters.

    Args:
        parameters: what moves.
        seed: of r.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int = 0) -> None:
        self._free = [parameter for parameter in parameters if parameter.requires_grad]
        self._seed = seed
        self._direction: list[Tensor] | None = None

    @contextmanager
    def moved(self, step: float) -> Iterator[None]:
        """Inside, the parameters are moved by a step in the direction; afterwards as before, bit for bit."""
        if self._direction is None:
            self._direction = self._drawn()
        kept = [parameter.detach().clone() for parameter in self._free]
        try:
            with torch.no_grad():
                for parameter, direction in zip(self._free, self._direction, strict=True):
                    parameter.add_(direction, alpha=step)
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self._free, kept, strict=True):
                    parameter.copy_(old)

    def _drawn(self) -> list[Tensor]:
        values = [parameter.detach() for parameter in self._free]
        numbers = sum(value.numel() for value in values)
        overall = math.sqrt(sum(float(v.double().square().sum()) for v in values) / max(numbers, 1)) or 1.0
        random = seeded(self._seed, "kinks")
        found = []
        for value in values:
            least = float(value.double().square().mean().sqrt()) if value.numel() else 0.0
            drawn = torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
            found.append(drawn.mul_(value.abs().clamp(min=least or overall)))
        return found


@dataclass(frozen=True)
class _Layer:
    """What is known of a layer: nearest distance, ε, Σ x² and number of the x in its input, and units."""

    nearest: float
    spacing: float
    squares: float
    numbers: int
    count: int
    ties: int
    units: int
    near: int

    def joined(self, other: _Layer) -> _Layer:
        """Of both sets of samples."""
        sums = (a + b for a, b in zip(astuple(self)[2:], astuple(other)[2:], strict=True))
        return _Layer(min(self.nearest, other.nearest), max(self.spacing, other.spacing), *sums)

    @property
    def scale(self) -> float:
        """The root mean square of the input."""
        return math.sqrt(self.squares / max(self.numbers, 1))

    @property
    def relative(self) -> float:
        """The nearest distance relative to the scale."""
        return self.nearest / self.scale if self.scale else math.inf if self.nearest else 0.0


class _Closed(NamedTuple):
    """The units of a call that are on their kink within rounding."""

    units: Tensor
    distances: Tensor
    tolerance: float


class _FirstPass:
    """Consumes the kinks of a batch at θ, given what is known of the layers from the batches before."""

    def __init__(self, before: dict[str, _Layer]) -> None:
        self._before = before
        self.closed: dict[str, _Closed] = {}
        self.eps = 0.0  # the coarsest of those
        self._layers: dict[str, _Layer] = {}

    def __call__(self, kink: Kink) -> None:
        if not kink.depends_on_weights:
            return
        x, distances = kink.input.detach(), kink.distance().detach().flatten()
        finite = x.isfinite()
        squares = float(torch.linalg.vector_norm(torch.where(finite, x, 0.0), dtype=torch.float64)) ** 2
        numbers = int(finite.sum())
        eps = torch.finfo(x.dtype).eps
        layer = _Layer(math.inf, eps, squares, numbers, 0, 0, len(distances), 0)
        scale = layer.joined(self._before[kink.name]).scale if kink.name in self._before else layer.scale
        tolerance = _ROUNDINGS * eps * scale
        closed = distances <= tolerance
        nearest = float(torch.where(closed, math.inf, distances).min()) if len(distances) else math.inf
        if bool(closed.any()):
            self.closed[kink.name] = _Closed(closed.nonzero()[:, 0], distances[closed], tolerance)
            self.eps = max(self.eps, eps)
        near = int((distances <= _WIDE * tolerance).sum()) - int(closed.sum())
        self._layers[kink.name] = replace(layer, nearest=nearest, near=near)

    def settled(self, opened: dict[str, Tensor]) -> dict[str, _Layer]:
        """The layers, where those of the closed units that opened are on their kink, the others tied."""
        layers = dict(self._layers)
        for name, closed in self.closed.items():
            on_kink = closed.distances[opened[name]]
            layers[name] = replace(
                layers[name],
                nearest=min([layers[name].nearest, *on_kink.tolist()]),
                count=len(on_kink),
                ties=len(closed.units) - len(on_kink),
            )
        return layers


class _SecondPass:
    """Consumes the kinks of the same batch near θ, and notes which units are still closed."""

    def __init__(self, closed: dict[str, _Closed], opened: dict[str, Tensor]) -> None:
        self._closed = closed
        self._opened = opened

    def __call__(self, kink: Kink) -> None:
        closed = self._closed.get(kink.name)
        if closed is not None:
            self._opened[kink.name] &= kink.distance().detach().flatten()[closed.units] > closed.tolerance


def _gathered(layers: dict[str, _Layer], team: Team) -> dict[str, _Layer]:
    """The layers over all processes, of which each may have met others."""
    rows = torch.zeros(len(layers), _NAME + 8, dtype=torch.float64)
    for row, (name, layer) in zip(rows, layers.items(), strict=True):
        label = name.encode()[-_NAME:]
        row[: len(label)] = torch.tensor(list(label), dtype=torch.float64)
        row[_NAME:] = torch.tensor(astuple(layer), dtype=torch.float64)
    found: dict[str, _Layer] = {}
    for row in team.join(rows):
        name = bytes(int(byte) for byte in row[:_NAME].tolist() if byte).decode(errors="replace")
        nearest, spacing, squares, *counts = row[_NAME:].tolist()
        layer = _Layer(nearest, spacing, squares, *map(int, counts))
        found[name] = found[name].joined(layer) if name in found else layer
    return found


def _summary(layers: dict[str, _Layer]) -> KinkDistance:
    if not layers:
        return KinkDistance()
    name = min(layers, key=lambda name: layers[name].relative)
    every = layers.values()
    return KinkDistance(
        min(layer.nearest for layer in every),
        layers[name].relative,
        name if layers[name].relative < math.inf else "",
        sum(layer.count for layer in every),
        sum(layer.ties for layer in every),
        sum(layer.units for layer in every),
        sum(layer.near for layer in every) / (_WIDE - 1),
        max((layer.spacing for layer in every if layer.count), default=0.0),
    )
