"""The processes of a run: their devices, signals, and connections."""
