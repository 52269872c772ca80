import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_mnn.landscape import KinkDistance, KinkTrace, kink_distance, planted_kink_minimum
from tests.landscape.small_models import build, kink_passes


def naive(model, inputs):
    """Nearest distance and its ratio to the layer's scale, from all distances of one pass at once."""
    met = {}
    with KinkTrace(model, lambda kink: met.update({kink.name: (kink.input.clone(), kink.distance())})):
        model(inputs)
    nearest = min(float(d.min()) for _, d in met.values())
    relative, layer = min((float(d.min() / x.square().mean().sqrt()), name) for name, (x, d) in met.items())
    return nearest, relative, layer, sum(d.numel() for _, d in met.values())


@pytest.mark.parametrize("name", ["mlp", "gru", "transformer"])
@pytest.mark.parametrize("batch_size", [5, 12])
def test_agrees_with_one_pass_over_all(name, batch_size):
    model, inputs, _ = build(name)
    found = kink_distance(kink_passes(model, inputs, batch_size=batch_size), list(model.parameters()))
    nearest, relative, layer, units = naive(model, inputs)
    assert (found.layer, found.units, found.count, found.ties) == (layer, units, 0, 0)
    assert found.nearest == pytest.approx(nearest, rel=0, abs=1e-14)  # of numbers of order 1: batches round otherwise
    assert found.relative == pytest.approx(relative, rel=0, abs=1e-14)


def test_a_planted_kink_is_found_in_either_precision():
    planted = planted_kink_minimum(40, 5, 4, kinks_per_unit=2)
    for dtype in (torch.float64, torch.float32):
        model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)).to(dtype)
        with torch.no_grad():
            model[0].weight.copy_(planted.hidden_weights)
        inputs = planted.inputs.to(dtype)
        before = model[0].weight.clone()
        found = kink_distance(kink_passes(model, inputs, batch_size=15), list(model.parameters()))
        assert (found.count, found.ties, found.layer) == (int(planted.kinks.sum()), 0, "1")
        assert found.nearest <= 1e-5
        assert torch.equal(model[0].weight, before)


class Borders(nn.Module):
    """Two convolutions with ReLU and max-pooling."""

    def __init__(self, *, bias):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, bias=bias), nn.Conv2d(4, 4, 3, bias=bias)

    def forward(self, x):
        x = functional.max_pool2d(self.first(x).relu(), 2)
        return functional.max_pool2d(self.second(x).relu(), 2).flatten(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_ties_of_constant_borders_are_no_kinks(bias, dtype, seed):
    torch.manual_seed(seed)
    model = Borders(bias=bias).to(dtype)
    inputs = torch.zeros(20, 1, 20, 20, dtype=dtype)
    inputs[:, :, 8:12, 8:12] = torch.rand(20, 1, 4, 4, dtype=dtype)  # an image with black borders
    distances = []
    with KinkTrace(model, lambda kink: distances.append(kink.distance().flatten())):
        model(inputs)
    distances = torch.cat(distances)
    zeros = int((distances == 0).sum())
    found = kink_distance(kink_passes(model, inputs), list(model.parameters()))
    assert zeros > 1000
    assert found.count == 0
    assert found.ties >= zeros
    assert found.units == len(distances)
    assert 0 < found.nearest < math.inf


def test_a_kink_among_ties_is_found():
    torch.manual_seed(0)
    model = Borders(bias=True).double()
    inputs = torch.zeros(3, 1, 20, 20, dtype=torch.float64)
    inputs[:, :, 8:12, 8:12] = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():  # put one unit of the first layer, over the image, on its kink
        middle = functional.conv2d(inputs, model.first.weight)[1, 2, 8, 8]
        model.first.bias[2] = -middle
    found = kink_distance(kink_passes(model, inputs), list(model.parameters()))
    assert found.count == 1
    assert found.layer == "F.relu"
    assert found.nearest <= 1e-15


def test_a_bias_of_zero_is_a_kink_where_it_could_move():
    """Samples at the origin: with a bias that is zero by chance their units bend, without one nothing moves them."""
    inputs = torch.zeros(4, 3)
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(3, 2, bias=bias), nn.ReLU())
        if bias:
            nn.init.zeros_(model[0].bias)
        found = kink_distance(kink_passes(model, inputs), list(model.parameters()))
        assert (found.count, found.ties) == ((8, 0) if bias else (0, 8))


def test_a_zero_about_to_leave_is_no_kink_of_the_maximum():
    """ReLU outputs (0, 0) compete; one pre-activation is barely negative, so a small step may open the gap."""
    theta = nn.Parameter(torch.tensor([-1e-4, -1.0, 1.0]))
    model = nn.ReLU()

    def run(on_kink):
        with KinkTrace(model, on_kink):
            torch.maximum(*model(theta)[:2])

    for seed in range(10):
        found = kink_distance([run], [theta], seed=seed)
        assert (found.count, found.ties) == (0, 1)


def test_by_chance_some_are_on_kinks():
    """Of very many units in float32 a few are within rounding; their density tells how many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2000), nn.ReLU())
    found = kink_distance(kink_passes(model, torch.randn(4000, 8), batch_size=500), list(model.parameters()))
    expected = 8e6 * 16 * 2**-23 * 2 * 0.4  # of a normal density; in fact a bit more, as scales differ
    assert 0.7 * expected < found.by_chance < 2 * expected
    assert abs(found.count - found.by_chance) < 4 * found.by_chance**0.5
    assert found.spacing == 2**-23


def test_half_precision_takes_all_for_kinks():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU()).bfloat16()
    found = kink_distance(kink_passes(model, torch.zeros(4, 3, dtype=torch.bfloat16)), list(model.parameters()))
    assert (found.count, found.ties) == (8, 0)


def test_no_kinks_and_frozen_ones():
    smooth = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    assert kink_distance(kink_passes(smooth, torch.zeros(4, 3)), list(smooth.parameters())) == KinkDistance()
    frozen = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).requires_grad_(False)  # noqa: FBT003
    assert kink_distance(kink_passes(frozen, torch.zeros(4, 3)), list(frozen.parameters())).units == 0


@pytest.mark.parametrize(
    ("module", "kinked", "smooth"),
    [(nn.ELU(), 0, True), (nn.ELU(0.5), 1, False), (nn.SELU(), 1, False), (nn.CELU(0.5), 0, True)],
    ids=str,
)
def test_an_elu_has_a_kink_unless_its_slopes_agree(module, kinked, smooth):
    met = []
    with KinkTrace(nn.Sequential(module), met.append) as trace:
        module(torch.randn(3))
    assert len(met) == kinked
    assert bool(trace.smooth) is smooth
