"""The figure of a run of anybody's model."""

import csv
import math

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_mnn.figures import model_figure


def write(folder, rows):
    names = sorted({name for row in rows for name in row})
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


def rows_of(num_layers):
    rows = [{"epoch": 0, "step": step, "train_loss": 0.5**step} for step in range(5)]
    for step in (0, 2, 4):
        row = {"step": step, "minimum/loss": 0.6**step, "minimum/gradient_norm": 2.0**-step}
        row |= {"minimum/relative_gradient": 3.0**-step, "minimum/min_preactivation": 1e-4}
        row |= {f"pattern/net.{i}/hamming_from_start": step / 10 + i / 100 for i in range(num_layers)}
        rows.append(row)
    end = {"step": 4, "minimum/smallest_eigenvalue": -0.25, "minimum/eigenvalue_error": 0.125}
    end |= {"minimum/largest_eigenvalue": 4.0, "volume/half_sigma": 1e-3}
    end |= {"volume/half_sigma_low": 5e-4, "volume/half_sigma_high": 2e-3}
    return [*rows, end | {f"volume/net.{i}/half_sigma": 10.0 ** -(i + 1) for i in range(num_layers)}]


@pytest.mark.parametrize("num_layers", [3, 18])
def test_every_panel_shows_its_numbers(tmp_path, drawn, num_layers):
    write(tmp_path, rows_of(num_layers))
    assert imread(model_figure(tmp_path)).shape[:2] == (720, 1300)
    loss, gradient, curvature, kink, patterns, volumes, *bar = drawn[0].axes
    assert len(bar) == (num_layers > 6)
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.5**s for s in range(5)], [0.6**s for s in (0, 2, 4)]]
    assert [list(line.get_ydata()) for line in gradient.lines] == [[b**-s for s in (0, 2, 4)] for b in (2.0, 3.0)]
    (error,) = curvature.containers
    (segment,) = error.lines[2][0].get_segments()
    np.testing.assert_allclose(segment, [[4, -0.375], [4, -0.25]])  # the error is one of the lower bound
    assert "largest: 4" in [text.get_text() for text in curvature.texts]
    assert [list(line.get_ydata()) for line in kink.lines] == [[1e-4] * 3]
    assert len(patterns.lines) == num_layers
    np.testing.assert_allclose(patterns.lines[2].get_ydata(), [0.02, 0.22, 0.42])
    (dots,) = (c for c in volumes.collections if len(c.get_offsets()) == num_layers)
    np.testing.assert_allclose(dots.get_offsets(), [(10.0 ** -(i + 1), i + 1) for i in range(num_layers)])
    assert math.isclose(volumes.lines[0].get_xdata()[0], 1e-3)


def test_a_network_that_can_be_certified_has_panels_of_its_own(tmp_path, drawn):
    names = ("minimum/mse", "minimum/stationarity", "minimum/distance", "minimum/certified_mse")
    rows = [{"step": step} | {name: 10.0 ** -(step + i) for i, name in enumerate(names)} for step in (0, 5)]
    volume = {"volume/log_lower_bound": -9.0, "volume/log_volume": -7.0, "volume/log_volume_standard_error": 0.5}
    write(tmp_path, [*rows, {"step": 5} | volume])
    model_figure(tmp_path)
    loss, stationarity, certified, _, _, volumes = drawn[0].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[1.0, 1e-5]]
    assert [list(line.get_ydata()) for line in stationarity.lines] == [[0.1, 1e-6]]
    assert [list(line.get_ydata()) for line in certified.lines] == [[1e-2, 1e-7], [1e-3, 1e-8]]
    (estimate,) = volumes.containers
    (segment,) = estimate.lines[2][0].get_segments()
    np.testing.assert_allclose(segment, [[5, -7.98], [5, -6.02]])
    assert list(volumes.lines[0].get_ydata()) == [-9.0]


def test_panels_without_numbers_say_so(tmp_path, drawn):
    write(tmp_path, [{"step": 0, "pattern/relu/hamming_from_start": 0.0, "loss": 0.0}])
    model_figure(tmp_path)
    notes = [[text.get_text() for text in ax.texts] for ax in drawn[0].axes]
    assert [note == ["not logged in this run"] for note in notes] == [True, True, True, True, False, True]


def test_a_log_of_something_else_is_named(tmp_path):
    write(tmp_path, [{"step": 0, "train_loss": 0.5}])
    with pytest.raises(ValueError, match="has none of minimum"):
        model_figure(tmp_path)
