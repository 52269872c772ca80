"""Transfers between the host and a device, with as few synchronisations as possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # keyed by the size in bytes


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor copied to a device; the host does not wait for the copy.

    A copy to a GPU goes through pinned memory, which torch does not reuse before the copy has finished.

    >>> sent(torch.arange(3), "cpu")
    tensor([0, 1, 2])
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The most accurate floating dtype of a device: float64 on all devices except Apple's."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors copied to the CPU, all tensors of one device in a single copy: a GPU is waited for only once.

    >>> to_host([torch.tensor([[1, 2]]), torch.tensor(True)])
    [tensor([[1, 2]]), tensor(True)]
    """
    found = [tensor.detach() for tensor in tensors]
    for device, indices in _by_device(found).items():
        if device.type == "cpu":
            continue
        parts = [found[index].contiguous() for index in indices]
        joined = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).cpu()
        pieces = torch.split(joined, [part.nbytes for part in parts])
        for index, part, piece in zip(indices, parts, pieces, strict=True):
            found[index] = piece.clone().view(part.dtype).reshape(part.shape)
    return found


def fetched(*numbers: Tensor) -> list[float]:
    """The values of tensors with one element, all tensors of one device read at once: a GPU is waited for only once.

    Args:
        *numbers: tensors with one element each, of any dtype and device.

    >>> fetched(torch.tensor(3), torch.tensor([0.5]), torch.tensor(True))
    [3.0, 0.5, 1.0]
    """
    found = [0.0] * len(numbers)
    for device, indices in _by_device(numbers).items():
        dtype = widest_dtype(device)
        stacked = torch.stack([numbers[index].detach().reshape(()).to(dtype) for index in indices])
        for index, value in zip(indices, stacked.tolist(), strict=True):
            found[index] = value
    return found


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Indices of the tensors on each device."""
    indices: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        indices.setdefault(tensor.device, []).append(index)
    return indices


def digests(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A digest of the bits of each tensor, int64 (): different bits give different numbers, except by coincidence.

    Nothing waits for the device. Unlike torch's own version counter, it also detects changes made through
    ``tensor.data``. It is 0 for tensors that are not stored densely in this process's memory, such as sparse ones.

    >>> weights = torch.ones(4)
    >>> digests([weights]) == digests([weights.clone()]), digests([weights]) == digests([-weights])
    (True, False)
    """
    return [_digest(tensor.detach()) for tensor in tensors]


def _digest(tensor: Tensor) -> Tensor:
    plain = tensor.layout is torch.strided and not tensor.is_meta and tensor.element_size() in _INTEGERS
    if not plain:
        return torch.zeros((), dtype=torch.int64)
    bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    odd = torch.arange(1, 2 * len(bits) + 1, 2, device=bits.device)
    half = 4 * tensor.element_size()  # without it, two sign changes would cancel
    total: Tensor = ((bits ^ (bits >> half)) * odd).sum()
    return total


def plain(values: Tensor | None) -> Any:
    """A tensor (...) as Python numbers: one number, or a list over replicas; None stays None."""
    return None if values is None else values.tolist()
