"""Curvature: a loss with its derivatives, its extreme eigenvalues, and second-order tests of a point."""
