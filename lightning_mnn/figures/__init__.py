"""Figures from saved results."""

from lightning_mnn.figures.census import census_figure
from lightning_mnn.figures.run import PANELS, Panel, read_metrics, run_figure

__all__ = ["PANELS", "Panel", "census_figure", "read_metrics", "run_figure"]
