"""Linear regions on a plane of inputs: their number, how they fit together, and what the network is on each."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mnn.landscape import input_regions
from lightning_mnn.utilities.validation import ArgumentError

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed, *sizes, slope=0.0):
    torch.manual_seed(seed)
    layers = [nn.Linear(sizes[0], sizes[1])]
    for i in range(1, len(sizes) - 1):
        layers += [nn.LeakyReLU(slope) if slope else nn.ReLU(), nn.Linear(sizes[i], sizes[i + 1])]
    return nn.Sequential(*layers).double()


def crossings(module):
    """The points where two kinks of the first layer cross."""
    weights, biases = module[0].weight.detach().numpy(), module[0].bias.detach().numpy()
    return np.array([np.linalg.solve(weights[[i, j]], -biases[[i, j]]) for i, j in combinations(range(len(biases)), 2)])


def inside(polygon, points):
    """Whether points are inside a convex polygon, by the side of each of its edges on which they are."""
    along = np.roll(polygon, -1, 0) - polygon
    away = points[:, None] - polygon
    sides = along[:, 0] * away[..., 1] - along[:, 1] * away[..., 0]
    return (sides > 0).all(1) | (sides < 0).all(1)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, width=st.integers(1, 9))
def test_one_layer_in_general_position_has_the_number_of_regions_of_zaslavskys_formula(seed, width):
    module = drawn(seed, 2, width, 1)
    points = crossings(module) if width > 1 else np.zeros((1, 2))
    weights, biases = module[0].weight.detach().numpy(), module[0].bias.detach().numpy()
    feet = -biases[:, None] * weights / np.square(weights).sum(1, keepdims=True)
    size = 2 * max(np.abs(points).max(), np.abs(feet).max()) + 1
    assume(size < 1e4)  # otherwise two lines are parallel up to rounding
    found = input_regions(module, ranges=[(-size, size)] * 2)
    assert len(found.polygons) == sum(comb(width, j) for j in range(3))
    assert found.num_vertices - found.num_edges + len(found.polygons) == 1
    assert len(np.unique(found.active, axis=0)) == len(found.polygons)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, width=st.integers(2, 15))
def test_in_any_window_each_line_and_each_crossing_adds_a_region(seed, width):
    module = drawn(seed, 2, width, 1)
    found = input_regions(module)
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    signs = module[0](corners) > 0
    lines = int((signs.any(0) & ~signs.all(0)).sum())
    points = crossings(module)
    assert len(found.polygons) == 1 + lines + int((np.abs(points) < 1).all(1).sum())


def test_kinks_through_one_point():
    module = nn.Sequential(nn.Linear(2, 6, bias=False), nn.ReLU(), nn.Linear(6, 1)).double()
    found = input_regions(module)
    assert len(found.polygons) == 12
    assert found.num_vertices - found.num_edges + 12 == 1


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, slope=st.sampled_from([0.0, 0.2]), sizes=st.sampled_from([(2, 5, 4, 1), (2, 4, 4, 3, 3)]))
def test_deep_networks_are_affine_on_polygons_that_fit_together(seed, slope, sizes):
    module = drawn(seed, *sizes, slope=slope)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    found = input_regions(module, ranges=[(-2, 2), (-1, 3)])
    assert found.areas().sum() == pytest.approx(16, rel=1e-9)
    assert found.num_vertices - found.num_edges + len(found.polygons) == 1
    points = torch.rand(400, 2, dtype=torch.float64) * 4 - torch.tensor([2.0, 1.0])
    hidden, active = points, []
    with torch.no_grad():
        for layer in module:
            if not isinstance(layer, nn.Linear):
                active.append(hidden > 0)
            hidden = layer(hidden)
    active, outputs = torch.cat(active, 1).numpy(), hidden.numpy()
    seen = np.zeros(len(points), int)
    for polygon, row, functions in zip(found.polygons, found.active, found.outputs, strict=True):
        here = inside(polygon, points.numpy())
        seen += here
        assert (active[here] == row).all()
        affine = functions[:, 0] + points.numpy()[here] @ functions[:, 1:].T
        np.testing.assert_allclose(affine, outputs[here], rtol=1e-9, atol=1e-9)
    assert (seen <= 1).all()
    assert (seen == 0).sum() <= 2  # on an edge up to rounding


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_kinks_are_zeros_of_their_layer(seed):
    module = drawn(seed, 2, 4, 3, 1)
    found = input_regions(module, ranges=[(-3, 3)] * 2)
    for place, segments in found.kinks.items():
        for segment in segments:
            values = module[: int(place)](torch.from_numpy(segment.mean(0)[None]))
            assert float(values.detach().abs().min()) < 1e-9


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, outputs=st.sampled_from([1, 3]))
def test_the_decision_changes_on_its_boundary(seed, outputs):
    module = drawn(seed, 2, 6, 4, outputs)
    found = input_regions(module, ranges=[(-3, 3)] * 2)
    boundary = found.decision_boundary(0.1)
    assert boundary.shape[1:] == (2, 2)
    with torch.no_grad():
        for segment in boundary:
            (values,) = module(torch.from_numpy(segment.mean(0)[None]))
            if outputs == 1:
                assert abs(float(values) - 0.1) < 1e-9
            else:
                largest = values.sort(descending=True).values
                assert float(largest[0] - largest[1]) < 1e-9
        points = torch.from_numpy(np.stack(np.meshgrid(*[np.linspace(-3, 3, 40)] * 2), -1)).reshape(-1, 2)
        decisions = (module(points)[:, 0] > 0.1) if outputs == 1 else module(points).argmax(1)
    assert len(boundary) > 0 or len(decisions.unique()) == 1


def test_a_plane_of_images():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3), nn.ReLU(),
        nn.Linear(3, 2),
    ).eval()  # fmt: skip
    moves, center = torch.randn(2, 1, 6, 6), torch.randn(1, 6, 6)
    found = input_regions(module, moves, center=center)
    assert found.num_vertices - found.num_edges + len(found.polygons) == 1
    assert len(found.polygons) > 20
    for polygon, functions in zip(found.polygons[::9], found.outputs[::9], strict=True):
        c = polygon.mean(0)
        image = center.double() + torch.einsum("k,k...->...", torch.from_numpy(c), moves.double())
        with torch.no_grad():
            (direct,) = module.double()(image[None])
        np.testing.assert_allclose(functions[:, 0] + functions[:, 1:] @ c, direct, atol=1e-9)
        module.float()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Linear(2, 1), {}, "module must be an nn.Sequential"),
        (nn.Sequential(nn.Linear(2, 1), nn.Tanh()), {}, "module has a layer whose kinks are not cut exactly"),
        (nn.Sequential(nn.Linear(3, 1)), {}, "directions must be given for a network"),
        (nn.Sequential(nn.Linear(2, 9), nn.ReLU()), {"max_regions": 2}, "max_regions is less than the"),
        (nn.Sequential(nn.Linear(2, 1)), {"ranges": [(0, 1), (2, 1)]}, r"ranges\[1\]\[1\] must be a number, above 2"),
        (nn.Sequential(nn.Linear(2, 1)), {"center": torch.zeros(3)}, "center must have the shape"),
    ],
)
def test_mistakes_are_named_with_their_arguments(module, options, message):
    torch.manual_seed(0)
    with pytest.raises(ArgumentError, match=message):
        input_regions(module, **options)
