"""torch's precision switches, old and new, are full inside and as before afterwards, whichever were used."""

import subprocess
import sys

import pytest
import torch

from lightning_mnn.utilities.compat.precision import full_precision

# Each combination of what a user may have set, in a process of its own: some of it cannot be taken back.
COMBINATIONS = """
import itertools, os, sys
import torch
from lightning_mnn.utilities.compat.precision import full_precision

b = torch.backends
get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
KINDS = [(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")]
SET = [
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "b.cuda.matmul.allow_tf32 = True",
    "b.cudnn.allow_tf32 = False",
    "b.cudnn.allow_tf32 = True",
    *(f"b.{name}fp32_precision = '{value}'" for name, values in {
        "": ("tf32", "ieee", "bf16"), "cudnn.": ("tf32",), "cuda.matmul.": ("tf32", "none"),
        "cudnn.conv.": ("ieee", "none"), "cudnn.rnn.": ("tf32",), "mkldnn.matmul.": ("bf16", "ieee", "none"),
    }.items() for value in values),
    "b.mkldnn.set_flags(_fp32_precision='bf16')",
]


def own(name, above):
    "The switch's own value; none where it takes that of the one above."
    kept, seen = above[1], []
    for value in ("ieee", "tf32"):
        put(*above[0], value)
        seen.append(get(*name))
    put(*above[0], kept)
    return seen[0] if seen[0] == seen[1] else "none"


def read(old):
    try:
        return old()
    except RuntimeError:
        return "cannot be read"


def state():
    every = ("generic", "all")
    found = {every: get(*every)}
    for backend in ("cuda", "mkldnn"):
        found[backend, "all"] = own((backend, "all"), (every, found[every]))
    for backend, kind in KINDS:
        found[backend, kind] = own((backend, kind), ((backend, "all"), found[backend, "all"]))
    old = [torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32]
    return found, {name: get(*name) for name in found}, [read(value) for value in old]


def check(statements):
    for statement in statements:
        exec(statement)
    before = state()
    with full_precision():
        assert {get(*name) for name in before[0]} == {"ieee"}
        if before[2] == ["high", True, False]:
            assert (torch.get_float32_matmul_precision(), b.cuda.matmul.allow_tf32) == ("highest", False)
    assert state() == before, (before, state())


failed = []
for statements in [*itertools.chain(*(itertools.combinations(SET, n) for n in range(3))), (SET[1], *SET[-2:])]:
    sys.stdout.flush()
    if not (child := os.fork()):
        code = 1
        try:
            check(statements)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        failed.append(statements)
assert not failed, failed
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has the old switches only")
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_new_switches_are_full_inside_and_as_before_afterwards():
    done = subprocess.run([sys.executable, "-c", COMBINATIONS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_old_switches_are_full_inside_and_as_before_afterwards(monkeypatch):
    backends = torch.backends
    monkeypatch.setattr("lightning_mnn.utilities.compat.precision.torch.backends", _OldBackends(backends.cudnn))
    torch.set_float32_matmul_precision("medium")
    backends.cudnn.allow_tf32 = True
    try:
        with full_precision():
            assert (torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32) == ("highest", False)
        assert (torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32) == ("medium", True)
    finally:
        torch.set_float32_matmul_precision("highest")


class _OldBackends:
    """What torch.backends was before torch 2.9."""

    def __init__(self, cudnn):
        self.cudnn = cudnn


def test_they_are_as_before_after_an_error_and_within_one_another():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), full_precision(), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


FIT = """
import sys, warnings
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_mnn import MNN
from lightning_mnn.callbacks import ActivationPatternRecorder, AngularVolumeMonitor, LocalMinimumDetector
from lightning_mnn.callbacks import LocalVolumeSettings, Schedule, SecondOrderSettings
from lightning_mnn.data import GaussianData

torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.conv.fp32_precision = "ieee"
before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


options = dict(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
               enable_model_summary=False)
for dtype in ("float32", "float64"):
    pl.Trainer(**options).fit(MNN(6, (5,), dtype=dtype), GaussianData(20, 6))
detector = LocalMinimumDetector(Schedule(every=1), second_order=SecondOrderSettings(gradient_tolerance=1e9))
few = LocalVolumeSettings(num_draws=3)
callbacks = [detector, ActivationPatternRecorder(), AngularVolumeMonitor(local_volume=few)]
data = DataLoader(TensorDataset(torch.randn(20, 1, 8), torch.randint(3, (20,))), batch_size=10)
pl.Trainer(callbacks=callbacks, **options).fit(Net(), data)
assert detector.summary()["largest_eigenvalue"] is not None, detector.summary()
assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has the old switches only")
def test_fits_run_after_new_switches_were_used():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FIT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
