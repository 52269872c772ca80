"""Measures of cones beside known values, plain sampling and each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_mnn.landscape import Stop
from lightning_mnn.landscape.intervals import SampleCount
from lightning_mnn.landscape.volumes import cone
from lightning_mnn.landscape.volumes.closed_forms import ConeGroup
from lightning_mnn.landscape.volumes.cone import _sample, log_cone_measure
from tests.landscape.volumes.cones import (
    arc_measure,
    arcs,
    cells,
    equicorrelated,
    orthant,
    polygon_measure,
    random_cone,
    rotation,
    shares,
)

seeds = st.integers(0, 2**31 - 1)


def sampled(normals, point, seed=0, target=0.1):
    """Value and error by sampling, whether or not there is a closed form."""
    group = ConeGroup(normals / np.linalg.norm(normals, axis=1, keepdims=True), point)
    value, error = _sample([group], np.array([target]), 2**20, torch.Generator().manual_seed(seed), SampleCount())
    return value[0], error[0]


def agree(estimate, truth, largest_error):
    assert estimate.standard_error <= largest_error
    assert abs(estimate.value - truth) <= 4 * estimate.standard_error


@pytest.mark.parametrize("dim", [2, 3, 5, 10, 30, 100])
def test_orthants_have_a_closed_form(dim):
    normals, _, truth = orthant(dim, np.random.default_rng(dim))
    agree(log_cone_measure(normals), truth, 1e-11)


@pytest.mark.parametrize("dim", [2, 5, 20, 50, 100])
def test_orthants_by_sampling(dim):
    normals, point, truth = orthant(dim, np.random.default_rng(dim))
    value, error = sampled(normals, point)
    assert error <= 0.15  # of a target of 0.1, which is met on average
    assert abs(value - truth) <= 4 * error


@pytest.mark.parametrize("dim", [5, 10, 20, 50])
def test_pairwise_correlated_constraints(dim):
    normals, point, truth = equicorrelated(dim)
    agree(log_cone_measure(normals, point), truth, 0.15)


@given(seeds, st.integers(1, 50))
def test_arcs(seed, num):
    normals, point = random_cone(num, 2, np.random.default_rng(seed))
    truth = math.log(arc_measure(normals, point)) if num > 1 else -math.log(2)
    estimate = log_cone_measure(normals, point)
    assert estimate.standard_error < 1e-8
    assert estimate.value == pytest.approx(truth, abs=1e-8)


@given(seeds, st.integers(3, 30))
def test_spherical_polygons(seed, num):
    normals, point = random_cone(num, 3, np.random.default_rng(seed))
    estimate = log_cone_measure(normals, point)
    assert estimate.standard_error < 1e-3
    assert estimate.value == pytest.approx(math.log(polygon_measure(normals)), abs=1e-6)


@pytest.mark.parametrize("num", [3, 8, 30])
def test_spherical_polygons_by_sampling(num):
    normals, point = random_cone(num, 3, np.random.default_rng(num))
    value, error = sampled(normals, point)
    assert abs(value - math.log(polygon_measure(normals))) <= 4 * error <= 0.4


@settings(max_examples=15)
@given(seeds, st.integers(4, 6), st.integers(2, 8))
def test_agrees_with_plain_sampling(seed, dim, num):
    rng = np.random.default_rng(seed)
    normals, point = random_cone(num, dim, rng)
    inside = int((rng.standard_normal((100_000, dim)) @ normals.T > 0).all(1).sum())
    low, high = stats.binomtest(inside, 100_000).proportion_ci(0.9999)
    estimate = log_cone_measure(normals, point)
    assert math.exp(estimate.value - 4 * estimate.standard_error) <= high
    assert math.exp(estimate.value + 4 * estimate.standard_error) >= low


@pytest.mark.parametrize(("num", "dim", "count"), [(8, 3, 58), (12, 4, 464)])
def test_all_cells_add_up_to_one(num, dim, count):
    rng = np.random.default_rng(num)
    inputs = rng.standard_normal((num, dim))
    signs = cells(inputs)
    assert len(signs) == count
    estimate = log_cone_measure(signs[:, :, None] * inputs)
    measures = estimate.value.exp().numpy()
    errors = measures * estimate.standard_error.numpy()
    assert abs(measures.sum() - 1) <= 3 * np.sqrt((errors**2).sum()) + 1e-12
    draws = 400_000
    counts = shares(inputs, signs, draws, rng)
    deviations = np.sqrt(measures * (1 - measures) / draws + errors**2)
    seen = measures > 25 / draws  # where a normal law describes the counts
    scores = (counts / draws - measures)[seen] / deviations[seen]
    assert np.abs(scores).max() < 4.5
    assert scores.std() < 1.15
    rest = measures[~seen].sum() * draws
    assert stats.poisson(rest).sf(counts[~seen].sum() - 1) > 1e-4 or rest == 0


CONES = {
    "product of thin arcs": lambda rng: arcs([1e-4, 1e-3, 0.5, 2.0], rng),  # smallest margin 5e-5
    "thin arc and wide arc": lambda rng: arcs([1e-6, 2.5], rng),
    "correlated": lambda rng: equicorrelated(10),
    "orthant": lambda rng: orthant(15, rng),
    "random": lambda rng: (*random_cone(40, 8, rng), None),
}


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_nothing_ends_or_goes_on_by_the_error_of_the_estimate_itself(monkeypatch, factor):
    """Whatever the last round says of its error is the answer; rounds before it only set its length."""
    normals, point, _ = equicorrelated(5)
    expected = log_cone_measure(normals, point, target_standard_error=0.05)
    lengths, original = [], cone._one_round

    def one_round(cones, steps, pending, length, generator):
        values, errors = original(cones, steps, pending, length, generator)
        lengths.append(length)
        return values, errors * (factor if len(lengths) > 1 else 1.0)

    monkeypatch.setattr(cone, "_one_round", one_round)
    estimate = log_cone_measure(normals, point, target_standard_error=0.05)
    assert len(lengths) == 2
    assert estimate.value == expected.value
    assert estimate.standard_error == pytest.approx(factor * expected.standard_error)


def test_an_estimate_says_how_many_samples_it_took_and_why_it_stopped(monkeypatch):
    normals, point, _ = equicorrelated(6)
    states, original = [], cone._one_round

    def one_round(cones, steps, pending, length, generator):
        states.append(len(pending) * length * len(steps) * cone._ISLANDS * cone._CHAINS)
        return original(cones, steps, pending, length, generator)

    monkeypatch.setattr(cone, "_one_round", one_round)
    found = log_cone_measure(normals, point)
    assert (found.samples, found.stopped) == (sum(states), Stop.TARGET)
    precise = log_cone_measure(normals, point, target_standard_error=0.01)
    assert precise.samples > 2 * found.samples
    assert precise.stopped == Stop.TARGET
    short = log_cone_measure(normals, point, target_standard_error=0.003, max_samples=2**14)
    assert short.stopped == Stop.LIMIT
    assert short.samples < 2**15
    assert short.standard_error > 0.003
    orthant_like = log_cone_measure(np.eye(3))
    assert (orthant_like.samples, orthant_like.stopped) == (0, Stop.CLOSED_FORM)
    approximated = log_cone_measure(normals, point, method="ep")
    assert (approximated.samples, approximated.stopped) == (0, Stop.APPROXIMATED)
    both = log_cone_measure(np.stack([normals, rotation(6, np.random.default_rng(0))]))  # the second is an orthant
    assert both.stopped == Stop.TARGET
    assert both.samples > 0


@pytest.mark.slow
def test_intervals_cover_at_a_small_target():
    """Where samples that stop by their own error cover some 92 %; by the thousand in tests/benchmarks."""
    normals, point, truth = equicorrelated(5)
    found = [log_cone_measure(normals, point, target_standard_error=0.03, seed=seed) for seed in range(100)]
    scores = np.array([(estimate.value - truth) / estimate.standard_error for estimate in found])
    assert stats.binomtest(int((np.abs(scores) < 1.96).sum()), len(scores), 0.95).pvalue > 1e-3
    assert abs(scores.mean()) < 4 / math.sqrt(len(scores))  # no bias


@pytest.mark.slow
@pytest.mark.parametrize("name", CONES)
def test_intervals_cover_the_truth(name):
    normals, point, truth = CONES[name](np.random.default_rng(1))
    if truth is None:  # by many times the samples: it is off by a fifth of the errors of those
        truth, _ = sampled(normals, point, 1000, 0.02)
    count = 60
    found = np.array([sampled(normals, point, seed) for seed in range(count)])
    hits = int((np.abs(found[:, 0] - truth) < 1.96 * found[:, 1]).sum())
    assert stats.binomtest(hits, count, 0.95, alternative="less").pvalue > 1e-3
    assert abs((found[:, 0] - truth).mean()) < 4 * found[:, 0].std() / math.sqrt(count) + 0.01  # no bias


@pytest.mark.parametrize(("angle", "planes", "ties"), [(1e-7, 2, 1), (1e-8, 3, 6), (1e-9, 3, 40), (1e-10, 2, 1)])
def test_cones_that_are_thin_in_several_directions(angle, planes, ties):
    rng = np.random.default_rng(0)
    normals, point, truth = arcs([angle] * planes, rng)
    tied = np.vstack([normals, rng.uniform(0.1, 1, (ties, len(normals))) @ normals])  # redundant
    estimate = log_cone_measure(tied, point)
    assert estimate.standard_error < 0.3
    assert abs(estimate.value - truth) <= 4 * estimate.standard_error


@pytest.mark.parametrize("height", [1e-5, 1e-7, 1e-9])
def test_polygons_with_nearly_opposite_corners(height):
    normals = np.array([[1, 0, 0], [math.cos(1), math.sin(1), 0], [math.cos(0.5), math.sin(0.5), height]])
    for turned in (np.eye(3), rotation(3, np.random.default_rng(0))):
        estimate = log_cone_measure(normals @ turned.T, turned @ [1.0, 1.0, 0.0])
        lune = math.log((math.pi - 1) / (2 * math.pi))  # of which the third wall cuts off next to nothing
        assert abs(estimate.value - lune) <= 4 * estimate.standard_error + 2 * height**2


def test_needles_among_many_constraints():
    """Directions that look like rounding beside all the others hold the point nevertheless."""
    rest = np.column_stack([np.random.default_rng(0).uniform(-0.5, 0.5, 2998), np.ones(2998), np.zeros(2998)])
    for thin in (1e-8, 1e-9):
        normals = np.vstack([[1, 0, thin], [-1, 0, thin], rest])
        estimate = log_cone_measure(normals, [0.0, 1.0, 1.0])
        # Between the planes x = ± thin·z lie z > 0 and, of those, the half with y > 0: thin/π of a quarter circle.
        truth = math.log(thin / (2 * math.pi))
        assert abs(estimate.value - truth) <= max(4 * estimate.standard_error, 1e-6)


def test_thin_cones_are_not_called_empty():
    for thin in (1e-6, 1e-9, 1e-11):
        normals = [[1.0, thin], [-1.0, thin]]
        given = log_cone_measure(normals, [0.0, 1.0])
        assert given.value == pytest.approx(math.log(math.atan(thin) / math.pi), abs=1e-3)
        try:
            assert log_cone_measure(normals).value == pytest.approx(given.value, abs=1e-3)
        except ArithmeticError as error:
            assert "give an interior_point" in str(error)  # noqa: PT017 (either is right)


def test_nearly_orthogonal_walls_matter_beside_thin_arcs():
    normals = np.zeros((3, 784))
    normals[0, :3], normals[1, :3], normals[2, 2] = [1, 1e-9, 6e-13], [-1, 1e-9, 6e-13], 1
    point = np.zeros(784)
    point[1:3] = 1
    estimate = log_cone_measure(normals, point)
    reduced = log_cone_measure(normals[:, :3], point[:3])
    assert abs(estimate.value - reduced.value) <= 4 * math.hypot(estimate.standard_error, reduced.standard_error)
    assert abs(estimate.value - math.log(_wedge(1e-9, 6e-13))) <= max(4 * estimate.standard_error, 1e-3)


def _wedge(first, second):
    """P(|x| < first·y + second·z, z > 0) for small slopes: 2φ(0) E[(first·y + second·z)₊; z > 0]."""
    length = math.hypot(first, second)
    # In polar coordinates of (y, z) the angle runs from the y-axis' side on which the sum is positive, above z = 0.
    low, high = 0.0, math.pi / 2 + math.atan2(second, first)
    across = math.sin(high - math.atan2(second, first)) - math.sin(low - math.atan2(second, first))
    return 2 / math.sqrt(2 * math.pi) * length * across * math.sqrt(math.pi / 2) / (2 * math.pi)


def test_large_batches_of_small_cones():
    rng = np.random.default_rng(0)
    pairs = [random_cone(10, 4, rng) for _ in range(300)]
    normals, points = (np.stack(part) for part in zip(*pairs, strict=True))
    found = log_cone_measure(normals, points, target_standard_error=0.3)
    assert found.value.isfinite().all()
    draws = rng.standard_normal((40_000, 4))
    for k in range(0, 300, 30):
        hits = int((draws @ normals[k].T > 0).all(1).sum())
        low, high = stats.binomtest(hits, 40_000).proportion_ci(0.9999)
        assert math.exp(found.value[k] - 4 * found.standard_error[k]) <= high
        assert math.exp(found.value[k] + 4 * found.standard_error[k]) >= low


def test_input_of_any_kind():
    normals, point = [[0.6, 0.8], [-0.1, 0.3]], [0.5, 0.5]
    expected = log_cone_measure(np.array(normals), np.array(point))
    assert log_cone_measure(normals, point) == expected  # not by way of float32
    assert log_cone_measure(np.array(normals)[::-1], [1e-200, 1e-200]).value == pytest.approx(expected.value)
    assert log_cone_measure(torch.tensor(normals, dtype=torch.float64, requires_grad=True)) == expected


def test_samples_are_capped():
    normals, point = random_cone(60, 10, np.random.default_rng(0))
    rough = log_cone_measure(normals, point, target_standard_error=1e-3, max_samples=2**15)
    assert 1e-3 < rough.standard_error < 0.5


def test_error_falls_with_the_target():
    normals, point = random_cone(60, 10, np.random.default_rng(0))
    rough, fine = (log_cone_measure(normals, point, target_standard_error=t) for t in (0.3, 0.03))
    assert fine.standard_error <= 0.04 < rough.standard_error <= 0.4
    assert abs(rough.value - fine.value) < 4 * rough.standard_error


def test_few_samples_leave_a_larger_error_that_says_so():
    normals, point = random_cone(60, 10, np.random.default_rng(0))
    short = log_cone_measure(normals, point, target_standard_error=0.001, max_samples=10_000)
    long = log_cone_measure(normals, point, target_standard_error=0.02)
    assert short.standard_error > 0.001
    assert abs(short.value - long.value) < 4 * short.standard_error


def test_a_thousand_thin_arcs():
    angles = np.linspace(1e-5, 1e-2, 1000)
    normals, point = np.zeros((2000, 2000)), np.zeros(2000)
    for i, angle in enumerate(angles):
        normals[2 * i, 2 * i : 2 * i + 2] = [math.sin(angle / 2), math.cos(angle / 2)]
        normals[2 * i + 1, 2 * i : 2 * i + 2] = [math.sin(angle / 2), -math.cos(angle / 2)]
        point[2 * i] = 1
    estimate = log_cone_measure(normals, point)
    assert estimate.value == pytest.approx(np.log(angles / (2 * np.pi)).sum(), abs=1e-6)
    assert estimate.value < -7000


@given(seeds)
@settings(max_examples=10)
def test_measure_is_the_cone_s_not_its_description_s(seed):
    rng = np.random.default_rng(seed)
    normals, point = random_cone(12, 5, rng)
    turned = rotation(7, rng)[:5]
    others = normals * rng.uniform(1e-3, 1e3, (12, 1))
    others = np.vstack([others, others[:3] + others[3:6], others[:2]])[rng.permutation(17)] @ turned
    first, second = log_cone_measure(normals, point), log_cone_measure(others, seed=1)
    assert abs(first.value - second.value) <= 4 * math.hypot(first.standard_error, second.standard_error)


def test_orthogonal_groups_multiply():
    rng = np.random.default_rng(0)
    (first, u), (second, v) = random_cone(15, 4, rng), random_cone(9, 5, rng)
    both = np.zeros((24, 9))
    both[:15, :4], both[15:, 4:] = first, second
    whole = log_cone_measure(both @ rotation(9, rng), target_standard_error=0.05)
    parts = [log_cone_measure(b, p, target_standard_error=0.05, seed=3) for b, p in ((first, u), (second, v))]
    error = math.sqrt(whole.standard_error**2 + sum(part.standard_error**2 for part in parts))
    assert abs(whole.value - sum(part.value for part in parts)) < 4 * error
    assert whole.standard_error <= 0.075


def test_many_cones_at_once():
    rng = np.random.default_rng(0)
    pairs = [random_cone(10, 4, rng) for _ in range(6)]
    normals, points = (np.stack(part).reshape(2, 3, *part[0].shape) for part in zip(*pairs, strict=True))
    together = log_cone_measure(torch.from_numpy(normals), torch.from_numpy(points))
    assert together.value.shape == together.standard_error.shape == (2, 3)
    for index in np.ndindex(2, 3):
        alone = log_cone_measure(normals[index], points[index], seed=5)
        error = math.hypot(alone.standard_error, together.standard_error[index])
        assert abs(alone.value - together.value[index]) < 4 * error


def test_seed_decides_and_nothing_else_is_touched():
    normals, point = random_cone(30, 6, np.random.default_rng(0))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    first, again, other = (log_cone_measure(normals, point, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("normals", "options", "message"),
    [
        (np.ones(3), {}, r"normals must have shape .*got \(3,\)"),
        (np.ones((0, 3)), {}, r"normals must have shape"),
        ([[1.0, math.nan]], {}, "normals must be finite"),
        ([[1.0, 0.0], [0.0, 0.0]], {}, r"row \[1\] is"),
        ([[1.0, 0.0], [-1.0, 0.0]], {}, "the cone is empty"),
        (np.array([[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]]), {}, "the cone is empty"),
        (np.array([[[1.0], [1.0]], [[1.0], [-1.0]]]), {}, "cone 1 is empty"),
        (np.eye(2), {"interior_point": [1.0, -1.0]}, r"not inside the cone: .* constraint 1"),
        (np.eye(2), {"interior_point": [0.0, 0.0]}, "not inside the cone"),
        (np.eye(2), {"interior_point": [1.0, math.inf]}, "interior_point must be finite"),
        (np.eye(2), {"interior_point": [1.0]}, r"interior_point must have shape \(2,\)"),
        (np.eye(2), {"target_standard_error": 0.0}, "target_standard_error must be positive, got 0"),
        (np.eye(2), {"max_samples": 10}, "max_samples must be at least"),
    ],
)
def test_bad_input_is_named(normals, options, message):
    with pytest.raises(ValueError, match=message):
        log_cone_measure(normals, **options)


def test_too_thin_for_floats():
    normals, point, _ = arcs([1e-13, 1.0, 1.0], np.random.default_rng(0))
    mixed = np.vstack([normals, normals[0] + normals[2:].sum(0)])  # redundant, but it ties them together
    with pytest.raises(ArithmeticError, match="too thin for float64"):
        log_cone_measure(mixed, point)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    normals, point = random_cone(200, 20, np.random.default_rng(0))
    here = log_cone_measure(normals, point)
    there = log_cone_measure(torch.from_numpy(normals).cuda(), torch.from_numpy(point).cuda())
    assert abs(here.value - there.value) < 4 * math.hypot(here.standard_error, there.standard_error)
