"""Volumes: of cones, of regions, of the minima in them, and of rare events."""
