"""Figures drawn from saved results."""

from lightning_mnn.figures.experiments.census import census_figure
from lightning_mnn.figures.experiments.interpolators import interpolators_figure
from lightning_mnn.figures.experiments.scaling import FIGURES, error_figure, minima_figure, scan_figure
from lightning_mnn.figures.local_volume import local_volume_figure
from lightning_mnn.figures.model import model_figure
from lightning_mnn.figures.run import PANELS, Panel, run_figure
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
    "interpolators_figure",
    "local_volume_figure",
    "minima_figure",
    "model_figure",
    "read_metrics",
    "run_figure",
    "scan_figure",
    "sweep_figure",
]
