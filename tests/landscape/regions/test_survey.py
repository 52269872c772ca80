import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mnn.landscape import Network, infer_threshold, merge_statistics, network_statistics
from lightning_mnn.landscape.labels import wrong
from lightning_mnn.landscape.regions.statistics import exact_patterns, on_cpu, rank_cap
from tests import naive


def replicas_of(problem):
    """Pairs (problem, survey value getter) of every replica."""
    if problem.network.output_weights.ndim == 1:
        return [(problem, lambda value: value)]
    count = problem.network.output_weights.shape[0]
    return [(problem.replica(r), lambda value, r=r: value[r]) for r in range(count)]


@given(naive.problems())
def test_survey_agrees_with_loops(problem):
    found = network_statistics(problem.network, problem.inputs, problem.targets, threshold=0.5)
    for single, pick in replicas_of(problem):
        layers, outputs = naive.forward(single)
        errors = single.targets.numpy() - np.array(outputs)
        np.testing.assert_allclose(pick(found.squared_error), (errors**2).sum(), rtol=1e-10, atol=1e-24)
        np.testing.assert_allclose(pick(found.mse), (errors**2).mean(), rtol=1e-10, atol=1e-24)
        mistakes = sum((o - 0.5) * (y - 0.5) <= 1e-12 for o, y in zip(outputs, single.targets.tolist(), strict=True))
        assert pick(found.wrong) == mistakes
        assert float(pick(found.mce)) == mistakes / len(outputs)
        everything = [abs(u) for layer in layers for sample in layer for u in sample]
        for layer, u, inputs in zip(found.layers, layers, naive.layer_inputs(single), strict=True):
            active = np.array(u) > 0
            assert pick(layer.active).tolist() == active.sum(0).tolist()
            assert int(pick(layer.unactivated)) == sum(not any(row) for row in active)
            bits = type(layer.pattern)(pick(layer.bits), layer.pattern.width)
            assert bits.unpack().active.tolist() == active.tolist()
            slopes = np.where(active, 1, single.network.negative_slope)
            np.testing.assert_allclose(pick(layer.slopes_gram), slopes.T @ slopes, atol=1e-12)
            rows = [[abs(v) for v, x in zip(column, inputs, strict=True) if np.any(x)] for column in np.array(u).T]
            smallest = min((min(row) for row in rows if row), default=np.inf)
            np.testing.assert_allclose(pick(layer.smallest_preactivation), smallest, rtol=1e-9, atol=1e-13)
        if all(np.any(x) for inputs in naive.layer_inputs(single) for x in inputs):
            np.testing.assert_allclose(pick(found.smallest_preactivation), min(everything), rtol=1e-9, atol=1e-13)


@given(naive.problems())
def test_correlation_is_g_e_and_the_gradient(problem):
    found = network_statistics(problem.network, problem.inputs, problem.targets)
    for single, pick in replicas_of(problem):
        scale = 1 + float(single.inputs.norm()) ** 3
        naive_g_e = naive.last_correlation(single)
        np.testing.assert_allclose(pick(found.layers[-1].correlation), naive_g_e, atol=1e-11 * scale)
        *earlier, last = naive.gradients(single)
        count = len(single.targets)
        z = single.network.output_weights.numpy()[:, None]
        np.testing.assert_allclose(-2 / count * z * naive_g_e, last, atol=1e-11 * scale)
        for layer, gradient in zip(found.layers, earlier, strict=False):
            np.testing.assert_allclose(-2 / count * pick(layer.correlation), gradient, atol=1e-11 * scale)


