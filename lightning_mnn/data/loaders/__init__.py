"""Loaders that yield each sample exactly once per epoch, on any number of processes."""
