"""Regions: the linear model inside one activation pattern, its rank, its least squares, its minima."""
