"""Proofs against slower, obvious computations: a hundred digits, dense matrices, all samples at once."""

import pytest
import torch
from torch import nn

from lightning_mnn.landscape import (
    Kind,
    certify_model,
    planted_model_kink_minimum,
    planted_model_minimum,
    polish_model,
)
from lightning_mnn.landscape.minima.models.equations.face import (
    derivatives,
    hessian,
    largest_curvature,
    largest_slope,
    outputs_jacobian,
)
from lightning_mnn.landscape.minima.models.equations.reading import active_sets, objective_at, read_face, true_outputs
from lightning_mnn.landscape.minima.models.equations.stationarity import Fit, linearise, prove_fit
from lightning_mnn.landscape.minima.models.inactive_units import COPY_SINE, scaled_units, split_units
from lightning_mnn.landscape.minima.models.model_certificate import prepare
from tests.landscape.minima.models.probing import model_of
from tests.landscape.minima.models.test_precise import TARGETS, grouped, line, on_kinks

DIGITS = 100


def lagrangian_gradient(mp, net, x, y, decay, kinks, theta, multipliers):  # noqa: C901, PLR0912, PLR0917 (a plain pass)
    """Gradient of the Lagrangian and switching values, in mpmath."""
    parts, start = [], 0
    for layer in net[::2]:
        rows, columns = layer.weight.shape
        w = [[theta[start + i * columns + j] for j in range(columns)] for i in range(rows)]
        start += rows * columns
        parts.append((w, theta[start : start + rows]))
        start += rows
    slope, slopes_of = mp.mpf(getattr(net[1], "negative_slope", 0.0)), []
    flat, switching = [], [None] * len(kinks)
    gradients = [([[mp.mpf(0)] * len(r) for r in w], [mp.mpf(0)] * len(w)) for w, _ in parts]
    for n in range(len(x)):
        hs, slopes_of = [[mp.mpf(v) for v in x[n].tolist()]], []
        for layer, (w, b) in enumerate(parts):
            z = [mp.fdot(row, hs[-1]) + c for row, c in zip(w, b, strict=True)]
            if layer == len(parts) - 1:
                hs.append(z)
                break
            slopes = [mp.mpf(1) if v > 0 else slope for v in z]
            for place, (where, sample, unit) in enumerate(kinks):
                if (where, sample) == (layer, n):
                    slopes[unit], switching[place] = (1 + slope) / 2, z[unit]
            slopes_of.append(slopes)
            hs.append([s * v for s, v in zip(slopes, z, strict=True)])
        back = [2 * (f - mp.mpf(t)) / len(x) for f, t in zip(hs[-1], y[n].tolist(), strict=True)]
        for layer in reversed(range(len(parts))):
            for i, g in enumerate(back):
                gradients[layer][1][i] += g
                for j, h in enumerate(hs[layer]):
                    gradients[layer][0][i][j] += g * h
            if layer:
                w = parts[layer][0]
                up = [mp.fsum(w[i][j] * g for i, g in enumerate(back)) for j in range(len(hs[layer]))]
                back = [s * g for s, g in zip(slopes_of[layer - 1], up, strict=True)]
                for place, (where, sample, unit) in enumerate(kinks):
                    if (where, sample) == (layer - 1, n):
                        back[unit] += multipliers[place]
    for of_weight, of_bias in gradients:
        flat += [g for row in of_weight for g in row] + of_bias
    return [g + mp.mpf(decay) * t for g, t in zip(flat, theta, strict=True)] + switching


@pytest.mark.parametrize("kinks", [0, 2])
def test_the_radius_holds_against_newtons_method_with_a_hundred_digits(kinks):
    mp = pytest.importorskip("mpmath")
    decay = 1e-2
    plant = planted_model_kink_minimum if kinks else planted_model_minimum
    options = {"kinks": kinks} if kinks else {}
    planted = plant(16, (2, 2, 1), 0.1, weight_decay=decay, **options)
    found = certify_model(planted.module, planted.inputs, planted.targets, weight_decay=decay)
    assert found.is_minimum
    model, _ = model_of(planted)
    vector = model.vector(found.state_dict)
    active = {1: torch.full((16, 2), -1)}
    for _, sample, unit in planted.kinks:
        active[1][sample, unit] = 0
    system = linearise(read_face(model, vector, active).face, vector)
    inverse = torch.linalg.inv(system.matrix).tolist()
    with mp.workdps(DIGITS):
        theta, size = [mp.mpf(v) for v in vector.tolist()], len(vector)
        multipliers = [mp.mpf(v) for v in system.multipliers.tolist()]
        for _ in range(14):  # each gains some 13 digits, with the inverse in float64
            residual = lagrangian_gradient(
                mp, planted.module, planted.inputs, planted.targets, decay, planted.kinks, theta, multipliers
            )
            move = [mp.fdot([mp.mpf(v) for v in row], residual) for row in inverse]
            theta = [t - m for t, m in zip(theta, move[:size], strict=True)]
            multipliers = [t - m for t, m in zip(multipliers, move[size:], strict=True)]
        assert max(map(abs, residual)) < mp.mpf(10) ** -(DIGITS - 10)
        distance = mp.norm([t - mp.mpf(v) for t, v in zip(theta, vector.tolist(), strict=True)])
        assert distance <= found.radius
        assert found.radius < 1e-12


