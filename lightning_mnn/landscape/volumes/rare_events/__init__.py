"""Probabilities of rare events of random weights: the method, and the events."""
