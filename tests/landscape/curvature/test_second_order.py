import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_mnn.landscape import (
    Kind,
    KinkDistance,
    LossSurface,
    ReasonCode,
    check_curvature,
    check_stationarity,
    kink_distance,
    planted_kink_minimum,
    planted_minimum,
    planted_saddle,
    second_order_verdict,
)
from tests.landscape.small_models import batches, kink_passes


def network(planted, dtype=torch.float64):
    """A planted point as an ordinary module, with the mean squared error of its data."""
    width, input_dim = planted.hidden_weights.shape
    model = nn.Sequential(
        nn.Linear(input_dim, width, bias=False),
        nn.LeakyReLU(planted.negative_slope) if planted.negative_slope else nn.ReLU(),
        nn.Linear(width, 1, bias=False),
    ).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(planted.hidden_weights)
        model[2].weight.copy_(planted.output_weights[None])
    inputs, targets = planted.inputs.to(dtype), planted.targets.to(dtype)

    def part(rows):
        return len(targets[rows]) / len(targets), lambda: (model(inputs[rows])[:, 0] - targets[rows]).square().mean()

    surface = LossSurface(list(model.parameters()), lambda: (part(rows) for rows in batches(30, len(inputs))))
    return model, surface, kink_distance(kink_passes(model, inputs, batch_size=30), list(model.parameters()))


