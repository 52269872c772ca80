"""From kink calls to patterns: which numbers of a call belong to which sample, and their packed patterns.

The output of a kink call for a batch has the samples on their own axis (the first, or the second of a sequence-first
model), or merged with another axis: (B·k, H), where k may be the steps of a sequence. Sizes alone do not determine this
axis, so a module is first run on three samples and on two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.kinks.tracing import Kink, KinkTrace, Names, PatternError, check_numbers
from lightning_mnn.landscape.pattern import PackedPattern, PiecePattern, num_digits
from lightning_mnn.utilities.validation import MisfitError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

_MORE, _FEWER = 3, 2  # samples of the two passes that are compared

# Functions that pass a gradient on every piece.
_PASSING = ("leaky_relu", "prelu", "rrelu", "elu", "selu", "abs", "absolute")

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
_CHANNELS_SECOND = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
)


class NoKinksError(TypeError):
    """A module has no kinks, or none of the requested ones."""


class UnknownLayersError(NoKinksError, MisfitError):
    """A module has none of the requested layers."""


@dataclass(frozen=True)
class KinkLayer:
    """The units of one kink call, and their position in its output for a batch.

    Attributes:
        num_units: number of units, each with one number for each sample.
        num_pieces: number of pieces that a unit can be on.
        active_pieces: the pieces that count as active; None where there are none, as in max-pooling.
        axis: the axis with the samples. It is an (outer, n, inner) array of n samples.
        outer: number of repetitions of the n samples on the axis.
        inner: number of successive entries of each sample on the axis.
        rest: sizes of the other axes.
        channel: which of these axes has the channels, as the maps of a convolution: units of one channel share their
            weights. None: each unit has its own.
        blocks: whether an inactive unit passes no gradient, unlike that of a LeakyReLU.
    """

    num_units: int
    num_pieces: int = 2
    active_pieces: tuple[int, ...] | None = (1,)
    axis: int = 0
    outer: int = 1
    inner: int = 1
    rest: tuple[int, ...] = ()
    channel: int | None = None
    blocks: bool = True

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of a sample's packed pattern: ⌈units/8⌉ for each binary digit of a piece."""
        return num_digits(self.num_pieces) * -(-self.num_units // 8)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an output has this number of units for each sample, and a whole number of samples."""
        if len(shape) != len(self.rest) + 1:
            return False
        rest = (*shape[: self.axis], *shape[self.axis + 1 :])
        return rest == self.rest and shape[self.axis] % (self.outer * self.inner) == 0

    def rows(self, values: Tensor) -> Tensor:
        """The output of a call with one row for each sample: (n, units).

        >>> layer = KinkLayer(num_units=4, inner=2, rest=(2,))
        >>> layer.rows(torch.arange(12).reshape(6, 2))
        tensor([[ 0,  1,  2,  3],
                [ 4,  5,  6,  7],
                [ 8,  9, 10, 11]])
        """
        moved = values.movedim(self.axis, 0)
        num = moved.shape[0] // (self.outer * self.inner)
        return moved.reshape(self.outer, num, self.inner, -1).movedim(1, 0).reshape(num, self.num_units)

    def whole_channels(self, flags: Tensor) -> Tensor:
        """Of flags of the units (..., units), whether all of a channel's units have it, (..., channels).

        >>> layer = KinkLayer(num_units=4, rest=(2, 2), channel=0)
        >>> layer.whole_channels(torch.tensor([True, True, True, False]))
        tensor([ True, False])
        """
        if self.channel is None:
            return flags
        shape = (*flags.shape[:-1], self.outer * self.inner, *self.rest)
        moved = flags.reshape(shape).movedim(flags.ndim + self.channel, -1)
        return moved.flatten(flags.ndim - 1, -2).all(-2)


@dataclass(frozen=True)
class FoundLayers:
    """Layers found by passes of a module on a few samples.

    Attributes:
        layers: the layers by name, in the order of the forward pass.
        without_samples: kink calls with the same shape for any number of samples.
        mixed: layers in which a sample's numbers depend on the other samples of the batch, or on random numbers.
        smooth: smooth nonlinear functions found.
        opaque: functions and modules found whose kinks cannot be seen.
    """

    layers: Mapping[str, KinkLayer]
    without_samples: tuple[str, ...]
    mixed: tuple[str, ...]
    smooth: tuple[str, ...]
    opaque: tuple[str, ...]


@dataclass(frozen=True)
class _Output:
    """Output of a layer in one pass."""

    values: Tensor  # distances to the kink: they differ between samples, while pieces may agree by chance
    num_pieces: int
    active_pieces: tuple[int, ...] | None
    channel_axis: int  # of the values, counted from the first or the last axis
    blocks: bool


def find_layers(
    module: torch.nn.Module,
    run: Callable[[int], Any],
    modules: Names = None,
) -> FoundLayers:
    """Find a module's kink layers, and the axis of the samples in each.

    The module runs twice, on three samples and on the first two of them. The axis whose size changes is that of the
    samples. If its size is k times the number of samples, the order on it is the one in which the two passes agree.

    Args:
        module: the module.
        run: runs the module on the first n samples, for its argument n.
        modules: names or patterns of the layers to find (see :class:`KinkTrace`).

    Raises:
        NoKinksError: no layer is found.
        ValueError: the axis or the order of the samples in a layer cannot be determined.

    >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 2), torch.nn.ReLU(), torch.nn.MaxPool1d(3))
    >>> inputs = torch.randn(3, 1, 7)
    >>> found = find_layers(net, lambda n: net(inputs[:n]))
    >>> {name: (layer.num_units, layer.num_pieces) for name, layer in found.layers.items()}
    {'1': (24, 2), '2': (8, 3)}
    """
    (more, trace), (fewer, _) = (_outputs(module, run, n, modules) for n in (_MORE, _FEWER))
    layers, without_samples, mixed = {}, [], []
    for name, output in more.items():
        other = fewer.get(name)
        if other is None:
            raise _unclear(name, f"it is called with {_MORE} samples, and not with {_FEWER}")
        if output.values.shape == other.values.shape:
            without_samples.append(name)
            continue
        layers[name], agree = _layer(name, output, other)
        if not agree:
            mixed.append(name)
    if not layers:
        raise no_kinks(module, trace, modules, without_samples)
    return FoundLayers(
        layers, tuple(without_samples), tuple(mixed), tuple(sorted(trace.smooth)), tuple(sorted(trace.opaque))
    )


def _outputs(
    module: torch.nn.Module, run: Callable[[int], Any], num: int, modules: Names
) -> tuple[dict[str, _Output], KinkTrace]:
    found: dict[str, _Output] = {}

    def record(kink: Kink) -> None:
        if kink.num_pieces > 1:
            values = kink.distance().cpu().to(torch.float64)
            axis, blocks = _channel_axis(kink, values.ndim), kink.function not in _PASSING
            found[kink.name] = _Output(values, kink.num_pieces, kink.active_pieces, axis, blocks)

    trace = KinkTrace(module, record, modules)
    with trace:
        run(num)
    return found, trace


def _channel_axis(kink: Kink, ndim: int) -> int:
    """The axis of a call's output whose entries have their own weights, by the module before it, or else by custom."""
    if isinstance(kink.source, _CHANNELS_LAST):
        return -1
    return 1 if ndim > 3 or isinstance(kink.source, _CHANNELS_SECOND) else -1


def _layer(name: str, output: _Output, other: _Output) -> tuple[KinkLayer, bool]:
    """The layer, and whether its numbers for a sample are the same in both passes."""
    large, small = output.values.shape, other.values.shape
    changed = [axis for axis, (a, b) in enumerate(zip(large, small, strict=False)) if a != b]
    same_kind = len(large) == len(small) and output.num_pieces == other.num_pieces
    if not same_kind or len(changed) != 1:
        raise _unclear(name, f"its shape is {tuple(large)} for {_MORE} samples and {tuple(small)} for {_FEWER}")
    axis = changed[0]
    fold, left = divmod(large[axis], _MORE)
    if left or small[axis] != _FEWER * fold:
        raise _unclear(name, f"its shape is {tuple(large)} for {_MORE} samples and {tuple(small)} for {_FEWER}")
    rest = (*large[:axis], *large[axis + 1 :])
    place = output.channel_axis % len(large)
    channel = place - (place > axis)
    shared = place != axis and fold * math.prod(rest) > rest[channel]
    layers = [
        KinkLayer(
            num_units=fold * math.prod(rest),
            num_pieces=output.num_pieces,
            active_pieces=output.active_pieces,
            axis=axis,
            outer=fold // inner,
            inner=inner,
            rest=tuple(rest),
            channel=channel if shared else None,
            blocks=output.blocks,
        )
        for inner in range(1, fold + 1)
        if fold % inner == 0
    ]
    values = [(layer.rows(output.values), layer.rows(other.values)) for layer in layers]
    errors = [_difference(a[:_FEWER], b) for a, b in values]
    best = min(range(len(layers)), key=errors.__getitem__)
    if len(layers) == 1:
        a, _ = values[0]
        between_samples = max(_difference(a[:1], a[1:2]), _difference(a[1:2], a[2:3]))
        return layers[0], errors[0] <= tolerances.MAX_REPEAT_ERROR_RATIO * between_samples
    if any(
        errors[best] > tolerances.MAX_ORDER_ERROR_RATIO * error or error == 0
        for i, error in enumerate(errors)
        if i != best
    ):
        raise _unclear(name, f"the order of {fold} × n entries on its axis {axis} agrees with no known order")
    return layers[best], True


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).nan_to_num(0.0, posinf=0.0, neginf=0.0).abs().mean())


