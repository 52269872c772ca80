"""Hydra finds the launchers here: the module is installed as ``hydra_plugins/lightning_mnn.py`` by ``pyproject.toml``.

Hydra may run it more than once in a process, each time it looks for plugins.
"""

from hydra.core.config_store import ConfigStore

from lightning_mnn.launchers import batched, device_pool, slurm


class DevicePool(device_pool.DevicePool):
    """The launcher under a name that Hydra accepts: a class defined in ``hydra_plugins``."""


class Batched(batched.Batched):
    """The launcher of jobs in batches, likewise under a name that Hydra accepts."""


class Slurm(slurm.Slurm):
    """The SLURM launcher, likewise under a name that Hydra accepts."""


ConfigStore.instance().store(group="hydra/launcher", name="batched", node=batched.BatchedConf, provider="lightning_mnn")
ConfigStore.instance().store(
    group="hydra/launcher", name="device_pool", node=device_pool.DevicePoolConf, provider="lightning_mnn"
)
