"""Vital signs of a network in training: what its units, their patterns and its gradients do."""
