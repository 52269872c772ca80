"""Sizes of a network: widths, and the memory for its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_mnn.utilities.validation import ArgumentError, check_memory, positive_integer

if TYPE_CHECKING:
    from collections.abc import Sequence

_GENERATOR_BYTES = 5056  # size of torch's state of a generator; there is one per replica


def check_size(input_dim: int, hidden_dims: Sequence[int], replicas: int) -> None:
    """Refuse more weights than the memory allows; drawing them needs two copies in float64."""
    weights = sum(fan_in * width for fan_in, width in zip([input_dim, *hidden_dims], [*hidden_dims, 1], strict=True))
    needed = replicas * (2 * 8 * weights + _GENERATOR_BYTES)
    check_memory(needed, "the weights", {"input_dim": input_dim, "hidden_dims": hidden_dims, "replicas": replicas})


def checked_widths(hidden_dims: Any) -> list[int]:
    """The widths of the hidden layers, checked.

    Raises:
        ArgumentError: they are not one or more positive whole numbers.
    """
    widths = list(hidden_dims) if isinstance(hidden_dims, Iterable) and not isinstance(hidden_dims, str) else []
    if not widths:
        raise ArgumentError("hidden_dims", hidden_dims, "must be a list of one or more widths", "as [40] or [40,20]")
    return [positive_integer("hidden_dims", width) for width in widths]
