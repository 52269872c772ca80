import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mnn.landscape import network_statistics
from lightning_mnn.landscape.minima.planted import planted_kink_minimum, planted_minimum, planted_saddle
from tests import naive

SLOPES = [0.0, 0.01, 0.3, -1.0]


@st.composite
def sizes(draw, least_dim=2, samples_per_input=1, smallest_width=2, largest=(400, 60, 20)):
    """(N, d0, d1) and ρ."""
    dim = draw(st.integers(least_dim, largest[1]))
    num_samples = draw(st.integers(max(dim + 2, samples_per_input * dim), largest[0]))
    return num_samples, dim, draw(st.integers(smallest_width, largest[2])), draw(st.sampled_from(SLOPES))


seeds = st.integers(0, 2**32 - 1)


def loss(planted, w, z):
    """The MSE at other weights."""
    u = planted.inputs.numpy() @ w.T
    outputs = np.where(u > 0, u, planted.negative_slope * u) @ z
    return ((planted.targets.numpy() - outputs) ** 2).mean()


def forces(planted):
    """Rows Σ_{n∉B_i} e_n A_ni x_n by a double loop, and for each the sum of the norms of its terms."""
    x, w, e = planted.inputs.numpy(), planted.hidden_weights.numpy(), planted.residual.numpy()
    found, sizes = np.zeros(w.shape), np.zeros(len(w))
    for n in range(len(x)):
        for i in range(len(w)):
            if not planted.kinks[n, i]:
                term = e[n] * (1.0 if w[i] @ x[n] > 0 else planted.negative_slope) * x[n]
                found[i] += term
                sizes[i] += np.linalg.norm(term)
    return found, sizes


def sines(planted):
    """|w·x|/(‖w‖‖x‖), (N, d1)."""
    x, w = planted.inputs.numpy(), planted.hidden_weights.numpy()
    return np.abs(x @ w.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(w, axis=1)


@settings(max_examples=60)
@given(sizes(), seeds)
def test_planted_minimum_has_no_force_and_the_error_of_the_linear_model(size, seed):
    *shape, slope = size
    planted = planted_minimum(*shape, slope, seed=seed)
    x, w, z = planted.inputs.numpy(), planted.hidden_weights.numpy(), planted.output_weights.numpy()
    assert (len(x), w.shape[1], w.shape[0]) == tuple(shape)
    force, _ = forces(planted)
    features = np.where(x @ w[1] > 0, 1.0, slope)[:, None] * x
    y = planted.targets.numpy()
    assert np.linalg.norm(force, axis=1).max() <= 1e-12 * np.linalg.norm(features) * np.linalg.norm(y)
    linear = ((y - features @ np.linalg.lstsq(features, y)[0]) ** 2).mean()
    assert planted.mse == pytest.approx(linear, rel=1e-9)
    assert loss(planted, w, z) == pytest.approx(linear, rel=1e-9)
    assert planted.mse > 1e-6
    assert set(np.unique(y)) == {0.0, 1.0}
    assert len(np.unique(np.sign(x @ w.T), axis=1).T) == 1  # one pattern
    assert sines(planted).min() > 1e-6
    assert not planted.kinks.any()
    assert np.count_nonzero(z) == 2


@pytest.mark.parametrize("slope", SLOPES)
def test_planted_minimum_is_one_numerically(slope):
    planted = planted_minimum(30, 4, 5, slope)
    w, z = planted.hidden_weights.numpy(), planted.output_weights.numpy()
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = 10 ** rng.uniform(-4, -2)  # relative to the margins
        moved = w + size * sines(planted).min() * rng.standard_normal(w.shape)
        assert loss(planted, moved, z + size * rng.standard_normal(z.shape)) >= planted.mse * (1 - 1e-12)


def test_planted_minimum_takes_data():
    x = torch.cat([torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3)])
    y = torch.linspace(-2, 5, 21)
    planted = planted_minimum(21, 3, 2, inputs=x, targets=y)
    assert torch.equal(planted.inputs, x.double())
    assert torch.equal(planted.targets, y.double())
    assert planted.inputs.dtype == planted.targets.dtype == torch.float64
    force, scale = forces(planted)
    assert np.all(np.linalg.norm(force, axis=1) <= 1e-11 * scale)
    assert set(planted_minimum(9, 3, 2, labels=(-1, 1)).targets.tolist()) == {-1.0, 1.0}


