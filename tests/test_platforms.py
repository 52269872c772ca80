"""Other systems than Linux, as far as they can be told here."""

import os
import subprocess
import sys

import pytest

from lightning_mnn.launchers.device_pool import DevicePool
from lightning_mnn.launchers.signals import LaunchError

# A process in which our modules find what Windows has. The libraries have found Linux before, which they chose their
# own parts by; of Lightning one is told.
AS_ON_WINDOWS = """
import importlib, os, pkgutil, signal, sys
import filelock, hydra, matplotlib.pyplot, pyarrow.parquet, pytorch_lightning, rich.live, torchvision, wandb, zarr
import concurrent.futures.process, multiprocessing.spawn
from pytorch_lightning.trainer.connectors import signal_connector

for name in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
known = ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM")
for name in ("alarm", "pause", "pthread_sigmask", "setitimer", "sigwait", *signal.Signals.__members__):
    if name not in known:
        delattr(signal, name)
signal.valid_signals = lambda: {getattr(signal, name) for name in known}
signal_connector._IS_WINDOWS = True
for name in ("fork", "getpgid", "killpg", "sched_getaffinity", "setpgid", "setsid", "WIFSIGNALED", "WNOHANG"):
    delattr(os, name)

import lightning_mnn

for module in pkgutil.walk_packages(lightning_mnn.__path__, "lightning_mnn."):
    importlib.import_module(module.name)
from lightning_mnn.app import main

sys.argv = ["lightning-mnn", "trainer.max_epochs=3", "data.num_samples=12", "logger.mode=disabled"]
main()
"""


def test_the_quickstart_runs_without_what_windows_lacks(tmp_path):
    done = subprocess.run([sys.executable, "-c", AS_ON_WINDOWS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/quickstart/*/summary.json"))) == 1


def test_the_device_pool_says_what_it_needs(monkeypatch):
    pool = DevicePool()
    pool.setup(hydra_context=None, task_function=None, config=None)
    monkeypatch.delattr(os, "killpg")
    with pytest.raises(LaunchError, match=r"needs Linux or macOS.*hydra/launcher=basic"):
        pool.launch([["seed=1"]], 0)
