import dataclasses
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from lightning_mnn.landscape import ActivationPattern, Region
from lightning_mnn.landscape.intervals import Proportion
from lightning_mnn.landscape.volumes.region_census import (
    Case,
    Census,
    DataSet,
    GaussianSamples,
    Outcome,
    census,
    classify,
    count,
    draw_weights,
    ensemble_census,
    tally,
)
from tests.landscape.regions.test_existence import planar_regions

NAMES = [field.name for field in dataclasses.fields(Census)]


def planar(num_samples, low=0.0):
    rng = np.random.default_rng(1)
    x, ones = rng.standard_normal((2, num_samples)).T, rng.integers(0, 2, num_samples)
    return torch.from_numpy(x), torch.from_numpy(low + (1 - low) * ones)


def exact_volumes(inputs, targets, width, slope, epsilon):
    """Every region of the plane, by its arcs."""
    volumes = dict.fromkeys(NAMES, 0.0)
    for volume, active in planar_regions(inputs.numpy(), width):
        region = Region(inputs, ActivationPattern(torch.from_numpy(active)), slope)
        for name, mark in classify(region, targets, epsilon=epsilon).marks().items():
            volumes[name] += float(volume * mark)
    return volumes


def agrees(found, volumes, alpha=1e-4):
    """Whether no count is further from its exact volume than one in 1 / alpha would be."""
    for name in NAMES:
        hits, trials = getattr(found, name).hits, getattr(found, name).trials
        assert binomtest(hits, trials, min(1.0, volumes[name])).pvalue > alpha, (name, hits, trials, volumes[name])


def test_volumes_of_the_plane_with_four_samples():
    inputs, targets = planar(4)
    volumes = exact_volumes(inputs, targets, 2, 0.0, 0.0)
    assert round(volumes["global_minimum"], 4) == 0.1818
    assert round(volumes["any_minimum"], 3) == 0.466
    agrees(census(inputs, targets, 2, num_regions=1000), volumes)


@pytest.mark.parametrize(
    ("num_samples", "width", "slope", "epsilon", "low"),
    [(6, 2, 0.0, 0.2, 0.0), (6, 2, 0.1, 0.0, 0.0), (6, 3, 0.0, 1 / 6, -1.0), (6, 2, -0.5, 0.0, 0.0)],
)
def test_volumes_of_the_plane(num_samples, width, slope, epsilon, low):
    inputs, targets = planar(num_samples, low)
    volumes = exact_volumes(inputs, targets, width, slope, epsilon)
    assert volumes["suboptimal_minimum"] > 0.01
    agrees(census(inputs, targets, width, slope, epsilon=epsilon, num_regions=600), volumes)


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say():
    inputs, targets = planar(4)
    volumes = exact_volumes(inputs, targets, 2, 0.0, 0.0)
    case = Case(DataSet.of(inputs, targets), width=2)
    outcomes = [case.outcome(index) for index in range(3000)]
    parts = [Census.from_counts([tally(outcomes[start : start + 30])]) for start in range(0, 3000, 30)]
    for name in NAMES[:-1]:
        covered = sum(getattr(part, name).low <= volumes[name] <= getattr(part, name).high for part in parts)
        assert covered >= 90, name  # of 100, at 95 % or more


@pytest.mark.parametrize(("width", "expected"), [(4, 0.77), (6, 0.23), (8, 0.07), (10, 0.016)])
def test_share_of_deficient_regions(width, expected):
    case = Case(GaussianSamples(20, 5), width, max_nodes=0)
    found = Census.from_counts([count(case, 0, 1000)])
    assert binomtest(found.rank_deficient.hits, 1000, expected).pvalue > 0.001
    assert found.undecided.hits == 1000


def test_a_transition_of_the_global_minima():
    narrow, wide = (ensemble_census(20, 5, width, num_regions=60) for width in (4, 12))
    assert narrow.global_minimum.high < 0.1
    assert wide.global_minimum.low > 0.8
    assert narrow.suboptimal_residual.low > 0.2
    assert narrow.undecided.hits == wide.undecided.hits == 0


def test_orthogonal_inputs():
    found = census(torch.eye(6), torch.tensor([1.0, -1, 1, -1, 1, 1]), 3, num_regions=1000)
    exact = 1 - (1 - 2**-3) ** 6
    for name in (
        "rank_deficient",
        "suboptimal_residual",
    ):  # a sample that no unit sees is predicted as 0, which is wrong
        assert binomtest(getattr(found, name).hits, 1000, exact).pvalue > 1e-3


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 50), (3, 50), (50, 50), (400, 1000)])
def test_intervals_are_those_of_scipy(hits, trials):
    found = Proportion.of(hits, trials)
    exact = binomtest(hits, trials).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.value == hits / trials


def test_undecided_regions_widen_what_they_could_be():
    yes, no, unknown = True, False, None
    outcomes = [
        Outcome(no, no, yes, yes),
        Outcome(no, no, yes, unknown),
        Outcome(yes, yes, no, unknown),
        Outcome(yes, yes, no, no),
    ]
    found = Census.from_counts([tally(outcomes)])
    assert [getattr(found, name).hits for name in NAMES] == [2, 2, 0, 1, 1, 2]
    assert found.any_minimum.low == Proportion.of(1, 4).low
    assert found.any_minimum.high == Proportion.of(3, 4).high
    assert found.global_minimum.high == Proportion.of(2, 4).high
    assert found.suboptimal_minimum.high == Proportion.of(1, 4).high
    assert found.suboptimal_residual == Proportion.of(2, 4)


