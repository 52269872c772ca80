"""Kinks that follow from others: found, proved, and decided as a scan over all directions decides."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mnn.landscape import Kind, ReasonCode, certify_model
from lightning_mnn.landscape.minima.models import planted_models
from lightning_mnn.landscape.minima.models.equations.face import derivatives
from lightning_mnn.landscape.minima.models.equations.implied import Reach, implied_kinks
from lightning_mnn.landscape.minima.models.equations.reading import read_face
from lightning_mnn.landscape.minima.models.equations.stationarity import linearise
from lightning_mnn.landscape.minima.models.model_certificate import prepare
from lightning_mnn.landscape.minima.models.planted_models import _targets
from tests.landscape.minima.models.probing import lowest_nearby, model_of

UNSEEN = 60  # a sample that no unit of the first layer sees; for the next one unit 0 is on its kink, the others off
KINKS = [(0, UNSEEN + 1, 0), (1, UNSEEN, 0), (1, UNSEEN + 1, 0)]  # the last: c + v·0 = c = 0


def network(seed):
    """A network (2, 3, 3, 2) with these three kinks, two of which are independent, and its inputs."""
    rng = np.random.default_rng(seed)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [-0.3, 1.0], [-1.0, -0.7]]))
        net[0].bias.copy_(torch.tensor([-1.0, -0.8, -0.9]))
        net[2].weight.copy_(torch.from_numpy(rng.uniform(0.3, 1.5, (3, 3)) * rng.choice([-1, 1], (3, 3))))
        net[2].bias.copy_(torch.tensor([0.0, 0.7, -0.4]))
        net[4].weight.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, (2, 3)) * rng.choice([-1, 1], (2, 3))))
        net[4].bias.zero_()
    x = np.concatenate([3 * rng.standard_normal((UNSEEN, 2)), [[0.0, 0.0], [1.0, -0.5]]])
    return net, torch.from_numpy(x)


def problem(seed, monkeypatch):
    """Targets for which the network is stationary, with multipliers and growths that are drawn, of both signs."""
    net, x = network(seed)
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(planted_models, "_MIN_EIGENVALUE_RATIO", 1e-7)
    return _targets(rng, net, x, KINKS, "squared_error", 0.0, violated=bool(seed % 3), saddle=False)


def slowest_growth(system):
    """The smallest slope of the objective over Σ|ζ|, by a scan over the plane of independent changes of z."""
    first, lowest = system.first, math.inf
    basis = torch.linalg.svd(first.jacobian, full_matrices=False)[2][: system.num_independent]
    for angle in torch.linspace(0, 2 * math.pi, 4001).tolist():
        d = math.cos(angle) * basis[0] + math.sin(angle) * basis[1]
        change = torch.zeros(len(system.implied), dtype=torch.float64)
        for _ in KINKS:
            change = first.jacobian @ d + first.coupling @ change.abs()
        slope = float(first.gradient @ d + first.normal @ change.abs())
        lowest = min(lowest, slope / float(change.abs().sum()))
    return lowest


def system_of(planted):
    model, vector = model_of(planted)
    active = {1: torch.full((UNSEEN + 2, 3), -1), 3: torch.full((UNSEEN + 2, 3), -1)}
    for layer, sample, unit in KINKS:
        active[1 + 2 * layer][sample, unit] = 0
    face = read_face(model, vector, active).face
    return linearise(face, vector[face.free])


@pytest.mark.parametrize("seed", [0, 2, 4, 5, 7, 8, 9, 10])
def test_growth_off_dependent_kinks_is_decided_as_by_a_scan(seed, monkeypatch):
    planted = problem(seed, monkeypatch)
    if planted is None:
        pytest.skip("no such targets")
    found = certify_model(planted.module, planted.inputs, planted.targets, max_distance=1e-6)
    expected = slowest_growth(system_of(planted))
    assert abs(expected) > 1e-7
    assert found.kinks == 3
    assert found.implied_kinks == 1
    if expected > 0:
        assert found.kind is Kind.KINK_MINIMUM
        assert 0 < found.growth <= expected * (1 + 1e-6)
        assert found.kink_directions == 2
        assert lowest_nearby(planted, found, draws=20, sizes=(1e-5, 1e-7)) > -1
    else:
        assert found.kind is Kind.NOT_STATIONARY
        assert found.reason_code is ReasonCode.GROWTH_NEGATIVE


def with_proportional_units():
    """Units 0 and 1 of the second layer, whose weights are proportional, on kinks for three samples.

    The inputs of the second layer for the third sample are the mean of those for the others.
    """
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    first, second = net[0], net[2]
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=random))
        first.bias.copy_(torch.tensor([0.2, 0.1, -50.0]))
        x = torch.linalg.lstsq(first.weight[:2], torch.tensor([[1.0, 0.3], [0.4, 1.5]]).double()).solution.T
        across = torch.linalg.svd(first.weight[:2])[2][2:]
        x = torch.cat([x + torch.randn(2, 2, generator=random).double() @ across, x.mean(0, keepdim=True)])
        x[2] += 2 * across[0]
        h = torch.cat([net[:2](x), torch.ones(3, 1).double()], dim=1)
        row = torch.linalg.svd(h[:, [0, 1, 3]])[2][-1]
        second.weight[:2, :2] = torch.stack([row[:2], -0.5 * row[:2]])
        second.bias[:2] = torch.stack([row[2], -0.5 * row[2]])
    model, vector = prepare(net, x, torch.ones(3), loss="squared_error", weight_decay=0.1, frozen=())
    active = {3: torch.tensor([[0, 0, -1]] * 3)}
    return model, vector, active


def test_the_last_kink_of_a_proportional_unit_is_implied():
    model, vector, active = with_proportional_units()
    face = read_face(model, vector, active).face
    theta = vector[face.free]
    assert implied_kinks(face, theta).tolist() == [False] * 5 + [True]
    jacobian = derivatives(face, theta).jacobian
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-12) == 5
    assert torch.linalg.matrix_rank(jacobian[:5], rtol=1e-12) == 5
    # On the face of the five others it stays on its kink.
    random = torch.Generator().manual_seed(1)
    moved = theta + 1e-2 * torch.randn(len(theta), generator=random, dtype=torch.float64)
    for _ in range(8):
        z = face.evaluate(moved, moved.new_zeros(6))[1]
        moved = moved - torch.linalg.pinv(derivatives(face, moved).jacobian[:5]) @ z[:5]
    z = face.evaluate(moved, moved.new_zeros(6))[1]
    assert float((moved - theta).norm()) > 1e-3
    assert float(z.abs().max()) < 1e-13


@pytest.mark.parametrize(("radius", "proved"), [(1e-12, True), (1.0, False)])
def test_a_kink_is_proved_to_be_implied_in_a_small_ball_only(radius, proved):
    model, vector, active = with_proportional_units()
    face = read_face(model, vector, active).face
    reach = Reach(radius, {1: torch.full((3,), 10.0).double()})
    assert bool(implied_kinks(face, vector[face.free], reach).any()) is proved


def test_kinks_that_are_dependent_up_to_rounding_stay_undecided():
    """A sample midway between two others has its pre-activation midway, but no structure of the model says so."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=random, dtype=torch.float64)
    x[2] = (x[0] + x[1]) / 2
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        rows = torch.cat([x[:3], torch.ones(3, 1).double()], dim=1)
        row = torch.linalg.svd(rows)[2][-1]
        net[0].weight[0], net[0].bias[0] = row[:3], row[3]
    model, vector = prepare(net, x, torch.zeros(30, 2), loss="squared_error", weight_decay=0.1, frozen=())
    active = {1: torch.full((30, 2), -1)}
    active[1][:3, 0] = 0
    face = read_face(model, vector, active).face
    assert not bool(implied_kinks(face, vector[face.free]).any())
    assert linearise(face, vector[face.free]).likq < 1e-12


def test_kinks_after_a_layer_that_is_zero_on_the_face_are_implied_by_it():
    """Without biases: where all units of the first layer are on kinks, so are those of the second."""
    net = nn.Sequential(
        *(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    x = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    model, vector = prepare(net, x, torch.ones(2), loss="squared_error", weight_decay=0.1, frozen=())
    active = {1: torch.tensor([[0, 0], [-1, -1]]), 3: torch.tensor([[0, 0], [-1, -1]])}
    face = read_face(model, vector, active).face
    assert implied_kinks(face, vector[face.free]).tolist() == [False, False, True, True]
