import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from lightning_mnn.landscape import ActivationPattern, Region, find_minimum
from lightning_mnn.landscape.intervals import Estimate, Proportion
from lightning_mnn.landscape.volumes.rare_events import splitting
from lightning_mnn.landscape.volumes.rare_events.splitting import rare_event
from lightning_mnn.landscape.volumes.rare_events.suboptimal import (
    fewest_wrong,
    rare_census,
    suboptimal_score,
    unactivated_score,
)
from lightning_mnn.landscape.volumes.region_census import Case, DataSet, GaussianSamples, census


def first(weights):
    return weights[:, 0, 0]


def unseen(num_samples, width):
    """The probability that some of orthogonal samples activates no unit."""
    return -math.expm1(num_samples * math.log1p(-(2.0**-width)))


def direct(score, shape, level, draws):
    """The same probability without splitting."""
    random, hits = torch.Generator().manual_seed(1), 0
    for _ in range(draws // 10_000):
        hits += int((score(torch.randn(10_000, *shape, generator=random, dtype=torch.float64)) >= level).sum())
    return Proportion.of(hits, draws)


def overlap(one, other):
    return max(one.low, other.low) <= min(one.high, other.high)


@pytest.mark.parametrize("level", [-1.0, 0.5, 3.0, 6.0, 9.0])
def test_tails_of_the_normal_distribution(level):
    found = rare_event(first, (1, 1), level, particles=500)
    assert found.low < norm.sf(level) < found.high
    assert found.high / found.low < 3
    assert found.levels[-1] == level
    assert (found.population[..., 0, 0] >= level).all()
    assert found.log_runs.shape == (10,)


def test_a_known_volume_of_one_in_sixty_seven_million():
    found = rare_event(unactivated_score(torch.eye(4)), (28, 4), 0.0, particles=500)
    assert found.low < unseen(4, 28) < found.high
    assert found.high / found.low < 3
    assert found.evaluations == 11 * 500 * (1 + 10 * len(found.levels))


def test_where_the_event_is_common_the_draws_are_direct():
    found = rare_event(unactivated_score(torch.eye(8)), (3, 8), 0.0, particles=300)
    hits = round(found.value * 3000)
    assert (found.low, found.high) == pytest.approx((Proportion.of(hits, 3000).low, Proportion.of(hits, 3000).high))
    assert found.low < unseen(8, 3) < found.high
    certain = rare_event(first, (1, 1), -1e3, particles=10, runs=2)
    assert (certain.value, certain.high) == (1, 1)
    assert 0.5 < certain.low < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score", "shape", "level", "exact"),
    [
        (unactivated_score(torch.eye(4)), (10, 4), 0.0, unseen(4, 10)),
        (first, (1, 1), 4.0, norm.sf(4)),
        (lambda w: (2 * first(w)).floor() / 2, (1, 1), 3.0, norm.sf(3)),  # ties at every level
    ],
    ids=["cones", "tail", "ties"],
)
def test_runs_are_unbiased_and_intervals_cover(score, shape, level, exact):
    found = [rare_event(score, shape, level, particles=60, seed=seed) for seed in range(60)]
    runs = np.concatenate([each.log_runs.exp().numpy() for each in found]) / exact
    assert abs(runs.mean() - 1) < 4 * runs.std() / math.sqrt(len(runs))
    covered = sum(each.low <= exact <= each.high for each in found)
    assert binomtest(covered, 60, 0.95, alternative="less").pvalue > 1e-4


BLOCKS = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1]]) == 1


