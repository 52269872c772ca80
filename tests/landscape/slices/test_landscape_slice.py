"""Slices: losses are those of the network at each point, and units change their piece on the kinks that are drawn."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lightning_mnn.landscape import (
    KinkTrace,
    LossSurface,
    curvature_directions,
    landscape_slice,
    planted_model_kink_minimum,
    principal_directions,
    random_directions,
)
from lightning_mnn.landscape.slices.directions import flat_point
from lightning_mnn.landscape.slices.losses import PointLosses
from lightning_mnn.utilities.validation import ArgumentError

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed, *sizes, count=2, num_samples=7, dtype=torch.float64):
    """An MLP with biases, inputs, targets and random directions."""
    torch.manual_seed(seed)
    layers = [nn.Linear(sizes[0], sizes[1])]
    for a, b in itertools.pairwise(sizes[1:]):
        layers += [nn.ReLU(), nn.Linear(a, b)]
    module = nn.Sequential(*layers).to(dtype)
    inputs, targets = torch.randn(num_samples, sizes[0], dtype=dtype), torch.randn(num_samples, sizes[-1], dtype=dtype)
    return module, inputs, targets, torch.randn(count, flat_point(module).numel(), dtype=dtype)


def at(module, theta):
    """A copy with other parameters, set one by one."""
    moved = copy.deepcopy(module).requires_grad_(requires_grad=False)
    start = 0
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.copy_(theta[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
    return moved


def preactivation(module, theta, inputs, layer, sample, unit):
    """One pre-activation, by a forward pass layer by layer."""
    numbers = iter(theta.split([parameter.numel() for parameter in module.parameters()]))
    hidden = inputs[sample : sample + 1]
    for part in list(module)[: int(layer)]:
        own = [next(numbers).view_as(parameter) for parameter in part.parameters()]
        match part:
            case nn.Linear():
                hidden = hidden @ own[0].T + own[1]
            case nn.Conv2d():
                hidden = functional.conv2d(hidden, *own)
            case _:
                hidden = part(hidden)
    return float(hidden[0].flatten()[unit])


def point(module, found, coordinates):
    return flat_point(module) + coordinates @ found.directions


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, count=st.sampled_from([1, 2]), weight_decay=st.sampled_from([0.0, 0.3]))
def test_losses_equal_direct_evaluation(seed, count, weight_decay):
    module, inputs, targets, moves = drawn(seed, 3, 4, 2, count=count)
    found = landscape_slice(module, inputs, targets, moves, resolution=4, weight_decay=weight_decay)
    grid = torch.cartesian_prod(*found.axes).reshape(-1, count)
    for coordinates, loss in zip(grid, found.losses.flatten(), strict=True):
        theta = point(module, found, coordinates)
        direct = (at(module, theta)(inputs) - targets).square().sum(1).mean() + 0.5 * weight_decay * theta @ theta
        assert loss == pytest.approx(float(direct), rel=1e-12)
    assert found.losses.shape == (4,) * count


@pytest.mark.parametrize("budget", [2**28, 2000])
@pytest.mark.parametrize("batched", [True, False])
def test_chunks_and_loops_give_the_same_losses(budget, batched):
    module, inputs, targets, moves = drawn(0, 3, 4, 2)
    labels = targets.argmax(1)
    coordinates = torch.randn(9, 2, dtype=torch.float64)
    losses = PointLosses(module, inputs, labels, "cross_entropy", memory_budget=budget)
    losses._by_vmap = batched
    found = losses(flat_point(module), coordinates, moves)
    direct = [functional.cross_entropy(at(module, flat_point(module) + c @ moves)(inputs), labels) for c in coordinates]
    assert torch.allclose(found, torch.stack(direct), rtol=1e-12)
    own = PointLosses(module, inputs, labels, functional.cross_entropy, memory_budget=budget)
    assert torch.allclose(own(flat_point(module), coordinates, moves), found, rtol=1e-12)


def test_operations_that_cannot_be_batched_are_evaluated_one_by_one():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x) * (2.0 if float(self.layer.bias.detach().sum()) > 0 else 1.0)

    module = Reads().double()
    inputs, targets = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    moves = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    found = landscape_slice(module, inputs, targets, moves, resolution=3)
    for t, loss in zip(found.axes[0], found.losses, strict=True):
        direct = (at(module, point(module, found, t[None]))(inputs)[:, 0] - targets).square().mean()
        assert float(loss) == pytest.approx(float(direct), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_kink_lines_of_the_first_layer_are_where_its_pre_activation_changes_sign(seed):
    module, inputs, targets, moves = drawn(seed, 3, 5, 1)
    found = landscape_slice(module, inputs, targets, moves, resolution=3)
    (kinks,) = found.kinks
    assert (kinks.layer, kinks.exact, kinks.traced, kinks.pairs) == ("1", True, 35, 35)
    drawn_pairs = set()
    for ends, sample, unit in zip(kinks.ends, kinks.samples.tolist(), kinks.units.tolist(), strict=True):
        drawn_pairs.add((sample, unit))
        assert float(ends.abs().max()) <= 1 + 1e-9
        for share in (0.0, 0.37, 1.0):
            c = ends[0] + share * (ends[1] - ends[0])
            value = preactivation(module, point(module, found, c), inputs, 1, sample, unit)
            assert abs(value) <= 1e-10
        middle, along = ends.mean(0), ends[1] - ends[0]
        if along.norm() > 1e-3:
            normal = torch.stack([-along[1], along[0]]) / along.norm()
            sides = [
                preactivation(module, point(module, found, middle + s * normal), inputs, 1, sample, unit)
                for s in (-1e-6, 1e-6)
            ]
            assert sides[0] * sides[1] < 0
    corners = [torch.tensor(c, dtype=torch.float64) for c in ((-1.0, -1), (-1, 1), (1, 1), (1, -1))]
    for sample in range(7):
        for unit in range(5):
            signs = {preactivation(module, point(module, found, c), inputs, 1, sample, unit) > 0 for c in corners}
            assert ((sample, unit) in drawn_pairs) == (len(signs) == 2)  # a line crosses a square between corners


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_later_kinks_in_a_plane_are_in_the_cells_between_whose_corners_a_unit_changes_its_sign(seed):
    module, inputs, targets, moves = drawn(seed, 2, 4, 3, 1, num_samples=2)
    found = landscape_slice(module, inputs, targets, 0.3 * moves, resolution=15)
    first, later = found.kinks
    assert (first.exact, later.exact) == (True, False)
    grid = torch.cartesian_prod(*found.axes)
    for sample in range(2):
        for unit in range(3):
            values = [preactivation(module, point(module, found, c), inputs, 3, sample, unit) for c in grid]
            signs = torch.tensor(values).view(15, 15) > 0
            corners = torch.stack([signs[:-1, :-1], signs[1:, :-1], signs[:-1, 1:], signs[1:, 1:]])
            expected = {tuple(cell) for cell in (corners != corners[0]).any(0).nonzero().tolist()}
            ends = later.ends[(later.samples == sample) & (later.units == unit)]
            places = [torch.searchsorted(axis, ends.mean(1)[:, i].contiguous()) for i, axis in enumerate(found.axes)]
            assert {tuple(cell) for cell in (torch.stack(places, 1) - 1).tolist()} == expected


def every_change(module, found, inputs, layer, sample, unit):
    """Brackets of the changes of sign of one pre-activation on a line, by a fine grid."""
    fine = torch.linspace(-1, 1, 401, dtype=torch.float64)
    values = torch.tensor(
        [preactivation(module, point(module, found, t[None]), inputs, layer, sample, unit) for t in fine]
    )
    return [(float(fine[i]), float(fine[i + 1])) for i in ((values[:-1] > 0) != (values[1:] > 0)).nonzero()[:, 0]]


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_kinks_on_a_line_are_roots_in_every_layer(seed):
    module, inputs, targets, moves = drawn(seed, 2, 3, 2, 1, count=1, num_samples=2)
    found = landscape_slice(module, inputs, targets, moves, resolution=101)
    for kinks in found.kinks:
        for sample in range(2):
            for unit in range(len(kinks.units) and (3 if kinks.layer == "1" else 2)):
                here = (kinks.samples == sample) & (kinks.units == unit)
                positions = sorted(kinks.ends[here].flatten().tolist())
                brackets = every_change(module, found, inputs, kinks.layer, sample, unit)
                close = [(a, b) for (_, a), (b, _) in itertools.pairwise(brackets) if b - a < 0.05]
                if not close:  # two kinks within one cell of the coarser grid are missed
                    assert len(positions) == len(brackets)
                for t in positions:
                    theta = point(module, found, torch.tensor([t], dtype=torch.float64))
                    assert abs(preactivation(module, theta, inputs, kinks.layer, sample, unit)) <= 1e-9


def patterns(module, theta, inputs):
    found = []
    moved = at(module, theta)
    with KinkTrace(moved, lambda kink: found.append(kink.pieces().flatten())):
        moved(inputs)
    return torch.cat(found)


@pytest.mark.parametrize("sizes", [(3, 4, 1), (3, 4, 3, 1)])
def test_the_region_is_where_no_unit_changes_its_piece(sizes):
    module, inputs, targets, moves = drawn(3, *sizes, num_samples=4)
    found = landscape_slice(module, inputs, targets, 0.2 * moves, resolution=9)
    here = patterns(module, flat_point(module), inputs)
    grid = torch.cartesian_prod(*found.axes)
    expected = [torch.equal(patterns(module, point(module, found, c), inputs), here) for c in grid]
    assert found.region.flatten().tolist() == expected
    assert 1 < sum(expected) < len(expected)


def test_the_region_of_a_kink_minimum_leaves_out_its_own_kinks():
    planted = planted_model_kink_minimum(40, (3, 4, 1), kinks=2)
    origin = flat_point(planted.module)
    moves = random_directions(planted.module)
    ranges = [(-1e-4, 1e-4)] * 2
    found = landscape_slice(planted.module, planted.inputs, planted.targets, moves, ranges=ranges, resolution=5)
    assert bool(found.region.all())
    through = [ends for kinks in found.kinks for ends in kinks.ends]
    assert len(through) == 2
    for ends in through:  # they pass through the centre
        along = (ends[1] - ends[0]) / (ends[1] - ends[0]).norm()
        assert abs(float(ends[0][0] * along[1] - ends[0][1] * along[0])) < 1e-12
    assert torch.equal(origin, flat_point(planted.module))


def test_convolutions_and_pooling():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3), nn.ReLU6(), nn.Linear(3, 2)
    ).double()
    inputs, labels = torch.randn(3, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 1])
    moves = random_directions(module)
    found = landscape_slice(module, inputs, labels, moves, loss="cross_entropy", resolution=21)
    assert {kinks.layer: kinks.exact for kinks in found.kinks} == {"1": True, "2": False, "5": False}
    for kinks in found.kinks:
        assert len(kinks.ends) == len(kinks.samples) == len(kinks.units) > 0
    first = found.kinks[0]
    for ends, sample, unit in zip(first.ends, first.samples.tolist(), first.units.tolist(), strict=True):
        theta = point(module, found, ends.mean(0))
        assert abs(preactivation(module, theta, inputs, 1, sample, unit)) < 1e-12


@pytest.mark.parametrize("count", [1, 2])
def test_ties_of_pooled_zeros_are_no_kinks(count):
    """A window of which one number becomes positive has the kink of that number only, in the layer before."""
    module = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.MaxPool1d(4)).double()
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].bias.copy_(torch.tensor([-1.0, -1, -1, -1]))
    moves = torch.zeros(count, 8, dtype=torch.float64)
    moves[0, 5], moves[-1, 6] = 2.3, 2.3
    data = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    found = landscape_slice(module, *data, moves, resolution=8)
    relu, pooling = found.kinks
    assert len(relu.ends) == 2
    for t in pooling.ends.reshape(-1, count):  # only where both are positive, and equal
        assert count == 2
        assert float(t[0] - t[1]) == pytest.approx(0, abs=1e-9)
        assert float(t.min()) > 1 / 2.3 - 2 / 7


def test_of_many_pairs_some_are_traced_those_at_the_centre_first():
    planted = planted_model_kink_minimum(40, (3, 5, 1), kinks=2)
    moves = random_directions(planted.module)
    found = landscape_slice(planted.module, planted.inputs, planted.targets, moves, kink_pairs=9, kink_samples=30)
    (kinks,) = found.kinks
    assert len(found.samples) == 30
    assert (kinks.traced, kinks.pairs) == (9, 150)
    assert len(kinks.ends) == 9  # all of them cross the window, as there are enough that do


def test_float32_and_no_kinks():
    module, inputs, targets, moves = drawn(0, 3, 2, dtype=torch.float32)
    found = landscape_slice(module, inputs, targets, moves, resolution=4)
    assert found.losses.dtype == torch.float32
    assert found.kinks == ()
    assert bool(found.region.all())


def test_the_trajectory_is_projected_onto_its_main_components():
    module, *data, _ = drawn(0, 3, 4, 1)
    origin = flat_point(module)
    basis = torch.linalg.qr(torch.randn(len(origin), 3, dtype=torch.float64)).Q.T
    coordinates = torch.tensor([[5.0, 0, 0], [3, 2, 0], [1, 1, 0.01], [0, 0, 0]], dtype=torch.float64)
    points = list(origin + coordinates @ basis)
    moves = principal_directions(module, points)
    assert torch.allclose(moves @ moves.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    found = landscape_slice(module, *data, moves, trajectory=points, resolution=3)
    lengths = coordinates.norm(dim=1)
    assert torch.allclose(found.trajectory.norm(dim=1), lengths, rtol=1e-3, atol=1e-3)
    assert float(found.trajectory[0, 0]) > 0
    assert found.off_slice.tolist() == pytest.approx([0, 0, 0.01 / 2**0.5, 0], abs=2e-3)
    for axis, passed in zip(found.axes, found.trajectory.T, strict=True):
        assert float(axis[0]) < float(passed.min())
        assert float(passed.max()) < float(axis[-1])


def test_points_are_states_by_name_too():
    module, *data, moves = drawn(0, 3, 4, 1)
    other = at(module, flat_point(module) + moves[0])
    found = landscape_slice(
        module, *data, [moves[0]], trajectory=[other.state_dict()], center=module.state_dict(), resolution=3
    )
    assert found.trajectory.flatten().tolist() == pytest.approx([1.0])
    assert float(found.off_slice[0]) < 1e-12


def test_random_directions_have_the_lengths_of_the_filters():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2))
    moves = random_directions(module, seed=4)
    for move in moves:
        moved = at(module, move)
        assert torch.allclose(moved[0].weight.flatten(1).norm(dim=1), module[0].weight.flatten(1).norm(dim=1))
        assert torch.allclose(moved[3].weight.norm(dim=1), module[3].weight.norm(dim=1))
        assert not moved[0].bias.any()
    assert not torch.allclose(moves[0], moves[1])
    assert torch.equal(moves, random_directions(module, seed=4))


def test_curvature_directions_agree_with_the_dense_hessian():
    module, inputs, targets, _ = drawn(1, 3, 4, 1, num_samples=12)
    parameters = list(module.parameters())
    surface = LossSurface(parameters, lambda: [(1.0, lambda: (module(inputs) - targets).square().mean())])
    values, vectors = torch.linalg.eigh(surface.hessian.dense())
    found = curvature_directions(surface)
    assert torch.allclose(found @ found.T, torch.eye(2, dtype=torch.float64), atol=1e-10)
    for direction, value, vector in ((found[0], values[-1], vectors[:, -1]), (found[1], values[0], vectors[:, 0])):
        assert abs(float(direction @ vector)) == pytest.approx(1, abs=1e-4)
        assert float(direction @ surface.product(direction)) == pytest.approx(float(value), abs=1e-5)


MISTAKES = [
    ({"directions": torch.ones(3, 21)}, "directions must be one or two, got '3 directions'"),
    ({"directions": torch.ones(2, 21)}, "directions must be independent and not zero"),
    ({"directions": torch.ones(1, 20)}, r"directions\[0\] must have the shape \(21,\)"),
    ({"directions": [{"0.weight": torch.ones(4, 3)}]}, r"directions\[0\] must have 0.bias of shape \(4,\)"),
    ({"ranges": [(0, 1), (1, 1)]}, r"ranges\[1\]\[1\] must be a number, above 1"),
    ({"ranges": [(0, 1)]}, "ranges must be 2 pairs"),
    ({"resolution": 1}, "resolution must be at least 2"),
    ({"targets": torch.ones(3, 1)}, "targets must be as many as the 7 inputs"),
    ({"loss": "hinge"}, "loss must be squared_error, cross_entropy or logistic"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_named(changes, message):
    module, inputs, targets, moves = drawn(0, 3, 4, 1)
    arguments = {"module": module, "inputs": inputs, "targets": targets, "directions": moves} | changes
    with pytest.raises(ArgumentError, match=message):
        landscape_slice(**arguments)


def test_too_few_points_for_main_components():
    module, *_ = drawn(0, 3, 4, 1)
    with pytest.raises(ArgumentError, match="points must lie in at least 2 directions"):
        principal_directions(module, [flat_point(module) + 1])
