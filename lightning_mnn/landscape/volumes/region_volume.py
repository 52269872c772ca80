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
from lightning_mnn.landscape.intervals import LogEstimate, SampleCount, Stop
from lightning_mnn.landscape.network import smallest_sines
from lightning_mnn.landscape.volumes.cone import check_precision, log_cone_measure, one_thread
from lightning_mnn.landscape.volumes.ep_sampling import TARGET_FRACTION, SharedCones
from lightning_mnn.utilities.seeding import generator

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from lightning_mnn.landscape.regions.region import Region


_ENTRIES_PER_BATCH = 2**26  # entries of the normals of all cones in one batch

_FEWEST_UNITS = 12  # units from which the spread of the difference from EP is known well enough

_UNIT_VARIANCE = 0.0225  # usual variance of the log measure of one cone with the fewest samples


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
        units: the units whose cones were sampled, (m,).
        unit_values: log measures of their cones, (..., m).
        unit_standard_errors: standard errors of these, (..., m).
        approximations: log measures of the cones of all units by expectation propagation, without an error bar,
            (..., d1); NaN where it failed.
        fallbacks: the units on which it failed (in any network), which are all sampled by themselves.
    """

    lower_bound: float | Tensor
    units: Tensor
    unit_values: Tensor
    unit_standard_errors: Tensor
    approximations: Tensor
    fallbacks: Tensor


def region_log_volume(
    region: Region,
    hidden_weights: Tensor,
    *,
    target_standard_error: float = 0.25,
    num_units: int | None = None,
    max_samples: int = 2**20,
    seed: int = 0,
) -> RegionVolume:
    """Log of the angular volume V(D_A) = Π γ(C_i) of a region: the sum over its units of their cones' log measures.

    Expectation propagation (EP) gives all log measures approximately, without random numbers. A random few of the cones
    are sampled as well, from the approximations (see :mod:`~lightning_mnn.landscape.volumes.ep_sampling`). The mean
    difference from EP corrects the sum: Σ_i EP_i + d1 · mean(sampled_i − EP_i). That is unbiased, and precise because
    the difference is nearly the same for all cones of a region. A cone on which EP fails, such as a thin one, is
    sampled by itself by :func:`~lightning_mnn.landscape.volumes.cone.log_cone_measure`.

    Args:
        region: the region, with inputs (..., N, d0). Samples x_n = 0 constrain no unit.
        hidden_weights: a point W (..., d1, d0) of it.
        target_standard_error: for the sum, in nats per square root of the number of units: √d1 times as large. It is
            reached approximately, since the number of samples is set in advance.
        num_units: number of units to sample, drawn at random. None: as many as the target needs, at least twelve, or
            all where their cones have a closed form. 0: EP alone, which is low by 0.1 to 0.3 nats per unit and has no
            error bar: the standard error is then NaN.
        max_samples: largest number of samples per cone.
        seed: seed of the random numbers.

    Returns:
        The estimate. Its standard error includes the spread of the difference over the units, and the errors of the
        samples; ± 1.96 of it covers 95 %.

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
    if num_units is not None and num_units != 0 and not min(2, width) <= num_units <= width:
        raise ValueError(f"num_units must be 0, or lie between {min(2, width)} and the width {width}, got {num_units}")
    check_precision(target_standard_error, max_samples)
    bound = log_volume_lower_bound(region, weights)
    cones = _unit_cones(region, weights)
    units = torch.randperm(width, generator=generator(seed, "units"))
    leading = weights.shape[:-2]
    networks = [cones.network(r) for r in range(math.prod(leading))]
    shared = [SharedCones.of(network.inputs, network.sides) for network in networks]
    valid = torch.stack([network.valid for network in shared]).all(0).cpu()
    if num_units is None:
        closed = all(network.closed for network in shared)
        num_units = width if closed else num_units_for(width, target_standard_error)
    chosen = units[valid[units]][:num_units].sort().values
    fallbacks = units[~valid[units]].sort().values
    precision, count = (target_standard_error, max_samples), SampleCount()
    parts = [
        _network_volume(
            network, of_ep, chosen, fallbacks, precision, seed=generator(seed, "cones", r).initial_seed(), count=count
        )
        for r, (network, of_ep) in enumerate(zip(networks, shared, strict=True))
    ]
    sampled = torch.cat([chosen, fallbacks])
    order = sampled.argsort()
    values, errors = (
        torch.stack(found)[:, order].reshape(*leading, len(order))
        for found in zip(*(p[2:] for p in parts), strict=True)
    )
    total, error = (
        torch.tensor(found, dtype=torch.float64).reshape(leading) for found in zip(*(p[:2] for p in parts), strict=True)
    )
    return RegionVolume(
        value=total if leading else float(total),
        standard_error=error if leading else float(error),
        samples=count.samples,
        stopped=count.stopped,
        lower_bound=bound,
        units=sampled[order],
        unit_values=values,
        unit_standard_errors=errors,
        approximations=torch.stack([network.approximations.cpu() for network in shared]).reshape(*leading, width),
        fallbacks=fallbacks,
    )


