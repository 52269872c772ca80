"""Figures of experiments that train nothing, or one network after another."""
