"""Jobs of a sweep: their processes, the devices allocated to them, and their display."""
