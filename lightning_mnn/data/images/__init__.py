"""Images in two groups of classes."""
