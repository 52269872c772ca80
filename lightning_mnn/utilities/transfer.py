"""Between the host and a device, with as few waits as there can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; the host does not wait until it is there.

    A copy to a GPU goes through pinned memory, which torch gives to nobody else before the copy is over.

    >>> sent(torch.arange(3), "cpu")
    tensor([0, 1, 2])
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The most accurate floating dtype of a device: float64 on all but Apple's."""
    return torch.float32 if device.type == "mps" else torch.float64


def fetched(*numbers: Tensor) -> list[float]:
    """What tensors of one number hold, all of a device read at once: on a GPU a single wait.

    Args:
        *numbers: tensors of one number each, of any dtype and device.

    >>> fetched(torch.tensor(3), torch.tensor([0.5]), torch.tensor(True))
    [3.0, 0.5, 1.0]
    """
    by_device: dict[torch.device, list[int]] = {}
    for index, number in enumerate(numbers):
        by_device.setdefault(number.device, []).append(index)
    found = [0.0] * len(numbers)
    for device, indices in by_device.items():
        dtype = widest_dtype(device)
        stacked = torch.stack([numbers[index].detach().reshape(()).to(dtype) for index in indices])
        for index, value in zip(indices, stacked.tolist(), strict=True):
            found[index] = value
    return found
