"""What a verdict of the LocalMinimumDetector is based on: one module a tier."""
