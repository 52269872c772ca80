"""The evidence that a verdict of the LocalMinimumDetector is based on: one module per tier."""
