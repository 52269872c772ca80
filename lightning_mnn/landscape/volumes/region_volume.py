"""Angular volume of cones and regions: V(R) = P(W ∈ R), the entries of W i.i.d. N(0, 1).

All volumes are natural logarithms: a cone of 100 half-spaces in 20 dimensions already has a volume of about e^−45.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import special
from scipy.stats import t as student

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.network import smallest_sines
from lightning_mnn.landscape.volumes.cone import log_cone_measure, log_ellipsoid_volume
from lightning_mnn.landscape.volumes.intervals import LogEstimate
from lightning_mnn.utilities.seeding import generator

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from lightning_mnn.landscape.regions.region import Region


_ENTRIES_PER_BATCH = 2**26  # entries of the normals of all cones in one batch


def log_cap_measure(sine: ArrayLike, dim: int) -> NDArray[np.float64]:
    """Log of the Gaussian measure of a spherical cap: log(½ I_{sin²θ}((d−1)/2, ½)) for half-angles θ ≤ π/2.

    If the regularised incomplete beta function I underflows, it is replaced by its hypergeometric form
    I_x(a, b) = xᵃ (1−x)ᵇ / (a B(a, b)) · ₂F₁(a+b, 1; a+1; x), whose logarithm is exact up to rounding.

    Args:
        sine: sin θ in [0, 1], any shape; a tensor may be on any device.
        dim: dimension d of the space.

    Returns:
        Natural logarithms, an array of the shape of ``sine``; −inf where sin θ = 0 and d > 1.

    Raises:
        ValueError: ``sine`` is outside [0, 1], or ``dim`` < 1.

    >>> round(float(np.exp(log_cap_measure(math.sin(0.3), 2))), 6) == round(2 * 0.3 / (2 * math.pi), 6)
    True
    """
    sine = np.asarray(sine.detach().cpu() if isinstance(sine, torch.Tensor) else sine, dtype=np.float64)
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
    small = np.where(beta < tolerances.MIN_BETA_VALUE, x, 0.0)
    series = np.log(special.hyp2f1(a + b, 1, a + 1, small)) + b * np.log1p(-small) - math.log(a) - special.betaln(a, b)
    return np.asarray(-math.log(2) + np.where(beta < tolerances.MIN_BETA_VALUE, a * log_x + series, direct))


@dataclass(frozen=True)
class RegionVolume(LogEstimate):
    """Log of the angular volume of a region, and its parts; tensors are on the CPU.

    Attributes:
        lower_bound: a rigorous bound from spherical caps (see :func:`log_volume_lower_bound`), of the shape of
            ``value``.
        units: the units whose cones were measured, (m,).
        unit_values: log measures of their cones, (..., m).
        unit_standard_errors: standard errors of these, (..., m).
    """

    lower_bound: float | Tensor
    units: Tensor
    unit_values: Tensor
    unit_standard_errors: Tensor


def region_log_volume(
    region: Region,
    hidden_weights: Tensor,
    *,
    target_standard_error: float = 0.1,
    num_units: int | None = None,
    max_samples: int = 2**20,
    seed: int = 0,
) -> RegionVolume:
    """Log of the angular volume V(D_A) = Π γ(C_i) of a region: the sum over its units of their cones' log measures.

    Args:
        region: the region, with inputs (..., N, d0). Samples x_n = 0 constrain no unit.
        hidden_weights: a point W (..., d1, d0) of it.
        target_standard_error: of one unit's cone, in nats; that of the sum is about √d1 times as large.
        num_units: measure the cones of this many units, drawn at random, and estimate the others from the ellipsoids
            inside their cones (see :func:`~lightning_mnn.landscape.volumes.cone.log_ellipsoid_volume`). The estimate is
            unbiased. The standard error includes the spread of the difference from the ellipsoids; it is reliable from
            about twelve units. None: all units.
        max_samples: largest number of samples per cone (see
            :func:`~lightning_mnn.landscape.volumes.cone.log_cone_measure`).
        seed: seed of the random numbers.

    Raises:
        ValueError: the weights do not lie in the region, a unit lies on a kink (the volume is that of an open region),
            or ``num_units`` is out of range.
        ArithmeticError: a cone is too thin for float64.

    >>> from lightning_mnn.landscape import ActivationPattern, Region
    >>> x, w = torch.eye(2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    >>> region = Region(x, ActivationPattern.from_preactivations(x @ w.T))
    >>> round(math.exp(region_log_volume(region, w).value), 6)  # three quadrants: ¼³
    0.015625
    """
    weights = hidden_weights.detach().to(torch.float64)
    width = weights.shape[-2]
    if num_units is not None and not 2 <= num_units <= width:
        raise ValueError(f"num_units must lie between 2 and the width {width}, got {num_units}")
    bound = log_volume_lower_bound(region, weights)
    cones = _unit_cones(region, weights)
    units = torch.randperm(width, generator=generator(seed, "units"))[:num_units].sort().values
    values, errors = _measures(cones, units, target_standard_error, max_samples, seed)
    variance = errors.square().sum(-1)
    if len(units) < width:
        factor = width / len(units)
        quantile = student.ppf(0.975, len(units) - 1) / 1.96  # the spread of few units is itself uncertain
        ellipsoids = _ellipsoids(cones)
        missed = values - ellipsoids[..., units]
        # Their spread already includes the errors of the values, so only a part of these is added.
        variance = quantile**2 * width * (factor - 1) * missed.var(-1) + factor * variance
        total = ellipsoids.sum(-1) + factor * missed.sum(-1)
    else:
        total = values.sum(-1)
    error = variance.sqrt()
    if total.ndim == 0:
        return RegionVolume(float(total), float(error), bound, units, values, errors)
    return RegionVolume(total, error, bound, units, values, errors)


def log_volume_lower_bound(region: Region, hidden_weights: Tensor) -> Tensor | float:
    """A rigorous lower bound on log V(D_A) of the region of the given weights, from a spherical cap in each cone.

    The cone of row i contains the cap around w_i of half-angle θ_i = min_n arcsin(|w_i·x_n| / ‖w_i‖‖x_n‖), so
    V(D_A) = Π γ(C_i) ≥ Π ½ I_{sin²θ_i}((d0−1)/2, ½). The sines are lowered by the rounding error of the products.

    Args:
        region: the region, with inputs (..., N, d0).
        hidden_weights: a point W (..., d1, d0) of it.

    Returns:
        Natural logarithm: a float, with leading axes a tensor (...) on the CPU; −inf when a pre-activation is zero up
        to rounding.

    Raises:
        ValueError: the weights do not lie in the region.

    >>> from lightning_mnn.landscape import ActivationPattern, Region
    >>> x, w = torch.eye(2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    >>> region = Region(x, ActivationPattern.from_preactivations(x @ w.T))
    >>> round(math.exp(log_volume_lower_bound(region, w)), 6)  # the cap fills the quadrant: ¼
    0.25
    """
    inputs, weights = region.inputs.detach(), hidden_weights.detach().to(torch.float64)
    preactivations = _checked_preactivations(region, weights)
    bound = log_volume_bound_from_sines(
        smallest_sines(preactivations, inputs.norm(dim=-1), weights.norm(dim=-1)), inputs.shape[-1]
    )
    return float(bound) if bound.ndim == 0 else bound


def _checked_preactivations(region: Region, weights: Tensor) -> Tensor:
    """w_i·x_n, (..., N, d1), of weights that lie in the region."""
    preactivations = region.inputs.detach() @ weights.mT
    if not torch.equal(preactivations > 0, region.pattern.active.expand(preactivations.shape)):
        raise ValueError("hidden_weights do not lie in the region: they have a different activation pattern")
    return preactivations


@dataclass(frozen=True)
class _UnitCones:
    """The cones of a region's units: {w : ±x_n·w > 0}.

    Attributes:
        inputs: x_n ≠ 0, (..., N', d0).
        sides: signs of the x_n·w_i, (..., d1, N').
        rows: w_i, a point of each, (..., d1, d0).
    """

    inputs: Tensor
    sides: Tensor
    rows: Tensor

    def of(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Normals (..., m, N', d0) and interior points (..., m, d0) of some units' cones."""
        return self.sides[..., units, :, None] * self.inputs[..., None, :, :], self.rows[..., units, :]

    def batches(self, units: Tensor) -> tuple[Tensor, ...]:
        """Batches of units whose normals fit into memory together."""
        return torch.split(units, max(1, _ENTRIES_PER_BATCH // max(1, self.inputs.numel())))


def _unit_cones(region: Region, weights: Tensor) -> _UnitCones:
    inputs = region.inputs.detach()
    used = (inputs != 0).any(-1)
    if inputs.ndim == 2:
        inputs, used = inputs[used], used[used]
    if not bool(used.all()):
        raise ValueError("inputs have samples x_n = 0 in some networks: measure the networks one by one")
    preactivations = inputs @ weights.mT
    rounding = (inputs.shape[-1] + 4) * np.finfo(np.float64).eps
    noise = rounding * inputs.norm(dim=-1)[..., None] * weights.norm(dim=-1)[..., None, :]
    on_kinks = (preactivations.abs() <= noise).any(-2)
    if bool(on_kinks.any()):
        unit = int(on_kinks.nonzero()[0][-1])
        raise ValueError(f"hidden_weights lie on a kink: unit {unit} has a pre-activation of zero")
    return _UnitCones(inputs, preactivations.sign().mT, weights)


def _measures(cones: _UnitCones, units: Tensor, target: float, max_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log measures (..., m) of the cones of some units, and their standard errors."""
    if not cones.inputs.shape[-2]:  # no constraint at all
        zeros = torch.zeros((*cones.rows.shape[:-2], len(units)), dtype=torch.float64)
        return zeros, zeros
    parts = [
        log_cone_measure(
            *cones.of(some),
            target_standard_error=target,
            max_samples=max_samples,
            seed=generator(seed, "cones", int(some[0])).initial_seed(),
        )
        for some in cones.batches(units)
    ]
    values, errors = zip(*((part.value, part.standard_error) for part in parts), strict=True)
    return torch.cat(values, dim=-1), torch.cat(errors, dim=-1)


def _ellipsoids(cones: _UnitCones) -> Tensor:
    """Log volumes (..., d1) of the ellipsoids in the cones of all units."""
    if not cones.inputs.shape[-2]:
        return torch.zeros(cones.rows.shape[:-1], dtype=torch.float64)
    units = torch.arange(cones.rows.shape[-2])
    return torch.cat([log_ellipsoid_volume(*cones.of(some)) for some in cones.batches(units)], dim=-1).cpu()


def log_volume_bound_from_sines(sines: Tensor, dim: int) -> Tensor:
    """Sum over the units of the log measure of their caps, (...) on the CPU, from sines (..., d1).

    See :func:`log_volume_lower_bound`.
    """
    lowered = (sines.detach().cpu().numpy() - (dim + 4) * np.finfo(np.float64).eps).clip(min=0)
    return torch.as_tensor(log_cap_measure(lowered, dim).sum(-1))
