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


def fetched(*numbers: Tensor) -> list[float]:
    """What tensors of one number hold, float64, all read at once: on a GPU a single wait.

    Args:
        *numbers: tensors of one number each, of any dtype and device.

    >>> fetched(torch.tensor(3), torch.tensor([0.5]), torch.tensor(True))
    [3.0, 0.5, 1.0]
    """
    if not numbers:
        return []
    device = numbers[0].device
    found: list[float] = torch.stack(
        [number.detach().reshape(()).to(device, torch.float64) for number in numbers]
    ).tolist()
    return found
