"""Samples that start from expectation propagation, and the volumes of regions that they correct."""

import math

import numpy as np
import pytest
import torch

from lightning_mnn.landscape import ActivationPattern, Region, log_cone_measure, region_log_volume, tolerances
from lightning_mnn.landscape.intervals import SampleCount, Stop
from lightning_mnn.landscape.volumes import ep_sampling, region_volume
from lightning_mnn.landscape.volumes.ep_sampling import SharedCones
from tests.landscape.volumes.cones import equicorrelated, orthant

EXACT = {"equicorrelated": lambda: equicorrelated(9), "orthant": lambda: orthant(8, np.random.default_rng(0))}


def region_of(num, dim, width, seed, near=0):
    rng = torch.Generator().manual_seed(seed)
    inputs, weights = (torch.randn(n, dim, generator=rng, dtype=torch.float64) for n in (num, width))
    inputs = torch.cat([inputs, inputs[:near] + 1e-3 * torch.randn(near, dim, generator=rng, dtype=torch.float64)])
    return Region(inputs, ActivationPattern.from_preactivations(inputs @ weights.T)), weights


@pytest.mark.parametrize("name", EXACT)
def test_samples_agree_with_closed_forms(name):
    normals, point, truth = EXACT[name]()
    inputs = torch.from_numpy(normals)
    sides = (inputs @ torch.from_numpy(point)).sign()[None].expand(20, -1)
    cones = SharedCones.of(inputs, sides)
    values, errors = cones.sample(torch.arange(20), 0.1, 2**16, 0, SampleCount())
    assert float(errors.max()) < 0.25
    assert abs(float(values.mean()) - truth) < 4 * float(errors.norm()) / 20
    assert float(((values - truth) / errors).abs().max()) < 4.5


def test_samples_agree_with_the_other_sampler():
    region, weights = region_of(60, 10, 6, 0)
    sides = (region.inputs @ weights.T).sign().T
    cones = SharedCones.of(region.inputs, sides)
    values, errors = cones.sample(torch.arange(6), 0.1, 2**16, 0, SampleCount())
    others = log_cone_measure(sides[:, :, None] * region.inputs, weights, target_standard_error=0.1)
    assert bool(((values - others.value).abs() < 4.5 * torch.hypot(errors, others.standard_error)).all())


def test_walls_that_the_moves_leave_out_count(monkeypatch):
    """Far walls are tested only at the end: with few walls in the moves, some particles end behind the others."""
    region, weights = region_of(60, 6, 10, 3)
    sides = (region.inputs @ weights.T).sign().T
    truth = log_cone_measure(sides[:, :, None] * region.inputs, weights, target_standard_error=0.05)
    monkeypatch.setattr(ep_sampling, "_FAR_DEVIATIONS", 2.0)
    values, errors = SharedCones.of(region.inputs, sides).sample(torch.arange(10), 0.1, 2**16, 0, SampleCount())
    missed = float((values - truth.value).sum())
    assert abs(missed) < 4 * float(torch.hypot(errors, truth.standard_error).norm())


def test_some_units_correct_all_without_bias():
    """Against all units by the other sampler; the bands hold for any random numbers but one set in thousands."""
    region, weights = region_of(40, 6, 20, 0)
    normals = (region.inputs @ weights.T).sign().T[:, :, None] * region.inputs
    every = log_cone_measure(normals, weights, target_standard_error=0.03)
    truth, slack = float(every.value.sum()), float(every.standard_error.norm())
    found = [
        region_log_volume(region, weights, num_units=5, target_standard_error=0.5, seed=seed) for seed in range(30)
    ]
    values, errors = (np.array([getattr(part, name) for part in found]) for name in ("value", "standard_error"))
    assert abs(values.mean() - truth) < 4 * (values.std() / math.sqrt(30) + slack)
    assert (np.abs(values - truth) < 1.96 * errors + slack).sum() >= 23
    assert {len(part.units) for part in found} == {5}
    assert len({tuple(part.units.tolist()) for part in found}) > 10


def test_parts_of_an_estimate_add_up():
    region, weights = region_of(40, 6, 20, 1)
    found = region_log_volume(region, weights, num_units=7)
    factor = 20 / 7
    missed = found.unit_values - found.approximations[found.units]
    assert found.value == pytest.approx(float(found.approximations.sum() + factor * missed.sum()))
    everything = region_log_volume(region, weights, num_units=20)
    assert everything.value == pytest.approx(float(everything.unit_values.sum()))
    assert everything.standard_error == pytest.approx(float(everything.unit_standard_errors.norm()))
    alone = region_log_volume(region, weights, num_units=0)
    assert alone.value == pytest.approx(float(alone.approximations.sum()))
    assert math.isnan(alone.standard_error)
    assert len(alone.units) == 0


