"""Figures of slices: the loss on planes and lines of weight space, and regions on planes of inputs."""
