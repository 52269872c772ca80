"""Image data sets whose classes form two groups."""