def test_the_radius_of_a_zero_holds_too():
    mp = pytest.importorskip("mpmath")
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(0.1), nn.Linear(4, 1)).double()
    x = torch.randn(5, 2).double()
    y = net(x).detach() + 1e-6
    found = certify_model(net, x, y[:, 0])
    if found.radius is None:  # the exact test of two layers states none
        model, vector = prepare(net, x, y, loss="squared_error", weight_decay=0.0, frozen=())
        face = read_face(model, vector).face
        fit = Fit(face, fit_vector := vector[face.free])
        for _ in range(6):
            fit_vector = Fit(face, fit_vector).step()
        fit = Fit(face, fit_vector)
    jacobian = fit.jacobian.tolist()
    gram = torch.linalg.inv(fit.gram).tolist()
    ball = prove_fit(fit)
    assert ball is not None
    with mp.workdps(60):
        theta = [mp.mpf(v) for v in fit_vector.tolist()]
        start = list(theta)
        for _ in range(8):
            residual = []
            for n in range(5):
                w1 = [theta[2 * i : 2 * i + 2] for i in range(4)]
                h = [mp.fdot(w1[i], [mp.mpf(v) for v in x[n].tolist()]) + theta[8 + i] for i in range(4)]
                h = [v if v > 0 else mp.mpf(0.1) * v for v in h]
                residual.append(mp.fdot(theta[12:16], h) + theta[16] - mp.mpf(float(y[n])))
            weights = [mp.fdot([mp.mpf(v) for v in row], residual) for row in gram]
            move = [mp.fsum(mp.mpf(jacobian[n][p]) * weights[n] for n in range(5)) for p in range(17)]
            theta = [t - m for t, m in zip(theta, move, strict=True)]
        assert max(map(abs, residual)) < mp.mpf(10) ** -45
        assert mp.norm([a - b for a, b in zip(theta, start, strict=True)]) <= ball.radius


@pytest.mark.parametrize(("make", "shape"), [(grouped, (2, 7, 8)), (line, (2, 8))])
def test_bounds_on_norms_hold_and_are_near(make, shape):
    torch.manual_seed(0)
    face, vector = on_kinks(make(), torch.randn(4, *shape).double(), TARGETS["squared_error"](4), "squared_error")
    at = vector[face.free].abs()
    multipliers = torch.rand(face.num_kinks).double()
    exact = float(torch.linalg.matrix_norm(hessian(face, at, multipliers, absolute=True), 2))
    assert exact <= largest_curvature(face, at, multipliers) <= 3 * exact

    def values(theta):
        f, z = face.evaluate(theta, theta.new_zeros(face.num_kinks), absolute=True)
        return torch.cat([f.flatten(), z])

    exact = float(torch.linalg.matrix_norm(torch.func.jacrev(values)(at), 2))
    assert exact <= largest_slope(face, at) <= 3 * exact


@pytest.mark.parametrize(("make", "shape"), [(grouped, (2, 7, 8)), (line, (2, 8))])
def test_the_jacobian_of_some_samples_at_a_time_is_that_of_all(make, shape):
    torch.manual_seed(0)
    face, vector = on_kinks(make(), torch.randn(19, *shape).double(), TARGETS["squared_error"](19), "squared_error")
    theta = vector[face.free]

    def values(t):
        return face.evaluate(t, t.new_zeros(face.num_kinks))[0].flatten()

    expected = torch.cat([torch.func.jacrev(values)(theta), derivatives(face, theta).jacobian])
    torch.testing.assert_close(outputs_jacobian(face, theta), expected, rtol=1e-12, atol=1e-12)


def with_a_dead_unit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].bias[1] = -100.0
    x, y = torch.randn(25, 3).double(), torch.randn(25, 1).double()
    return net, *prepare(net, x, y, loss="squared_error", weight_decay=2e-2, frozen=()), x, y


def test_a_unit_split_off_another_changes_neither_function_nor_penalty():
    _, model, vector, _, _ = with_a_dead_unit()
    split = split_units(model, vector)
    zero = {name: value.clone() for name, value in model.parameters(vector).items()}
    for number in (0, 2):
        dead = (read_face(model, vector).units[number + 1].values <= 0).all(0)
        zero[f"{number}.weight"][dead], zero[f"{number}.bias"][dead] = 0.0, 0.0
        zero[f"{number + 2}.weight"][:, dead] = 0.0
    torch.testing.assert_close(true_outputs(model, split), true_outputs(model, model.vector(zero)))
    assert objective_at(model, split) == pytest.approx(objective_at(model, model.vector(zero)), rel=1e-12)
    ratio = model.parameters(split)["0.weight"][1] / COPY_SINE
    assert any(torch.allclose(ratio, row) for row in zero["0.weight"])
    assert split_units(model, split) is None
    unchanged = scaled_units(model, split, 1e-6, 8.0)
    assert torch.equal(unchanged, split)


def test_a_network_with_a_dead_unit_is_polished_to_a_certified_minimum():
    net, _, _, x, y = with_a_dead_unit()
    found = polish_model(net, x, y, weight_decay=2e-2).certificate
    assert found.kind in (Kind.DIFFERENTIABLE_MINIMUM, Kind.KINK_MINIMUM)


def test_the_nearest_sets_of_kinks_are_those_of_the_same_function():
    """A sample that no unit sees has the bias for its pre-activation, and another one the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.zero_()
        net[2].bias[0] = 1e-12
    x = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [1.0, 2.0], [2.0, 1.0]]).double()
    model, vector = prepare(net, x, torch.ones(4), loss="squared_error", weight_decay=0.1, frozen=())
    sets = active_sets(read_face(model, vector), 1e-2, 3)
    face = read_face(model, vector, sets[0]).face
    assert len(face.pieces[3].kinks) == 2
    assert face.num_kinks == 1