@pytest.mark.parametrize("slope", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_planted_minima(slope, dtype, seed):
    _, surface, kinks = network(planted_minimum(60, 6, 5, slope, seed=seed), dtype)
    verdict = second_order_verdict(surface, kinks, 1.0)
    if dtype == torch.float64:
        assert verdict.kind is Kind.DIFFERENTIABLE_MINIMUM, verdict
        assert verdict.flat == "constant"  # scalings of units, and units with one pattern
    else:  # where moves that show more than rounding may cross kinks
        assert verdict.kind in (Kind.DIFFERENTIABLE_MINIMUM, Kind.UNDECIDED)
    assert "not a proof" in verdict.reason
    assert (verdict.kinks, verdict.nearest_kink) == (0, kinks.nearest)
    assert verdict.loss > 0.01
    exact = torch.linalg.eigvalsh(surface.hessian.dense().double())
    assert abs(verdict.smallest_eigenvalue - exact[0]) <= verdict.eigenvalue_error
    assert verdict.smallest_eigenvalue - verdict.eigenvalue_error >= -1e-3 * verdict.largest_eigenvalue
    assert verdict.largest_eigenvalue <= exact[-1] * (1 + 1e-5)


@pytest.mark.parametrize("slope", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_planted_saddles(slope, dtype, seed):
    model, surface, kinks = network(planted_saddle(60, 6, 5, slope, seed=seed), dtype)
    before = [p.clone() for p in model.parameters()]
    verdict = second_order_verdict(surface, kinks, 1.0)
    assert verdict.kind is Kind.SADDLE, verdict
    assert verdict.relative_gradient <= 1e-4  # rounding
    exact = float(torch.linalg.eigvalsh(surface.hessian.dense().double())[0])
    assert exact < 0
    assert abs(verdict.smallest_eigenvalue - exact) <= verdict.eigenvalue_error
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_kink_minimum_is_on_a_kink():
    _, surface, kinks = network(planted_kink_minimum(40, 5, 4))
    verdict = second_order_verdict(surface, kinks, 1.0)
    assert verdict.kind is Kind.ON_KINK
    assert verdict.kinks == kinks.count > 0
    assert (verdict.smallest_eigenvalue, verdict.products) == (None, 0)
    assert "one side" in verdict.reason
    assert verdict.relative_jump > 1e-3
    assert check_stationarity(surface, kinks, 1.0, jump_tolerance=1e-3).kind is Kind.ON_KINK


def test_kinks_that_matter_little_may_pass():
    """A sample on a kink is added to a planted minimum, with an error that makes its sides differ, or hardly."""
    planted = planted_minimum(60, 6, 5)
    row = planted.hidden_weights[0]
    sample = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample -= row * (sample @ row) / (row @ row)
    inputs = torch.cat([planted.inputs, sample[None]])
    for error in (1.0, 1e-7):
        outputs = planted.output_weights @ (planted.hidden_weights @ inputs.T).relu()
        targets = torch.cat([planted.targets, outputs[-1:] + error])
        changed = replace(planted, inputs=inputs, targets=targets)
        _, surface, kinks = network(changed)
        assert kinks.count == 1
        assert second_order_verdict(surface, kinks, 1.0).kind is Kind.ON_KINK
        tolerant = second_order_verdict(surface, kinks, 1.0, gradient_tolerance=1.0, jump_tolerance=1e-6)
        if error == 1:
            assert tolerant.kind is Kind.ON_KINK
            assert tolerant.relative_jump > 1e-3
        else:
            assert tolerant.kind is Kind.DIFFERENTIABLE_MINIMUM
            assert "on a kink within rounding" in tolerant.reason


def test_a_slope_on_all_sides_of_a_kink_is_no_stationary_point():
    planted = planted_kink_minimum(40, 5, 4)
    tilted = replace(planted, targets=planted.targets + 100 * planted.inputs[:, 0].abs())
    for case, kind in ((planted, Kind.ON_KINK), (tilted, Kind.NOT_STATIONARY)):
        _, surface, kinks = network(case)
        assert kinks.count > 0
        verdict = check_stationarity(surface, kinks, 1.0)
        assert verdict.kind is kind
        gradient = surface.value_and_gradient()[1]
        with surface.moved(-1e-9 * gradient / gradient.norm()):
            falls = verdict.loss - surface.loss()
        if kind is Kind.NOT_STATIONARY:
            assert falls >= 0.4e-9 * verdict.gradient_norm  # half of what the slope promises, at the least
            assert "on a kink within rounding" in verdict.reason


def test_far_from_stationary():
    _, surface, kinks = network(planted_minimum(60, 6, 5))
    with surface.moved(0.01 * torch.ones(surface.size, dtype=torch.float64)):
        verdict = second_order_verdict(surface, kinks, 1.0)
        assert verdict.kind is Kind.NOT_STATIONARY
        assert verdict.relative_gradient == verdict.gradient_norm > 1e-3
        assert verdict.smallest_eigenvalue is None
        assert check_stationarity(surface, kinks, verdict.gradient_norm * 1e4).kind is Kind.UNDECIDED


def quadratic(diagonal, *, offset=1.0, other=None):
    """½ Σ λ (θ − 1)² + offset at θ = 1, and what else is given, of θ − 1."""
    theta = torch.ones(len(diagonal), dtype=diagonal.dtype, requires_grad=True)

    def loss():
        value = 0.5 * (diagonal * (theta - 1) ** 2).sum() + offset
        return value if other is None else value + other(theta - 1)

    return LossSurface([theta], lambda: [(1.0, loss)])


def test_kinks_as_many_as_by_chance_cost_gradients_only_where_they_decide():
    surface, passes = quadratic(torch.linspace(1, 2, 5, dtype=torch.float64)), []
    parts, surface._parts = surface._parts, lambda: (passes.append(1), parts())[1]  # counts them
    by_chance = KinkDistance(0.0, 0.0, "1", count=12, units=10**6, by_chance=9.0, spacing=2.0**-52)
    with surface.moved(torch.ones(5, dtype=torch.float64)):
        far = check_stationarity(surface, by_chance, 1.0)
        assert (far.kind, far.relative_jump, far.kinks, len(passes)) == (Kind.NOT_STATIONARY, None, 12, 1)
        assert "12 of 1000000 units are on a kink within rounding (9 would be by chance" in far.reason
        many = check_stationarity(surface, replace(by_chance, count=30), 1.0)
        assert many.relative_jump is not None
    assert check_stationarity(surface, by_chance, 1.0).relative_jump is not None  # stationary


def test_a_strict_minimum():
    verdict = second_order_verdict(quadratic(torch.linspace(1, 2, 50, dtype=torch.float64)), KinkDistance(), 1.0)
    assert verdict.kind is Kind.DIFFERENTIABLE_MINIMUM
    assert "strict" in verdict.reason
    assert verdict.smallest_eigenvalue - verdict.eigenvalue_error <= 1 <= verdict.smallest_eigenvalue


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.float64), (1.0, torch.float64), (1.0, torch.float32)])
def test_negative_curvature_is_seen_in_the_loss(offset, dtype):
    diagonal = torch.linspace(0, 1, 50, dtype=dtype)
    diagonal[3] = -0.01
    verdict = second_order_verdict(quadratic(diagonal, offset=offset), KinkDistance(), 1.0)
    assert verdict.kind is Kind.SADDLE, verdict