@given(naive.problems(max_layers=1))
def test_sines_and_stationarity_agree_with_loops(problem):
    found = network_statistics(problem.network, problem.inputs, problem.targets)
    for single, pick in replicas_of(problem):
        weights, inputs = single.network.hidden_weights[0].numpy(), single.inputs.numpy()
        sines = [min(abs(w @ x) / np.linalg.norm(w) / np.linalg.norm(x) for x in inputs) for w in weights]
        np.testing.assert_allclose(pick(found.layers[0].smallest_sines), sines, rtol=1e-9, atol=1e-14)
        active = np.array(naive.forward(single)[0][0]) > 0
        slopes = np.where(active, 1, single.network.negative_slope)
        squared_norm = sum((slopes[n] ** 2).sum() * (inputs[n] ** 2).sum() for n in range(len(inputs)))
        scale = np.sqrt(squared_norm) * np.linalg.norm(single.targets)
        size = np.linalg.norm(naive.last_correlation(single))
        expected = size / scale if scale else (np.inf if size else 0.0)
        np.testing.assert_allclose(pick(found.stationarity), expected, rtol=1e-9, atol=1e-14)


@given(naive.problems(), st.data())
def test_merged_parts_equal_the_whole(problem, data):
    count = problem.inputs.shape[-2]
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=3))) if count > 1 else []
    edges = [0, *cuts, count]
    parts = [
        network_statistics(problem.network, problem.inputs[..., a:b, :], problem.targets[..., a:b], 0.5)
        for a, b in itertools.pairwise(edges)
    ]
    whole, merged = network_statistics(problem.network, problem.inputs, problem.targets, 0.5), merge_statistics(parts)
    assert merged.num_samples == whole.num_samples
    for name in ("squared_error", "squared_target", "wrong", "error_excess", "rounding_bound", "stationarity"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-10, atol=1e-13)
    for a, b in zip(merged.layers, whole.layers, strict=True):
        torch.testing.assert_close(a.correlation, b.correlation, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.smallest_sines, b.smallest_sines)
        assert torch.equal(a.bits, b.bits)
        assert a.pattern.digest() == b.pattern.digest()


@st.composite
def biased_problems(draw):
    """Problems of one hidden layer, the same with a hidden bias and an explicit column of ones, and with biases."""
    problem = draw(naive.problems(max_layers=1))
    network = problem.network
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden_bias = torch.randn(network.output_weights.shape, dtype=torch.float64, generator=rng)
    output_bias = torch.randn(network.output_weights.shape[:-1], dtype=torch.float64, generator=rng)
    biased = replace(network, hidden_bias=hidden_bias, output_bias=output_bias if draw(st.booleans()) else None)
    columns = torch.cat([network.hidden_weights[0], hidden_bias[..., None]], -1)
    ones = torch.cat([problem.inputs, torch.ones_like(problem.inputs[..., :1])], -1)
    return biased, problem, naive.Problem(replace(network, hidden_weights=(columns,)), ones, problem.targets)


@given(biased_problems())
def test_a_hidden_bias_is_an_input_of_ones(problems):
    biased, problem, plain = problems
    shift = 0 if biased.output_bias is None else biased.output_bias[..., None]
    found = network_statistics(biased, problem.inputs, problem.targets)
    expected = network_statistics(plain.network, plain.inputs, plain.targets - shift)
    assert torch.equal(biased.augment(problem.inputs), plain.inputs)
    assert torch.equal(biased.rows, plain.network.hidden_weights[0])
    assert biased.input_dim == problem.inputs.shape[-1]
    torch.testing.assert_close(found.squared_error, expected.squared_error, rtol=1e-10, atol=1e-20)
    torch.testing.assert_close(found.layers[0].correlation, expected.layers[0].correlation, rtol=1e-10, atol=1e-11)
    for name in ("squared_norm", "smallest_preactivation", "smallest_sines", "kinks", "active", "slopes_gram", "bits"):
        torch.testing.assert_close(getattr(found.layers[0], name), getattr(expected.layers[0], name), rtol=0, atol=0)
    for pattern, layer in zip(exact_patterns(biased, problem.inputs), found.layers, strict=True):
        assert torch.equal(pattern.active, layer.pattern.unpack().active)
    if biased.output_bias is None:
        assert found.error_sum is None
        assert torch.equal(found.stationarity, expected.stationarity)
        assert torch.equal(found.rounding_bound, expected.rounding_bound)
    else:
        layer, squared_target = found.layers[0], problem.targets.square().sum(-1)
        sizes = layer.correlation.norm(dim=(-2, -1)), found.error_sum.abs()
        scales = (layer.squared_norm * squared_target).sqrt(), (problem.targets.shape[-1] * squared_target).sqrt()
        first, last = (torch.where(a == 0, 0.0, a / b) for a, b in zip(sizes, scales, strict=True))
        torch.testing.assert_close(found.stationarity, torch.maximum(first, last), rtol=1e-9, atol=1e-13)


