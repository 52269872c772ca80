"""KinkDistance: the distance of a point of weight space to the nearest kink of the network, over all samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.perturbation import Jitter
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.distributed import ProcessGroup
from lightning_mnn.utilities.interruption import safe_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from lightning_mnn.landscape.kinks.tracing import Kink


_NAME_BYTES = 256  # bytes of a layer's name that processes exchange


@dataclass(frozen=True)
class KinkDistance:
    """Distances of the units of a network to their kinks, over all samples.

    Identically tied units (on their kink for all weights nearby, as windows of zeros in a max-pooling) cause no kink of
    the network, and are left out.

    Attributes:
        nearest: smallest distance of a unit, in units of its function's input; infinite without units.
        relative: smallest distance relative to the root mean square of the layer's input.
        layer: layer with the distance ``relative``; empty without units.
        count: number of units on their kink within rounding.
        ties: number of identically tied units.
        units: number of all units, tied ones included.
        by_chance: expected number of units on their kink within rounding by chance, from the density of units nearby.
        spacing: ε of the coarsest floats of a unit on its kink; 0 if there is none.
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
    process_group: ProcessGroup | None = None,
    *,
    seed: int = 0,
) -> KinkDistance:
    """The distance of the parameters θ from the nearest kink.

    A unit is on its kink within rounding if its distance is at most 16 ε times the root mean square of its layer's
    input over the batches so far, where ε is the spacing of that dtype at 1: the error of a dot product of some hundred
    terms, and a cautious bound for channels much smaller than the rest of their layer. To find out whether such a unit
    is identically tied, the same batch is run at θ ± s. Here s is random, √ε relative to the weights of each tensor (or
    of the network, where all of a tensor are zero). A unit on a kink leaves it on both sides; a tied unit stays on it
    on at least one side. So does a maximum of two zeros from ReLUs, if one of them is about to become positive. In
    float32 about one kink in a hundred moves too little to be distinguished from a tie. In half precision no step is
    both small and above rounding, so all such units count as on their kink.

    Batches with such units are run three times, others once. Products of float32 use its full precision. The memory is
    one number for each unit, for one batch at a time. The host waits for a GPU once per batch, and at the end.

    Args:
        passes: for each batch of this process's samples, a function that runs one forward pass, the same on each call,
            and calls its argument with each kink call: ``with KinkTrace(module, on_kink): module(inputs)``.
        parameters: θ; those that require a gradient are moved, and restored bit for bit.
        process_group: the processes.
        seed: seed of the direction of s.

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
    meter = KinkMeter(parameters, seed)
    for run in passes:
        safe_point()
        meter.take(run)
    return meter.found(process_group)


class KinkMeter:
    """:func:`kink_distance` batch by batch, for a pass that also does something else.

    Args:
        parameters: θ; those that require a gradient are moved, and restored bit for bit.
        seed: seed of the direction of s.
        spacing: ε of the floats that θ was found in, if the passes compute with a smaller one; 0: that of the passes.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int = 0, *, spacing: float = 0.0) -> None:
        self._layers: dict[str, Tensor] = {}
        self._jitter = Jitter(parameters, seed)
        self._spacing = spacing

    def take(self, run: Callable[[Callable[[Kink], None]], None]) -> dict[str, Tensor]:
        """Record the kinks of one batch.

        Args:
            run: runs one forward pass, as for :func:`kink_distance`.

        Returns:
            By layer, which units of the batch are on their kink within rounding, tied ones left out: bool, flat, in the
            order of the function's output. Layers without a unit on its kink or tied are left out.
        """
        with full_precision():
            first = _FirstPass(self._layers, self._spacing)
            run(first)
            closed = first.closed_calls()
            eps = max((call.eps for call in closed.values()), default=0.0)
            if closed and eps < tolerances.MIN_COARSE_SPACING:
                for step in (eps**0.5, -(eps**0.5)):
                    with self._jitter.moved(step):
                        run(_SecondPass(closed))
            for name, call in first.calls.items():
                before, new = self._layers.get(name), call.measures()
                self._layers[name] = new if before is None else _joined(before, new)
        return {name: call.opened for name, call in closed.items()}

    def found(self, process_group: ProcessGroup | None = None) -> KinkDistance:
        """The distance over the batches of all processes; each process must call this."""
        return _summary(_gathered(self._layers, ProcessGroup() if process_group is None else process_group))


@dataclass(frozen=True)
class _Layer:
    """Statistics of a layer: nearest distance, ε, Σ x² over its input and the number of x, and counts of units."""

    nearest: float
    spacing: float
    squares: float
    numbers: float
    count: float
    ties: float
    units: float
    near: float

    @property
    def scale(self) -> float:
        """The root mean square of the input."""
        return math.sqrt(self.squares / max(self.numbers, 1))

    @property
    def relative(self) -> float:
        """The nearest distance relative to the scale."""
        return self.nearest / self.scale if self.scale else math.inf if self.nearest else 0.0


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """The numbers of a :class:`_Layer`, (8,), over both sets of samples."""
    return torch.cat([torch.minimum(a[:1], b[:1]), torch.maximum(a[1:2], b[1:2]), a[2:] + b[2:]])


