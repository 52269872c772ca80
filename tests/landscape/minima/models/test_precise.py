"""The equations in double-double against those in doubles, and against exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mnn.landscape.minima.models.equations import double_double as dd
from lightning_mnn.landscape.minima.models.equations.face import derivatives
from lightning_mnn.landscape.minima.models.equations.precise import precise_equations
from lightning_mnn.landscape.minima.models.equations.reading import active_sets, read_face
from lightning_mnn.landscape.minima.models.equations.stationarity import linearise
from lightning_mnn.landscape.minima.models.model_certificate import prepare
from tests.landscape.minima.models.test_face import network


def grouped():
    layers = [nn.Conv2d(2, 4, 3, padding="same", groups=2, dilation=2), nn.Hardtanh(), nn.AvgPool2d(3, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(4, 2, 2, stride=2, padding=1), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def line():
    layers = [nn.Conv1d(2, 4, 3, padding=1, stride=2), nn.ReLU(), nn.MaxPool1d(3, 1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


NETS = [(network, (1, 10, 10)), (grouped, (2, 7, 8)), (line, (2, 8))]
TARGETS = {
    "squared_error": lambda n: torch.randn(n, 3).double(),
    "cross_entropy": lambda n: torch.randn(n, 3).double().softmax(1),
    "logistic": lambda n: torch.rand(n, 3).double(),
}


def on_kinks(net, x, y, loss):
    """The face with the most kinks nearby."""
    model, vector = prepare(net, x, y, loss=loss, weight_decay=0.01, frozen=())
    sets = active_sets(read_face(model, vector), 0.2, 9)
    active = max(sets, key=lambda a: sum(int((t >= 0).sum()) for t in a.values()))
    return read_face(model, vector, active).face, vector


@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize(("make", "shape"), NETS)
def test_the_equations_are_those_in_doubles(make, shape, loss):
    torch.manual_seed(0)
    net, x = make(), torch.randn(4, *shape).double()
    face, vector = on_kinks(net, x, TARGETS[loss](4), loss)
    theta, multipliers = vector[face.free], torch.randn(face.num_kinks).double()
    first, precise = derivatives(face, theta), precise_equations(face, theta, multipliers)
    assert face.num_kinks > 5
    gradient = first.gradient + first.jacobian.T @ multipliers
    growth = first.normal + first.coupling.T @ multipliers - multipliers.abs()
    for found, expected in (
        (precise.gradient, gradient),
        (precise.switching, first.switching),
        (precise.growth, growth),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def exactly(  # noqa: C901, PLR0917 (a plain backward pass)
    net, x, y, decay, kinks, multipliers, face
):
    """Gradient, switching values and growth of a network of linear layers and LeakyReLU, in fractions."""

    def fractions(t):
        return [Fraction(v) for v in t.tolist()] if t.ndim == 1 else [fractions(row) for row in t]

    weights, biases = zip(*((fractions(m.weight.detach()), fractions(m.bias.detach())) for m in net[::2]), strict=True)
    slope = Fraction(net[1].negative_slope)
    gradients = [([[Fraction(0)] * len(row) for row in w], [Fraction(0)] * len(w)) for w in weights]
    switching, growth = {}, {}
    for n, (row, target) in enumerate(zip(fractions(x), fractions(y), strict=True)):
        hs, slopes = [row], []
        for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
            z = [sum(a * h for a, h in zip(ws, hs[-1], strict=True)) + c for ws, c in zip(w, b, strict=True)]
            if layer == len(weights) - 1:
                hs.append(z)
                break
            on = [(layer, n, unit) in kinks for unit in range(len(z))]
            switching.update({(layer, n, u): z[u] for u in range(len(z)) if on[u]})
            active = (face.pieces[1 + 2 * layer].slope[n] == 1).tolist()  # elsewhere ρ, or the mean
            slopes.append([(1 + slope) / 2 if o else 1 if a else slope for a, o in zip(active, on, strict=True)])
            hs.append([s * v for s, v in zip(slopes[-1], z, strict=True)])
        back = [2 * (f - t) / len(x) for f, t in zip(hs[-1], target, strict=True)]
        for layer in reversed(range(len(weights))):
            for i, g in enumerate(back):
                gradients[layer][1][i] += g
                for j, h in enumerate(hs[layer]):
                    gradients[layer][0][i][j] += g * h
            if layer:
                up = [sum(weights[layer][i][j] * g for i, g in enumerate(back)) for j in range(len(hs[layer]))]
                back = [s * g for s, g in zip(slopes[layer - 1], up, strict=True)]
                for u in range(len(up)):
                    if (layer - 1, n, u) in kinks:
                        value = Fraction(float(multipliers[kinks.index((layer - 1, n, u))]))
                        growth[layer - 1, n, u] = (1 - slope) / 2 * up[u] - abs(value)
                        back[u] += value
    flat = []
    for (of_weight, of_bias), w, b in zip(gradients, weights, biases, strict=True):
        flat += [
            g + Fraction(decay) * v for gs, vs in zip(of_weight, w, strict=True) for g, v in zip(gs, vs, strict=True)
        ]
        flat += [g + Fraction(decay) * v for g, v in zip(of_bias, b, strict=True)]
    return flat, [switching[k] for k in kinks], [growth[k] for k in kinks]


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_rounding_errors_are_those_of_double_double(seed):
    """After subtraction of the exact results all but 2⁻⁵³ of them, their own rounding to doubles, is gone."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(0.1), nn.Linear(3, 2), nn.LeakyReLU(0.1), nn.Linear(2, 2))
    net, x, y = net.double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    model, vector = prepare(net, x, y, loss="squared_error", weight_decay=0.01, frozen=())
    kinks = [(0, 1, 2), (0, 2, 0), (1, 1, 1)]
    active = {1: torch.full((4, 3), -1), 3: torch.full((4, 2), -1)}
    for layer, n, u in kinks:
        active[1 + 2 * layer][n, u] = 0
    face = read_face(model, vector, active).face
    multipliers = torch.randn(3).double() / 10
    found = precise_equations(face, vector[face.free], multipliers)
    gradient, switching, growth = exactly(net, x, y, 0.01, kinks, multipliers, face)
    for values, expected in (
        (found.gradient, [gradient[i] for i in face.free.tolist()]),
        (found.switching, switching),
        (found.growth, growth),
    ):
        for value, true in zip(values.tolist(), expected, strict=True):
            assert abs(Fraction(value) - true) <= Fraction(2.0**-53) * abs(true) + Fraction(2.0**-90)


def test_probabilities_have_their_own_unit():
    torch.manual_seed(0)
    face, vector = on_kinks(line(), torch.randn(4, 2, 8).double(), TARGETS["logistic"](4), "logistic")
    precise = linearise(face, vector[face.free]).precise
    assert precise.unit == dd.EXP_UNIT
    assert precise.rounding(face.model) < 1e-18