def num_units_for(width: int, target_standard_error: float) -> int:
    """Number of units that are sampled for a target of the sum's standard error per √width."""
    wanted = math.ceil(width * _UNIT_VARIANCE / (TARGET_FRACTION * target_standard_error) ** 2)
    return min(width, max(_FEWEST_UNITS, wanted))


def _network_volume(
    cones: _UnitCones,
    shared: SharedCones,
    chosen: Tensor,
    fallbacks: Tensor,
    precision: tuple[float, int],
    *,
    seed: int,
    count: SampleCount,
) -> tuple[float, float, Tensor, Tensor]:
    """Value, standard error, and log measures of the chosen units and the fallbacks, with standard errors (m,)."""
    target, max_samples = precision
    alone, alone_errors = _measures(cones, fallbacks, target, max_samples, seed, count)
    width = len(shared.valid) - len(fallbacks)
    regular = torch.ones(len(shared.valid), dtype=torch.bool)
    regular[fallbacks] = False
    total = float(shared.approximations.cpu()[regular].sum() + alone.sum())
    if not len(chosen):
        error = float(alone_errors.norm()) if not width else math.nan
        count.add(0, Stop.APPROXIMATED if width else Stop.CLOSED_FORM)
        return total, error, alone, alone_errors
    unit_target = target * math.sqrt(len(chosen) / width)
    if shared.closed:
        values, errors = _measures(cones, chosen, unit_target, max_samples, seed, count)
    else:
        with one_thread():
            values, errors = shared.sample(chosen, unit_target, max_samples, seed, count)
        lost = ~(values + errors).isfinite()  # no particle reached these cones
        if bool(lost.any()):
            values[lost], errors[lost] = _measures(cones, chosen[lost], target, max_samples, seed, count)
    missed = values - shared.approximations.cpu()[chosen]
    factor = width / len(chosen)
    variance = factor * errors.square().sum() + alone_errors.square().sum()
    if factor > 1:
        quantile = student.ppf(0.975, len(chosen) - 1) / 1.96  # the spread of few units is itself uncertain
        # Their spread already includes the errors of the values, so only a part of these is added.
        variance += quantile**2 * width * (factor - 1) * missed.var()
    total += factor * float(missed.sum())
    return total, float(variance.sqrt()), torch.cat([values, alone]), torch.cat([errors, alone_errors])


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
        """Normals (m, N', d0) and interior points (m, d0) of some units' cones."""
        return self.sides[units, :, None] * self.inputs, self.rows[units]

    def network(self, index: int) -> _UnitCones:
        """Those of one network, without leading axes."""
        width, dim = self.rows.shape[-2:]
        num = self.inputs.shape[-2]
        count = math.prod(self.rows.shape[:-2])
        inputs = self.inputs.expand(*self.rows.shape[:-2], num, dim).reshape(count, num, dim)
        sides, rows = self.sides.reshape(count, width, num), self.rows.reshape(count, width, dim)
        return _UnitCones(inputs[index], sides[index], rows[index])


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


def _measures(
    cones: _UnitCones, units: Tensor, target: float, max_samples: int, seed: int, count: SampleCount
) -> tuple[Tensor, Tensor]:
    """Log measures (m,) of the cones of some units by sampling each by itself, and their standard errors."""
    if not len(cones.inputs) or not len(units):
        return torch.zeros(len(units), dtype=torch.float64), torch.zeros(len(units), dtype=torch.float64)
    batches = torch.split(units, max(1, _ENTRIES_PER_BATCH // cones.inputs.numel()))
    parts = [
        log_cone_measure(
            *cones.of(some),
            target_standard_error=target,
            max_samples=max_samples,
            seed=generator(seed, "cones", int(some[0])).initial_seed(),
        )
        for some in batches
    ]
    for part in parts:
        count.add(part.samples, part.stopped)
    values, errors = zip(*((part.value, part.standard_error) for part in parts), strict=True)
    return torch.cat(values), torch.cat(errors)


def log_volume_bound_from_sines(sines: Tensor, dim: int) -> Tensor:
    """Sum over the units of the log measure of their caps, (...) on the CPU, from sines (..., d1).

    See :func:`log_volume_lower_bound`.
    """
    lowered = (sines.detach().cpu().numpy() - (dim + 4) * np.finfo(np.float64).eps).clip(min=0)
    return torch.as_tensor(log_cap_measure(lowered, dim).sum(-1))
