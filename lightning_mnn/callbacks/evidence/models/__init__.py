"""Certificates of piecewise-linear models: their objective, and the tier of evidence."""