def _unclear(name: str, why: str) -> ValueError:
    return ValueError(
        f"which numbers of the layer {name} belong to which sample is unknown: {why}. Leave it out by modules= "
        "with the names or patterns of the others"
    )


def no_kinks(
    module: torch.nn.Module, trace: KinkTrace, modules: Names, without_samples: Sequence[str] = ()
) -> NoKinksError:
    """The error for a module in which no layer was found, with the reason.

    Args:
        module: the module.
        trace: the trace of a pass of it.
        modules: names or patterns of the requested layers.
        without_samples: layers without a number for each sample.
    """
    name = type(module).__name__
    if not trace.names and trace.left_out:
        return UnknownLayersError(
            f"modules={modules!r} matches none of the layers in the forward pass of {name}: {', '.join(trace.left_out)}"
        )
    unseen = f"; the kinks of {', '.join(sorted(trace.opaque))} cannot be seen" if trace.opaque else ""
    shapeless = f"; {', '.join(without_samples)} have no number for each sample" if without_samples else ""
    return NoKinksError(
        f"{name} has no kink in its forward pass: no ReLU, LeakyReLU, clamp, maximum, max-pooling or similar function"
        f"{unseen}{shapeless}. If training does not run its forward, give a forward_fn(module, batch)"
    )


class PatternRows:
    """Packed patterns of N samples, filled batch by batch while a module runs under a :class:`KinkTrace`.

    Args:
        layers: the layers by name.
        num_samples: N.
        device: device of the patterns.
        start: the first row to fill.
        ignored: names of kink calls that are not layers.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> rows = PatternRows({"1": KinkLayer(3, rest=(3,))}, num_samples=5)
    >>> trace = KinkTrace(net, rows.take)
    >>> for batch in torch.randn(5, 2).split(3):
    ...     with trace:
    ...         _ = net(batch)
    ...     rows.end_batch()
    >>> rows.check()
    >>> rows.patterns()["1"].unpack().active.shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        layers: Mapping[str, KinkLayer],
        num_samples: int,
        device: torch.device | str = "cpu",
        start: int = 0,
        ignored: Sequence[str] = (),
    ) -> None:
        self.layers = layers
        self.row = start
        self._num_samples = num_samples
        self._ignored = ignored
        self._counts: dict[str, int] = {}  # number of samples of each layer in this batch
        self._nan: dict[str, Tensor] = {}  # whether a layer had a NaN input; read at the end
        self.bits = {
            name: torch.zeros(
                num_digits(layer.num_pieces), num_samples, -(-layer.num_units // 8), dtype=torch.uint8, device=device
            )
            for name, layer in layers.items()
        }

    def take(self, kink: Kink) -> None:
        """Pack the pieces of a kink call.

        Raises:
            PatternError: the call is not one of the layers, or has another number of units.
        """
        layer = self.layers.get(kink.name)
        if layer is None:
            if kink.num_pieces == 1 or kink.name in self._ignored:
                return
            raise _changing(kink.name, "it was not called in the pass on a few samples")
        if kink.num_pieces != layer.num_pieces:
            raise _changing(kink.name, f"its units had {layer.num_pieces} pieces, and now {kink.num_pieces}")
        pieces, is_nan = kink.pieces_or_nan()
        if not layer.fits(pieces.shape):
            raise _changing(
                kink.name,
                f"it had {layer.num_units} units for each sample (samples on axis {layer.axis}, the other axes of "
                f"sizes {layer.rest}), and now its shape is {tuple(pieces.shape)}",
            )
        self._nan[kink.name] = self._nan.get(kink.name, is_nan) | is_nan
        rows = layer.rows(pieces)
        self._counts[kink.name] = len(rows)
        if self.row + len(rows) <= self._num_samples:  # otherwise end_batch raises
            packed = PiecePattern(rows, layer.num_pieces).pack().bits
            self.bits[kink.name][:, self.row : self.row + len(rows)] = packed

    def end_batch(self) -> None:
        """Advance to the rows of the next batch.

        Raises:
            PatternError: a layer was not called in the batch, or layers had different numbers of samples.
        """
        missing = [name for name in self.layers if name not in self._counts]
        if missing:
            raise _changing(missing[0], "it was not called in every batch")
        counts = set(self._counts.values())
        if len(counts) > 1 or self.row + max(counts) > self._num_samples:
            raise PatternError(
                f"the layers have different numbers of samples of one batch, or more than the {self._num_samples} that "
                f"are recorded: {self._counts}. Leave some out by modules="
            )
        self.row += counts.pop()
        self._counts = {}

    def check(self) -> None:
        """Check that no packed piece is that of a NaN; only here the host waits for a GPU.

        Raises:
            PatternError: the input of a kink was NaN.
        """
        check_numbers(list(self._nan), list(self._nan.values()))

    def patterns(self) -> dict[str, PackedPattern]:
        """The patterns by layer, views of the rows; they are valid if :meth:`check` passes."""
        return {
            name: PackedPattern(bits if len(bits) > 1 else bits[0], self.layers[name].num_units, layer.num_pieces)
            for (name, bits), layer in zip(self.bits.items(), self.layers.values(), strict=True)
        }


def _changing(name: str, why: str) -> PatternError:
    return PatternError(
        f"the layer {name} is not the same in every batch: {why}. If batches are padded to their longest sample, "
        "pad them to one length; or leave the layer out by modules= with the names or patterns of the others"
    )
