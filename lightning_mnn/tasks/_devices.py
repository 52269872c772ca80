"""Which processes a run trains in, and whether they can be started from where it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig
from pytorch_lightning.accelerators import CUDAAccelerator

if TYPE_CHECKING:
    from collections.abc import Mapping

# Launchers by which each job of a sweep has a process of its own, that can be started again as the job alone.
_LAUNCHERS = (
    *("lightning_mnn.launcher.DevicePool", "hydra_plugins.lightning_mnn.DevicePool"),
    *("lightning_mnn.slurm.Slurm", "hydra_plugins.lightning_mnn.Slurm"),
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)
_WITHIN = ("spawn", "fork", "notebook")  # ways to start processes that go on from within this one


def processes() -> int:
    """Size of the process group that was really formed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse strategies whose processes cannot be started rightly, before there is any work to lose.

    Args:
        trainer: arguments of the Trainer.

    Raises:
        ValueError: the strategy trains in processes that are lost at its end with what they know; or it starts
            processes by running the same command again, which is that of a whole sweep.
    """
    strategy = _strategy(trainer)
    if any(way in strategy for way in _WITHIN):
        raise ValueError(
            f"trainer.strategy={strategy} trains in processes whose callbacks and steps are lost when they end: "
            "set trainer.strategy=ddp"
        )
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN or hydra.launcher["_target_"] in _LAUNCHERS or not _starts_others(trainer):
        return
    raise ValueError(
        f"trainer.strategy={strategy} with trainer.devices={trainer.get('devices', 'auto')} starts its other processes "
        "by running the same command again, and this one is a sweep, which each of them would run as a whole: "
        "add hydra/launcher=device_pool, or on a cluster hydra/launcher=slurm"
    )


def _strategy(trainer: Mapping[str, Any]) -> str:
    """The strategy's name; of one given by its class, that class, and how it starts processes."""
    strategy = trainer.get("strategy") or "auto"
    if isinstance(strategy, DictConfig):
        return f"{strategy['_target_']} {strategy.get('start_method', 'popen')}"
    return str(strategy)


def _starts_others(trainer: Mapping[str, Any]) -> bool:
    """Whether Lightning starts processes by the command, or, with one device, leaves variables that say it did."""
    strategy = _strategy(trainer)
    if strategy != "auto":
        return "single" not in strategy.lower()
    return trainer.get("num_nodes", 1) > 1 or _devices(trainer) > 1


def _devices(trainer: Mapping[str, Any]) -> int:
    """Devices of a node; what is no number of them is left for the Trainer to refuse."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, str) and "," in devices:
        return len([name for name in devices.split(",") if name.strip()])
    if str(devices) in ("auto", "-1", "None"):
        gpus = trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()
        return CUDAAccelerator.auto_device_count() if gpus else 1
    if str(devices).isdigit():
        return int(devices)
    return len(devices) if isinstance(devices, ListConfig | list | tuple) else 1
