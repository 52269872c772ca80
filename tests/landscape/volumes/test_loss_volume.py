"""Sampled volumes of sublevel sets against closed forms: ellipsoids, kinks, normal crossings, certified minima."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_mnn.landscape import (
    certify,
    closed_form_log_volume,
    loss_volume,
    minimum_log_volume,
    planted_kink_minimum,
    planted_minimum,
    planted_saddle,
)
from lightning_mnn.landscape.volumes import loss_volume as module
from lightning_mnn.utilities.validation import ArgumentError
from tests.benchmarks.campaign_learning_coefficients import around
from tests.landscape.curvature.singular_losses import crossing

SMALL = {"runs": 8, "particles": 16, "steps": 16}
POSITIVE = st.floats(0.1, 10)


def zeros(size):
    return torch.zeros(size, dtype=torch.float64)


def holds(found, truths, slack=0.6):
    """Whether the intervals hold the truths; wider by a share of themselves, as one in twenty does not."""
    for low, high, truth in zip(found.log_lows, found.log_highs, truths, strict=True):
        room = slack * (high - low)
        assert low - room < truth < high + room, (low, truth, high)


def test_balls_have_the_law_of_chi_squared():
    levels = [1.0, 1e-1, 1e-3, 1e-5]
    found = loss_volume(lambda w: w.square().sum(1), zeros(4), levels, localisation=4.0, **SMALL)
    assert found.levels == tuple(levels)
    holds(found, [stats.chi2.logcdf(4 * level, 4) for level in levels])
    assert abs(found.slopes[-1] - 2) < 3 * found.slope_errors[-1] + 1e-3
    assert (found.lowest, found.localisation) == (0.0, 4.0)


def test_ellipsoids_kinks_and_flat_directions():
    def loss(w):
        scaled = w[:, 1:3].square() * torch.tensor([0.1, 10.0], dtype=w.dtype)
        return 2 * w[:, 0].relu() + (-w[:, 0]).relu() + scaled.sum(1) / 2

    levels = [1e-5, 1e-7]
    bounds = closed_form_log_volume(levels, [0.1, 10.0], [2 / (1 / 2 + 1 / 1)])
    holds(loss_volume(loss, zeros(5), levels, **SMALL), bounds.high)
    assert all(high - low < 1e-2 for low, high in zip(bounds.low, bounds.high, strict=True))


def crossing_log_volume(level, power):
    """log P(|x y|^power ≤ ε) of two standard normal numbers: the density of their product is K₀(|t|)/π."""
    logs = np.linspace(-60, math.log(level) / power, 20_001)
    from scipy.special import k0

    return math.log(np.trapezoid(2 * k0(np.exp(logs)) / math.pi * np.exp(logs), logs))


def test_normal_crossings_and_their_multiplicity():
    loss, point, _ = crossing(2, 2)  # (x² y²)² = |x y|⁴
    levels = [1e-2, 1e-6, 1e-10]
    truths = [crossing_log_volume(level, 4) for level in levels]
    found = loss_volume(loss, point, levels, **SMALL)
    holds(found, truths)
    slope = (truths[1] - truths[2]) / math.log(levels[1] / levels[2])  # still far below ¼, its limit
    assert slope < 0.22
    assert abs(found.slopes[1] - slope) < 3.5 * found.slope_errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kinked", "slope"), [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_certified_minima(kinked, slope, seed):
    if kinked:
        planted = planted_kink_minimum(16, 3, 2, slope, seed=seed)
    else:
        planted = planted_minimum(12, 2, 2, slope, seed=seed)
    x, y = planted.inputs, planted.targets
    certificate = certify(planted.hidden_weights, planted.output_weights, x, y, slope)

    def loss(points):
        hidden, out = points[:, : x.shape[1] * 2].reshape(-1, 2, x.shape[1]), points[:, -2:]
        return ((torch.nn.functional.leaky_relu(hidden @ x.T, slope) * out[..., None]).sum(1) - y).square().mean(-1)

    point = torch.cat([certificate.hidden_weights.flatten(), certificate.output_weights])
    levels = [1e-9, 1e-10]
    truths = minimum_log_volume(certificate, x, y, levels, slope, localisation=1e5)
    found = loss_volume(loss, point, levels, localisation=1e5, **SMALL | {"steps": 32})
    holds(found, truths)
    coefficient = certificate.kink_directions + certificate.positive_directions / 2
    assert abs(found.slopes[0] - coefficient) < 4 * found.slope_errors[0]


@given(
    curvatures=st.lists(POSITIVE, min_size=0, max_size=2),
    slopes=st.lists(POSITIVE, min_size=1, max_size=2),
    gamma=POSITIVE,
)
@settings(max_examples=20, deadline=None)
def test_closed_forms_bound_quadrature(curvatures, slopes, gamma):
    level = 1e-2
    bounds = closed_form_log_volume([level], curvatures, slopes, localisation=gamma)
    draws = np.random.default_rng(0).standard_normal((200_000, len(curvatures) + len(slopes)))
    # Importance sampling: uniform in the box that holds the set.
    sides = [math.sqrt(2 * level / h) for h in curvatures] + [level / a for a in slopes]
    points = (2 * stats.norm.cdf(draws) - 1) * sides
    weights = np.exp(stats.norm.logpdf(points, scale=gamma**-0.5).sum(1)) * np.prod(2 * np.array(sides))
    values = points[:, : len(curvatures)] ** 2 @ np.array(curvatures) / 2
    values = values + np.abs(points[:, len(curvatures) :]) @ np.array(slopes)
    parts = weights * (values <= level)
    mean, error = parts.mean(), parts.std() / math.sqrt(len(parts))
    assert math.exp(bounds.low[0]) - 5 * error < mean < math.exp(bounds.high[0]) + 5 * error


def test_moves_keep_the_restricted_normal_distribution():
    """Many moves from exact draws below a level leave their law as it is: quantiles of the norm, and of one part."""
    stream = torch.Generator().manual_seed(0)
    target = module._Sublevels(lambda w: (w[:, 0] * w[:, 1]).abs(), zeros(3), 2.0)
    points, losses = target.draw(60_000, stream)
    points, losses = points[losses <= 0.05], losses[losses <= 0.05]
    root = torch.tensor([[1.0, 0, 0], [0.5, 0.3, 0], [0, 0.2, 2.0]], dtype=torch.float64)
    moved = points
    for _ in range(10):
        moved, losses = target.move(moved, losses, 0.05, root, stream)
    assert float(losses.max()) <= 0.05
    assert float((moved != points).any(1).double().mean()) > 0.95
    for before, after in ((points.norm(dim=1), moved.norm(dim=1)), (points[:, 0], moved[:, 0])):
        assert stats.ks_2samp(before.numpy(), after.numpy()).pvalue > 1e-4


def test_runs_that_lose_all_points_leave_an_unknown_lower_end():
    found = loss_volume(lambda w: w.square().sum(1).sqrt().ceil(), zeros(20), [0.5], **SMALL)  # V = 0
    assert found.log_volumes == (-math.inf,)
    assert (found.log_lows, found.log_highs) == ((-math.inf,), (0.0,))


def test_it_repeats_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again = (loss_volume(lambda w: w.abs().sum(1), zeros(2), [0.1, 0.01], **SMALL) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), before)
    assert first.evaluations > 0


def test_a_lower_loss_nearby_is_reported():
    found = loss_volume(lambda w: w[:, 0] + w.square().sum(1), zeros(2), [0.1], **SMALL)
    assert found.lowest < -0.2


@pytest.mark.parametrize(
    "options", [{"levels": []}, {"levels": [0.1, 0.1]}, {"levels": [-1.0]}, {"runs": 1}, {"localisation": 0.0}]
)
def test_arguments_are_checked(options):
    with pytest.raises(ArgumentError):
        loss_volume(**{"loss": lambda w: w.sum(1), "point": zeros(2), "levels": [0.1]} | options)


def test_losses_of_another_shape_and_nan_are_refused():
    with pytest.raises(ArgumentError, match="must give 1 numbers"):
        loss_volume(lambda w: w, zeros(2), [0.1])
    with pytest.raises(ArgumentError, match="must be finite"):
        loss_volume(lambda w: w.sum(1) * math.nan, zeros(2), [0.1])


def test_closed_forms_of_minima_need_a_minimum_without_biases():
    saddle = planted_saddle(20, 2, 3)
    found = certify(saddle.hidden_weights, saddle.output_weights, saddle.inputs, saddle.targets)
    with pytest.raises(ArgumentError, match="is not of a minimum"):
        minimum_log_volume(found, saddle.inputs, saddle.targets, [1e-6])
    with pytest.raises(ArgumentError, match="must have a direction"):
        closed_form_log_volume([0.1], [])


def test_the_loss_at_a_minimum_has_its_coefficient_as_slope():
    planted = planted_minimum(12, 2, 2)
    certificate = certify(planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
    loss, point, truth = around(certificate, planted.inputs, planted.targets)
    found = loss_volume(loss, point, [1e-8, 1e-10], localisation=1e4, **SMALL)
    assert abs(found.slopes[0] - truth) < 4 * found.slope_errors[0]
