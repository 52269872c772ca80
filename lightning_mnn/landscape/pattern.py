"""Activation patterns: which side of each kink every sample is on.

Shapes: N samples, d1 hidden units, ``...`` leading axes (replicas). A unit has two pieces, inactive (0) and active (1),
or more: ReLU6 has three, a window of max-pooling has one for each input.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_mnn.utilities.transfer import to_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_BITS_PER_BYTE = 8


@dataclass(frozen=True)
class PackedPattern:
    """An activation pattern with one bit per sample and unit, the form that is stored, sent and compared.

    Unit ``8 b + j`` is bit ``j`` (the least significant is 0) of byte ``b``; the bits beyond the width are 0. Units
    with more than two pieces have one bit for each binary digit of the piece, on an extra axis before the samples, with
    the least significant digit first.

    Attributes:
        bits: uint8 array (..., N, ⌈d1/8⌉), or (..., digits, N, ⌈d1/8⌉) for more than two pieces.
        width: number of units d1.
        num_pieces: number of pieces that a unit can be on.

    Raises:
        ValueError: the bits do not fit the width or the pieces.
    """

    bits: Tensor
    width: int
    num_pieces: int = 2

    def __post_init__(self) -> None:
        """Check that the bytes fit the width, and the digits the pieces."""
        expected = -(-self.width // _BITS_PER_BYTE)
        if self.bits.dtype != torch.uint8 or self.bits.shape[-1] != expected:
            raise ValueError(
                f"bits must be uint8 with {expected} bytes per sample for width={self.width}, "
                f"got {self.bits.dtype} of shape {tuple(self.bits.shape)}"
            )
        digits = num_digits(self.num_pieces)
        if digits > 1 and (self.bits.ndim < 3 or self.bits.shape[-3] != digits):
            raise ValueError(
                f"bits must have {digits} digits before the samples for num_pieces={self.num_pieces}, "
                f"got shape {tuple(self.bits.shape)}"
            )

    @property
    def lead(self) -> torch.Size:
        """Shape of the axes before the digits and the samples (replicas)."""
        return self.bits.shape[: -2 if num_digits(self.num_pieces) == 1 else -3]

    def to(self, device: torch.device | str) -> PackedPattern:
        """The pattern on a device."""
        return replace(self, bits=self.bits.to(device))

    def unpack(self) -> ActivationPattern:
        """The pattern as booleans (..., N, d1).

        Raises:
            ValueError: the units have more than two pieces.

        >>> pattern = ActivationPattern(torch.tensor([[True, False, True]]))
        >>> pattern.pack().unpack().active
        tensor([[ True, False,  True]])
        """
        if num_digits(self.num_pieces) > 1:
            raise ValueError(
                f"a unit with {self.num_pieces} pieces has more states than active or not: use unpack_pieces()"
            )
        return ActivationPattern(_unpack(self.bits, self.width).bool())

    def unpack_pieces(self) -> PiecePattern:
        """The pattern as integers (..., N, d1).

        >>> PiecePattern(torch.tensor([[2, 0, 1]]), num_pieces=3).pack().unpack_pieces().pieces
        tensor([[2, 0, 1]])
        """
        bits = self.bits.unsqueeze(-3) if num_digits(self.num_pieces) == 1 else self.bits
        digits = _unpack(bits, self.width).to(torch.int64)
        powers = 2 ** torch.arange(digits.shape[-3], device=digits.device)
        return PiecePattern((digits * powers[:, None, None]).sum(-3), self.num_pieces)

    def is_comparable(self, other: PackedPattern) -> bool:
        """Whether both patterns have the same numbers of samples, units and pieces."""
        return (self.width, self.num_pieces, self.bits.shape) == (other.width, other.num_pieces, other.bits.shape)

    def flips(self, other: PackedPattern) -> Tensor:
        """Number of (sample, unit) pairs on different pieces; with two pieces, on different sides of the kink.

        Returns:
            int64 (...), on the CPU.

        Raises:
            ValueError: the two patterns differ in shape.
        """
        return count_flips([(self, other)])[0]

    def activity(self, active_pieces: Sequence[int] = (1,)) -> Activity:
        """Which units are dead or linear on these samples, and which samples activate no unit.

        Args:
            active_pieces: the pieces on which a unit counts as active.

        >>> found = ActivationPattern(torch.tensor([[True, False, True], [False, False, True]])).pack().activity()
        >>> int(found.never_active), int(found.always_active), found.unactivated
        (1, 1, tensor([False, False]))
        """
        on_pieces = [self._on_piece(piece) for piece in active_pieces]
        active = reduce(np.bitwise_or, on_pieces)
        ever = _count(np.bitwise_or.reduce(active, axis=-2))
        always = sum(_count(np.bitwise_and.reduce(mask, axis=-2)) for mask in on_pieces)
        return Activity(
            never_active=self.width - torch.as_tensor(ever),
            always_active=torch.as_tensor(always),
            unactivated=torch.as_tensor(~active.any(-1)),
        )

    def dead(self, active_pieces: Sequence[int] = (1,)) -> Tensor:
        """Which units are active on none of these samples, bool (..., d1), on the CPU.

        >>> ActivationPattern(torch.tensor([[True, False, True], [False, False, True]])).pack().dead()
        tensor([False,  True, False])
        """
        active = reduce(np.bitwise_or, [self._on_piece(piece) for piece in active_pieces])
        ever = torch.from_numpy(np.bitwise_or.reduce(active, axis=-2))
        return ~_unpack(ever, self.width).bool()

    def _on_piece(self, piece: int) -> np.ndarray:
        """Packed flags of the units on one piece, (..., N, ⌈d1/8⌉)."""
        bits = _numpy(self.bits)
        planes = np.moveaxis(bits, -3, 0) if num_digits(self.num_pieces) > 1 else bits[None]
        within = np.packbits(np.ones(self.width, dtype=np.uint8), bitorder="little")
        return reduce(np.bitwise_and, [p if piece >> d & 1 else ~p for d, p in enumerate(planes)], within)

    def digest(self) -> str | list[str]:
        """A name of the region: equal patterns have equal digests, others different ones (BLAKE2b, 128 bits).

        Returns:
            Hexadecimal text; with a leading replica axis, a list of R.
        """
        if self.lead:
            return [_digest(replace(self, bits=bits)) for bits in self.bits.flatten(0, len(self.lead) - 1)]
        return _digest(self)


@dataclass(frozen=True)
class Activity:
    """Dead and linear units, and samples that activate no unit of a layer; tensors on the CPU.

    Attributes:
        never_active: number of units that are active on no sample, int64 (...).
        always_active: number of units that are on the same active piece on every sample, int64 (...).
        unactivated: whether no unit is active on a sample, bool (..., N).
    """

    never_active: Tensor
    always_active: Tensor
    unactivated: Tensor


@dataclass(frozen=True)
class PiecePattern:
    """The piece of every unit on every sample, for units that may have more than two pieces.

    Attributes:
        pieces: integers (..., N, d1) from 0 to ``num_pieces`` − 1.
        num_pieces: number of pieces that a unit can be on.
    """

    pieces: Tensor
    num_pieces: int

    def pack(self) -> PackedPattern:
        """The pattern with one bit per sample, unit and binary digit, packed on its own device."""
        width = self.pieces.shape[-1]
        if num_digits(self.num_pieces) == 1:
            return PackedPattern(_pack(self.pieces), width, self.num_pieces)
        pieces = self.pieces.to(torch.uint8) if self.num_pieces <= 2**_BITS_PER_BYTE else self.pieces
        digits = [_pack((pieces >> digit) & 1) for digit in range(num_digits(self.num_pieces))]
        return PackedPattern(torch.stack(digits, dim=-3), width, self.num_pieces)


@dataclass(frozen=True)
class ActivationPattern:
    """Which samples each unit is active on: the paper's A, with 1 for active and ρ for inactive.

    Attributes:
        active: bool (..., N, d1); True where w_i · x_n > 0.
    """

    active: Tensor

    @classmethod
    def from_preactivations(cls, preactivations: Tensor) -> ActivationPattern:
        """The pattern of pre-activations (..., N, d1).

        A pre-activation of exactly zero is on a kink, where the slope is undefined; it counts as inactive, as in
        torch's ``relu`` and ``leaky_relu``.

        Raises:
            ValueError: a pre-activation is NaN.

        >>> ActivationPattern.from_preactivations(torch.tensor([[0.5, -1.0], [0.0, 2.0]])).active
        tensor([[ True, False],
                [False,  True]])
        """
        if preactivations.isnan().any():
            raise ValueError("preactivations contain NaN: a pattern is defined for numbers only")
        return cls(preactivations > 0)

    def slopes(self, negative_slope: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """The paper's matrix A: 1 where active, ρ elsewhere, (..., N, d1)."""
        return self.active.to(dtype) * (1 - negative_slope) + negative_slope

    def pack(self) -> PackedPattern:
        """The pattern with one bit per sample and unit, packed on its own device."""
        return PackedPattern(_pack(self.active), self.active.shape[-1])

    def flips(self, other: ActivationPattern) -> Tensor:
        """Number of (sample, unit) pairs on different sides of their kink, int64 (...), on the CPU.

        >>> a, b = ActivationPattern(torch.tensor([[True, False]])), ActivationPattern(torch.tensor([[True, True]]))
        >>> int(a.flips(b))
        1

        Raises:
            ValueError: the two patterns differ in shape.
        """
        return self.pack().flips(other.pack())

    def digest(self) -> str | list[str]:
        """A name of the region (see :meth:`PackedPattern.digest`)."""
        return self.pack().digest()


