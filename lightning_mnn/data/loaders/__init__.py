"""Loaders whose samples are seen exactly once an epoch, on any number of processes."""
