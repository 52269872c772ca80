import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binomtest, norm

from lightning_mnn.landscape import random_interpolators
from lightning_mnn.landscape.volumes.rare_events import interpolators, splitting
from lightning_mnn.landscape.volumes.rare_events.interpolators import Architecture
from lightning_mnn.landscape.volumes.rare_events.paths import PathPopulation


def first(weights):
    return weights[:, 0]


def tail(level, seed=0, score=first, **options):
    """The last stage, and the estimate, of {score ≥ level} with three weights."""
    options = {"particles": 1000, "runs": 8, "steps": 40, "seed": seed} | options
    stages = list(splitting.splitting_stages(score, (3,), level, **options, population=PathPopulation))
    return stages[-1], splitting.estimate_of_levels([stage.log_runs for stage in stages], options["particles"])


def two_units(num_samples, positive):
    """ln P of a ReLU network with two units on orthogonal inputs, by quadrature over the angle of its output weights.

    An output is positive with probability (2 − u)/4, negative with (1 + u)/4 and otherwise 0, if the output weights
    have different signs, which has probability 1/2, with u uniform in (0, 1); otherwise one label is impossible.
    """
    negative = num_samples - positive

    def log_density(u):
        return positive * math.log(2 - u) + negative * math.log(1 + u)

    top = max(log_density(k / 1000) for k in range(1001))
    integral, _ = quad(lambda u: math.exp(log_density(u) - top), 0, 1)
    return math.log(integral / 2) + top - num_samples * math.log(4)


def orthogonal(num_samples):
    labels = torch.ones(num_samples, dtype=torch.float64)
    labels[::2] = -1
    return torch.eye(num_samples, dtype=torch.float64), labels


@pytest.mark.parametrize("level", [0.5, 3.0, 6.0])
def test_tails_of_the_normal_distribution(level):
    last, found = tail(level)
    assert found.low < norm.sf(level) < found.high
    assert found.high / found.low < 30
    assert last.weights.shape == (8, 1000, 3)
    assert (first(last.weights.flatten(0, 1)) >= level).all()
    torch.testing.assert_close(first(last.weights.flatten(0, 1)), last.scores.flatten())


def test_states_have_the_law_of_the_event():
    last, _ = tail(3.0, particles=2000)
    means = last.weights.mean(1)
    expected = torch.tensor([norm.pdf(3) / norm.sf(3), 0.0, 0.0])
    assert ((means.mean(0) - expected).abs() < 5 * means.std(0) / math.sqrt(8) + 0.01).all()
    assert ((last.weights[..., 1:].flatten(0, 1).var(0) - 1).abs() < 0.25).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score", "level", "exact"),
    [(first, 4.0, norm.sf(4)), (lambda w: w.abs().amax(1), 3.5, 1 - (1 - 2 * norm.sf(3.5)) ** 3)],
    ids=["half-space", "six caps"],
)
def test_runs_are_unbiased_and_intervals_cover(score, level, exact):
    found = [tail(level, seed, score, particles=400, steps=40, runs=10) for seed in range(60)]
    runs = torch.cat([last.log_runs for last, _ in found]).exp() / exact
    assert abs(float(runs.mean()) - 1) < 4 * float(runs.std()) / math.sqrt(len(runs))
    covered = sum(each.low <= exact <= each.high for _, each in found)
    assert binomtest(covered, 60, 0.95, alternative="less").pvalue > 1e-4


def population(score, shape, seed=0):
    blocks = splitting._Blocks.of(None, shape[2:], torch.device("cpu"))
    return PathPopulation(score, shape, blocks, 5, torch.Generator().manual_seed(seed))


def corner(weights):
    """Its level sets are corners."""
    return weights.amin(1)


@pytest.mark.parametrize("size", [0.05, 0.4, 1.2])
def test_a_step_goes_back_where_it_came_from(size):
    particles = population(corner, (2, 200, 4))
    particles.weights = particles.weights.abs() + 0.3
    particles.scores = corner(particles.weights.flatten(0, 1)).reshape(2, 200)
    start, velocity = particles.weights.clone(), particles._normal((2, 200, 4))
    moved, left = particles._step(velocity, 0.3, size)
    assert (particles.scores >= 0.3).all()
    stayed = float((particles.weights == start).all(2).double().mean())
    assert size < 0.1 or 0 < stayed <= float(left) < 1
    energies = particles.weights.square().sum(2) + moved.square().sum(2)
    torch.testing.assert_close(energies, start.square().sum(2) + velocity.square().sum(2))
    back, _ = particles._step(-moved, 0.3, size)
    torch.testing.assert_close(particles.weights, start)
    torch.testing.assert_close(back, -velocity)


def test_reflecting_all_particles_changes_nothing(monkeypatch):
    options = {"particles": 60, "runs": 3, "steps": 5}
    some, _ = tail(3.0, **options)
    monkeypatch.setattr(PathPopulation, "_reflected", lambda _, below: torch.arange(len(below)))
    whole, _ = tail(3.0, **options)
    torch.testing.assert_close(some.weights, whole.weights)
    torch.testing.assert_close(some.log_runs, whole.log_runs)
    assert some.evaluations < whole.evaluations


def test_every_state_that_reaches_a_level_starts_equally_many_paths():
    counts = torch.zeros(12)
    for seed in range(400):
        particles = population(first, (1, 12, 1), seed)
        particles.weights[0, :, 0] = particles.scores[0] = torch.arange(12.0, dtype=torch.float64)
        assert particles.climb(5.0).tolist() == pytest.approx([7 / 12])
        starts = particles.weights.flatten().long()
        assert len(set(starts.tolist())) == 3  # of paths of five states each
        counts[starts] += 1
    assert (counts[:5] == 0).all()
    assert ((counts[5:] / 400 - 3 / 7).abs() < 4 * math.sqrt(3 / 7 * 4 / 7 / 400)).all()


def test_a_perceptron_on_orthogonal_inputs():
    inputs, labels = orthogonal(40)
    found = random_interpolators(inputs, labels, (), particles=500, steps=20, moves="paths").probability
    assert found.log_low < -40 * math.log(2) < found.log_high
    assert found.log_high - found.log_low < 4


def test_two_units_on_orthogonal_inputs():
    inputs, labels = orthogonal(16)
    found = random_interpolators(inputs, labels, (2,), particles=1000, steps=20, moves="paths").probability
    assert found.log_low < two_units(16, 8) < found.log_high
    assert found.log_high - found.log_low < 5


def test_the_closed_form_of_two_units_agrees_with_plain_draws():
    inputs, labels = orthogonal(4)
    theta = torch.randn(200_000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = float((Architecture(4, (2,)).outputs(theta, inputs) * labels > 0).all(1).double().mean())
    exact = math.exp(two_units(4, 2))
    assert abs(share - exact) < 4 * math.sqrt(exact / 200_000)


def test_the_score_falls_before_an_output_is_zero():
    inputs, labels = orthogonal(3)
    network = Architecture(3, (2,))
    score = interpolators._margin_score(network, interpolators._Samples.of(inputs, labels, None))
    theta = torch.randn(500, network.num_weights, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = (network.outputs(theta, inputs) * labels > 0).all(1)
    assert (score(theta) == 0).tolist() == right.tolist()
    assert (score(theta) <= 0).all()
    torch.testing.assert_close(score(3 * theta), score(theta))
    assert score(0 * theta[:1]).tolist() == pytest.approx([-0.6])