@pytest.mark.parametrize("slope", [0.0, 1e-4])
def test_negative_curvature_that_the_loss_belies(slope):
    """A second derivative that is wrong: the loss does not fall along its direction, but for the gradient's part."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, theta):
            ctx.save_for_backward(theta)
            return (theta**4).sum()

        @staticmethod
        def backward(ctx, grad):
            return -grad * ctx.saved_tensors[0]

    diagonal = torch.linspace(0, 0.5, 20, dtype=torch.float64)
    surface = quadratic(diagonal, other=lambda step: Wrong.apply(step) + slope * step.sum())
    verdict = second_order_verdict(surface, KinkDistance(), 1.0)
    assert verdict.kind is Kind.UNDECIDED
    assert "does not fall" in verdict.reason
    assert verdict.smallest_eigenvalue < 0


def test_undecided_names_the_remedy():
    diagonal = torch.cos(torch.arange(500, dtype=torch.float64) * math.pi / 499) + 1  # smallest 0, and many near it
    surface = quadratic(diagonal)
    few = second_order_verdict(surface, KinkDistance(), 1.0, max_products=20)
    assert few.kind is Kind.UNDECIDED
    assert "max_products" in few.reason
    assert few.products == 21
    many = second_order_verdict(quadratic(diagonal + 0.01), KinkDistance(), 1.0, max_products=300)
    assert many.kind is Kind.DIFFERENTIABLE_MINIMUM
    assert "strict" in many.reason
    more = second_order_verdict(surface, KinkDistance(), 1.0, max_products=300)
    assert more.kind is Kind.UNDECIDED  # eigenvalues of 1e-5 and of 0 are not told apart
    flat = second_order_verdict(quadratic(torch.zeros(5)), KinkDistance(), 1.0)
    assert flat.kind is Kind.UNDECIDED
    assert "the Hessian is zero" in flat.reason
    noisy = quadratic(torch.linspace(0, 1, 30, dtype=torch.float32))
    hidden = second_order_verdict(noisy, KinkDistance(), 1.0, curvature_tolerance=1e-8)
    assert hidden.kind is Kind.UNDECIDED
    assert "rounding" in hidden.reason


def test_not_finite():
    theta = torch.ones(2, requires_grad=True)
    surface = LossSurface([theta], lambda: [(math.nan, theta.sum)])
    verdict = second_order_verdict(surface, KinkDistance(), 1.0)
    assert verdict.kind is Kind.NOT_STATIONARY
    assert "not finite" in verdict.reason


def test_bad_arguments():
    surface = quadratic(torch.ones(2))
    with pytest.raises(ValueError, match="reference must be a positive number, got 0"):
        check_stationarity(surface, KinkDistance(), 0.0)
    with pytest.raises(ValueError, match="jump_tolerance must not be negative"):
        check_stationarity(surface, KinkDistance(), 1.0, jump_tolerance=-1.0)
    stationary = check_stationarity(surface, KinkDistance(), 1.0)
    with pytest.raises(ValueError, match="curvature_tolerance must be positive"):
        check_curvature(surface, stationary, curvature_tolerance=0.0)


# Points that are no minima though λ_min is not below zero, and minima that are flat


def surface_of(start, function):
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    return LossSurface([theta], lambda: [(1.0, lambda: function(theta))])


def zero_network(depth, activation):
    """All weights zero, the last bias at the mean of the targets."""
    torch.manual_seed(0)
    widths = [3, *[4] * (depth - 1), 1]
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), activation())][:-1]
    model, x = nn.Sequential(*layers).double(), torch.randn(12, 3, dtype=torch.float64)
    y = torch.randn(12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[-1].bias += y.mean()
    return LossSurface(list(model.parameters()), lambda: [(1.0, lambda: nn.functional.mse_loss(model(x)[:, 0], y))])


def tail(y):
    return surface_of([1e-6, y], lambda z: 1 + z[0] ** 2 + torch.exp(-z[1]))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: tail(9.0), "undecided"),
        (lambda: tail(25.0), "undecided"),
        (lambda: tail(45.0), "undecided"),  # below the spacing of floats
        (lambda: surface_of([0.0, 0.0], lambda z: 1 + z[0] ** 2 - z[1] ** 4), "saddle"),
        (lambda: surface_of([0.0, 0.0], lambda z: z[0] ** 2 + z[1] ** 3), "saddle"),
        (lambda: surface_of([0.0, 0.0], lambda z: 1 + (z[0] - z[1] ** 2) * (z[0] - 3 * z[1] ** 2)), "saddle"),
        (lambda: surface_of([0.0, 0.0], lambda z: 1 + z[0] ** 2 + z[1] ** 4), "undecided"),  # no symmetry explains it
        (lambda: zero_network(2, nn.Tanh), "saddle"),
        (lambda: zero_network(2, nn.GELU), "saddle"),
        (lambda: zero_network(3, nn.Tanh), "saddle"),
        (lambda: zero_network(3, nn.GELU), "saddle"),
    ],
)
def test_what_is_no_minimum_is_not_called_one(make, kind):
    surface = make()
    before = [p.clone() for p in surface.parameters]
    found = second_order_verdict(surface, KinkDistance(), 1.0)
    assert found.kind == kind, found
    assert all(torch.equal(p, old) for p, old in zip(surface.parameters, before, strict=True))


@pytest.mark.parametrize("steps", [100, 400])
def test_a_head_on_separable_features_has_no_minimum(steps):
    torch.manual_seed(0)
    x, y = torch.randn(20, 5, dtype=torch.float64), (torch.rand(20) < 0.5).double()
    features, head = torch.relu(x @ torch.randn(5, 40, dtype=torch.float64)), nn.Linear(40, 1).double()

    def loss():
        return nn.functional.binary_cross_entropy_with_logits(head(features)[:, 0], y)

    surface = LossSurface(list(head.parameters()), lambda: [(1.0, loss)])
    reference = float(surface.value_and_gradient()[1].norm())
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    found = second_order_verdict(surface, KinkDistance(), reference)
    assert found.relative_gradient < 0.01
    tolerant = second_order_verdict(surface, KinkDistance(), reference, gradient_tolerance=0.1)
    assert tolerant.kind is Kind.UNDECIDED
    assert tolerant.newton_gain == pytest.approx(loss().item() / 2, rel=0.5)  # as of exp(−y)


@pytest.mark.parametrize("slip", [0.0, 1e-9])
def test_a_network_with_more_weights_than_samples_is_at_a_minimum_without_error(slip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    y = model(x).detach()[:, 0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(slip * torch.randn_like(parameter))
    surface = LossSurface(list(model.parameters()), lambda: [(1.0, lambda: nn.functional.mse_loss(model(x)[:, 0], y))])
    found = second_order_verdict(surface, KinkDistance(), 1.0)
    assert found.kind is Kind.DIFFERENTIABLE_MINIMUM, found
    assert found.flat == "constant"


def test_what_a_newton_step_would_still_gain_is_told():
    diagonal = torch.linspace(1, 2, 5, dtype=torch.float64)
    surface = quadratic(diagonal, offset=0.01)
    for step, kind in ((1e-6, "differentiable_minimum"), (0.1, "undecided")):
        with surface.moved(torch.full((5,), step, dtype=torch.float64)):
            found = second_order_verdict(surface, KinkDistance(), 1e3)
        assert found.kind == kind
        assert found.newton_gain == pytest.approx(0.5 * step**2 * float(diagonal.sum()), rel=1e-6)
        assert (found.reason_code == ReasonCode.NEWTON_STEP_GAINS) is (kind == "undecided")
