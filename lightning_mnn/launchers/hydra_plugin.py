"""Where Hydra looks for plugins: installed as ``hydra_plugins/lightning_mnn.py`` (see ``pyproject.toml``).

Hydra may run this module again in one process, when it looks for plugins again.
"""

from hydra.core.config_store import ConfigStore

from lightning_mnn.launchers import device_pool, slurm


class DevicePool(device_pool.DevicePool):
    """The launcher by the only sort of name that Hydra takes."""


class Slurm(slurm.Slurm):
    """The same of the other launcher."""


ConfigStore.instance().store(
    group="hydra/launcher", name="device_pool", node=device_pool.DevicePoolConf, provider="lightning_mnn"
)
