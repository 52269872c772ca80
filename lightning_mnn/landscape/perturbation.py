"""Small random moves of all parameters of a network, made and undone in place."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, TypeAlias

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.seeding import generator as seeded
from lightning_mnn.utilities.transfer import widest_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    Run: TypeAlias = Callable[[], Mapping[str, Tensor]]


@contextmanager
def moved(parameters: Iterable[Tensor], sigma: float, *, seed: int = 0) -> Iterator[None]:
    """A context in which the parameters are moved at random with size σ; afterwards they are restored bit for bit.

    >>> weight = torch.ones(4)
    >>> with moved([weight], 0.1):
    ...     float((weight - 1).norm()) > 0
    True
    >>> weight
    tensor([1., 1., 1., 1.])
    """
    with RandomMoves(list(parameters)) as moves:
        moves.turn(generator(seed, "local volume", 0).initial_seed())
        moves.go(sigma)
        yield


def finest_sigma(parameters: Iterable[Tensor]) -> float:
    """Smallest σ at which moves are not lost in the rounding of the parameters: 8 spacings of their floats at 1.

    Raises:
        ValueError: there is no parameter.

    >>> finest_sigma([torch.ones(2)]) < 1e-6 < finest_sigma([torch.ones(2), torch.ones(2, dtype=torch.bfloat16)])
    True
    """
    spacings = [torch.finfo(tensor.dtype).eps for tensor in parameters]
    if not spacings:
        raise ValueError("parameters must have at least one tensor to move, got none")
    return tolerances.MIN_MOVE_SPACINGS * max(spacings)


class RandomMoves:
    """Moves tensors along one direction at a time, and restores them at the end.

    It writes to their memory without autograd, so that autograd's version counter does not count changes that are
    undone.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._targets = [tensor.data for tensor in tensors]
        self._origins = [target.clone() for target in self._targets]
        self._scales = [
            torch.linalg.vector_norm(origin, dtype=torch.promote_types(origin.dtype, widest_dtype(origin.device)))
            / math.sqrt(max(1, origin.numel()))
            for origin in self._origins
        ]
        self._direction: list[Tensor] = []

    def __enter__(self) -> Self:
        """Return the moves; nothing has moved yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Restore all tensors."""
        for target, origin in zip(self._targets, self._origins, strict=True):
            target.copy_(origin)

    def turn(self, seed: int) -> None:
        """Choose another direction."""
        generators: dict[torch.device, torch.Generator] = {}
        self._direction.clear()  # free its memory before the new direction is allocated
        for origin, scale in zip(self._origins, self._scales, strict=True):
            device = origin.device
            drawn_by = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            dtype = torch.promote_types(origin.dtype, torch.float32)
            self._direction.append(torch.randn(origin.shape, generator=drawn_by, dtype=dtype, device=device) * scale)

    def go(self, sigma: float) -> None:
        """Set the tensors to their origin plus σ times the direction."""
        for target, origin, direction in zip(self._targets, self._origins, self._direction, strict=True):
            torch.add(origin, direction, alpha=sigma, out=target)


class Jitter:
    """A random direction that moves each number θ of a tensor by r · max(|θ|, root mean square), with r normal.

    If a tensor is all zeros, the root mean square is that of all tensors. Tensors that do not require a gradient do not
    move. The direction is drawn at its first use, and needs as much memory as the parameters.

    Args:
        parameters: the tensors to move.
        seed: seed of r.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int = 0) -> None:
        self._free = [parameter for parameter in parameters if parameter.requires_grad]
        self._seed = seed
        self._direction: list[Tensor] | None = None

    @contextmanager
    def moved(self, step: float) -> Iterator[None]:
        """A context in which the parameters are moved by a step; afterwards they are restored bit for bit."""
        if self._direction is None:
            self._direction = self._drawn()
        originals = [parameter.detach().clone() for parameter in self._free]
        try:
            with torch.no_grad():
                for parameter, direction in zip(self._free, self._direction, strict=True):
                    parameter.add_(direction, alpha=step)
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self._free, originals, strict=True):
                    parameter.copy_(old)

    def _drawn(self) -> list[Tensor]:
        values = [parameter.detach() for parameter in self._free]
        squares = [value.double().square().sum() for value in values]
        numbers = sum(value.numel() for value in values)
        random = seeded(self._seed, "kinks")
        found = []
        for value, square in zip(values, squares, strict=True):
            overall = torch.stack([other.to(square.device) for other in squares]).sum() / max(numbers, 1)
            mean = square / max(value.numel(), 1)
            smallest = torch.where(mean > 0, mean, torch.where(overall > 0, overall, 1.0)).sqrt()
            drawn = torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
            found.append(drawn.mul_(value.abs().clamp(min=smallest.to(value.dtype))))
        return found
