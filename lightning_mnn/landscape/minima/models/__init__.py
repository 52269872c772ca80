"""Certificates of minima of general piecewise-linear networks."""
