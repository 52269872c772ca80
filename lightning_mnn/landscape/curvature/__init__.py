"""Curvature: a loss with its derivatives, its extreme eigenvalues, and what they say of a point."""
