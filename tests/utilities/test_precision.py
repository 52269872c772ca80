"""torch's precision switches, old and new, are full inside and as before afterwards, whichever were used."""

import itertools
import os
import sys

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    LocalMinimumDetector,
    LocalVolumeSettings,
    Schedule,
    SecondOrderSettings,
)
from lightning_mnn.data import GaussianData
from lightning_mnn.utilities.compat.precision import full_precision
from tests.children import side_by_side

new_switches = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch has the old switches only"
)

# What a user may have set.
STATEMENTS = [
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
]  # fmt: skip
OLD_OR_GENERIC = STATEMENTS[:8]  # each acts on several of the others


def own(name, above):
    """The switch's own value; none where it takes that of the one above."""
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
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
    get, every = torch._C._get_fp32_precision_getter, ("generic", "all")
    found = {every: get(*every)}
    for backend in ("cuda", "mkldnn"):
        found[backend, "all"] = own((backend, "all"), (every, found[every]))
        for kind in ("matmul", "conv", "rnn"):
            found[backend, kind] = own((backend, kind), ((backend, "all"), found[backend, "all"]))
    b = torch.backends
    old = [torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32]
    return found, {name: get(*name) for name in found}, [read(value) for value in old]


def check(statements):
    for statement in statements:
        exec(statement, {"torch": torch, "b": torch.backends})  # noqa: S102 (our own)
    before = state()
    with full_precision():
        assert {torch._C._get_fp32_precision_getter(*name) for name in before[0]} == {"ieee"}
        if before[2] == ["high", True, False]:
            matmul = torch.backends.cuda.matmul
            assert (torch.get_float32_matmul_precision(), matmul.allow_tf32) == ("highest", False)
    assert state() == before, (before, state())


def check_each_combination():
    """Each in a process of its own: some of it cannot be taken back."""
    failed = []
    pairs = [pair for pair in itertools.combinations(STATEMENTS, 2) if pair[0] in OLD_OR_GENERIC]
    for statements in [(), *((one,) for one in STATEMENTS), *pairs, (STATEMENTS[1], *STATEMENTS[-2:])]:
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


@new_switches
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_new_switches_are_full_inside_and_as_before_afterwards(tmp_path):
    side_by_side(tmp_path, 1, check_each_combination)


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


def fit_after_new_switches():
    def switches():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    before = switches()
    options = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    for dtype in ("float32", "float64"):
        pl.Trainer(**options).fit(MNN(6, (5,), dtype=dtype), GaussianData(20, 6))
    detector = LocalMinimumDetector(Schedule(every=1), second_order=SecondOrderSettings(gradient_tolerance=1e9))
    callbacks = [
        detector,
        ActivationPatternRecorder(),
        AngularVolumeMonitor(local_volume=LocalVolumeSettings(num_draws=3)),
    ]
    data = DataLoader(TensorDataset(torch.randn(20, 1, 8), torch.randint(3, (20,))), batch_size=10)
    pl.Trainer(callbacks=callbacks, **options).fit(Net(), data)
    assert detector.summary()["largest_eigenvalue"] is not None, detector.summary()
    assert switches() == before


@new_switches
def test_fits_run_after_new_switches_were_used(tmp_path):
    side_by_side(tmp_path, 1, fit_after_new_switches)