def num_digits(num_pieces: int) -> int:
    """Number of binary digits of a piece.

    >>> num_digits(2), num_digits(3), num_digits(9)
    (1, 2, 4)
    """
    return max(1, (num_pieces - 1).bit_length())


def count_flips(pairs: Sequence[tuple[PackedPattern, PackedPattern]]) -> list[Tensor]:
    """The flips of pairs of patterns (see :meth:`PackedPattern.flips`), with one wait for a GPU."""
    for one, other in pairs:
        if not one.is_comparable(other):
            raise ValueError(
                f"patterns of different shape cannot be compared: {tuple(one.bits.shape)}, width {one.width} "
                f"and {tuple(other.bits.shape)}, width {other.width}"
            )
    differing = to_host([one.bits ^ other.bits.to(one.bits.device) for one, other in pairs])
    return [count_packed(bits, one.num_pieces) for bits, (one, _) in zip(differing, pairs, strict=True)]


def count_packed(bits: Tensor, num_pieces: int = 2) -> Tensor:
    """Number of (sample, unit) pairs with any bit set in packed bits, as those of a PackedPattern.

    Args:
        bits: uint8 (..., N, ⌈d1/8⌉), or with an axis of digits before the samples, on the CPU.
        num_pieces: number of pieces that a unit can be on.

    Returns:
        int64 (...), on the CPU.

    >>> int(count_packed(torch.tensor([[3], [1]], dtype=torch.uint8)))
    3
    """
    array = bits.numpy()
    if num_digits(num_pieces) > 1:
        array = np.bitwise_or.reduce(array, axis=-3)
    return torch.as_tensor(np.bitwise_count(array).sum(axis=(-2, -1), dtype=np.int64))


