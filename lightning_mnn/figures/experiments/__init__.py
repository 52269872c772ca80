"""Figures of the experiments in parts."""