@pytest.mark.parametrize(("shape", "blocks"), [((6,), None), ((6,), BLOCKS), ((1, 2, 3), BLOCKS.reshape(3, 1, 2, 3))])
def test_weights_have_any_shape_and_blocks(shape, blocks):
    direction = torch.tensor([1.0, -2, 0, 2, 0, 4], dtype=torch.float64) / 5  # of length 1

    def along(weights):
        assert weights.shape[1:] == shape
        return weights.flatten(1) @ direction

    found = rare_event(along, shape, 5.0, particles=300, blocks=blocks)
    assert found.low < norm.sf(5) < found.high
    assert found.high / found.low < 3
    assert found.population.shape == (10, 300, *shape)
    values = found.population.flatten(2) @ direction
    assert abs(float(values.mean()) - norm.pdf(5) / norm.sf(5)) < 0.05
    # The weights across this direction are free.
    across = found.population.flatten(2) @ torch.tensor([2.0, 1, 0, 0, 0, 0], dtype=torch.float64) / math.sqrt(5)
    assert abs(float(across.var()) - 1) < 0.2


def test_a_block_moves_alone():
    moves = splitting._Blocks.of(BLOCKS, (6,), torch.device("cpu"))
    torch.testing.assert_close(moves.factors[:, 0], (6 / BLOCKS.sum(1).double()).sqrt())
    one = splitting._Blocks.of(BLOCKS[:1], (6,), torch.device("cpu"))
    population = splitting.Population(lambda w: w[:, 0] * 0, (2, 50, 6), one, 5, torch.Generator().manual_seed(0))
    population.score = lambda w: torch.where((w[:, 2:] == start[:, 2:]).all(1), 1.0, -1.0)  # nothing else may move
    start = population.weights.flatten(0, 1)
    population.move(0.0, 0.3)
    moved = population.weights.flatten(0, 1) != start
    assert moved[:, :2].all()
    assert not moved[:, 2:].any()


def test_stages_estimate_events_between_the_levels():
    options = {"particles": 400, "runs": 10, "steps": 5, "seed": 0}
    stages = list(splitting.splitting_stages(lambda w: w[:, 0], (1,), 4.0, **options))
    estimates = []
    for stage, following in itertools.pairwise(stages):  # P(3 ≤ w < 3.5), shell by shell
        inside = (stage.scores >= 3) & (stage.scores < min(3.5, following.level))
        estimates.append(stage.log_runs.exp() * inside.double().mean(1))
    runs = torch.stack(estimates).sum(0)
    assert abs(float(runs.mean()) - (norm.sf(3) - norm.sf(3.5))) < 4 * float(runs.std()) / math.sqrt(10)
    assert stages[0].level == -math.inf
    assert (stages[0].log_runs == 0).all()
    assert [stage.evaluations for stage in stages] == sorted(stage.evaluations for stage in stages)


def test_the_population_has_the_law_of_the_event():
    found = rare_event(first, (1, 2), 2.0, particles=500)
    tail, other = found.population[..., 0].numpy(), found.population[..., 1].numpy()
    expected = norm.pdf(2) / norm.sf(2)
    assert abs(tail.mean() - expected) < 5 * tail.mean((1, 2)).std() / math.sqrt(9) + 0.01
    assert abs(other.mean()) < 5 * other.mean((1, 2)).std() / math.sqrt(9) + 0.01
    assert abs(other.var() - 1) < 0.15


def test_an_event_that_cannot_happen_has_an_upper_limit():
    found = rare_event(lambda w: first(w).clamp(max=2.0), (1, 1), 3.0, particles=100)
    assert (found.value, found.low, found.log_value, found.standard_error) == (0, 0, -math.inf, math.inf)
    assert norm.sf(3) < found.high < 0.3 * 0.05
    assert found.population.shape == (0, 100, 1, 1)
    nothing = rare_event(lambda w: first(w) * 0, (1, 1), 1.0, particles=100)
    assert nothing.value == 0 < nothing.high < 0.4
    assert rare_event(lambda w: first(w) - math.inf, (1, 1), 1.0, particles=9).value == 0


def test_runs_that_die_out_widen_the_interval():
    def trap(weights):  # a plateau leads nowhere, and the event beside it is met by few
        return torch.where(first(weights) > 3.2, 4.0, (-first(weights)).clamp(max=1.0))

    found = rare_event(trap, (1, 1), 4.0, particles=100, runs=8)
    assert 0 < found.log_runs.isfinite().sum() < 8
    assert found.low < norm.sf(3.2) < found.high
    assert found.high / max(found.low, 1e-9) > 10


