"""Slices: the loss on a plane or a line of weight space, and a network's regions on a plane of inputs."""
