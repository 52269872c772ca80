"""The processes in which a run trains, and whether they can be started."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric.plugins.environments.lsf import LSFEnvironment
from lightning_fabric.plugins.environments.mpi import MPIEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.accelerators import CUDAAccelerator, MPSAccelerator
from pytorch_lightning.utilities import rank_zero_only

from lightning_mnn.utilities.distributed import is_initialised
from lightning_mnn.utilities.resources import cores
from lightning_mnn.utilities.validation import ArgumentError, positive_integer, whole_number

if TYPE_CHECKING:
    from collections.abc import Mapping

# Launchers that run each job of a sweep in its own process, whose command, run again, starts only that job.
_LAUNCHERS = (
    *("lightning_mnn.launchers.device_pool.DevicePool", "hydra_plugins.lightning_mnn.DevicePool"),
    *("lightning_mnn.launchers.slurm.Slurm", "hydra_plugins.lightning_mnn.Slurm"),
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)
_CLUSTERS = (SLURMEnvironment, TorchElasticEnvironment, LSFEnvironment, MPIEnvironment)
_MOST_THREADS = 64  # with more threads than this and than processors, torch may crash at the start
_WITHIN = ("spawn", "fork", "notebook")  # ways to start processes from within this one


def processes() -> int:
    """Size of the process group that was actually formed."""
    return dist.get_world_size() if is_initialised() else 1


def check_trainer(cfg: DictConfig) -> None:
    """Refuse values that Lightning refuses late, unclearly or not at all; warn of more processes than cores.

    Args:
        cfg: the config, of which ``trainer`` and ``threads`` are checked.

    Raises:
        ArgumentError: an impossible training length or number of devices, nodes or threads; or a GPU where there is
            none.
    """
    trainer = cfg.trainer
    epochs = trainer.get("max_epochs")
    if epochs is not None and epochs != -1 and epochs < 1:
        problem = "must be at least 1, or -1 or null for no limit"
        raise ArgumentError("trainer.max_epochs", epochs, problem, "for example trainer.max_epochs=2000")
    for name, least in (("log_every_n_steps", 0), ("accumulate_grad_batches", 1), ("num_nodes", 1)):
        if isinstance(value := trainer.get(name), int):
            whole_number(f"trainer.{name}", value, at_least=least)
    if trainer.get("num_nodes", 1) > 1 and not _is_started_by_a_cluster():
        problem = "needs a cluster that starts a process on each node; otherwise this one would wait for the others"
        raise ArgumentError("trainer.num_nodes", trainer.num_nodes, problem, "choose hydra/launcher=slurm, or 1 node")
    if isinstance(trainer.get("accelerator"), str):
        _check_accelerator(trainer.accelerator, trainer.get("devices", "auto"))
    _check_threads(cfg.threads)


def _check_accelerator(accelerator: str, devices: Any) -> None:
    """Refuse GPUs if there are none or not enough, and invalid numbers of devices."""
    available = CUDAAccelerator.auto_device_count() if CUDAAccelerator.is_available() else 0
    has_gpu = available > 0 or MPSAccelerator.is_available()
    if accelerator in ("gpu", "cuda") and not has_gpu:
        problem = "needs a GPU, and torch sees none"
        raise ArgumentError("trainer.accelerator", accelerator, problem, "choose trainer=cpu")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not has_gpu)
    if not (on_cpu or available):  # other accelerators are left to Lightning
        return
    plain = OmegaConf.to_container(devices) if isinstance(devices, ListConfig) else devices
    count = _count(plain, on_cpu=on_cpu, available=available)
    if count is None:
        kinds = "a positive number or auto" if on_cpu else "a positive number, a list of GPUs, -1 or auto"
        raise ArgumentError("trainer.devices", plain, f"must be {kinds}", "for example trainer.devices=1")
    if on_cpu and count > cores():
        _warn(f"trainer.devices={count}: {count} processes share {cores()} cores: choose trainer.devices={cores()}")
    if not on_cpu and count > available:
        problem = f"asks for {count} GPUs, and there {'is' if available == 1 else 'are'} {available}"
        raise ArgumentError("trainer.devices", plain, problem, f"choose trainer.devices={available} or auto")


def _count(devices: Any, *, on_cpu: bool, available: int) -> int | None:
    """The number of devices that is asked for; None if the value does not determine one."""
    number = int(devices) if isinstance(devices, str) and re.fullmatch(r"-?\d+", devices) else devices
    if number == "auto":
        return max(1, 1 if on_cpu else available)
    if isinstance(number, int) and not isinstance(number, bool):
        everything = number == -1 and not on_cpu
        return available if everything else number if number > 0 else None
    if on_cpu:
        return None
    given = devices.split(",") if isinstance(devices, str) else devices if isinstance(devices, list) else []
    names = [str(name).strip() for name in given if str(name).strip()]
    return len(names) if names and all(name.isdigit() for name in names) else None


def _check_threads(threads: int | None) -> None:
    if threads is None:
        return
    positive_integer("threads", threads)
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if threads > most:
        remedy = f"this machine has {os.cpu_count()} processors"
        raise ArgumentError("threads", threads, f"must be at most {most}", remedy)


@rank_zero_only
def _warn(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")


def _is_started_by_a_cluster() -> bool:
    """Whether a cluster or launcher started this process as one of several nodes' processes, or `NODE_RANK` says so."""
    return any(environment.detect() for environment in _CLUSTERS) or "NODE_RANK" in os.environ


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse strategies whose processes cannot be started correctly, before there is any work to lose.

    Args:
        trainer: arguments of the Trainer.

    Raises:
        ValueError: the strategy trains in processes whose state is lost when they end; or it starts processes by
            running the same command again, and that command is a whole sweep.
    """
    strategy = _strategy(trainer)
    if any(way in strategy for way in _WITHIN):
        raise ValueError(
            f"trainer.strategy={strategy}: trains in processes whose callbacks and steps are lost when they end: "
            "set trainer.strategy=ddp"
        )
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN or hydra.launcher["_target_"] in _LAUNCHERS or not _starts_others(trainer):
        return
    raise ValueError(
        f"trainer.strategy={strategy} with trainer.devices={trainer.get('devices', 'auto')} starts its other processes "
        "by running the same command again, but this command is a sweep, and each of them would run all of it: "
        "add hydra/launcher=device_pool, or on a cluster hydra/launcher=slurm"
    )


def _strategy(trainer: Mapping[str, Any]) -> str:
    """The strategy's name; for one given by its class, the class and how it starts processes."""
    strategy = trainer.get("strategy") or "auto"
    if isinstance(strategy, DictConfig):
        return f"{strategy['_target_']} {strategy.get('start_method', 'popen')}"
    return str(strategy)


def _starts_others(trainer: Mapping[str, Any]) -> bool:
    """Whether Lightning starts processes by the command, or, with one device, sets the variables of a process group."""
    strategy = _strategy(trainer)
    if strategy != "auto":
        return "single" not in strategy.lower()
    return trainer.get("num_nodes", 1) > 1 or _devices(trainer) > 1


def _devices(trainer: Mapping[str, Any]) -> int:
    """Number of devices per node; invalid values are left for the Trainer to refuse."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, str) and "," in devices:
        return len([name for name in devices.split(",") if name.strip()])
    if str(devices) in ("auto", "-1", "None"):
        gpus = trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()
        return CUDAAccelerator.auto_device_count() if gpus else 1
    if str(devices).isdigit():
        return int(devices)
    return len(devices) if isinstance(devices, ListConfig | list | tuple) else 1
