"""Planted points of general networks: what is a minimum is certified, and nothing else ever."""

import copy

import pytest
import torch
from torch import nn

from lightning_mnn.landscape import (
    Kind,
    ReasonCode,
    certify,
    certify_model,
    planted_kink_minimum,
    planted_minimum,
    planted_model_kink_minimum,
    planted_model_minimum,
    planted_model_saddle,
    polish_model,
)
from lightning_mnn.landscape.minima.models.equations.face import outputs_jacobian
from lightning_mnn.landscape.minima.models.equations.reading import read_face, true_loss, true_outputs
from lightning_mnn.landscape.minima.models.equations.symmetries import gauge_of
from lightning_mnn.landscape.minima.models.model_certificate import classify_near, prepare
from lightning_mnn.utilities.validation import ArgumentError
from tests.landscape.minima.models.probing import lowest_nearby, model_of

MINIMA = [
    ("squared_error", (4, 4, 2), 60, 0.0, 0.0),
    ("squared_error", (4, 4, 2), 60, 1e-3, 0.1),
    ("squared_error", (5, 4, 3, 2), 100, 1e-3, 0.2),
    ("logistic", (4, 4, 2), 80, 1e-4, 0.1),
    ("cross_entropy", (4, 4, 3), 80, 0.0, 0.1),
]


def certified(planted, **options):
    return certify_model(
        planted.module, planted.inputs, planted.targets, loss=planted.loss, weight_decay=planted.weight_decay, **options
    )


def moved(planted, relative, **options):
    torch.manual_seed(0)
    module = copy.deepcopy(planted.module)
    with torch.no_grad():
        for p in module.parameters():
            move = torch.randn_like(p)
            p.add_(relative * move * p.norm() / move.norm())
    return certify_model(module, planted.inputs, planted.targets, loss=planted.loss, weight_decay=planted.weight_decay)


@pytest.mark.parametrize(("loss", "widths", "n", "decay", "slope"), MINIMA)
def test_a_planted_minimum_is_certified(loss, widths, n, decay, slope):
    planted = planted_model_minimum(n, widths, slope, loss=loss, weight_decay=decay)
    for found in (certified(planted), moved(planted, 1e-8)):
        assert found.kind is Kind.DIFFERENTIABLE_MINIMUM
        assert found.reason_code is ReasonCode.MODEL_CERTIFIED
        assert found.smallest_eigenvalue == pytest.approx(planted.tangential_eigenvalue, rel=1e-4)
        assert found.distance < 1e-6
        assert found.flat_directions == 0
        # Without a penalty each unit can be rescaled; the softmax has shifts.
        assert (found.symmetries > 0) is (decay == 0)
        assert lowest_nearby(planted, found, draws=20) > -1


@pytest.mark.parametrize("violated", [False, True])
@pytest.mark.parametrize(("widths", "n", "decay"), [((4, 4, 2), 60, 1e-3), ((5, 4, 3, 1), 120, 1e-3)])
def test_kinks_decide_by_their_growth(widths, n, decay, violated):
    planted = planted_model_kink_minimum(n, widths, 0.1, kinks=3, weight_decay=decay, violated=violated)
    for found in (certified(planted, max_distance=1e-6), moved(planted, 1e-8, max_distance=1e-6)):
        assert found.kinks == 3
        assert found.growth == pytest.approx(float(planted.growth.min()), rel=1e-4)
        assert found.kind is (Kind.NOT_STATIONARY if violated else Kind.KINK_MINIMUM)
        if violated:
            assert found.reason_code is ReasonCode.GROWTH_NEGATIVE
            assert falls(planted, found)
        else:
            assert lowest_nearby(planted, found, draws=20) > -1


def falls(planted, found):
    model, _ = model_of(planted)
    at, move = model.vector(found.state_dict), model.vector({**found.state_dict, **found.direction})
    here, error = true_loss(model, at)
    there, error_there = true_loss(model, at + move)
    return there < here - error - error_there


@pytest.mark.parametrize("kinks", [0, 2])
def test_a_planted_saddle_has_a_direction_in_which_the_loss_falls(kinks):
    planted = planted_model_saddle(80, (5, 4, 3, 1), 0.1, kinks=kinks, weight_decay=1e-3)
    found = certified(planted)
    assert found.kind is Kind.SADDLE
    assert found.reason_code is ReasonCode.NEGATIVE_TANGENTIAL_CURVATURE
    assert found.kinks == kinks
    assert falls(planted, found)


