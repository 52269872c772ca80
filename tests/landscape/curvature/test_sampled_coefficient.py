"""Sampled learning coefficients against known truths; settings that must be refused; diagnostics of chains."""

import math

import pytest
import torch

from lightning_mnn.landscape import ReasonCode, certify, estimate_learning_coefficient, planted_kink_minimum
from lightning_mnn.landscape.curvature.chain_diagnostics import drift, effective_samples, error_of_mean, split_r_hat
from lightning_mnn.utilities.validation import ArgumentError
from tests.benchmarks.campaign_learning_coefficients import NETWORKS, around, certified
from tests.landscape.curvature.singular_losses import crossing, expected_crossing, reduced_rank

FLAT = torch.zeros(5, dtype=torch.float64)


def bowl(points):
    """Quadratic in three of five directions: λ = 3/2."""
    return (points[:, :3].square() * torch.tensor([1.0, 0.01, 100.0], dtype=points.dtype)).sum(1)


def agrees(found, truth, share=0.0):
    assert found.is_reliable, found.reason
    assert abs(found.value - truth) < share * truth + 3.5 * found.standard_error
    assert found.reason_code == ReasonCode.CHAINS_AGREE


def test_quadratic_flat_and_linear_directions():
    found = estimate_learning_coefficient(bowl, FLAT, inverse_temperature=1e6, steps=300)
    agrees(found, 1.5)
    assert found.traces.shape == (32, 300)
    assert math.isclose(float(found.traces.mean()), found.value)
    kinked = estimate_learning_coefficient(
        lambda w: w[:, :2].abs().sum(1) + w[:, 2].square(), FLAT, inverse_temperature=1e6, steps=400
    )
    agrees(kinked, 2.5)


def test_more_parameters_than_a_whole_matrix_is_used_for():
    def loss(points):
        return points[:, :40].square().sum(1)

    agrees(
        estimate_learning_coefficient(
            loss, torch.zeros(300, dtype=torch.float64), inverse_temperature=1e4, localisation=10, steps=150
        ),
        20,
    )


@pytest.mark.parametrize("preconditioned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sgld(preconditioned):
    def loss(points):
        return (points[:, :3].square() * torch.tensor([1.0, 2.0, 4.0], dtype=points.dtype)).sum(1)

    found = estimate_learning_coefficient(
        loss,
        FLAT[:3],
        inverse_temperature=1e4,
        adjusted=False,
        preconditioned=preconditioned,
        steps=3000,
        burn_in=200,
    )
    agrees(found, 1.5, 0.03)


@pytest.mark.parametrize(
    "powers", [pytest.param((1, 2), marks=pytest.mark.slow), (2, 2), pytest.param((3, 1), marks=pytest.mark.slow)]
)
def test_normal_crossings_at_a_finite_temperature(powers):
    loss, point, _ = crossing(*powers)
    found = estimate_learning_coefficient(
        loss, point, inverse_temperature=1e4, chains=64, steps=1000, burn_in=200, leapfrog_steps=1
    )
    agrees(found, expected_crossing(*powers, 1e4), 0.03)


def test_reduced_rank_regression():
    loss, point, truth = reduced_rank(2, 1, 4)
    found = estimate_learning_coefficient(loss, point, inverse_temperature=1e3, steps=500)
    agrees(found, truth, 0.05)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])  # planted, with kinks, polished
def test_certified_minima(seed):
    loss, point, truth = certified(seed)
    found = estimate_learning_coefficient(loss, point, **NETWORKS | {"steps": 400})
    agrees(found, truth)