def distinct_patterns(layers: Sequence[PackedPattern]) -> Tensor:
    """Number of different patterns of samples, over all layers together, int64 (...), on the CPU.

    It is the number of linear regions of input space that contain samples. The patterns are compared, not digests.

    Args:
        layers: patterns of the same samples.

    >>> active = torch.tensor([[True, False], [True, False], [False, False]])
    >>> int(distinct_patterns([ActivationPattern(active).pack()]))
    2
    """
    rows = np.concatenate([_rows(layer) for layer in layers], axis=-1)
    flat = np.ascontiguousarray(rows).reshape(-1, *rows.shape[-2:]).view(f"V{rows.shape[-1]}")
    counts = [len(set(samples.ravel().tolist())) for samples in flat]
    return torch.tensor(counts).reshape(layers[0].lead)


def _rows(layer: PackedPattern) -> np.ndarray:
    """All bytes of each sample, (..., N, bytes)."""
    bits = _numpy(layer.bits)
    if num_digits(layer.num_pieces) == 1:
        return bits
    moved = np.moveaxis(bits, -3, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def _unpack(bits: Tensor, width: int) -> Tensor:
    shifts = torch.arange(_BITS_PER_BYTE, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :width]


def _pack(flags: Tensor) -> Tensor:
    return _pack_by_numpy(flags) if flags.device.type == "cpu" else _pack_by_torch(flags)


def _digest(pattern: PackedPattern) -> str:
    pieces = f"x{pattern.num_pieces}" if num_digits(pattern.num_pieces) > 1 else ""
    header = f"{pattern.bits.shape[-2]}x{pattern.width}{pieces}:".encode()
    return hashlib.blake2b(header + _numpy(pattern.bits).tobytes(), digest_size=16).hexdigest()


def _count(packed: np.ndarray) -> np.ndarray:
    return np.asarray(np.bitwise_count(packed).sum(axis=-1, dtype=np.int64))


def _pack_by_numpy(active: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(_numpy(active), axis=-1, bitorder="little"))


def _pack_by_torch(active: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(active.to(torch.uint8), (0, -active.shape[-1] % _BITS_PER_BYTE))
    weights = 2 ** torch.arange(_BITS_PER_BYTE, device=padded.device, dtype=torch.uint8)
    return (padded.reshape(*padded.shape[:-1], -1, _BITS_PER_BYTE) * weights).sum(-1, dtype=torch.uint8)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