def test_a_far_point_is_not_stationary():
    planted = planted_model_minimum(60, (4, 4, 2), weight_decay=1e-3)
    found = moved(planted, 0.3)
    assert found.kind is Kind.NOT_STATIONARY
    assert found.reason_code is ReasonCode.NO_STATIONARY_POINT


def test_kinks_of_equal_samples_are_one():
    """The same sample twice has two kinks with the same gradient, and one multiplier."""
    planted = planted_model_kink_minimum(60, (4, 4, 2), 0.1, kinks=2, weight_decay=1e-3)
    x, y = (t.repeat(2, 1) for t in (planted.inputs, planted.targets))
    found = certify_model(planted.module, x, y, weight_decay=1e-3)
    assert found.kind is Kind.KINK_MINIMUM
    assert found.kinks == 2
    assert found.growth == pytest.approx(float(planted.growth.min()), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_zero_error_is_a_global_minimum_at_any_depth_and_number_of_outputs(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv1d(1, 6, 3), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(36, 20), nn.LeakyReLU(0.1), nn.Linear(20, 3)
    ).double()
    x = torch.randn(10, 1, 8).double()
    y = net(x).detach() + 1e-7 * torch.randn(10, 3).double()
    found = certify_model(net, x, y)
    assert found.kind is Kind.DIFFERENTIABLE_MINIMUM
    assert found.reason_code is ReasonCode.MODEL_FITS
    assert found.zero_error
    assert found.loss < 1e-25
    assert found.positive_directions == 30
    assert not certify_model(net, x, y + 1.0, max_distance=1e-6).zero_error


def test_frozen_parameters_do_not_move_and_change_the_verdict():
    planted = planted_model_minimum(60, (4, 4, 2), weight_decay=1e-3)
    name = "0.weight"
    module = copy.deepcopy(planted.module)
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-5
    options = {"weight_decay": {n: 1e-3 for n, _ in module.named_parameters()}}
    found = certify_model(module, planted.inputs, planted.targets, frozen=(name,), **options)
    assert found.is_minimum
    assert torch.equal(found.state_dict[name], module[0].weight)
    free = certify_model(module, planted.inputs, planted.targets, **options)
    assert free.is_minimum
    assert not torch.equal(free.state_dict[name], module[0].weight)


@pytest.mark.parametrize("flatten_first", [False, True])
def test_channels_of_a_convolution_have_their_symmetries(flatten_first):
    """Channels of one pattern, all active: without a penalty they are mixed by gl(2), with one they are rotated."""
    torch.manual_seed(0)
    middle = [nn.Flatten(), nn.ReLU()] if flatten_first else [nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(nn.Conv1d(1, 3, 2), *middle, nn.Linear(9, 2)).double()
    with torch.no_grad():
        net[0].weight.abs_()
        net[0].bias.copy_(torch.tensor([1.0, 2.0, -0.3]))
    x, y = torch.rand(9, 1, 4).double(), torch.randn(9, 2).double()
    for decay, count in ((0.0, 4 + 1), (0.1, 1)):
        model, vector = prepare(net, x, y, loss="squared_error", weight_decay=decay, frozen=())
        face = read_face(model, vector).face
        gauge = gauge_of(face, vector[face.free])
        assert len(gauge.basis) == count
        step = 1e-6 * gauge.basis
        here = true_outputs(model, vector)
        for move in step:
            change = true_outputs(model, face.whole(vector[face.free] + move)) - here
            assert float(change.abs().max()) < 1e-11


CHANNELS = [  # layers, the shape of a sample, and the number of symmetries
    ([nn.Linear(3, 4), nn.ReLU(), nn.AvgPool1d(2), nn.Linear(2, 1)], (3,), 0),
    ([nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Linear(4, 1), nn.Flatten()], (1, 5), 0),
    ([nn.Linear(3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)], (4, 3), 0),
    ([nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)], (1, 5), 2),
    ([nn.Conv1d(1, 2, 2), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(2, 2, 2), nn.Flatten()], (1, 5), 2),
    ([nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.AvgPool1d(2), nn.Linear(4, 1)], (1, 5), 0),
]


@pytest.mark.parametrize(("layers", "shape", "count"), CHANNELS)
def test_layers_that_mix_channels_have_no_symmetries_of_channels(layers, shape, count):
    torch.manual_seed(0)
    net, x = nn.Sequential(*layers).double(), torch.randn(9, *shape).double()
    for layer in net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    model, vector = prepare(net, x, torch.zeros_like(net(x)), loss="squared_error", weight_decay=0.0, frozen=())
    face = read_face(model, vector).face
    gauge = gauge_of(face, vector[face.free])
    assert len(gauge.basis) == count
    if count:
        change = outputs_jacobian(face, vector[face.free]) @ gauge.basis.T
        assert float(change.abs().max()) < 1e-13


def test_two_layer_points_are_classified_by_the_exact_test():
    planted = planted_kink_minimum(30, 3, 3)
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(planted.hidden_weights)
        net[2].weight.copy_(planted.output_weights[None])
    found = certify_model(net, planted.inputs, planted.targets)
    assert found.kind is Kind.KINK_MINIMUM
    assert found.reason_code is ReasonCode.CERTIFIED_ON_KINKS
    assert found.radius is None


@pytest.mark.parametrize("seed", [0, 4, 8])
def test_a_manifold_of_minima_beyond_the_symmetries_is_explained(seed):
    """Units of one pattern with parallel weights: gl(k) moves along 7 of the 9 flat directions."""
    planted = planted_minimum(30, 3, 3, (0.0, 0.1)[seed // 4 % 2], seed=seed)
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LeakyReLU(planted.negative_slope), nn.Linear(3, 1, bias=False))
    net = net.double()
    with torch.no_grad():
        net[0].weight.copy_(planted.hidden_weights)
        net[2].weight.copy_(planted.output_weights[None])
    exact = certify(
        planted.hidden_weights,
        planted.output_weights,
        planted.inputs,
        planted.targets,
        planted.negative_slope,
        threshold=0.0,
    )
    model, vector = prepare(net, planted.inputs, planted.targets, loss="squared_error", weight_decay=0.0, frozen=())
    found = classify_near(model, vector, 1e-3)
    assert found.kind is exact.kind is Kind.DIFFERENTIABLE_MINIMUM
    assert found.positive_directions == exact.rank
    assert found.symmetries + found.positive_directions == len(vector)


def test_moves_of_equal_products_change_no_output():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight[:3] = net[0].weight[:1]  # rank 1 and one bias: the units are of one pattern
        net[0].bias[:3] = net[0].bias[0]
        net[2].weight[:, 2] = 0.0
    x, y = torch.randn(20, 2).double(), torch.randn(20, 2).double()
    model, vector = prepare(net, x, y, loss="squared_error", weight_decay=0.0, frozen=())
    face = read_face(model, vector).face
    theta = vector[face.free]
    gauge = gauge_of(face, theta)
    assert len(gauge.basis) == (3 * 3 + 3 * 2 - 3 * 2) + 1  # of the product of the three units, and of the scaling
    assert float((outputs_jacobian(face, theta) @ gauge.basis.T).abs().max()) < 1e-13


def test_polish_ends_at_a_certified_minimum_without_raising_the_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x, y = torch.randn(25, 3).double(), torch.randn(25, 1).double()
    polished = polish_model(net, x, y, weight_decay=2e-2)
    found = polished.certificate
    assert found.is_minimum
    assert all(b <= a for a, b in zip(polished.losses, polished.losses[1:], strict=False))
    assert found.loss <= polished.losses[-1] + 1e-9
    again = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    again.load_state_dict(found.state_dict)
    checked = certify_model(again, x, y, weight_decay=2e-2)
    assert checked.kind is found.kind
    assert checked.kinks == found.kinks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frozen": ("7.weight",)}, "frozen"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": {"7.weight": 1.0}}, "weight_decay"),
        ({"loss": "hinge"}, "loss"),
        ({"max_distance": -1.0}, "max_distance"),
    ],
)
def test_a_wrong_argument_is_named(options, words):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with pytest.raises(ArgumentError, match=words):
        certify_model(net, torch.ones(3, 2), torch.ones(3), **options)
