"""The equations of stationary points of any piecewise-linear network, on one face of its pieces."""