def test_equal_seeds_give_equal_results():
    one, other, third = (rare_event(first, (1, 1), 3.0, particles=50, seed=seed) for seed in (0, 0, 1))
    assert one.log_value == other.log_value != third.log_value
    torch.testing.assert_close(one.population, other.population, rtol=0, atol=0)


def test_standard_error_spans_the_interval():
    found = Estimate(-3.0, -4.0, -2.5)
    assert found.log_value - 1.96 * found.standard_error == pytest.approx(-4, abs=1e-3)
    assert (found.value, found.low, found.high) == pytest.approx((math.exp(-3), math.exp(-4), math.exp(-2.5)))


@pytest.mark.parametrize("slope", [0.0, 0.1, -0.5])
@pytest.mark.parametrize(("num_samples", "dim", "width"), [(8, 3, 2), (8, 3, 4), (12, 2, 5), (1, 1, 1)])
def test_score_counts_what_the_census_counts(num_samples, dim, width, slope):
    for index in range(40):
        case = Case(GaussianSamples(num_samples, dim), width, slope)
        weights, data = case.draw(index)
        score = suboptimal_score(data.inputs, data.targets, slope, threshold=data.threshold)
        active = ActivationPattern.from_preactivations(data.inputs @ weights.T)
        found = find_minimum(Region(data.inputs, active, slope), data.targets, threshold=data.threshold, max_nodes=0)
        assert math.floor(score(weights[None])) == round(found.mce * num_samples)
        for epsilon in (0.0, 0.25, 0.3):
            outcome = Case(data, width, slope, epsilon=epsilon, max_nodes=0).outcome_at(weights, data)
            assert outcome.suboptimal == bool(score(weights[None]) >= fewest_wrong(num_samples, epsilon))


def test_score_does_not_depend_on_its_batch(monkeypatch):
    data = GaussianSamples(8, 3).draw(0, 0)
    weights = torch.randn(30, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for slope in (0.0, 0.1):
        score = suboptimal_score(data.inputs, data.targets, slope)
        whole = score(weights)
        with monkeypatch.context() as patch:
            patch.setattr("lightning_mnn.landscape.volumes.rare_events.suboptimal._ENTRIES_PER_BATCH", 300)
            torch.testing.assert_close(score(weights), whole, rtol=1e-9, atol=1e-9)


def test_samples_of_zero_activate_no_unit():
    score = unactivated_score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert score(torch.ones(3, 2, 2, dtype=torch.float64)).tolist() == [0, 0, 0]
    data = DataSet.of(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]))
    score = suboptimal_score(data.inputs, data.targets)
    assert score(torch.ones(1, 2, 2, dtype=torch.float64)).floor() == 0  # label 0 is right with the output 0


@pytest.mark.parametrize(
    ("epsilon", "expected"), [(0.0, 1), (0.1, 3), (0.0999, 2), (0.3, 7), (0.7, 15), (0.15, 4), (0.99, 20)]
)
def test_least_wrong_is_more_than_epsilon(epsilon, expected):
    assert fewest_wrong(20, epsilon) == expected
    assert expected / 20 > epsilon >= (expected - 1) / 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_samples", "dim", "width", "slope", "epsilon"),
    [(20, 5, 14, 0.0, 0.0), (20, 5, 10, 0.0, 0.05), (12, 3, 8, 0.1, 0.0)],  # 1.1e-3, 1.9e-3, 3e-4
)
def test_agrees_with_direct_draws(num_samples, dim, width, slope, epsilon):
    data = GaussianSamples(num_samples, dim).draw(0, 0)
    score, level = suboptimal_score(data.inputs, data.targets, slope), fewest_wrong(num_samples, epsilon)
    found = rare_event(score, (width, dim), level, particles=300)
    drawn = direct(score, (width, dim), level, 60_000)
    assert drawn.hits > 5
    assert overlap(found, drawn), (found, drawn)


