"""Small random moves of all parameters of a network, made and undone in place."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, TypeAlias

import torch

from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.seeding import generator as seeded
from lightning_mnn.utilities.transfer import widest_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    Run: TypeAlias = Callable[[], Mapping[str, Tensor]]


RESOLVED_SPACINGS = 8  # spacings of floats at 1: moves of a smaller σ would be rounding errors


@contextmanager
def moved(parameters: Iterable[Tensor], sigma: float, *, seed: int = 0) -> Iterator[None]:
    """A context in which the parameters stand at a random move of size σ; afterwards they are as before, bit for bit.

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
        raise ValueError("parameters must hold at least one tensor to move, got none")
    return RESOLVED_SPACINGS * max(spacings)


class RandomMoves:
    """Moves tensors along one direction at a time, and puts them back at the end.

    Their memory is written to past autograd, whose count of changes would tell others of a change that is undone.
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
        """Nothing has moved yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Put all back."""
        for target, origin in zip(self._targets, self._origins, strict=True):
            target.copy_(origin)

    def turn(self, seed: int) -> None:
        """Choose another direction."""
        generators: dict[torch.device, torch.Generator] = {}
        self._direction.clear()  # its memory goes before as much is asked for
        for origin, scale in zip(self._origins, self._scales, strict=True):
            device = origin.device
            drawn_by = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            dtype = torch.promote_types(origin.dtype, torch.float32)
            self._direction.append(torch.randn(origin.shape, generator=drawn_by, dtype=dtype, device=device) * scale)

    def go(self, sigma: float) -> None:
        """Stand at the origin plus σ times the direction."""
        for target, origin, direction in zip(self._targets, self._origins, self._direction, strict=True):
            torch.add(origin, direction, alpha=sigma, out=target)


COARSE_SPACING = 1e-4  # spacing of floats from which no step is both above rounding and small


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
        squares = [value.double().square().sum() for value in values]
        numbers = sum(value.numel() for value in values)
        random = seeded(self._seed, "kinks")
        found = []
        for value, square in zip(values, squares, strict=True):
            overall = torch.stack([other.to(square.device) for other in squares]).sum() / max(numbers, 1)
            mean = square / max(value.numel(), 1)
            least = torch.where(mean > 0, mean, torch.where(overall > 0, overall, 1.0)).sqrt()
            drawn = torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
            found.append(drawn.mul_(value.abs().clamp(min=least.to(value.dtype))))
        return found