@st.composite
def kink_problems(draw, *, violated=False):
    """A planted point on kinks, and a generator."""
    *shape, slope = draw(sizes(samples_per_input=4, smallest_width=1, largest=(150, 15, 8)))
    count = draw(st.integers(1, min(4, shape[1] - 1)))
    seed = draw(seeds)
    planted = planted_kink_minimum(*shape, slope, kinks_per_unit=count, violated=violated, seed=seed)
    return planted, count, np.random.default_rng(seed)


def probes(planted, i):
    """Moves v of row i along ± the columns of pinv(X_B), in boxes |v·x_n| < |w_i·x_n| of several sizes."""
    x, w, on_kink = planted.inputs.numpy(), planted.hidden_weights.numpy(), planted.kinks[:, i].numpy()
    for column in np.linalg.pinv(x[on_kink]).T:
        edge = 1 / np.abs((x[~on_kink] @ column) / (x[~on_kink] @ w[i])).max()
        for size in (0.5, 0.1, 0.01):
            yield size * edge * column
            yield -size * edge * column


def probed_losses(planted):
    w, z = planted.hidden_weights.numpy(), planted.output_weights.numpy()
    for i in range(len(w)):
        for v in probes(planted, i):
            moved = w.copy()
            moved[i] += v
            yield loss(planted, moved, z)


@settings(max_examples=60)
@given(kink_problems())
def test_planted_kink_minimum_is_one(problem):
    planted, count, rng = problem
    w, z, x = planted.hidden_weights.numpy(), planted.output_weights.numpy(), planted.inputs.numpy()
    off = ~planted.kinks.numpy()
    assert planted.kinks.sum(0).tolist() == [count] * len(w)
    assert np.all(sines(planted)[~off] < 1e-15)
    assert sines(planted)[off].min() > 4e-7
    assert np.all(np.abs(z) >= 0.5)
    assert planted.wrong_kink is None
    assert loss(planted, w, z) == pytest.approx(planted.mse, rel=1e-12)
    assert planted.mse > 1e-4
    for changed in probed_losses(planted):
        assert changed >= planted.mse * (1 - 1e-13)
    for _ in range(50):
        v = rng.standard_normal(w.shape)
        ratio = np.abs(x @ v.T)[off] / np.abs(x @ w.T)[off]
        size = rng.choice([0.9, 0.1, 0.001])
        moved = loss(planted, w + size / ratio.max() * v, z * (1 + rng.uniform(-size, size, z.shape)))
        assert moved >= planted.mse * (1 - 1e-13)


@settings(max_examples=40)
@given(kink_problems())
def test_multipliers_of_a_planted_kink_minimum_have_their_margin(problem):
    planted, _, _ = problem
    assert least_multipliers(planted).min() >= 0.05 - 1e-9


@settings(max_examples=60)
@given(kink_problems(violated=True))
def test_a_violated_multiplier_gives_a_descent_direction(problem):
    planted, _, _ = problem
    sample, unit = planted.wrong_kink
    assert bool(planted.kinks[sample, unit])
    found = least_multipliers(planted)
    same_group = (planted.kinks == planted.kinks[:, unit : unit + 1]).all(0).numpy()
    assert np.all(found[same_group] <= -0.05 + 1e-9)
    assert np.all(found[~same_group] >= 0.05 - 1e-9)
    assert min(probed_losses(planted)) < planted.mse * (1 - 1e-12)


def least_multipliers(planted):
    """For each unit the least sign(z)(c + ρe) and −sign(z)(c + e) on its kinks; that there are such c is checked."""
    x, e, slope = planted.inputs.numpy(), planted.residual.numpy(), planted.negative_slope
    force, scale = forces(planted)
    least = []
    for i, sign in enumerate(np.sign(planted.output_weights.numpy())):
        on_kink = planted.kinks[:, i].numpy()
        c = np.linalg.lstsq(x[on_kink].T, force[i])[0]
        assert np.linalg.norm(x[on_kink].T @ c - force[i]) <= 1e-11 * scale[i]  # stationary on the face
        least.append(min((sign * (c + slope * e[on_kink])).min(), -(sign * (c + e[on_kink])).max()))
    return np.array(least)


def test_planted_kink_minima_have_both_signs_and_patterns_of_their_own():
    planted = planted_kink_minimum(400, 10, 20, 0.1, kinks_per_unit=3)
    assert set(planted.output_weights.sign().tolist()) == {-1.0, 1.0}
    patterns = (planted.inputs @ planted.hidden_weights.mT > 0).T.tolist()
    assert len({tuple(pattern) for pattern in patterns}) >= 13
    assert int(planted.kinks.sum()) == 60


