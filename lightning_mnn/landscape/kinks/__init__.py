"""Kinks of any torch module: where they are, and how far."""
