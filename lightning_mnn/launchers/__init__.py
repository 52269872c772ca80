"""Hydra's launchers: device_pool and slurm."""
