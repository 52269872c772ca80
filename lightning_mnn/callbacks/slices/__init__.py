"""The loss of a module on slices of its weight space."""