def test_the_sum_reaches_its_target():
    region, weights = region_of(40, 6, 40, 2)
    for target in (0.1, 0.4):
        found = region_log_volume(region, weights, target_standard_error=target)
        assert found.standard_error < 1.5 * target * math.sqrt(40)
    assert len(found.units) < 40


def test_units_on_which_ep_fails_are_sampled_by_themselves(monkeypatch):
    region, weights = region_of(30, 5, 16, 0)
    whole = region_log_volume(region, weights)
    original = ep_sampling.approximate

    def fails_for_some(directions, sides):
        found = original(directions, sides)
        found.valid[[2, 11]] = False
        return found

    monkeypatch.setattr(ep_sampling, "approximate", fails_for_some)
    found = region_log_volume(region, weights, num_units=6)
    assert found.fallbacks.tolist() == [2, 11]
    assert {2, 11} < set(found.units.tolist())
    assert len(found.units) == 8
    assert found.approximations.isnan().nonzero()[:, 0].tolist() == [2, 11]
    assert abs(found.value - whole.value) < 4.5 * math.hypot(found.standard_error, whole.standard_error)
    monkeypatch.setattr(tolerances, "MIN_SITE_VARIANCE", 1e9)
    monkeypatch.setattr(ep_sampling, "approximate", original)
    nothing = region_log_volume(region, weights)
    assert nothing.fallbacks.tolist() == nothing.units.tolist() == list(range(16))
    assert abs(nothing.value - whole.value) < 4.5 * math.hypot(nothing.standard_error, whole.standard_error)


def test_cones_that_no_particle_reaches_are_sampled_otherwise(monkeypatch):
    region, weights = region_of(30, 5, 12, 0)
    whole = region_log_volume(region, weights)
    original = ep_sampling.sample

    def loses_one(*arguments, **options):
        values, variances, particles = original(*arguments, **options)
        return values.index_fill(0, torch.tensor([0]), -math.inf), variances, particles

    monkeypatch.setattr(ep_sampling, "sample", loses_one)
    found = region_log_volume(region, weights)
    assert bool(found.unit_values.isfinite().all())
    assert abs(found.value - whole.value) < 4.5 * math.hypot(found.standard_error, whole.standard_error)


def test_fewer_inputs_than_dimensions():
    region, weights = region_of(6, 30, 5, 0)
    normals = (region.inputs @ weights.T).sign().T[:, :, None] * region.inputs
    every = log_cone_measure(normals, weights, target_standard_error=0.05)
    found = region_log_volume(region, weights)
    error = math.hypot(found.standard_error, float(every.standard_error.norm()))
    assert abs(found.value - float(every.value.sum())) < 4.5 * error


def test_orthogonal_inputs_have_a_closed_form():
    inputs = torch.from_numpy(orthant(9, np.random.default_rng(1))[0]) * 3
    weights = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = region_log_volume(Region(inputs, ActivationPattern.from_preactivations(inputs @ weights.T)), weights)
    assert found.value == pytest.approx(-36 * math.log(2), abs=1e-10)
    assert found.standard_error < 1e-10


def test_near_duplicates_are_no_bias():
    region, weights = region_of(40, 6, 10, 0, near=15)
    normals = (region.inputs @ weights.T).sign().T[:, :, None] * region.inputs
    every = log_cone_measure(normals, weights, target_standard_error=0.05)
    found = region_log_volume(region, weights)
    error = math.hypot(found.standard_error, float(every.standard_error.norm()))
    assert abs(found.value - float(every.value.sum())) < 4.5 * error


def test_the_number_of_units_follows_the_target():
    assert region_volume.num_units_for(8, 10.0) == 8
    assert region_volume.num_units_for(500, 10.0) == 12
    assert region_volume.num_units_for(500, 0.01) == 500


def test_a_volume_says_how_many_samples_it_took_and_why_it_stopped():
    region, weights = region_of(20, 5, 6, seed=0)
    found = region_log_volume(region, weights)
    assert found.stopped == Stop.TARGET
    assert found.samples >= 6 * ep_sampling.MIN_PARTICLES * ep_sampling.MIN_STEPS
    limited = region_log_volume(region, weights, target_standard_error=0.005, max_samples=2**12)
    assert limited.stopped == Stop.LIMIT
    assert limited.samples <= 6 * 2**12
    approximated = region_log_volume(region, weights, num_units=0)
    assert (approximated.samples, approximated.stopped) == (0, Stop.APPROXIMATED)
    small, small_weights = region_of(10, 2, 3, seed=0)
    closed = region_log_volume(small, small_weights)
    assert (closed.samples, closed.stopped) == (0, Stop.CLOSED_FORM)
