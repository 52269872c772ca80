"""Figures of slices show what is in the results."""

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.image import imread
from PIL import Image
from torch import nn

from lightning_mnn.figures import input_space_animation, input_space_figure, line_figure, slice_figure
from lightning_mnn.landscape import input_regions, landscape_slice, planted_model_kink_minimum, random_directions
from lightning_mnn.landscape.slices.directions import flat_point
from lightning_mnn.verdicts import Kind


@pytest.fixture(scope="module")
def planted():
    return planted_model_kink_minimum(40, (3, 4, 1), kinks=2)


def sliced(planted, count=2, **options):
    moves = random_directions(planted.module, count=count)
    start = flat_point(planted.module) + 0.5 * moves[0]
    return landscape_slice(
        planted.module, planted.inputs, planted.targets, moves,
        trajectory=[start, (start + flat_point(planted.module)) / 2], resolution=21, kind=Kind.KINK_MINIMUM, **options,
    )  # fmt: skip


def titles(figure):
    return [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]


def test_a_plane_shows_its_kinks_its_trajectory_and_the_kind(planted, tmp_path, drawn):
    found = sliced(planted)
    path = slice_figure({"whole": found, "again": found}, tmp_path / "slice.png", "title")
    assert imread(path).shape[2] == 4
    (figure,) = drawn
    assert titles(figure)[0] == "title   |   minimum on kinks"
    ax = figure.axes[0]
    (lines,) = [one for one in ax.collections if type(one) is LineCollection]
    np.testing.assert_allclose(np.stack(lines.get_segments()), found.kinks[0].ends)
    passed = np.concatenate([found.trajectory, np.zeros((1, 2))])
    assert any(np.array_equal(line.get_xydata(), passed) for line in ax.lines)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert {"kinks of layer 1 (exact)", "start", "centre", "trajectory, projected"} <= set(labels)


def test_a_line_shows_the_loss_and_a_mark_for_each_kink(planted, tmp_path, drawn):
    found = sliced(planted, 1)
    line_figure({"line": found}, tmp_path / "line.png", "title", "along")
    (figure,) = drawn
    ax = figure.axes[0]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), found.losses)
    (marks,) = [one for one in ax.collections if type(one) is LineCollection]
    np.testing.assert_allclose([segment[0, 0] for segment in marks.get_segments()], found.kinks[0].ends.flatten())
    assert ax.get_xlabel() == "along"


def test_a_loss_of_zero_can_be_drawn(tmp_path):
    module = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    for parameter in module.parameters():
        nn.init.constant_(parameter, -1.0)
    data = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    found = landscape_slice(module, *data, torch.eye(2, dtype=torch.float64), ranges=[(-0.1, 0.1)] * 2, resolution=3)
    assert not found.losses.any()
    assert slice_figure({"zero": found}, tmp_path / "zero.png").exists()


def test_the_radius_counts_kinks_off_the_centre(planted):
    found = sliced(planted)
    ends = found.kinks[0].ends
    through = [ends[found.kinks[0].samples == sample] for sample in found.kinks[0].samples.unique()]
    assert through
    radius = found.kink_radius(1)
    near = sliced(planted, ranges=[(-0.7 * radius, 0.7 * radius)] * 2)
    assert len(near.kinks[0].ends) == 2  # only the kinks of the minimum
    assert found.kink_radius(10**6) == float("inf")


@pytest.mark.parametrize("outputs", [1, 3])
def test_input_space_shows_each_region(tmp_path, drawn, outputs):
    torch.manual_seed(0)
    layers = nn.Linear(2, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3), nn.LeakyReLU(0.1), nn.Linear(3, outputs)
    module = nn.Sequential(*layers).double()
    with torch.no_grad():  # so that the decision changes near a point
        module[-1].bias -= module(torch.full((1, 2), 0.7, dtype=torch.float64))[0]
    regions = input_regions(module, ranges=[(-4, 4)] * 2)
    boundary = regions.decision_boundary(0.0)
    assert len(boundary)
    samples = np.array([[0.1, 0.2], [0.5, -0.5]]), np.array([0.0, 1.0])
    path = input_space_figure(regions, tmp_path / "inputs.png", samples, threshold=0.0, title="t")
    assert imread(path).shape[2] == 4
    (figure,) = drawn
    left, right = figure.axes[:2]
    (cells,) = [one for one in left.collections if type(one) is PolyCollection]
    assert len(cells.get_paths()) == len(regions.polygons)
    drawn_lines = [one for one in right.collections if type(one) is LineCollection]
    assert [len(one.get_segments()) for one in drawn_lines[:2]] == [len(k) for k in regions.kinks.values()]
    np.testing.assert_array_equal(drawn_lines[2].get_segments(), boundary)


def test_the_animation_has_a_frame_for_each_network(tmp_path):
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(3)]
    frames = [(f"step {i}", input_regions(module)) for i, module in enumerate(modules)]
    path = input_space_animation(frames, tmp_path / "a.gif", (np.zeros((1, 2)), np.zeros(1)), threshold=0.5)
    with Image.open(path) as image:
        assert image.format == "GIF"
        assert image.n_frames == 3
