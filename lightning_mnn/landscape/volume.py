"""Angular volume of cones and regions: V(R) = P(W ∈ R), the entries of W i.i.d. N(0, 1).

Volumes are natural logarithms throughout: a cone of 100 half-spaces in 20 dimensions is about e^−45 already.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import special

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from lightning_mnn.landscape.region import Region

_TINY = 1e-250  # below, the incomplete beta function is near float64's smallest number and loses its digits


def log_cap_measure(sine: ArrayLike, dim: int) -> NDArray[np.float64]:
    """Log of the Gaussian measure of a spherical cap: log(½ I_{sin²θ}((d−1)/2, ½)) for half-angles θ ≤ π/2.

    Where the regularised incomplete beta function I underflows it is replaced by its hypergeometric form
    I_x(a, b) = xᵃ (1−x)ᵇ / (a B(a, b)) · ₂F₁(a+b, 1; a+1; x), whose logarithm is exact to rounding.

    Args:
        sine: sin θ in [0, 1], any shape.
        dim: dimension d of the space.

    Returns:
        Natural logarithms, the shape of ``sine``; −inf where sin θ = 0 and d > 1.

    Raises:
        ValueError: ``sine`` outside [0, 1] or ``dim`` < 1.

    >>> round(float(np.exp(log_cap_measure(math.sin(0.3), 2))), 6) == round(2 * 0.3 / (2 * math.pi), 6)
    True
    """
    sine = np.asarray(sine, dtype=np.float64)
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if not np.all((sine >= 0) & (sine <= 1)):
        raise ValueError(f"sine must lie between 0 and 1, got {sine}")
    if dim == 1:  # a cone of the line is a half-line
        return np.full(sine.shape, -math.log(2))
    x, a, b = sine**2, (dim - 1) / 2, 0.5
    beta = special.betainc(a, b, x)
    with np.errstate(divide="ignore"):
        direct = np.log(beta)
        log_x = 2 * np.log(sine)  # not log(sine²), which underflows first
    small = np.where(beta < _TINY, x, 0.0)
    series = np.log(special.hyp2f1(a + b, 1, a + 1, small)) + b * np.log1p(-small) - math.log(a) - special.betaln(a, b)
    return np.asarray(-math.log(2) + np.where(beta < _TINY, a * log_x + series, direct))


def log_volume_lower_bound(region: Region, hidden_weights: Tensor) -> Tensor | float:
    """A rigorous lower bound on log V(D_A) of the region that holds the given weights: a spherical cap in each cone.

    The cone of row i contains the cap around w_i of half-angle θ_i = min_n arcsin(|w_i·x_n| / ‖w_i‖‖x_n‖), so
    V(D_A) = Π γ(C_i) ≥ Π ½ I_{sin²θ_i}((d0−1)/2, ½). The sines are lowered by the rounding error of the products.

    Args:
        region: the region, with inputs (..., N, d0).
        hidden_weights: a point W (..., d1, d0) of it.

    Returns:
        Natural logarithm: a float, with leading axes a tensor (...); −inf when a pre-activation is zero up to rounding.

    Raises:
        ValueError: the weights do not lie in the region.

    >>> from lightning_mnn.landscape import ActivationPattern, Region
    >>> x, w = torch.eye(2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    >>> region = Region(x, ActivationPattern.from_preactivations(x @ w.T))
    >>> round(math.exp(log_volume_lower_bound(region, w)), 6)  # the cap fills the quadrant: ¼
    0.25
    """
    inputs, weights = region.inputs, hidden_weights.to(torch.float64)
    preactivations = inputs @ weights.mT
    if not torch.equal(preactivations > 0, region.pattern.active.expand(preactivations.shape)):
        raise ValueError("hidden_weights do not lie in the region: their activation pattern is another one")
    bound = log_volume_bound_from_sines(
        smallest_sines(preactivations, inputs.norm(dim=-1), weights.norm(dim=-1)), inputs.shape[-1]
    )
    return float(bound) if bound.ndim == 0 else bound


def smallest_sines(preactivations: Tensor, sample_norms: Tensor, weight_norms: Tensor) -> Tensor:
    """Smallest |w_i·x_n| / (‖w_i‖‖x_n‖) over the samples, for each unit: its angle's sine to the nearest kink.

    Samples x_n = 0 constrain nothing and are passed over; a row w_i = 0 lies on every kink (0).

    Args:
        preactivations: x_n·w_i, (..., N, d1).
        sample_norms: ‖x_n‖, (..., N).
        weight_norms: ‖w_i‖, (..., d1).

    Returns:
        Sines (..., d1); 1 where no sample constrains the unit.
    """
    ratios = (preactivations.abs() / sample_norms[..., None]).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(dim=-2)
    return torch.where(weight_norms > 0, ratios / weight_norms, 0.0).clamp(max=1.0)


def log_volume_bound_from_sines(sines: Tensor, dim: int) -> Tensor:
    """Sum over the units of the log measure of their caps, (...) from sines (..., d1) (see log_volume_lower_bound)."""
    lowered = (sines.cpu().numpy() - (dim + 4) * np.finfo(np.float64).eps).clip(min=0)
    return torch.as_tensor(log_cap_measure(lowered, dim).sum(-1))
