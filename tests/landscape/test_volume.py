import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from lightning_mnn.landscape import ActivationPattern, Region, log_cap_measure, log_volume_lower_bound


@given(st.floats(1e-6, math.pi / 2))
def test_caps_in_two_and_three_dimensions(angle):
    assert math.isclose(log_cap_measure(math.sin(angle), 2), math.log(2 * angle / (2 * math.pi)), abs_tol=1e-9)
    exact = 2 * math.sin(angle / 2) ** 2 / 2  # (1 − cos θ)/2
    assert math.isclose(log_cap_measure(math.sin(angle), 3), math.log(exact), abs_tol=1e-9)


@pytest.mark.parametrize("dim", [4, 40, 784, 12288])
@pytest.mark.parametrize("sine", [0.999, 0.7, 0.1, 1e-3, 1e-8])
def test_caps_agree_with_integration_in_log_space(dim, sine):
    """Measure of a cap = ∫₀^θ sin^(d−2) / ∫₀^π sin^(d−2), with the largest value of the integrand taken out."""
    angle, power = math.asin(sine), dim - 2
    width = min(angle, 60 * math.tan(angle) / power)  # the integrand falls off by e^−60 within it
    near, _ = integrate.quad(
        lambda t: math.exp(power * (math.log(math.sin(t)) - math.log(sine))), angle - width, angle, epsabs=0, limit=200
    )
    whole = 0.5 * math.log(math.pi) + math.lgamma((dim - 1) / 2) - math.lgamma(dim / 2)
    expected = power * math.log(sine) + math.log(near) - whole
    assert math.isclose(log_cap_measure(sine, dim), expected, rel_tol=1e-8, abs_tol=1e-8)


def test_extremes():
    assert float(log_cap_measure(1.0, 10)) == pytest.approx(math.log(0.5))
    assert float(log_cap_measure(0.0, 10)) == -math.inf
    assert log_cap_measure([0.0, 0.3], 1).tolist() == [-math.log(2)] * 2
    with pytest.raises(ValueError, match="sine must lie between 0 and 1"):
        log_cap_measure(1.5, 3)
    with pytest.raises(ValueError, match="dim must be at least 1"):
        log_cap_measure(0.5, 0)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_bound_lies_below_the_exact_measure_of_arcs(num_samples, width, seed):
    """In the plane a cone is an arc, whose measure is known."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((num_samples, 2)), rng.standard_normal((width, 2))
    exact = 0.0
    for row in w:
        here = math.atan2(row[1], row[0])
        edges = [math.atan2(v[1], v[0]) + side for v in x for side in (math.pi / 2, -math.pi / 2)]
        gaps = [(edge - here) % (2 * math.pi) for edge in edges]
        exact += math.log((min(gaps) + 2 * math.pi - max(gaps)) / (2 * math.pi))
    inputs, weights = torch.from_numpy(x), torch.from_numpy(w)
    region = Region(inputs, ActivationPattern.from_preactivations(inputs @ weights.T))
    bound = log_volume_lower_bound(region, weights)
    assert bound <= exact + 1e-12
    sines = np.abs(x @ w.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    assert bound == pytest.approx(sum(math.log(math.asin(min(1, s)) / math.pi) for s in sines.min(0)), abs=1e-6)


def test_bound_lies_below_the_sampled_measure():
    rng = torch.Generator().manual_seed(1)
    x, w = (torch.randn(shape, dtype=torch.float64, generator=rng) for shape in ((4, 5), (1, 5)))
    region = Region(x, ActivationPattern.from_preactivations(x @ w.T))
    draws = torch.randn(200_000, 5, dtype=torch.float64, generator=rng)
    share = ((draws @ x.T > 0) == region.pattern.active[:, 0]).all(1).double().mean().item()
    assert log_volume_lower_bound(region, w) <= math.log(share) + 0.02


def test_replicas_and_kinks():
    x = torch.eye(2, dtype=torch.float64)
    w = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]], dtype=torch.float64)
    region = Region(x, ActivationPattern.from_preactivations(x @ w.mT))
    assert log_volume_lower_bound(region, w).tolist() == pytest.approx([math.log(0.25), -math.inf])
    with pytest.raises(ValueError, match="do not lie in the region"):
        log_volume_lower_bound(region, -w)