def test_chains_do_not_depend_on_the_global_generator_and_repeat():
    torch.manual_seed(0)
    first = estimate_learning_coefficient(bowl, FLAT, num_samples=1000, steps=20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = estimate_learning_coefficient(bowl, FLAT, num_samples=1000, steps=20)
    assert torch.equal(first.traces, again.traces)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.inverse_temperature == pytest.approx(1000 / math.log(1000))


BAD = {
    "steps that are rejected": (bowl, {"step_size": 200.0}, {ReasonCode.MOVES_REJECTED}),
    "divergence": (
        bowl,
        {"step_size": 0.1, "adjusted": False, "preconditioned": False},
        {ReasonCode.CHAINS_DIVERGED},
    ),
    "a saddle": (
        lambda w: w[:, 0].square() - 1e-2 * w[:, 1].square(),
        {},
        {ReasonCode.LOWER_LOSS_FOUND},
    ),
    "short chains": (
        bowl,
        {"steps": 20, "burn_in": 2},
        {ReasonCode.CHAINS_DRIFT, ReasonCode.CHAINS_DISAGREE, ReasonCode.TOO_FEW_SAMPLES},
    ),
    "two basins": (
        lambda w: (w[:, 0].square() - 1).square() * 1e-3 * (1 + w[:, 0].square()) + w[:, 1:].square().sum(1),
        {"steps": 100, "step_size": 0.01},
        {ReasonCode.CHAINS_DISAGREE, ReasonCode.CHAINS_DRIFT, ReasonCode.LOWER_LOSS_FOUND, ReasonCode.TOO_FEW_SAMPLES},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_and_points_give_a_reason_and_no_value(case):
    loss, options, codes = BAD[case]
    found = estimate_learning_coefficient(loss, FLAT, inverse_temperature=1e6, **{"steps": 300} | options)
    assert (found.value, found.standard_error, found.is_reliable) == (None, None, False)
    assert found.reason_code in codes
    assert found.reason.startswith("unreliable: ")


def test_a_step_whose_half_gives_another_mean_is_refused():
    step = 0.9 * 2 / math.sqrt(2e6)  # for the curvature 2 nβ the mean is 1/(1 − 0.81) times too large
    found = estimate_learning_coefficient(
        lambda w: w.square().sum(1),
        FLAT[:2],
        inverse_temperature=1e6,
        localisation=1.0,
        adjusted=False,
        preconditioned=False,
        step_size=step,
        steps=2000,
    )
    assert found.reason_code in {ReasonCode.STEP_TOO_LARGE, ReasonCode.CHAINS_DIVERGED}


@pytest.mark.parametrize(
    "options", [{}, {"num_samples": 9, "inverse_temperature": 1.0}, {"num_samples": 9, "chains": 0}]
)
def test_arguments_are_checked(options):
    with pytest.raises(ArgumentError):
        estimate_learning_coefficient(bowl, FLAT, **options)


def test_leapfrog_steps_are_of_metropolis_chains():
    with pytest.raises(ArgumentError, match="must be 1 for SGLD"):
        estimate_learning_coefficient(bowl, FLAT, num_samples=9, adjusted=False, leapfrog_steps=3)


def autoregressive(chains, steps, memory, seed=0):
    noise = torch.randn(chains, steps, generator=torch.Generator().manual_seed(seed))
    rows = [noise[:, 0] / math.sqrt(1 - memory**2)]
    for k in range(1, steps):
        rows.append(memory * rows[-1] + noise[:, k])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_effective_samples_of_autoregressive_chains(memory):
    found = effective_samples(autoregressive(16, 2000, memory))
    assert found == pytest.approx(16 * 2000 * (1 - memory) / (1 + memory), rel=0.25)


def test_errors_of_few_means_cover():
    draws = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    covered = [abs(float(one.mean())) <= 1.96 * error_of_mean(one) for one in draws]
    assert 0.935 < sum(covered) / len(covered) < 0.965


def test_chains_apart_and_chains_that_drift():
    traces = autoregressive(8, 500, 0.5)
    assert split_r_hat(traces) < 1.05
    assert drift(traces) < 4
    assert split_r_hat(traces + 3 * torch.arange(8.0)[:, None]) > 2
    assert drift(traces + torch.linspace(0, 3, 500)) > 10
    assert split_r_hat(torch.ones(4, 10)) == 1
    assert split_r_hat(torch.arange(4.0)[:, None].expand(4, 10)) == math.inf
    assert effective_samples(torch.ones(4, 10)) == 0


@pytest.mark.slow
def test_kink_minimum_with_three_linear_directions():
    planted = planted_kink_minimum(20, 3, 3, seed=1)
    found = certify(planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
    loss, point, truth = around(found, planted.inputs, planted.targets)
    agrees(estimate_learning_coefficient(loss, point, **NETWORKS | {"steps": 1000}), truth)
