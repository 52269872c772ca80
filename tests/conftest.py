"""Fixtures that several parts of the tests share."""

import logging
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure
from torch.overrides import TorchFunctionMode

from lightning_mnn.utilities import interruption
from lightning_mnn.utilities.compat.lightning_internals import loggers_of_remarks

# Each run draws the same examples, or a change would be blamed for an example that nobody had met before.
# To look for new ones: pytest --hypothesis-profile=default
# What goes by the clock is off, as machines are busy.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and then in the tests' processes
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch, tmp_path):
    """Each test works in a folder of its own, and W&B knows of no account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)  # which Lightning's logger sets in this process
    yield
    interruption.forget()
    for name in loggers_of_remarks():  # which the command silences
        logging.getLogger(name).setLevel(logging.NOTSET)
    wandb = sys.modules.get("wandb")
    if wandb is not None and (wandb.run is not None or "WANDB_SERVICE" in os.environ):
        wandb.finish()  # else the next test would have its run,
        wandb.teardown()  # and its settings
        os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def away(monkeypatch, tmp_path):
    """The current folder is another than the Trainer's: then its folder gets files also without a logger."""
    monkeypatch.chdir(tmp_path.parent)


@pytest.fixture
def mnist_root() -> Path:
    """The folder with the original MNIST archives."""
    root = os.environ.get("LIGHTNING_MNN_DATA")
    if root is None or not (Path(root) / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("set LIGHTNING_MNN_DATA to the folder that holds MNIST/raw with the original archives")
    return Path(root)


@pytest.fixture
def make_trainer(tmp_path):
    """A Trainer on the CPU that writes to the test's folder and says nothing."""

    def make(**options) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "log_every_n_steps": 1,
        }
        return pl.Trainer(**defaults | options)

    return make


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn."""
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), real(self, *a, **k))[1])
    return figures


@pytest.fixture
def float32_precisions():
    """A context in which torch may form products of float32 in few digits; yields how it does it in some functions."""

    @contextmanager
    def allowed(*functions):
        met = set()

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if getattr(func, "__name__", "").strip("_") in functions:
                    met.add(torch.get_float32_matmul_precision())
                return func(*args, **kwargs or {})

        torch.set_float32_matmul_precision("medium")
        try:
            with Watch():
                yield met
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")

    return allowed


@pytest.fixture(autouse=True)
def _default_dtype():
    yield
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype behind"
