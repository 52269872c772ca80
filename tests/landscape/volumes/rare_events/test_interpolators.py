import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mnn.landscape import log_cone_measure, random_interpolators
from lightning_mnn.landscape.intervals import Proportion
from lightning_mnn.landscape.volumes.rare_events import interpolators
from lightning_mnn.landscape.volumes.rare_events.interpolators import Architecture, mean_over_runs


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(num_samples, dim, seed=0, num_test=60):
    inputs, teacher, test = normal(num_samples, dim, seed=seed), normal(dim, seed=99), normal(num_test, dim, seed=98)
    return inputs, (inputs @ teacher).sign(), test, (test @ teacher).sign()


def naive_output(network, theta, x):
    """The output on one sample, with a loop over layers and units."""
    values, start = x.tolist(), 0
    widths = (*network.hidden_dims, 1)
    for number, outputs in enumerate(widths):
        inputs = len(values)
        rows = [theta[start + k * inputs : start + (k + 1) * inputs].tolist() for k in range(outputs)]
        start += outputs * inputs
        biases = theta[start : start + outputs].tolist() if network.bias else [0.0] * outputs
        start += outputs if network.bias else 0
        values = [sum(w * v for w, v in zip(row, values, strict=True)) + b for row, b in zip(rows, biases, strict=True)]
        if number < len(widths) - 1:
            values = [v if v > 0 else network.negative_slope * v for v in values]
    assert start == len(theta)
    return values[0]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([0.0, 0.1, -0.5]),
    st.integers(0, 100),
)
def test_outputs_are_those_of_a_loop_over_units(hidden_dims, dim, bias, slope, seed):
    network = Architecture(dim, tuple(hidden_dims), slope, bias)
    theta, inputs = normal(3, network.num_weights, seed=seed), normal(5, dim, seed=seed + 1)
    expected = torch.tensor([[naive_output(network, t, x) for x in inputs] for t in theta], dtype=torch.float64)
    torch.testing.assert_close(network.outputs(theta, inputs), expected, rtol=1e-10, atol=1e-10)


def test_outputs_do_not_depend_on_the_batch(monkeypatch):
    network, inputs = Architecture(3, (4, 2)), normal(5, 3)
    theta = normal(9, network.num_weights)
    whole = network.outputs(theta, inputs)
    monkeypatch.setattr(interpolators, "_ENTRIES_PER_BATCH", 40)
    torch.testing.assert_close(network.outputs(theta, inputs), whole)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden_dims", [(), (3,), (3, 2)])
def test_a_block_is_a_layer_or_all_that_touches_a_hidden_unit(hidden_dims, bias):
    network, inputs = Architecture(4, hidden_dims, bias=bias), normal(6, 4)
    theta, blocks = normal(1, network.num_weights), network.blocks()
    layers = [outputs * (inputs + bias) for inputs, outputs in pairwise((4, *hidden_dims, 1))]
    assert len(blocks) == len(layers) + sum(hidden_dims)
    found = iter(blocks)
    for number, size in enumerate(layers):
        start = sum(layers[:number])
        assert next(found).nonzero().flatten().tolist() == list(range(start, start + size))
        for _ in range(hidden_dims[number] if number < len(hidden_dims) else 0):
            unit = next(found)  # what remains without it are the weights of a network without the unit
            fewer = Architecture(4, tuple(w - (k == number) for k, w in enumerate(hidden_dims)), bias=bias)
            smaller = fewer.outputs(theta[:, ~unit], inputs)
            torch.testing.assert_close(network.outputs(theta * ~unit, inputs), smaller)


def plain_draws(network, training, test, draws):
    theta = normal(draws, network.num_weights, seed=5)
    wrong = (network.outputs(theta, training[0]) * training[1] <= 0).sum(1)
    errors = (network.outputs(theta, test[0]) * test[1] <= 0).double().mean(1)
    return wrong, errors


