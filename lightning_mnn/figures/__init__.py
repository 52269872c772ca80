"""Figures drawn from saved results."""

from lightning_mnn.figures.census import census_figure
from lightning_mnn.figures.local_volume import local_volume_figure
from lightning_mnn.figures.model import model_figure
from lightning_mnn.figures.run import PANELS, Panel, run_figure
from lightning_mnn.figures.scaling import FIGURES, error_figure, minima_figure, scan_figure
from lightning_mnn.figures.slices.input_space import input_space_animation, input_space_figure
from lightning_mnn.figures.slices.weight_space import line_figure, slice_figure
from lightning_mnn.figures.sweep import sweep_figure
from lightning_mnn.figures.sweep_bands import band_figure, figure_of_test_errors
from lightning_mnn.figures.tables import read_metrics

__all__ = [
    "FIGURES",
    "PANELS",
    "Panel",
    "band_figure",
    "census_figure",
    "error_figure",
    "figure_of_test_errors",
    "input_space_animation",
    "input_space_figure",
    "line_figure",
    "local_volume_figure",
    "minima_figure",
    "model_figure",
    "read_metrics",
    "run_figure",
    "scan_figure",
    "slice_figure",
    "sweep_figure",
]
