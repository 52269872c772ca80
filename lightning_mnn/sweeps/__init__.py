"""The results of a sweep, read from its folder: its jobs, their table, the report, and the summary run in W&B."""