class _Call:
    """The units of one kink call, and which are on their kink within rounding; the host reads nothing from the device.

    Args:
        kink: the call.
        before: the numbers of its layer, (8,), from earlier batches; None: this is the first.
        spacing: the smallest ε that counts.

    Attributes:
        eps: ε of its floats.
        closed: units on their kink within rounding.
        opened: closed units that left their kink at every step so far.
    """

    def __init__(self, kink: Kink, before: Tensor | None, spacing: float) -> None:
        x = kink.input.detach()
        finite = x.isfinite()
        self._squares = torch.linalg.vector_norm(torch.where(finite, x, 0.0), dtype=torch.float64).square()
        self._numbers = finite.sum()
        self._distances = kink.distance().detach().flatten()
        self.eps = max(torch.finfo(x.dtype).eps, spacing)
        squares, numbers = self._squares, self._numbers
        if before is not None:
            squares, numbers = squares + before[2], numbers + before[3]
        self._tolerance = tolerances.MAX_KINK_SPACINGS * self.eps * (squares / numbers.clamp(min=1)).sqrt()
        self.closed = self._distances <= self._tolerance
        self.opened = self.closed

    def step(self, kink: Kink) -> None:
        """Record which closed units left their kink near θ."""
        self.opened = self.opened & (kink.distance().detach().flatten() > self._tolerance)

    def measures(self) -> Tensor:
        """The numbers of a :class:`_Layer`, (8,): closed units that opened are on a kink, the others are tied."""
        counted = torch.where(self.closed & ~self.opened, math.inf, self._distances)
        nearest = counted.min() if len(counted) else torch.full_like(self._squares, math.inf)
        closed, opened = self.closed.sum(), self.opened.sum()
        near = (self._distances <= tolerances.CHANCE_BAND_WIDTHS * self._tolerance).sum() - closed
        units = torch.full_like(closed, len(self._distances))
        spacing = torch.full_like(self._squares, self.eps)
        found = (nearest, spacing, self._squares, self._numbers, opened, closed - opened, units, near)
        return torch.stack([number.to(torch.float64) for number in found])


class _FirstPass:
    """Records the kinks of a batch at θ, given the numbers of the layers from earlier batches."""

    def __init__(self, before: dict[str, Tensor], spacing: float) -> None:
        self._before = before
        self._spacing = spacing
        self.calls: dict[str, _Call] = {}

    def __call__(self, kink: Kink) -> None:
        if kink.depends_on_weights:
            self.calls[kink.name] = _Call(kink, self._before.get(kink.name), self._spacing)

    def closed_calls(self) -> dict[str, _Call]:
        """The calls with units on their kink within rounding."""
        found = _on_host([call.closed.any() for call in self.calls.values()])
        return {name: call for (name, call), closed in zip(self.calls.items(), found, strict=True) if closed}


class _SecondPass:
    """Records the kinks of the same batch near θ, and which units are still closed."""

    def __init__(self, closed: dict[str, _Call]) -> None:
        self._closed = closed

    def __call__(self, kink: Kink) -> None:
        if kink.name in self._closed:
            self._closed[kink.name].step(kink)


def _on_host(tensors: Sequence[Tensor]) -> list[Any]:
    """The numbers of tensors of the same shape, fetched in one transfer."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else []


def _gathered(layers: dict[str, Tensor], process_group: ProcessGroup) -> dict[str, _Layer]:
    """The layers over all processes; each process may have found other layers."""
    rows = torch.zeros(len(layers), _NAME_BYTES + 8, dtype=torch.float64)
    for row, name, numbers in zip(rows, layers, _on_host(list(layers.values())), strict=True):
        label = name.encode()[-_NAME_BYTES:]
        row[: len(label)] = torch.tensor(list(label), dtype=torch.float64)
        row[_NAME_BYTES:] = torch.tensor(numbers, dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for row in process_group.join(rows):
        name = bytes(int(byte) for byte in row[:_NAME_BYTES].tolist() if byte).decode(errors="replace")
        found[name] = _joined(found[name], row[_NAME_BYTES:]) if name in found else row[_NAME_BYTES:]
    return {name: _Layer(*numbers.tolist()) for name, numbers in found.items()}


def _summary(layers: dict[str, _Layer]) -> KinkDistance:
    if not layers:
        return KinkDistance()
    name = min(layers, key=lambda name: layers[name].relative)
    every = layers.values()
    return KinkDistance(
        min(layer.nearest for layer in every),
        layers[name].relative,
        name if layers[name].relative < math.inf else "",
        int(sum(layer.count for layer in every)),
        int(sum(layer.ties for layer in every)),
        int(sum(layer.units for layer in every)),
        sum(layer.near for layer in every) / (tolerances.CHANCE_BAND_WIDTHS - 1),
        max((layer.spacing for layer in every if layer.count), default=0.0),
    )
