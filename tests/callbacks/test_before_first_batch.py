"""How much the callbacks read before the first batch, and what they leave out where there is too little time."""

import logging
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from lightning_mnn import MNN
from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    LocalMinimumDetector,
    Schedule,
    SecondOrderSettings,
    local_minimum_detector,
)
from lightning_mnn.callbacks.evaluation import full_batch
from lightning_mnn.callbacks.patterns.vital_signs import VitalSettings
from lightning_mnn.callbacks.trainer import long_pass
from lightning_mnn.utilities import interruption
from tests.children import side_by_side

_BATCH = 8
_SAMPLES = 20 * _BATCH
_FEW = 4 * _BATCH  # samples of the first batches that checks may read
_PROBE = 10  # samples of the recorder's


class Counted(Dataset):
    """Counts how often a sample is read; each takes a second of a clock that nothing else moves."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.reads, self.seconds = inputs, targets, 0, 0.0

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        self.reads += 1
        self.seconds += 1.0
        return self.inputs[index], self.targets[index]


class Foreign(pl.LightningModule):
    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]).squeeze(-1), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class ReadsAtFirstBatch(pl.Callback):
    def __init__(self, dataset):
        self.dataset, self.reads = dataset, None

    def on_train_start(self, trainer, pl_module):
        self.reads = self.dataset.reads  # behind the other callbacks, before training asks for a batch


def _two_layers():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 1))


def _mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3))


def _cnn():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def _case(name):
    """A module and its training set."""
    torch.manual_seed(0)
    x, image = torch.randn(_SAMPLES, 6), torch.randn(_SAMPLES, 1, 6, 6)
    classes, real, binary = torch.randint(3, (_SAMPLES,)), x[:, 0] * x[:, 1], (x[:, 0] > 0).float()
    foreign = {
        "mlp": (_mlp, nn.functional.cross_entropy, x, classes),
        "cnn": (_cnn, nn.functional.cross_entropy, image, classes),
        "regression": (_two_layers, nn.functional.mse_loss, x, real),
        "labels": (_two_layers, nn.functional.mse_loss, x, binary),
        "l1": (_two_layers, nn.functional.l1_loss, x, real),
    }
    if name in foreign:
        net, loss, inputs, targets = foreign[name]
        return Foreign(net(), loss), Counted(inputs, targets)
    return MNN(6, [9] if name == "mnn" else [9, 7], default_callbacks=False), Counted(x, binary)


def _reads_before_first_batch(make_trainer, name, callbacks, sampler=None):
    module, dataset = _case(name)
    reads = ReadsAtFirstBatch(dataset)
    loader = DataLoader(dataset, batch_size=_BATCH, sampler=sampler)
    make_trainer(max_steps=1, max_epochs=1, callbacks=[*callbacks, reads]).fit(module, loader)
    own = _SAMPLES if name.startswith("mnn") else 0  # an MNN checks its training set itself
    return reads.reads - own


@pytest.fixture(autouse=True)
def _large_training_set(monkeypatch):
    """Batches are not kept in memory, as those of a set of more than 256 MiB."""
    monkeypatch.setattr(full_batch, "_MAX_CACHED", 0)


@pytest.mark.parametrize("name", ["mlp", "cnn", "regression", "labels", "l1", "mnn", "mnn with two hidden layers"])
def test_the_detector_reads_the_training_set_once_before_the_first_batch(make_trainer, name):
    detector = LocalMinimumDetector(stop_training=False, second_order=SecondOrderSettings(max_products=2))
    reads = _reads_before_first_batch(make_trainer, name, [detector])
    once_more = _BATCH if name == "l1" else 0  # whose loss is compared with that of two tiers
    assert _SAMPLES <= reads <= _SAMPLES + _FEW + once_more
    tiers = {"regression": "certificate", "labels": "certificate", "mnn": "certificate", "mlp": "certificate"}
    if name in tiers:
        assert detector.summary()["evidence"] == tiers[name]


def test_drawn_samples_are_read_once_too(make_trainer):
    sampler = WeightedRandomSampler([1.0] * _SAMPLES, _SAMPLES, generator=torch.Generator())
    detector = LocalMinimumDetector(second_order=SecondOrderSettings(max_products=2))
    reads = _reads_before_first_batch(make_trainer, "mlp", [detector], sampler)
    assert _SAMPLES <= reads <= _SAMPLES + _FEW


@pytest.mark.parametrize("name", ["mlp", "cnn", "regression"])
def test_recorder_and_monitor_read_a_probe(make_trainer, tmp_path, name):
    recorder = ActivationPatternRecorder(probe=_PROBE, dirpath=tmp_path)
    assert _reads_before_first_batch(make_trainer, name, [recorder]) <= _PROBE + _FEW
    whole = _SAMPLES if name == "regression" else 0  # whose regions are those of the training set
    assert _reads_before_first_batch(make_trainer, name, [AngularVolumeMonitor(measure=[])]) <= whole + 2 * 32 + _FEW


@pytest.mark.parametrize("name", ["regression", "mnn"])
def test_the_callbacks_share_one_pass_over_a_network(make_trainer, tmp_path, name):
    callbacks = [LocalMinimumDetector(), ActivationPatternRecorder(dirpath=tmp_path), AngularVolumeMonitor(measure=[])]
    of_recorder = 0 if name == "mnn" else _SAMPLES  # on whose samples a foreign module runs itself
    of_vital_signs = VitalSettings().samples  # which are read once more
    reads = _reads_before_first_batch(make_trainer, name, callbacks)
    assert reads <= _SAMPLES + of_recorder + of_vital_signs + 3 * _FEW


def test_a_stationary_start_on_kinks_waits_for_the_next_check(make_trainer):
    """The gradients on both sides would be two passes more."""
    net = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 3, bias=False))
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[2].weight)
    _, dataset = _case("mlp")
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((dataset.reads, detector.summary()["kind"], detector.summary()["reason"]))

    detector = LocalMinimumDetector(Schedule(every=1), second_order=SecondOrderSettings(max_products=2))
    module = Foreign(net, nn.functional.cross_entropy)
    make_trainer(max_epochs=1, callbacks=[detector, Look()]).fit(module, DataLoader(dataset, batch_size=_BATCH))
    ((reads, kind, reason),) = seen
    assert reads <= _SAMPLES + _FEW
    assert (kind, "the sides of these kinks were not compared" in reason) == ("on_kink", True)


# What there is too little time for


@pytest.fixture
def clocked(monkeypatch, make_trainer):
    """Fits a case where each sample that is read takes a second; returns the detector and what it said."""

    def fit(name, max_seconds, *, epochs=1, **options):
        module, dataset = _case(name)
        clock = SimpleNamespace(monotonic=lambda: dataset.seconds)
        for own in (interruption, local_minimum_detector, long_pass):
            monkeypatch.setattr(own, "time", clock)
        options = {
            "stop_training": False,
            "second_order": SecondOrderSettings(max_products=2),
            "strict": True,
        } | options
        detector = LocalMinimumDetector(Schedule(every=1), max_seconds=max_seconds, **options)
        loader = DataLoader(dataset, batch_size=_BATCH)
        make_trainer(max_epochs=epochs, callbacks=[detector]).fit(module, loader)
        return detector

    return fit


@pytest.mark.parametrize("name", ["mlp", "cnn", "regression", "l1"])
def test_a_look_that_takes_too_long_leaves_the_gradients_of_training(clocked, name):
    summary = clocked(name, _SAMPLES / 2).summary()
    assert summary["evidence"] == "first_order"
    assert summary["kind"] == "undecided"
    assert summary["gradient_norm"] > 0
    assert "a check took longer than max_seconds=80: increase it, or use max_seconds=None" in summary["reason"]
    assert "kinks were not checked" in summary["reason"]


def test_without_a_gradient_of_training_there_is_no_evidence(clocked, monkeypatch):
    monkeypatch.setattr(LocalMinimumDetector, "on_before_optimizer_step", lambda *_: None)
    summary = clocked("mnn", _SAMPLES / 2).summary()
    assert (summary["evidence"], summary["kind"]) == ("none", "undecided")
    assert "max_seconds=80" in summary["reason"]


def test_products_that_take_too_long_leave_first_order_evidence(clocked):
    more = SecondOrderSettings(max_products=64, gradient_tolerance=1e9)
    summary = clocked("mlp", 2.5 * _SAMPLES, second_order=more).summary()
    assert (summary["evidence"], summary["kind"]) == ("first_order", "undecided")
    assert "no eigenvalue of the Hessian: a check took longer than max_seconds=400" in summary["reason"]
    assert summary["smallest_eigenvalue"] is None


def test_the_time_is_that_of_one_check(clocked):
    summary = clocked("mlp", 1.5 * _SAMPLES, epochs=3).summary()
    assert summary["evidence"] == "second_order"


def test_a_certificate_that_takes_too_long_leaves_the_first_order_tests(clocked):
    detector = clocked("regression", 1.5 * _SAMPLES)
    summary = detector.summary()
    assert summary["evidence"] == "first_order"
    assert "no certificate: a check took longer than max_seconds=240" in summary["reason"]
    assert detector.verdicts
    assert not detector.certificates


def test_max_seconds_must_be_positive():
    for value in (0, -1.0, "1", True, float("nan")):
        with pytest.raises(ValueError, match="max_seconds must be a number, above 0"):
            LocalMinimumDetector(max_seconds=value)


# What is said


def test_a_long_pass_is_announced_once_and_a_short_one_is_not(clocked, caplog):
    with caplog.at_level(logging.INFO):
        clocked("mlp", None)
    told = [record.message for record in caplog.records if "for 20 batches of the training set" in record.message]
    assert told[0] == (
        "LocalMinimumDetector after 0 steps, a check on the whole training set: about 3 min for 20 batches of the "
        "training set"
    )
    assert len(told) == 2  # at the start and at the end


def test_a_short_pass_says_nothing(make_trainer, caplog):
    module, dataset = _case("mlp")
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(
            max_epochs=1, callbacks=[LocalMinimumDetector(second_order=SecondOrderSettings(max_products=2))]
        )
        trainer.fit(module, DataLoader(dataset, batch_size=_BATCH))
    assert not any("batches of the training set" in record.message for record in caplog.records)


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize("what", ["error", "time"])
def test_what_one_process_meets_in_a_pass_is_met_by_all(tmp_path, what):
    side_by_side(tmp_path, 2, in_two_processes, what)
    expected = {
        "error": "none True ZeroDivisionError: here only\n",
        "time": "first_order True the norm of the last step's gradient, of a mini-batch, is ",
    }
    for rank in range(2):
        said = (tmp_path / f"rank_{rank}" / "out.txt").read_text()
        assert expected[what] in said
        assert ("max_seconds=1000" in said) is (what == "time")


def in_two_processes(what):
    """Train where in the look at the end the second of two processes meets an error, or has no time left."""
    module, dataset = _case("mlp")

    def loss(module, batch):
        if module.global_step and module.global_rank == 1:
            if what == "error":
                raise ZeroDivisionError("here only")
            interruption.time = SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6)
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    detector = LocalMinimumDetector(max_seconds=1000.0, loss_fn=loss, stop_training=False)
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, callbacks=[detector], **options, **quiet)
    trainer.fit(module, DataLoader(dataset, batch_size=_BATCH))
    summary = detector.summary()
    print(summary["evidence"], trainer.global_step > 0, summary["reason"])