@pytest.mark.parametrize(
    ("hidden_dims", "options"), [((4,), {}), ((3, 3), {"negative_slope": 0.1}), ((3,), {"bias": True})]
)
@pytest.mark.parametrize("moves", [{"particles": 300}, {"moves": "paths", "particles": 1000, "steps": 10}])
def test_it_agrees_with_plain_draws(hidden_dims, options, moves):
    inputs, labels, test, test_labels = data(8, 3)
    network = Architecture(3, hidden_dims, options.get("negative_slope", 0.0), options.get("bias", False))
    wrong, errors = plain_draws(network, (inputs, labels), (test, test_labels), 200_000)
    hits = wrong == 0
    share = Proportion.of(int(hits.sum()), len(hits))
    found = random_interpolators(
        inputs, labels, hidden_dims, test_inputs=test, test_targets=test_labels, **options, **moves
    )
    assert max(share.low, found.probability.low) <= min(share.high, found.probability.high)
    spread = 3 * float(errors[hits].std()) / math.sqrt(int(hits.sum()))
    assert found.test_error.low - spread <= float(errors[hits].mean()) <= found.test_error.high + spread
    for quantile, value in found.quantiles.items():
        assert abs(float((errors[hits] < value - 1e-9).double().mean()) - quantile) < 0.15 + (quantile == 0.95)
    for count in (1, 2, 4):
        estimate, share = found.training_errors(count), Proportion.of(int((wrong == count).sum()), len(wrong))
        assert max(share.low, estimate.low) <= min(share.high, estimate.high), count
    bins = found.log_joint.shape[1]
    for count in (0, 1, 3):
        for half in (0, 1):
            part = found.log_joint[count].reshape(2, bins // 2)[half].exp().sum()
            inside = (wrong == count) & ((errors < 0.5) == (half == 0))
            expected = float(inside.double().mean())
            assert abs(float(part) - expected) < 0.25 * expected + 0.004


def test_the_population_makes_no_training_error_and_has_the_reported_test_errors():
    inputs, labels, test, test_labels = data(8, 3)
    found = random_interpolators(inputs, labels, (4,), test_inputs=test, test_targets=test_labels, particles=50, runs=3)
    network = Architecture(3, (4,))
    theta = found.weights.flatten(0, 1)
    assert found.weights.shape == (3, 50, network.num_weights)
    assert bool((network.outputs(theta, inputs) * labels > 0).all())
    errors = (network.outputs(theta, test) * test_labels <= 0).double().mean(1).reshape(3, 50).mean(1)
    assert found.test_error == mean_over_runs(errors, found.log_runs)
    assert found.training_errors(0).log_value == pytest.approx(found.probability.log_value)
    assert float(found.log_joint.logsumexp((0, 1))) == pytest.approx(0, abs=0.3)


def test_a_perceptron_realises_as_many_labellings_as_cover_counts():
    num_samples, dim = 4, 2
    inputs = normal(num_samples, dim)
    total, variance, realised = 0.0, 0.0, 0
    for labels in product([-1.0, 1.0], repeat=num_samples):
        found = random_interpolators(inputs, torch.tensor(labels), (), threshold=0.0, particles=40, runs=4, steps=3)
        runs = found.log_runs.exp()
        realised += found.probability.value > 0
        total += float(runs.mean())
        variance += float(runs.var()) / len(runs)
    assert realised == 2 * sum(math.comb(num_samples - 1, k) for k in range(dim))  # Cover 1965
    assert abs(total - 1) < 4 * math.sqrt(variance)  # each perceptron has one labelling


def test_a_perceptron_has_the_measure_of_its_cone():
    inputs, labels, *_ = data(14, 4)
    truth = log_cone_measure(inputs * labels[:, None], target_standard_error=0.02)
    found = random_interpolators(inputs, labels, (), particles=400)
    assert found.probability.log_low - 0.06 < truth.value < found.probability.log_high + 0.06


def test_the_score_does_not_depend_on_the_scale_of_a_layer():
    inputs, labels, *_ = data(9, 3)
    network = Architecture(3, (4,))
    score = interpolators._count_score(network, interpolators._Samples.of(inputs, labels, None))
    theta = normal(20, network.num_weights)
    scaled = torch.cat([7 * theta[:, :12], theta[:, 12:] / 3], 1)
    torch.testing.assert_close(score(theta), score(scaled), rtol=1e-9, atol=1e-9)
    wrong = (network.outputs(theta, inputs) * labels <= 0).sum(1)
    assert score(theta).floor().tolist() == (9 - wrong).tolist()
    assert score(theta * 0).floor().tolist() == [0] * 20  # an output of 0 is wrong
    assert bool((score(theta) <= 9).all())


def test_labels_that_cannot_be_realised_have_an_upper_limit():
    inputs = torch.tensor([[1.0], [2.0]])
    found = random_interpolators(
        inputs, torch.tensor([1.0, -1.0]), (), particles=50, test_inputs=inputs, test_targets=torch.tensor([1.0, 1.0])
    )
    assert found.probability.log_value == -math.inf
    assert found.probability.high < 0.7
    assert found.test_error is None is found.quantiles
    assert found.weights.shape == (0, 50, 1)


@pytest.mark.slow
def test_intervals_cover():
    inputs, labels, test, test_labels = data(6, 2, num_test=40)
    wrong, errors = plain_draws(Architecture(2, (3,)), (inputs, labels), (test, test_labels), 1_000_000)
    truth, error = float((wrong == 0).double().mean()), float(errors[wrong == 0].mean())
    options = {"test_inputs": test, "test_targets": test_labels, "particles": 40, "steps": 3}
    found = [random_interpolators(inputs, labels, (3,), **options, seed=seed) for seed in range(60)]
    runs = torch.cat([each.log_runs.exp() for each in found]) / truth
    assert abs(float(runs.mean()) - 1) < 4 * float(runs.std()) / math.sqrt(len(runs)) + 0.01
    assert sum(each.probability.low <= truth <= each.probability.high for each in found) >= 51  # of 57 ± 1.7 (5e-3)
    assert sum(each.test_error.low <= error <= each.test_error.high for each in found) >= 51


def test_means_over_runs_are_weighted_by_the_runs_probabilities():
    found = mean_over_runs(torch.tensor([0.1, 0.3]), torch.tensor([math.log(3.0), 0.0, -math.inf]))
    assert found.value == pytest.approx(0.15)
    assert found.low == 0 < found.high
    single = mean_over_runs(torch.tensor([0.1]), torch.tensor([0.0, -math.inf]))
    assert (single.low, single.high) == (0, 1)
    equal = mean_over_runs(torch.zeros(5), torch.zeros(5))
    assert (equal.value, equal.low) == (0, 0) and 0 < equal.high < 1  # noqa: PT018 (one statement)


def test_equal_seeds_give_equal_results():
    inputs, labels, *_ = data(6, 2)
    one, other, third = (
        random_interpolators(inputs, labels, (3,), particles=20, runs=2, seed=seed) for seed in (0, 0, 1)
    )
    torch.testing.assert_close(one.log_joint_runs, other.log_joint_runs, rtol=0, atol=0)
    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)
    assert one.probability != third.probability
    assert one.log_joint_runs.shape == (2, 7, 1)


def test_bad_input_is_named():
    x, y = torch.eye(2), torch.tensor([1.0, -1.0])
    for match, change in {
        "hidden_dims must be at least 1": {"hidden_dims": (0,)},
        "negative_slope must be a number": {"negative_slope": math.nan},
        "targets must be two labels": {"targets": torch.tensor([1.0, 3.0])},
        "test_targets must be given too": {"test_inputs": x},
        "test_inputs must be given too": {"test_targets": y},
        r"test_inputs must have d0 = 2 columns, as inputs, got 3": {"test_inputs": torch.ones(2, 3), "test_targets": y},
        "test_targets must have shape": {"test_inputs": x, "test_targets": torch.ones(3)},
        "particles must be at least 1": {"particles": 0},
        "runs must be at least 2": {"runs": 1},
        "moves must be one of walk, paths, got 'hmc'": {"moves": "hmc"},
        "seed must not be negative": {"seed": -1},
    }.items():
        with pytest.raises(ValueError, match=match):
            random_interpolators(**{"inputs": x, "targets": y, "hidden_dims": (2,)} | change)
