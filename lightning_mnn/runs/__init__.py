"""A run's folder: its name, its settings, its resumption, and what is said on the console."""