@pytest.mark.parametrize(("width", "slope"), [(8, 0.0), (6, 0.1)])
def test_agrees_with_the_census(width, slope):
    data = GaussianSamples(10, 3).draw(0, 0)
    drawn = census(data.inputs, data.targets, width, slope, num_regions=600)
    found = rare_census(data.inputs, data.targets, width, slope, particles=200, regions=20)
    assert found.undecided == 0
    assert overlap(found.suboptimal_residual, drawn.suboptimal_residual)
    assert overlap(found.suboptimal_minimum, drawn.suboptimal_minimum)
    assert found.suboptimal_minimum.value <= found.suboptimal_residual.value


def test_undecided_regions_widen_the_interval():
    data = GaussianSamples(10, 3).draw(0, 0)
    options = {"particles": 100, "regions": 10, "runs": 6}
    full = rare_census(data.inputs, data.targets, 6, **options)
    cut = rare_census(data.inputs, data.targets, 6, max_nodes=2, **options)
    assert 0 < cut.undecided < 1
    assert cut.suboptimal_minimum.low <= full.suboptimal_minimum.low
    assert cut.suboptimal_minimum.high >= full.suboptimal_minimum.high
    blind = rare_census(data.inputs, data.targets, 6, max_nodes=0, **options)
    assert blind.undecided == 1
    assert blind.suboptimal_minimum.low == 0
    assert blind.suboptimal_minimum.high == pytest.approx(blind.suboptimal_residual.high, rel=0.5)


def test_certain_events_are_not_taken_for_granted():
    found = rare_census(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, -1.0]), 1, particles=20, regions=5, runs=6)
    assert (found.suboptimal_residual.value, found.suboptimal_minimum.value) == (1, 1)
    assert 0.5 < found.suboptimal_minimum.low < found.suboptimal_residual.low < 1


def test_no_minimum_among_the_regions_met_leaves_an_upper_limit():
    data = GaussianSamples(20, 3).draw(0, 0)  # so few units hold no minimum
    found = rare_census(data.inputs, data.targets, 5, epsilon=0.3, particles=100, regions=5, runs=6)
    assert found.suboptimal_minimum.value == 0 < found.suboptimal_minimum.high < found.suboptimal_residual.high


def test_bad_input_is_named():
    for match, change in {
        r"shape\[0\] must be at least 1": {"shape": (0, 1)},
        "particles must be at least 1": {"particles": 0},
        "steps must be at least 1": {"steps": 0},
        "runs must be at least 2, got 1": {"runs": 1},
        "level must be finite, got nan": {"level": math.nan},
        "seed must not be negative": {"seed": -1},
        r"to 1000 numbers, got shape \(1000,\) with 1000 NaN": {"score": lambda w: first(w) * math.nan},
        r"to 1000 numbers, got shape \(1000, 1\) with 0 NaN": {"score": lambda w: w[:, 0]},
        "shape must have at least one axis": {"shape": ()},
        r"blocks must be bool of shape \(number of blocks, 1, 1\), got torch.float32": {"blocks": torch.ones(1, 1, 1)},
        r"blocks must be bool .* of shape \(1, 2\)": {"blocks": torch.ones(1, 2) == 1},
        "blocks must each contain a weight": {"blocks": torch.zeros(1, 1, 1) == 1},
    }.items():
        with pytest.raises(ValueError, match=match):
            rare_event(**{"score": first, "shape": (1, 1), "level": 1.0} | change)
    with pytest.raises(ValueError, match="targets must be two labels"):
        suboptimal_score(torch.eye(3), torch.arange(3))
    x, y = torch.eye(2), torch.tensor([0.0, 1.0])
    for match, change in {
        "epsilon must be a number, at least 0 and below 1": {"epsilon": 1.0},
        "width must be at least 1": {"width": 0},
        "negative_slope must not be 1": {"negative_slope": 1.0},
        "regions must be at least 1": {"regions": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            rare_census(**{"inputs": x, "targets": y, "width": 2} | change)
