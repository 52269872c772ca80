"""The pieces of a piecewise-linear function: which piece a number is on, and its distance to the nearest kink."""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class Function(Protocol):
    """One call: its pieces, and how far its units are from a kink."""

    input: Tensor

    @property
    def num_pieces(self) -> int:
        """Number of pieces."""

    @property
    def active_pieces(self) -> tuple[int, ...] | None:
        """The pieces that count as active; None: the function has no active pieces."""

    @property
    def requires_grad(self) -> bool:
        """Whether any of the inputs requires a gradient."""

    def pieces(self) -> Tensor:
        """Piece of each unit."""

    def distance(self) -> Tensor:
        """Distance of each unit to the nearest kink."""


class Elementwise:
    """A function of each number x, with breakpoints b_1 ≤ b_2 ≤ …; the piece is the number of those below x.

    >>> call = Elementwise(torch.tensor([-1.0, 2.0, 9.0]), (0.0, 6.0))
    >>> call.pieces(), call.distance()
    (tensor([0, 1, 2], dtype=torch.uint8), tensor([1., 2., 3.]))
    """

    def __init__(
        self, x: Tensor, breakpoints: Sequence[float | Tensor] = (0.0,), active_pieces: tuple[int, ...] | None = (1,)
    ) -> None:
        self.input = x
        self.breakpoints = breakpoints
        self.num_pieces = len(breakpoints) + 1
        self.active_pieces = active_pieces

    @property
    def requires_grad(self) -> bool:
        """Whether the input or a breakpoint requires a gradient."""
        return any(isinstance(t, torch.Tensor) and t.requires_grad for t in (self.input, *self.breakpoints))

    def pieces(self) -> Tensor:
        """Number of breakpoints below each x, uint8."""
        first, *others = ((self.input > b).to(torch.uint8) for b in self.breakpoints)
        return sum(others, start=first)

    def distance(self) -> Tensor:
        """|x − b| to the nearest breakpoint."""
        return reduce(torch.minimum, ((self.input - b).abs() for b in self.breakpoints))


class Largest:
    """The largest of k numbers, along the last axis of the result of ``numbers``; the piece is its index.

    Args:
        x: the tensor that the function is called on.
        num_pieces: k.
        numbers: returns all k numbers, (..., k); −inf for entries of a window outside the input.
        winner: a faster function for the index of the largest; None: it is computed from the numbers.
        gap: a faster function for the largest less the second largest; None: it is computed from the numbers.
        others: other tensors that the numbers depend on.

    >>> call = Largest(torch.tensor([[1.0, 4.0, 2.0]]), 3, lambda: torch.tensor([[1.0, 4.0, 2.0]]))
    >>> call.pieces(), call.distance()
    (tensor([1]), tensor([2.]))
    """

    active_pieces = None

    def __init__(
        self,
        x: Tensor,
        num_pieces: int,
        numbers: Callable[[], Tensor],
        winner: Callable[[], Tensor] | None = None,
        gap: Callable[[], Tensor] | None = None,
        others: Sequence[Tensor] = (),
    ) -> None:
        self.input = x
        self.num_pieces = num_pieces
        self._numbers = numbers
        self._winner = winner
        self._gap = gap
        self._others = others

    @property
    def requires_grad(self) -> bool:
        """Whether any of the numbers requires a gradient."""
        return any(tensor.requires_grad for tensor in (self.input, *self._others))

    def pieces(self) -> Tensor:
        """Index of the largest."""
        return self._numbers().argmax(-1) if self._winner is None else self._winner()

    def distance(self) -> Tensor:
        """Largest less second largest; infinite if there is only one number."""
        if self._gap is not None:
            return self._gap()
        numbers = self._numbers()
        if self.num_pieces == 1:
            return torch.full_like(numbers[..., 0], math.inf)
        best = numbers.topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]
