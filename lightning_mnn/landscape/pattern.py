"""Activation patterns: which side of each kink every sample is on.

Shapes: N samples, d1 hidden units, ``...`` leading axes (replicas).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

_BITS = 8


@dataclass(frozen=True)
class PackedPattern:
    """An activation pattern at one bit per sample and unit: what is stored, sent and compared.

    Unit ``8 b + j`` is bit ``j`` (the least significant is 0) of byte ``b``; the bits beyond the width are 0.

    Attributes:
        bits: uint8 array (..., N, ⌈d1/8⌉).
        width: number of units d1.
    """

    bits: Tensor
    width: int

    def __post_init__(self) -> None:
        """Check that the bytes fit the width."""
        expected = -(-self.width // _BITS)
        if self.bits.dtype != torch.uint8 or self.bits.shape[-1] != expected:
            raise ValueError(
                f"bits must be uint8 with {expected} bytes a sample for width={self.width}, "
                f"got {self.bits.dtype} of shape {tuple(self.bits.shape)}"
            )

    def unpack(self) -> ActivationPattern:
        """The pattern as booleans (..., N, d1).

        >>> pattern = ActivationPattern(torch.tensor([[True, False, True]]))
        >>> pattern.pack().unpack().active
        tensor([[ True, False,  True]])
        """
        shifts = torch.arange(_BITS, device=self.bits.device, dtype=torch.uint8)
        active = (self.bits[..., None] >> shifts) & 1
        return ActivationPattern(active.flatten(-2)[..., : self.width].bool())

    def flips(self, other: PackedPattern) -> Tensor:
        """Number of (sample, unit) pairs on different sides of their kink, int64 (...).

        Raises:
            ValueError: the two patterns differ in shape.
        """
        if self.width != other.width or self.bits.shape != other.bits.shape:
            raise ValueError(
                f"patterns of different shape cannot be compared: {tuple(self.bits.shape)}, width {self.width} "
                f"and {tuple(other.bits.shape)}, width {other.width}"
            )
        differing = np.bitwise_count(_numpy(self.bits) ^ _numpy(other.bits))
        return torch.as_tensor(differing.sum(axis=(-2, -1), dtype=np.int64))

    def digest(self) -> str | list[str]:
        """A name of the region: equal patterns have equal digests, different ones differ (BLAKE2b, 128 bits).

        Returns:
            Hexadecimal text; with a leading replica axis, a list of R.
        """
        if self.bits.ndim > 2:
            return [_digest(bits, self.width) for bits in self.bits.flatten(0, -3)]
        return _digest(self.bits, self.width)


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

        A pre-activation of exactly zero lies on a kink, where the slope is undefined; it counts as inactive, as it does
        in torch's ``relu`` and ``leaky_relu``.

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
        """The pattern at one bit per sample and unit, packed on the device it is on."""
        pack = _pack_by_numpy if self.active.device.type == "cpu" else _pack_by_torch
        return PackedPattern(pack(self.active), self.active.shape[-1])

    def flips(self, other: ActivationPattern) -> Tensor:
        """Number of (sample, unit) pairs on different sides of their kink, int64 (...).

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


def _pack_by_numpy(active: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(_numpy(active), axis=-1, bitorder="little"))


def _pack_by_torch(active: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(active.to(torch.uint8), (0, -active.shape[-1] % _BITS))
    weights = 2 ** torch.arange(_BITS, device=padded.device, dtype=torch.uint8)
    return (padded.reshape(*padded.shape[:-1], -1, _BITS) * weights).sum(-1, dtype=torch.uint8)


def _digest(bits: Tensor, width: int) -> str:
    header = f"{bits.shape[0]}x{width}:".encode()
    return hashlib.blake2b(header + _numpy(bits).tobytes(), digest_size=16).hexdigest()


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
