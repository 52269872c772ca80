"""Max-pooling as the largest of several numbers."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lightning_mnn.landscape.kinks.pieces import Function, Largest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def max_pooling(num_axes: int) -> Callable[..., Function]:
    """A function from the arguments of torch's ``max_pool`` of this many axes to its :class:`Largest`."""

    def build(
        input: Tensor,  # noqa: A002
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,  # noqa: FBT001, FBT002
        *_: Any,
        **__: Any,
    ) -> Function:
        kernel, pad, spread = (_tuple(value, num_axes) for value in (kernel_size, padding, dilation))
        step = _tuple(stride, num_axes) if stride else kernel
        sizes = input.shape[-num_axes:]

        def windows() -> list[Tensor]:
            """For each position in a window, the numbers there, (..., windows); −inf outside the input."""
            each = list(zip(sizes, kernel, step, pad, spread, strict=True))
            outs = [_pooled(*options, ceil_mode=ceil_mode) for options in each]
            ends = [
                max(0, (out - 1) * s + d * (k - 1) + 1 - n - p) for out, (n, k, s, p, d) in zip(outs, each, strict=True)
            ]
            room = [width for sides in zip(pad[::-1], ends[::-1], strict=True) for width in sides]
            padded = functional.pad(input, room, value=-math.inf)
            found = []
            for offsets in itertools.product(*map(range, kernel)):
                starts = [o * d for o, d in zip(offsets, spread, strict=True)]
                cut = (slice(a, a + (out - 1) * s + 1, s) for a, out, s in zip(starts, outs, step, strict=True))
                index: Any = (..., *cut)
                found.append(padded[index])
            return found

        def winner() -> Tensor:
            """Index of the first of the largest, as in torch's pooling; computing torch's own indices is slower."""
            best, *others = windows()
            found = torch.zeros_like(best, dtype=torch.uint8 if len(others) < 256 else torch.int64)
            for i, window in enumerate(others, start=1):
                found = torch.maximum(found, (window > best).to(found.dtype) * i)
                best = torch.maximum(best, window)
            return found

        def gap() -> Tensor:
            best, *others = windows()
            second = torch.full_like(best, -math.inf)
            for window in others:
                second = torch.maximum(second, torch.minimum(best, window))
                best = torch.maximum(best, window)
            return best - second

        return Largest(input, math.prod(kernel), lambda: torch.stack(windows(), -1), winner, gap)

    return build


def _pooled(n: int, kernel: int, step: int, pad: int, spread: int, *, ceil_mode: bool) -> int:
    """Number of windows of a max-pooling along an axis of size n."""
    span = n + 2 * pad - spread * (kernel - 1) - 1
    out = (-(-span // step) if ceil_mode else span // step) + 1
    return out - 1 if ceil_mode and (out - 1) * step >= n + pad else out  # no window starts beyond the input


def adaptive_max_pooling(num_axes: int) -> Callable[..., Function]:
    """The same for torch's ``adaptive_max_pool``."""

    def build(input: Tensor, output_size: Any, *_: Any, **__: Any) -> Function:  # noqa: A002
        sizes = input.shape[-num_axes:]
        outputs = [n if out is None else out for n, out in zip(sizes, _tuple(output_size, num_axes), strict=True)]
        places, valid = [], []
        for n, out in zip(sizes, outputs, strict=True):
            window = torch.arange(out, device=input.device)
            end = -((window + 1) * n // -out)
            width = max((-((i + 1) * n // -out) - i * n // out for i in range(out)), default=0)
            place = (window * n // out)[:, None] + torch.arange(width, device=input.device)
            places.append(place)
            valid.append(place < end[:, None])
        return Largest(input, math.prod(p.shape[1] for p in places), lambda: _windows(input, places, valid))

    return build


def _windows(x: Tensor, places: Sequence[Tensor], valid: Sequence[Tensor]) -> Tensor:
    """The numbers of each window, (..., out_1, …, out_m, k); −inf where a window extends beyond x.

    Args:
        x: (..., n_1, …, n_m).
        places: for each axis, the indices of each window, (out, k), on the device of x.
        valid: for each axis, whether they lie in x and in the window, (out, k).
    """
    m = len(places)
    index: list[Any] = []
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, (place, good) in enumerate(zip(places, valid, strict=True)):
        shape = [1] * (2 * m)
        shape[axis], shape[m + axis] = place.shape
        index.append((place * good).reshape(shape))
        inside = inside & good.reshape(shape)
    found = x[(..., *index)].masked_fill(~inside, -math.inf)
    return found.flatten(-m)


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return tuple(itertools.islice(itertools.cycle(values), length)) if len(values) == 1 else values
