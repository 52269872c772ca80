"""The folder of a run: its name, its settings, how it is resumed, and the console output."""