@settings(max_examples=40)
@given(sizes(samples_per_input=2, smallest_width=3, largest=(200, 20, 8)), seeds)
def test_planted_saddle_has_no_gradient_and_a_way_down(size, seed):
    *shape, slope = size
    planted = planted_saddle(*shape, slope, seed=seed)
    w, z = (t.clone().requires_grad_() for t in (planted.hidden_weights, planted.output_weights))
    mse = (torch.nn.functional.leaky_relu(planted.inputs @ w.T, slope) @ z - planted.targets).square().mean()
    assert float(mse.detach()) == pytest.approx(planted.mse, rel=1e-9)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(mse, (w, z))])
    scale = float(z.detach().abs().max() * planted.inputs.norm() * planted.residual.norm()) / shape[0]
    assert float(gradient.norm()) <= 1e-11 * scale
    force, terms = forces(planted)
    assert not planted.output_weights[2]
    assert np.linalg.norm(force[2]) > 1e-3 * terms[2]
    assert sines(planted).min() > 1e-7
    moved_w, moved_z = planted.hidden_weights.numpy().copy(), planted.output_weights.numpy().copy()
    x = planted.inputs.numpy()
    step = 0.5 / np.abs((x @ force[2]) / (x @ moved_w[2])).max()  # half way to the nearest kink
    moved_w[2] += step * force[2]
    u = x @ moved_w[2]
    outputs = np.where(u > 0, u, slope * u)
    moved_z[2] = step * np.linalg.norm(force[2]) ** 2 / (outputs @ outputs)  # the bottom of a parabola
    gain = (step * np.linalg.norm(force[2]) ** 2) ** 2 / (outputs @ outputs) / shape[0]
    assert planted.mse - loss(planted, moved_w, moved_z) == pytest.approx(gain, rel=1e-3, abs=1e-12 * planted.mse)


def test_the_same_seed_plants_the_same():
    for plant in (planted_minimum, planted_kink_minimum, planted_saddle):
        a, b, c = (plant(30, 4, 3, 0.1, seed=seed) for seed in (1, 1, 2))
        for name in ("inputs", "targets", "hidden_weights", "output_weights"):
            assert torch.equal(getattr(a, name), getattr(b, name))
            assert getattr(a, name).dtype == torch.float64
        assert not torch.equal(a.inputs, c.inputs)


def test_the_survey_agrees():
    for plant in (planted_minimum, planted_kink_minimum, planted_saddle):
        planted = plant(40, 4, 3, 0.1)
        found = network_statistics(planted.network, planted.inputs, planted.targets)
        assert float(found.mse) == pytest.approx(planted.mse)
        assert int(found.kinks) == int(planted.kinks.sum())
    planted = planted_minimum(40, 4, 3, 0.1)
    problem = naive.Problem(planted.network, planted.inputs, planted.targets)
    np.testing.assert_allclose(naive.last_correlation(problem), 0, atol=1e-11)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda: planted_minimum(5, 4, 2), "num_samples must be at least input_dim"),
        (lambda: planted_minimum(9, 4, 1), "width must be at least 2"),
        (lambda: planted_minimum(9, 4, 2, 1.0), "negative_slope must be a real number other than 1"),
        (lambda: planted_minimum(9, 4, 2, inputs=torch.zeros(9, 3)), "inputs must have the shape"),
        (lambda: planted_minimum(9, 4, 2, targets=torch.zeros(8)), "targets must have the shape"),
        (lambda: planted_minimum(9, 4, 2, targets=torch.zeros(9)), "fits the targets without error"),
        (lambda: planted_kink_minimum(9, 4, 2, kinks_per_unit=4), "kinks_per_unit must be at least 1"),
        (lambda: planted_kink_minimum(9, 4, 2, margin=0.0), "margin must lie between 0 and 1"),
        (lambda: planted_kink_minimum(9, 7, 2, kinks_per_unit=6), "no residual found at num_samples=9"),
        (lambda: planted_saddle(9, 4, 2), "width must be at least 3"),
        (lambda: planted_saddle(9, 1, 3), "input_dim must be at least 2"),
    ],
)
def test_bad_arguments_are_named(plant, message):
    with pytest.raises(ValueError, match=message):
        plant()
