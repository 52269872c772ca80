"""Whitening: a linear map of the inputs after which their covariance is the identity, up to a floor."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 8192


def whitening_matrix(inputs: Tensor, floor: float) -> Tensor:
    """The symmetric matrix T = (C + floor · c̄ · I)^(−½), C the second moments of centred inputs, c̄ their mean diagonal.

    With ``floor`` = 0 the map whitens fully, and directions without variance are an error; a positive floor leaves
    directions with much less variance than the average nearly as small as they were.

    Args:
        inputs: centred inputs (N, d0).
        floor: least variance, relative to the mean variance of an input.

    Returns:
        float64 (d0, d0); whitened inputs are ``inputs @ T``.

    Raises:
        ValueError: a negative floor, or inputs without variance in some direction and ``floor`` = 0.

    >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> (x @ whitening_matrix(x, floor=0.0).float()).abs().max(0).values
    tensor([1.4142, 1.4142])
    """
    if floor < 0:
        raise ValueError(f"floor must not be negative, got {floor}")
    covariance = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for start in range(0, len(inputs), _BLOCK):  # a double copy of the whole may not fit
        block = inputs[start : start + _BLOCK].double()
        covariance += block.T @ block
    covariance /= inputs.shape[0]
    values, vectors = torch.linalg.eigh(covariance)
    floored = values.clamp(min=0) + floor * covariance.diagonal().mean()
    if floored[0] <= floored[-1] * len(floored) * torch.finfo(torch.float64).eps:
        raise ValueError("the inputs have no variance in some direction: whiten with a floor > 0")
    whitening: Tensor = (vectors / floored.sqrt()) @ vectors.T
    return whitening
