"""The engine against automatic differentiation and finite differences of the module's own loss."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_mnn.landscape import planted_kink_minimum, planted_model_kink_minimum
from lightning_mnn.landscape.minima.models.equations.face import derivatives, hessian
from lightning_mnn.landscape.minima.models.equations.reading import active_sets, read_face, true_loss, true_outputs
from lightning_mnn.landscape.minima.models.equations.stationarity import linearise, multipliers_at
from lightning_mnn.landscape.minima.models.model_certificate import prepare
from lightning_mnn.utilities.validation import ArgumentError


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3, bias=False), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2)]
    layers += [
        nn.BatchNorm2d(2),
        nn.ReLU6(),
        nn.AvgPool2d(2, 1),
        nn.Dropout(),
        nn.Flatten(),
        nn.Sequential(nn.Linear(8, 4), nn.Hardtanh()),
    ]
    net = nn.Sequential(*layers, nn.Identity(), nn.Linear(4, 3)).double().eval()
    net[4].running_mean.normal_()
    net[4].running_var.uniform_(0.5, 2)
    return net


LOSSES = {
    "squared_error": (lambda n, k: torch.randn(n, k).double(), lambda f, y: (f - y).square().sum(1).mean()),
    "cross_entropy": (lambda n, k: torch.randint(k, (n,)), functional.cross_entropy),
    "logistic": (
        lambda n, k: torch.randint(2, (n, k)).double(),
        lambda f, y: functional.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1).mean(),
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_derivatives_off_kinks_are_those_of_the_module(loss):
    net, x = network(), torch.randn(5, 1, 10, 10).double()
    targets, function = LOSSES[loss]
    y, decay = targets(5, 3), {"0.weight": 0.1, "11.bias": 0.2}
    model, vector = prepare(net, x, y, loss=loss, weight_decay=decay, frozen=("3.bias",))

    def objective(vector):
        parameters = model.parameters(vector)
        penalty = sum(0.5 * wd * parameters[name].square().sum() for name, wd in decay.items())
        return function(torch.func.functional_call(net, parameters, x), y) + penalty

    reading = read_face(model, vector)
    theta = vector[reading.face.free]
    found = derivatives(reading.face, theta)
    assert reading.ties == 0
    torch.testing.assert_close(true_outputs(model, vector), net(x).detach(), rtol=1e-12, atol=1e-12)
    assert true_loss(model, vector)[0] == pytest.approx(float(objective(vector)), rel=1e-12)
    gradient = torch.func.grad(objective)(vector)
    torch.testing.assert_close(found.gradient, gradient[reading.face.free], rtol=1e-9, atol=1e-11)
    naive = torch.func.jacrev(torch.func.grad(objective))(vector)[reading.face.free][:, reading.face.free]
    torch.testing.assert_close(hessian(reading.face, theta, theta.new_zeros(0)), naive, rtol=1e-9, atol=1e-10)
    inert = torch.ones(len(vector), dtype=torch.bool)
    inert[reading.face.free] = False
    assert bool((gradient[inert] == 0).all())


def on_kinks(**options):
    planted = planted_model_kink_minimum(70, (4, 4, 3, 1), 0.1, kinks=4, weight_decay=1e-3, **options)
    model, vector = prepare(
        planted.module, planted.inputs, planted.targets, loss="squared_error", weight_decay=1e-3, frozen=()
    )
    active = max(
        active_sets(read_face(model, vector), 1e-12, 3), key=lambda a: sum(int((t >= 0).sum()) for t in a.values())
    )
    return planted, model, vector, read_face(model, vector, active).face


def test_one_sided_derivatives_of_the_true_loss_are_those_of_the_face():
    """The loss along a direction d changes by aᵀd + bᵀ|z'| with z' = Z d + L |z'|, whatever the signs of z'."""
    _, model, vector, face = on_kinks()
    theta = vector[face.free]
    first = derivatives(face, theta)
    assert face.num_kinks == 4
    for seed in range(20):
        d = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed)).double()
        size = torch.zeros(4).double()
        for _ in range(4):  # L is nilpotent
            size = (first.jacobian @ d + first.coupling @ size).abs()
        slope = float(first.gradient @ d + first.normal @ size)
        step = 1e-6
        change = (true_loss(model, face.whole(theta + step * d))[0] - true_loss(model, vector)[0]) / step
        assert change == pytest.approx(slope, abs=1e-4)


def test_the_hessian_is_that_of_the_lagrangian():
    planted, _, vector, face = on_kinks()
    theta = vector[face.free]
    found = hessian(face, theta, planted.multipliers)
    d = torch.randn(len(theta), generator=torch.Generator().manual_seed(1)).double()

    def gradient(theta):
        first = derivatives(face, theta)
        return first.gradient + first.jacobian.T @ planted.multipliers

    product = (gradient(theta + 1e-6 * d) - gradient(theta - 1e-6 * d)) / 2e-6
    torch.testing.assert_close(found @ d, product, rtol=1e-6, atol=1e-7)


def test_multipliers_and_growth_are_the_planted_ones():
    planted, _, vector, face = on_kinks()
    system = linearise(face, vector[face.free])
    torch.testing.assert_close(multipliers_at(system.first), planted.multipliers, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(system.growth, planted.growth, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("violated", [False, True])
def test_first_order_conditions_agree_with_the_exact_ones_of_two_layers(violated):
    """Theory: z_i (c_n + ρ e_n) ≥ 0 ≥ z_i (c_n + e_n) for every kink, with Σ_{n∉B} e_n A_ni x_n = Σ_{n∈B} c_n x_n."""
    for seed in range(5):
        planted = planted_kink_minimum(40, 3, 3, 0.1, kinks_per_unit=2, violated=violated, seed=seed)
        w, z, x, slope = planted.hidden_weights, planted.output_weights, planted.inputs, 0.1
        net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LeakyReLU(slope), nn.Linear(3, 1, bias=False)).double()
        with torch.no_grad():
            net[0].weight.copy_(w)
            net[2].weight.copy_(z[None])
        model, vector = prepare(net, x, planted.targets, loss="squared_error", weight_decay=0.0, frozen=())
        active = {1: torch.where(planted.kinks, 0, -1)}
        face = read_face(model, vector, active).face
        growth = linearise(face, vector[face.free]).growth
        e, exact = planted.residual, []
        for n, i in planted.kinks.nonzero().tolist():
            on = planted.kinks[:, i]
            active_slopes = torch.where(x @ w[i] > 0, 1.0, slope).double() * ~on
            c = torch.linalg.lstsq(x[on].T, ((e * active_slopes) @ x)[:, None]).solution[:, 0]
            cn = c[int(on[:n].sum())]
            exact.append(float(torch.minimum(z[i] * (cn + slope * e[n]), -z[i] * (cn + e[n]))) * 2 / len(x))
        torch.testing.assert_close(growth, torch.tensor(exact).double(), rtol=1e-6, atol=1e-9)
        assert bool((growth > 0).all()) is not violated


def test_constants_are_no_kinks_and_dead_units_are_inert():
    """Zeros behind dead units, and windows of such zeros, do not count."""
    net = nn.Sequential(
        nn.Conv1d(1, 2, 1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
        nn.ReLU(),
        nn.Linear(3, 1),
    ).double()
    with torch.no_grad():
        net[0].bias[0] = -100.0
        net[0].weight[1], net[0].bias[1] = 1.0, 0.5
    x = torch.rand(6, 1, 4).double()
    model, vector = prepare(net, x, torch.ones(6), loss="squared_error", weight_decay=0.0, frozen=())
    reading = read_face(model, vector)
    assert reading.ties == 0
    assert reading.inert >= 2 + 2 * 3  # the dead channel's weight and bias, and what reads it
    assert reading.inert_units[0] == "0.weight[0]"
    x[0] = -50.0  # now a sample without any active unit
    model, vector = prepare(net, x, torch.ones(6), loss="squared_error", weight_decay=0.0, frozen=())
    unit = read_face(model, vector).units[5]
    assert not bool(unit.varies[0].any())
    assert bool((unit.values[0] == 0).all())


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Sigmoid(), "certificates do not cover"),
        (nn.Dropout(), "certificates do not cover"),
        (nn.BatchNorm1d(2), "eval"),
    ],
)
def test_a_layer_that_is_not_covered_is_refused(layer, words):
    net = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 1))
    with pytest.raises(ArgumentError, match=words):
        prepare(net, torch.ones(3, 2), torch.ones(3), loss="squared_error", weight_decay=0.0, frozen=())