@given(biased_problems())
def test_surveys_of_biased_parts_merge(problems):
    biased, problem, _ = problems
    cut = problem.inputs.shape[-2] // 2
    whole = network_statistics(biased, problem.inputs, problem.targets)
    if cut:
        halves = (slice(0, cut), slice(cut, None))
        parts = [network_statistics(biased, problem.inputs[..., h, :], problem.targets[..., h]) for h in halves]
        merged = on_cpu(merge_statistics(parts))
        torch.testing.assert_close(merged.error_sum, whole.error_sum, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(merged.stationarity, whole.stationarity, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kink", "slope"), [(nn.ReLU(), 0.0), (nn.LeakyReLU(0.3), 0.3), (nn.PReLU(init=-0.5), -0.5)])
@pytest.mark.parametrize("biases", list(itertools.product([False, True], repeat=2)))
def test_survey_of_torchs_own_layers(kink, slope, biases):
    torch.manual_seed(0)
    first, last = (nn.Linear(*dims, bias=b) for dims, b in zip([(5, 7), (7, 1)], biases, strict=True))
    net = nn.Sequential(first, kink, last).double()
    x, y = torch.randn(30, 5).double(), torch.randint(0, 2, (30,)).double()
    residual = y - net(x)[:, 0]
    residual.square().mean().backward()
    network = Network(
        (first.weight.detach(),),
        last.weight.detach()[0],
        slope,
        hidden_bias=first.bias.detach() if biases[0] else None,
        output_bias=last.bias.detach()[0] if biases[1] else None,
    )
    found = network_statistics(network, x, y, 0.5)
    torch.testing.assert_close(found.mse, residual.detach().square().mean())
    gradient = -2 / 30 * network.output_weights[:, None] * found.layers[0].correlation
    torch.testing.assert_close(gradient[:, :5], first.weight.grad)
    if biases[0]:
        torch.testing.assert_close(gradient[:, 5], first.bias.grad)
    if biases[1]:
        torch.testing.assert_close(-2 / 30 * found.error_sum, last.bias.grad[0])


def test_rounding_bound_covers_biases():
    w, z = torch.ones(1, 1), torch.ones(1)
    x, y = torch.zeros(1, 1), torch.zeros(1)
    bounds = [
        float(network_statistics(Network((w,), z, 0.0, **biases), x, y).rounding_bound)
        for biases in ({}, {"hidden_bias": torch.tensor([1e6])}, {"output_bias": torch.tensor(-1e6)})
    ]
    assert bounds[0] == 0
    assert min(bounds[1:]) > 1e6 * 2.0**-53


def test_a_sample_at_the_origin_can_be_on_a_kink_where_there_is_a_bias():
    network = Network((torch.ones(1, 1),), torch.ones(1), 0.0, hidden_bias=torch.zeros(1))
    assert int(network_statistics(network, torch.zeros(1, 1), torch.zeros(1)).kinks) == 1


def test_biases_of_deep_networks_are_refused():
    deep = (torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="output_bias given with 2 hidden layers"):
        Network(deep, torch.ones(2), 0.0, output_bias=torch.tensor(1.0))


def test_a_network_on_another_device_or_in_another_precision_keeps_its_biases():
    network = Network((torch.ones(1, 1),), torch.ones(1), 0.1, 2.0**-24, torch.ones(1), torch.tensor(1.0))
    wide = network.to(torch.float64)
    assert [t.dtype for t in wide.tensors] == [torch.float64] * 4
    assert (wide.negative_slope, wide.unit_roundoff) == (0.1, 2.0**-24)


@settings(max_examples=60)
@given(naive.problems(replicas=[None]), st.floats(-6, 6))
def test_rounding_bound_holds(problem, exponent):
    """The float64 residual differs from the one in extended precision by no more than the bound."""
    scaled = problem.inputs * 10**exponent
    found = network_statistics(problem.network, scaled, problem.targets)
    hidden = scaled.numpy().astype(np.longdouble)
    for weights in problem.network.hidden_weights:
        u = hidden @ weights.numpy().astype(np.longdouble).T
        hidden = np.where(u > 0, u, np.longdouble(problem.network.negative_slope) * u)
    exact = problem.targets.numpy() - hidden @ problem.network.output_weights.numpy().astype(np.longdouble)
    u64 = scaled
    for weights in problem.network.hidden_weights:
        u64 = u64 @ weights.T
        u64 = torch.where(u64 > 0, u64, problem.network.negative_slope * u64)
    computed = (problem.targets - u64 @ problem.network.output_weights).numpy()
    assert np.abs(computed - exact).max() <= float(found.rounding_bound)


@settings(max_examples=60)
@given(naive.problems(replicas=[None]))
def test_rounding_bound_covers_weights_rounded_to_single_precision(problem):
    exact = problem.network
    hidden = tuple(w.float().double() for w in exact.hidden_weights)
    rounded = Network(hidden, exact.output_weights.float().double(), exact.negative_slope, 2.0**-24)
    bound = float(network_statistics(rounded, problem.inputs, problem.targets).rounding_bound)
    outputs = [naive.forward(naive.Problem(n, problem.inputs, problem.targets))[1] for n in (exact, rounded)]
    assert max(abs(a - b) for a, b in zip(*outputs, strict=True)) <= bound


def test_zero_error_at_a_fitted_point_and_not_beside_it():
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, z = torch.eye(8, dtype=torch.float64), torch.linspace(-1, 1, 8, dtype=torch.float64)
    y = torch.relu(x @ w.T) @ z
    network = Network((w,), z, 0.0)
    assert bool(network_statistics(network, x, y).zero_error)
    assert not bool(network_statistics(network, x, y + 1e-10).zero_error)
    assert bool(network_statistics(Network((w,), z, 0.0, unit_roundoff=2.0**-24), x, y + 1e-10).zero_error)


def test_zero_inputs_and_zero_rows():
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[0.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    layer = network_statistics(Network((w,), torch.ones(2), 0.0), x, torch.zeros(2)).layers[0]
    assert layer.smallest_sines.tolist() == [0.0, 2 / np.sqrt(5)]  # a zero row is on a kink, a zero input is not
    assert int(layer.kinks) == 1
    assert float(layer.smallest_preactivation) == 0.0


@given(naive.problems(max_layers=1, replicas=[None]))
def test_rank_cap_is_an_upper_bound(problem):
    from lightning_mnn.landscape import Region
    from lightning_mnn.landscape.regions.region import gram_rank

    found = network_statistics(problem.network, problem.inputs, problem.targets)
    slope = problem.network.negative_slope
    rank = Region(problem.inputs, found.layers[0].pattern.unpack(), slope).rank()
    cap = rank_cap(found, gram_rank(problem.inputs.T @ problem.inputs), slope)
    assert rank <= int(cap) <= problem.inputs.shape[0]


@given(naive.problems(), st.sampled_from([torch.float32, torch.float64]))
def test_patterns_alone_are_those_of_the_survey(problem, dtype):
    hidden = tuple(w.to(dtype) for w in problem.network.hidden_weights)
    network = Network(hidden, problem.network.output_weights.to(dtype), problem.network.negative_slope)
    inputs = problem.inputs.to(dtype)
    patterns = exact_patterns(network, inputs)
    for pattern, layer in zip(patterns, network_statistics(network, inputs, problem.targets).layers, strict=True):
        assert torch.equal(pattern.active, layer.pattern.unpack().active)


@pytest.mark.parametrize("replicas", [None, 2])
def test_signs_that_single_precision_cannot_tell_are_exact(replicas):
    """Each unit's weights are turned until every sample is within float32 rounding of its kink."""
    rng = torch.Generator().manual_seed(0)
    lead = () if replicas is None else (replicas,)
    x = torch.randn(*lead, 200, 50, generator=rng)
    w = torch.randn(*lead, 30, 50, generator=rng)
    n = torch.arange(30)
    near = (
        w.double()
        - ((w.double() * x[..., n, :]).sum(-1) / x[..., n, :].double().square().sum(-1))[..., None] * x[..., n, :]
    )
    network = Network((near.float(),), torch.ones(*lead, 30), 0.0, 2.0**-24)
    expected = x.double() @ network.hidden_weights[0].double().mT > 0
    (found,) = exact_patterns(network, x)
    single = x @ network.hidden_weights[0].mT > 0
    assert torch.equal(found.active, expected)
    assert not torch.equal(single, expected)  # or this test tests nothing


def test_patterns_are_formed_in_all_digits(float32_precisions):
    x, w = torch.randn(9, 4), torch.randn(3, 4)
    with float32_precisions("matmul") as met:
        (found,) = exact_patterns(Network((w,), torch.ones(3), 0.0, 2.0**-24), x)
    assert met == {"highest"}
    assert torch.equal(found.active, x.double() @ w.double().T > 0)


def test_wrong_dimension_is_named():
    with pytest.raises(ValueError, match="inputs have 3 features and the network takes 2"):
        network_statistics(Network((torch.ones(4, 2),), torch.ones(4), 0.0), torch.ones(5, 3), torch.ones(5))


@pytest.mark.parametrize("size", [1e-200, 1e-7, 1.0, 1e7, 1e200])
@pytest.mark.parametrize(("labels", "threshold"), [((0.0, 1.0), 0.5), ((-1.0, 1.0), 0.0)])
def test_what_is_wrong_does_not_depend_on_the_size_of_the_labels(labels, threshold, size):
    targets = torch.tensor(labels, dtype=torch.float64) * size
    assert wrong(targets, targets, threshold * size).tolist() == [False, False]
    assert wrong(targets.flip(0), targets, threshold * size).tolist() == [True, True]
    near = threshold * size + 1e-13 * (targets - threshold * size)
    assert wrong(near, targets, threshold * size).tolist() == [True, True]  # on the threshold, up to rounding
    right = threshold * size + 1e-11 * (targets - threshold * size)
    assert wrong(right, targets, threshold * size).tolist() == [False, False]


def test_labels_0_1_and_plus_minus_1_are_compared_with_1e_12_itself():
    for low, threshold in ((0.0, 0.5), (-1.0, 0.0)):
        y = torch.tensor([1.0, low], dtype=torch.float64).repeat(200)
        products = torch.logspace(-12.5, -11.5, 400, dtype=torch.float64)
        predictions = threshold + products / (y - threshold)
        expected = ~((predictions - threshold) * (y - threshold) > 1e-12)
        assert torch.equal(wrong(predictions, y, threshold), expected)


def test_threshold_of_labels():
    assert infer_threshold(torch.tensor([0, 1, 0])) == 0.5
    assert infer_threshold(torch.tensor([-1.0, 1.0])) == 0.0
    assert infer_threshold(torch.tensor([0.0, 0.0])) == 0.5
    assert infer_threshold(torch.tensor([0.0, 0.3])) is None
    assert infer_threshold(torch.tensor([0.0, -1.0])) is None
    with pytest.raises(ValueError, match="fits labels"):
        infer_threshold(torch.tensor([1.0, 1.0]))