def test_branches_that_run_out_are_counted_as_undecided():
    full = ensemble_census(12, 3, 6, num_regions=40)
    cut = ensemble_census(12, 3, 6, num_regions=40, max_nodes=3)
    assert full.undecided.hits == 0 < cut.undecided.hits
    for name in ("any_minimum", "global_minimum", "suboptimal_minimum"):
        one, other = getattr(full, name), getattr(cut, name)
        assert other.low <= one.low <= one.high <= other.high
    assert full.suboptimal_residual == cut.suboptimal_residual


@pytest.mark.parametrize("data", [GaussianSamples(6, 2, "zero_one"), DataSet.of(*planar(6))])
def test_parts_add_up_and_survive_pickling(data):
    case = pickle.loads(pickle.dumps(Case(data, 3, 0.1, epsilon=0.1)))  # noqa: S301 (our own)
    whole = count(case, 0, 30)
    parts = [count(case, 20, 30), count(case, 0, 7), count(case, 7, 20)]
    assert Census.from_counts([whole]) == Census.from_counts(parts)
    assert whole["regions"] == 30
    assert whole == tally(case.outcome(index) for index in range(30))


@pytest.mark.slow
def test_processes_do_not_matter():
    one, two = (ensemble_census(6, 2, 2, 0.1, num_regions=5, processes=processes) for processes in (1, 2))
    assert one == two


def test_draws_depend_on_seed_and_index_alone():
    draws = [draw_weights(3, 2, seed, index) for seed in range(3) for index in range(3)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 9
    torch.manual_seed(5)
    assert torch.equal(draws[4], draw_weights(3, 2, 1, 1))
    many = torch.stack([draw_weights(3, 2, 0, index) for index in range(2000)])
    assert many.dtype == torch.float64
    assert abs(float(many.mean())) < 4 / math.sqrt(many.numel())
    assert abs(float(many.square().mean()) - 1) < 4 * math.sqrt(2 / many.numel())
    data = GaussianSamples(4, 3, "zero_one").draw(0, 0)
    assert set(data.targets.tolist()) <= {0.0, 1.0}
    assert not torch.equal(data.inputs, GaussianSamples(4, 3).draw(0, 1).inputs)


def test_error_is_more_than_epsilon():
    inputs, targets = torch.eye(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    active = torch.tensor([[False], [False], [True], [True]])  # two of four samples are seen by no unit
    region = Region(inputs, ActivationPattern(active))
    assert [classify(region, targets, epsilon=epsilon).suboptimal for epsilon in (0.0, 0.49, 0.5)] == [1, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("slope", [0, 0.1])
def test_a_region_takes_few_branches(slope):
    """Which are what takes time: here up to 3⁸ would be possible, and 256 are the most that is needed."""
    assert ensemble_census(20, 5, 8, slope, num_regions=100, max_nodes=1000).undecided.hits == 0


def test_bad_input_is_named():
    x, y = planar(4)
    for match, change in {
        r"inputs must have shape \(N, d0\), neither zero, got \(4,\)": {"inputs": x[:, 0]},
        r"targets must have shape \(4,\), one for each sample, got \(3,\)": {"targets": y[:3]},
        "inputs must be finite, got nan": {"inputs": x * math.nan},
        "targets must be finite, got inf": {"targets": y + math.inf},
        "targets must be two labels.*give threshold": {"targets": torch.arange(4)},
        "all targets are 1": {"targets": torch.ones(4)},
        "threshold must be finite": {"threshold": math.nan},
        "width must be at least 1 and a whole number, got 0": {"width": 0},
        "negative_slope must not be 1": {"negative_slope": 1},
        "epsilon must be a number, at least 0 and below 1, got 1": {"epsilon": 1},
        "epsilon must be a number, at least 0 and below 1, got nan": {"epsilon": math.nan},
        "num_regions must be at least 1": {"num_regions": 0},
        "processes must be at least 1": {"processes": 0},
        "seed must not be negative, got -1": {"seed": -1},
        "max_nodes must be at least 0 and a whole number, got -1": {"max_nodes": -1},
    }.items():
        with pytest.raises(ValueError, match=match):
            census(**{"inputs": x, "targets": y, "width": 2} | change)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        ensemble_census(0, 2, 2)
    with pytest.raises(ValueError, match=r"labels must be one of .* got 'teacher'"):
        GaussianSamples(2, 2, "teacher")
    region = Region(x, ActivationPattern(torch.ones(4, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="targets must be two labels"):
        classify(region, 3 * y)
    stacked = Region(x.expand(2, -1, -1), ActivationPattern(torch.ones(4, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="region must be that of one network"):
        classify(stacked, y)
    with pytest.raises(ValueError, match="must be among at least 1 trials, got 0"):
        Census.from_counts([])


def test_targets_of_any_kind_with_a_threshold(monkeypatch):
    x, y = planar(4)
    shifted = census(x, 2.0 + y, 2, threshold=2.5, num_regions=20)
    assert shifted.any_minimum.trials == 20
    module = sys.modules["lightning_mnn.landscape.volumes.region_census"]  # as an attribute its name is the function's
    monkeypatch.setattr(module, "find_minimum", None)  # bad input is refused before any work
    with pytest.raises(ValueError, match="give threshold"):
        census(x, 2.0 + y, 2)
