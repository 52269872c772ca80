"""Expectation propagation beside closed forms, a slow version of itself, and samples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_mnn.landscape import log_cone_measure, tolerances
from lightning_mnn.landscape.volumes import expectation_propagation
from lightning_mnn.landscape.volumes.expectation_propagation import (
    approximate,
    distinct_constraints,
    third_order_correction,
)
from tests.landscape.volumes.cones import arcs, equicorrelated, orthant, random_cone

seeds = st.integers(0, 2**31 - 1)


def unit(normals):
    rows = torch.as_tensor(normals, dtype=torch.float64)
    return rows / rows.norm(dim=-1, keepdim=True)


def shared(num, dim, cones, seed):
    rng = np.random.default_rng(seed)
    directions = unit(rng.standard_normal((num, dim)))
    return directions, (directions @ torch.from_numpy(rng.standard_normal((dim, cones)))).sign().T.contiguous()


def one_by_one(normals, sweeps=300):
    """EP for one cone in plain numpy, one constraint after the other with dense inverses."""
    num, dim = normals.shape
    tau, nu = np.zeros(num), np.zeros(num)

    def posterior():
        covariance = np.linalg.inv(np.eye(dim) + normals.T @ (tau[:, None] * normals))
        return covariance, covariance @ normals.T @ nu

    def cavity(n):
        covariance, mean = posterior()
        variance, middle = normals[n] @ covariance @ normals[n], normals[n] @ mean
        without = 1 / (1 / variance - tau[n])
        return without * (middle / variance - nu[n]), without

    for _ in range(sweeps):
        before = tau.copy(), nu.copy()
        for n in range(num):
            mean, variance = cavity(n)
            cut = stats.truncnorm(-mean / math.sqrt(variance), np.inf, mean, math.sqrt(variance))
            tau[n] = 1 / cut.var() - 1 / variance
            nu[n] = cut.mean() / cut.var() - mean / variance
        if max(np.abs(tau - before[0]).max(), np.abs(nu - before[1]).max()) < 1e-9:
            break
    covariance, mean = posterior()
    value = np.linalg.slogdet(covariance)[1] / 2 + mean @ np.linalg.solve(covariance, mean) / 2
    for n in range(num):
        middle, variance = cavity(n)
        # Its site c exp(−τs²/2 + νs) has the same integral over the cavity as the half-line.
        product = 1 / (1 / variance + tau[n])
        exponent = (middle / variance + nu[n]) ** 2 * product / 2 - middle**2 / (2 * variance)
        value += stats.norm.logcdf(middle / math.sqrt(variance)) - math.log(product / variance) / 2 - exponent
    return value


@pytest.mark.parametrize("dim", [1, 2, 10, 60])
def test_orthogonal_cones_are_exact(dim):
    directions = unit(orthant(dim, np.random.default_rng(dim))[0])
    sides = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (9, dim)))
    found = approximate(directions, sides)
    assert bool(found.valid.all())
    assert float((found.log_measures + dim * math.log(2)).abs().max()) < 1e-10


@settings(max_examples=8)
@given(seeds, st.integers(2, 5), st.integers(2, 9))
def test_agrees_with_one_site_at_a_time(seed, dim, num):
    directions, sides = shared(num, dim, 2, seed)
    found = approximate(directions, sides)
    for k in range(2):
        if found.valid[k]:
            assert float(found.log_measures[k]) == pytest.approx(
                one_by_one((sides[k][:, None] * directions).numpy()), abs=1e-6
            )


@settings(max_examples=12)
@given(seeds, st.sampled_from([4, 6, 10]), st.sampled_from([0.5, 1, 3, 20]))
def test_is_close_to_samples_or_says_that_it_is_not(seed, dim, ratio):
    normals, point = random_cone(max(1, int(ratio * dim)), dim, np.random.default_rng(seed))
    fast = log_cone_measure(normals, point, method="ep")
    sampled = log_cone_measure(normals, point, target_standard_error=0.15)
    if math.isnan(fast.standard_error):
        allowed = 5 * sampled.standard_error
        assert -0.1 - allowed < sampled.value - fast.value < 0.5 + allowed
    else:
        assert abs(sampled.value - fast.value) < 5 * math.hypot(sampled.standard_error, fast.standard_error)


def test_few_random_cones_are_refused():
    rng = np.random.default_rng(0)
    found = [log_cone_measure(*random_cone(5 * dim, dim, rng), method="ep") for dim in (6, 8, 12, 20) for _ in range(5)]
    assert sum(not math.isnan(one.standard_error) for one in found) <= 2


def test_a_batch_is_its_cones_one_by_one(monkeypatch):
    directions, sides = shared(40, 7, 12, 0)
    whole = approximate(directions, sides)
    alone = torch.cat([approximate(directions, one[None]).log_measures for one in sides])
    assert float((whole.log_measures - alone).abs().max()) < 1e-8
    monkeypatch.setattr(expectation_propagation, "_MEMORY", 2**10)  # some cones, and some inputs, at a time
    chunked = approximate(directions, sides)
    for name in ("log_measures", "means", "factors", "margins", "deviations"):
        assert float((getattr(whole, name) - getattr(chunked, name)).abs().max()) < 1e-6


def test_cones_that_do_not_converge_do_not_disturb_the_others(monkeypatch):
    directions, sides = shared(30, 5, 10, 1)
    whole = approximate(directions, sides)
    for count in range(5, 60):
        monkeypatch.setattr(expectation_propagation, "_DAMPINGS", ((count, 0.8),))
        short = approximate(directions, sides)
        if bool(short.valid.any()):
            break
    assert 0 < int(short.valid.sum()) < 10
    assert torch.allclose(short.log_measures[short.valid], whole.log_measures[short.valid], rtol=0, atol=1e-9)
    assert bool(short.log_measures[~short.valid].isnan().all())


@pytest.mark.parametrize("angle", [1e-4, 1e-7, 1e-9])
def test_thin_cones_are_right_or_refused(angle):
    rng = np.random.default_rng(0)
    normals, point, truth = arcs([angle] * 3, rng)
    tied = np.vstack([normals, rng.uniform(0.1, 1, (6, len(normals))) @ normals])
    found = log_cone_measure(tied, point, method="ep")
    if math.isnan(found.standard_error):
        assert -0.1 < truth - found.value < 0.5
    else:
        assert abs(truth - found.value) < 4 * found.standard_error


def test_equal_constraints_count_once():
    normals, point = random_cone(25, 6, np.random.default_rng(2))
    twice = np.vstack([normals, 3 * normals[:10], normals[4:5] / 7])
    values = [log_cone_measure(rows, point, method="ep").value for rows in (normals, twice)]
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    rows = unit(np.vstack([normals, -normals[3:5]]))
    assert int(distinct_constraints(rows).sum()) == 25
    assert bool(distinct_constraints(unit(normals)).all())


def test_nearly_equal_constraints_are_refused():
    rng = np.random.default_rng(0)
    normals, point = random_cone(60, 8, rng)
    near = normals[:30] + 1e-4 * rng.standard_normal((30, 8))
    both = np.vstack([normals, near[near @ point > 0]])
    assert not math.isnan(log_cone_measure(both, point, method="ep").standard_error)


def test_the_third_order_explains_most_of_what_is_missed():
    normals, point = random_cone(100, 10, np.random.default_rng(1))
    rows = unit(normals)
    found = approximate(rows, torch.ones(1, 100, dtype=torch.float64))
    correction = float(third_order_correction(found, rows, torch.ones(1, 100, dtype=torch.float64)))
    truth = log_cone_measure(normals, point, target_standard_error=0.03)
    assert abs(truth.value - float(found.log_measures) - correction) < 0.1 + 4 * truth.standard_error
    assert correction > 0.1
    orthogonal = unit(orthant(6, np.random.default_rng(0))[0])
    sides = torch.ones(1, 6, dtype=torch.float64)
    assert abs(float(third_order_correction(approximate(orthogonal, sides), orthogonal, sides))) < 1e-12


def test_a_closed_form_keeps_its_error_bar_and_the_rest_has_none():
    rng = np.random.default_rng(0)
    assert log_cone_measure(orthant(5, rng)[0], method="ep").standard_error < 1e-11
    normals, point, _ = equicorrelated(8)
    assert math.isnan(log_cone_measure(normals, point, method="ep").standard_error)
    batch = np.stack([normals, orthant(8, rng)[0]])
    errors = log_cone_measure(batch, method="ep").standard_error
    assert errors.isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="method must be one of sampling, ep, got 'exact'"):
        log_cone_measure(normals, method="exact")


def test_a_thin_variance_is_refused(monkeypatch):
    directions, sides = shared(20, 4, 1, 0)
    assert bool(approximate(directions, sides).valid)
    monkeypatch.setattr(tolerances, "MIN_SITE_VARIANCE", 1.0)
    assert not bool(approximate(directions, sides).valid)
