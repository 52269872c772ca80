"""A forward pass with the active kinks as they are in abs-normal form: each |z| of theirs is a variable of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lightning_mnn.landscape.kinks.tracing import Kink


class ActiveKinks:
    """Replaces f(z) by ((s₊ + s₋) z + (s₊ − s₋) v)/2 on active kinks, with v = 0 in the place of |z|.

    Here s₋ and s₊ are the slopes of f on both sides of z = 0. Derivatives by θ are then those on the face {z = 0} of
    the active kinks, with the mean of both slopes; those by v are those by |z|. It is the argument ``replace`` of a
    :class:`~lightning_mnn.landscape.kinks.tracing.KinkTrace`, for one pass.

    Args:
        active: by layer, which units are active kinks: bool, flat, in the order of the function's output.

    Attributes:
        layers: the layers met, in the order of the forward pass.
        values: their switching values z, one tensor (k,) for each layer, with their graph.
        sizes: the variables v, likewise.
        others: functions that have active kinks, and are not ReLU, LeakyReLU or |x|.

    >>> from torch import nn
    >>> from lightning_mnn.landscape import KinkTrace
    >>> net, x = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU()), torch.tensor([[1.0]])
    >>> _ = nn.init.constant_(net[0].weight, 0.0)
    >>> active = ActiveKinks({"1": torch.tensor([True, False])})
    >>> with KinkTrace(net, lambda kink: None, replace=active):
    ...     output = net(x).sum()
    >>> torch.autograd.grad(output, [net[0].weight, *active.sizes])
    (tensor([[0.5000],
            [0.0000]]), tensor([0.5000]))
    """

    def __init__(self, active: Mapping[str, Tensor]) -> None:
        self.layers: list[str] = []
        self.values: list[Tensor] = []
        self.sizes: list[Tensor] = []
        self.others: set[str] = set()
        self._places = {name: units.nonzero()[:, 0] for name, units in active.items()}

    def __call__(self, kink: Kink, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the function returns, with the active kinks of its layer replaced."""
        places = self._places.get(kink.name)
        if places is None or not len(places):
            return function(*args, **kwargs)
        slopes = _slopes(kink.function, args, kwargs)
        if slopes is None:
            self.others.add(kink.function)
            return function(*args, **kwargs)
        low, high = slopes
        before = kink.input
        value = before.flatten()[places]  # a copy: the function may overwrite its input
        size = torch.zeros_like(value, requires_grad=True)
        copied = before.clone()
        output = function(copied, *args[1:], **{key: x for key, x in kwargs.items() if key != "input"})
        face = (high + low) / 2 * value + (high - low) / 2 * size
        replaced = output.flatten().index_copy(0, places, face.to(output.dtype)).view(output.shape)
        self.layers.append(kink.name)
        self.values.append(value)
        self.sizes.append(size)
        return before.copy_(replaced) if output is copied else replaced


def _slopes(function: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """The slopes of a function of one breakpoint, at zero; None of others."""
    if function == "relu":
        return 0.0, 1.0
    if function == "leaky_relu":
        return kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01), 1.0
    return (-1.0, 1.0) if function in ("abs", "absolute") else None
