import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from lightning_mnn.landscape import (
    ActivationPattern,
    Region,
    log_cap_measure,
    log_cone_measure,
    log_volume_lower_bound,
    region_log_volume,
)
from tests.landscape.volumes.cones import arc_measure


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


def region_of(inputs, weights):
    return Region(inputs, ActivationPattern.from_preactivations(inputs @ weights.mT))


def gaussian(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_region_volume_is_the_sum_of_its_units_cones():
    inputs, weights = gaussian(0, 25, 5), gaussian(1, 4, 5)
    found = region_log_volume(region_of(inputs, weights), weights)
    signs = (inputs @ weights.T).sign().T
    alone = [log_cone_measure(signs[i, :, None] * inputs, weights[i], seed=9) for i in range(4)]
    for i, unit in enumerate(alone):
        error = math.hypot(unit.standard_error, found.unit_standard_errors[i])
        assert abs(unit.value - found.unit_values[i]) < 4 * error
    assert found.value == pytest.approx(float(found.unit_values.sum()))
    assert found.standard_error == pytest.approx(float(found.unit_standard_errors.square().sum().sqrt()))
    assert found.lower_bound == log_volume_lower_bound(region_of(inputs, weights), weights) < found.value


@given(st.integers(0, 2**31 - 1))
def test_region_volume_in_the_plane_is_a_product_of_arcs(seed):
    inputs, weights = gaussian(seed, 7, 2), gaussian(seed + 1, 3, 2)
    found = region_log_volume(region_of(inputs, weights), weights)
    truth = 0.0
    for row in weights.numpy():
        normals = np.sign(inputs.numpy() @ row)[:, None] * inputs.numpy()
        truth += math.log(arc_measure(normals, row))
    assert found.value == pytest.approx(truth, abs=1e-8)
    assert found.lower_bound <= found.value + 1e-8


def test_some_units_stand_for_all_without_bias():
    inputs, weights = gaussian(0, 12, 2), gaussian(1, 30, 2)
    region = region_of(inputs, weights)
    truth = region_log_volume(region, weights).value  # arcs: exact
    found = [region_log_volume(region, weights, num_units=12, seed=seed) for seed in range(150)]
    values, errors = (np.array([getattr(part, name) for part in found]) for name in ("value", "standard_error"))
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(150)
    assert (np.abs(values - truth) < 1.96 * errors).mean() > 0.9
    assert found[0].units.tolist() == sorted(set(found[0].units.tolist()))
    assert found[0].unit_values.shape == (12,)
    assert errors.mean() < 10 * found[0].unit_values.std() / math.sqrt(12)  # EP explains most
    assert found[0].approximations.shape == (30,)
    assert not len(found[0].fallbacks)


def test_batches_of_units_have_random_numbers_of_their_own(monkeypatch):
    monkeypatch.setattr(
        sys.modules["lightning_mnn.landscape.volumes.region_volume"], "_ENTRIES_PER_BATCH", 1
    )  # one unit at a time
    inputs, weights = gaussian(0, 12, 4), gaussian(1, 1, 4).expand(5, -1)
    first, second = (region_log_volume(region_of(inputs, weights), weights, seed=seed).unit_values for seed in (0, 1))
    assert len({*first.tolist(), *second.tolist()}) == 10


def test_volume_of_a_model_s_own_parameters():
    inputs, weights = gaussian(0, 8, 2), gaussian(1, 3, 2).requires_grad_()
    region = region_of(inputs, weights.detach())
    assert region_log_volume(region, weights).value == region_log_volume(region, weights.detach()).value


def test_region_volumes_of_replicas():
    inputs, weights = gaussian(0, 3, 10, 4), gaussian(1, 3, 2, 4)
    found = region_log_volume(region_of(inputs, weights), weights)
    assert found.value.shape == found.standard_error.shape == found.lower_bound.shape == (3,)
    assert found.unit_values.shape == (3, 2)
    for r in range(3):
        alone = region_log_volume(region_of(inputs[r], weights[r]), weights[r], seed=4)
        assert abs(alone.value - found.value[r]) < 4 * math.hypot(alone.standard_error, found.standard_error[r])


def test_zero_samples_constrain_no_volume():
    inputs, weights = gaussian(0, 6, 2), gaussian(1, 2, 2)
    padded = torch.cat([inputs, torch.zeros(2, 2, dtype=torch.float64)])
    assert region_log_volume(region_of(padded, weights), weights).value == pytest.approx(
        region_log_volume(region_of(inputs, weights), weights).value
    )
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert region_log_volume(region_of(nothing, weights), weights).value == 0


def test_volume_of_no_region_is_an_error():
    inputs, weights = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    region = region_of(inputs, weights)
    with pytest.raises(ValueError, match="kink: unit 1"):
        region_log_volume(region, weights)
    with pytest.raises(ValueError, match="do not lie in the region"):
        region_log_volume(region, -weights)
    with pytest.raises(ValueError, match="num_units must be 0, or lie between 2 and the width 2, got 3"):
        region_log_volume(region, weights, num_units=3)
