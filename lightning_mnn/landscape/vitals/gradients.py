"""Statistics of gradients: their sizes beside the weights, entries near zero, and the noise scale of mini-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class GradientSizes:
    """Sizes of the gradient of a layer, or of several together; numbers () on the device, so that nothing waits for it.

    Attributes:
        squared_norm: ‖g‖².
        squared_weights: ‖θ‖² of the same parameters.
        near_zero: number of entries with |g_k| at most 1e-3 of the root mean square of the gradient.
        size: number of entries.
    """

    squared_norm: Tensor
    squared_weights: Tensor
    near_zero: Tensor
    size: int

    @property
    def norm(self) -> Tensor:
        """‖g‖."""
        return self.squared_norm.sqrt()

    @property
    def relative_norm(self) -> Tensor:
        """‖g‖ / ‖θ‖; infinite or NaN if the weights are zero."""
        return self.norm / self.squared_weights.sqrt()

    @property
    def near_zero_fraction(self) -> Tensor:
        """Fraction of the entries that are near zero."""
        return self.near_zero / self.size


@torch.no_grad()
def gradient_sizes(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> GradientSizes:
    """Sizes of a layer's gradient: its norm, that of its weights, and how many of its entries are near zero.

    An entry is near zero if it is at most 1e-3 of the root mean square of all entries. So all entries of a gradient
    that is zero are.

    Args:
        gradients: gradients of the layer's parameters, of one device; sparse ones are taken as they are stored.
        weights: the parameters.

    Returns:
        Numbers on the device, in at least 32 bits.

    Raises:
        ValueError: there are no gradients.

    >>> found = gradient_sizes([torch.tensor([3.0, 0.0]), torch.tensor([4.0])], [torch.ones(2), torch.zeros(1)])
    >>> float(found.norm), f"{float(found.near_zero_fraction):.3f}"
    (5.0, '0.333')
    """
    if not gradients:
        raise ValueError("gradients must not be empty: give those of one parameter or more")
    stored = [_numbers(gradient) for gradient in gradients]
    total = squared_norm(stored)
    size = sum(gradient.numel() for gradient in gradients)
    bound = tolerances.NEAR_ZERO_GRADIENT_RATIO * (total / size).sqrt()
    unstored = size - sum(gradient.numel() for gradient in stored)
    near = torch.stack([(gradient.abs() <= bound).sum() for gradient in stored]).sum() + unstored
    return GradientSizes(total, squared_norm(list(weights)), near, size)


def joined(parts: Sequence[GradientSizes]) -> GradientSizes:
    """The sizes of several layers together; near zero is what is near zero in its own layer."""
    device = parts[0].squared_norm.device
    columns = zip(*((p.squared_norm, p.squared_weights, p.near_zero) for p in parts), strict=True)
    norm, weights, near = (torch.stack([number.to(device) for number in column]).sum() for column in columns)
    return GradientSizes(norm, weights, near, sum(part.size for part in parts))


def _numbers(gradient: Tensor) -> Tensor:
    found = gradient.detach()
    return found.coalesce().values() if found.layout is torch.sparse_coo else found


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The squared norm of all numbers of several tensors together, (), in at least 32 bits."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    return torch.stack([norm.to(norms[0].device, widest) for norm in norms]).square().sum()


def gradient_noise_scale(
    mean_squared_norm: Tensor, squared_norm_of_mean: Tensor, num_batches: int, batch_size: float
) -> Tensor:
    """Simple noise scale tr(Σ) / ‖G‖², in samples: the batch size from which larger batches hardly help.

    Σ is the covariance of a sample's gradient, G the gradient of the mean loss. Both numerator and denominator are
    unbiased estimates from the gradients g_1, …, g_k of k batches of B samples: with S = mean_j ‖g_j‖² and
    M = ‖mean_j g_j‖²,

        ‖G‖² ≈ (k M − S) / (k − 1),    tr(Σ) ≈ B (S − M) k / (k − 1).

    Args:
        mean_squared_norm: S.
        squared_norm_of_mean: M.
        num_batches: k.
        batch_size: B.

    Returns:
        (); infinite if the estimate of ‖G‖² is not positive: there is more noise than k batches can resolve.

    Raises:
        ValueError: k < 2.

    Source: McCandlish, Kaplan, Amodei et al., "An empirical model of large-batch training", 2018.

    >>> float(gradient_noise_scale(torch.tensor(2.0), torch.tensor(1.5), num_batches=2, batch_size=10))
    10.0
    """
    if num_batches < 2:
        raise ValueError(f"num_batches must be at least 2, got {num_batches}: one batch shows no noise")
    signal = (num_batches * squared_norm_of_mean - mean_squared_norm) / (num_batches - 1)
    noise = batch_size * (mean_squared_norm - squared_norm_of_mean) * num_batches / (num_batches - 1)
    return torch.where(signal > 0, noise / signal, torch.full_like(signal, torch.inf))
