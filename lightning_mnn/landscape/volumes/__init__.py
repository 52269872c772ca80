"""Volumes: of cones, of regions, of what they hold, and of rare events."""
