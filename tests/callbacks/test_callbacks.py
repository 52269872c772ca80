"""The three callbacks in real fits."""

import csv
import itertools
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import zarr
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    LocalMinimumDetector,
    PatternStore,
    RunProgress,
    Schedule,
)
from lightning_mnn.data import GaussianData, TensorData
from lightning_mnn.landscape import ActivationPattern, Kind, Network, Region, log_volume_lower_bound
from lightning_mnn.verdicts import Reason, ReasonCode
from tests import naive

ADAM = {"name": "adam", "lr": 1e-2}


def fitted(make_trainer, epochs=2000, **options):
    """A small quickstart: over-parameterised Gaussian data."""
    detector = LocalMinimumDetector(Schedule(every=20))
    trainer = make_trainer(max_epochs=epochs, callbacks=[detector], **options)
    model = MNN(12, (12,), optimizer=ADAM, schedule={"name": "exponential_tail"})
    trainer.fit(model, GaussianData(28, 12))
    return trainer, model, detector


def read_rows(logger):
    """The rows of a metrics.csv, each with the values that it has."""
    with Path(logger.experiment.metrics_file_path).open(newline="") as file:
        return [{name: float(v) for name, v in row.items() if v} for row in csv.DictReader(file)]


def callback(trainer, kind):
    return next(c for c in trainer.callbacks if isinstance(c, kind))


def test_detector_stops_at_a_minimum_and_knows_it(make_trainer):
    trainer, model, detector = fitted(make_trainer)
    assert detector.converged
    assert trainer.global_step < 2000
    assert trainer.global_step % 20 == 0
    summary = detector.summary()
    assert summary["kind"] == "differentiable_minimum"
    assert summary["zero_error"] is True
    assert summary["wrong"] == 0
    assert summary["mse"] < 1e-25
    assert summary["rank"] == 28 == summary["rank_cap"]
    x, y = GaussianData(28, 12).tensors()
    problem = naive.Problem(model.network(), x, y)
    layers, outputs = naive.forward(problem)
    assert summary["min_preactivation"] == pytest.approx(min(abs(u) for row in layers[0] for u in row), rel=1e-9)
    assert max(abs(o - t) for o, t in zip(outputs, y.tolist(), strict=True)) < 1e-12
    json.dumps(summary)


def test_detector_does_not_fire_early_and_need_not_stop(make_trainer):
    _, _, early = fitted(make_trainer, epochs=60)
    assert not early.converged
    assert early.summary()["kind"] == "not_stationary"
    going_on = LocalMinimumDetector(Schedule(every=20), patience=2, stop_training=False)
    trainer = make_trainer(max_epochs=1200, callbacks=[going_on])
    model = MNN(12, (12,), optimizer=ADAM, schedule={"name": "exponential_tail"})
    trainer.fit(model, GaussianData(28, 12))
    assert trainer.global_step == 1200
    assert going_on.converged


def test_patience_counts_consecutive_checks_of_all_replicas(make_trainer, monkeypatch):
    detector = LocalMinimumDetector(Schedule(every=1), patience=2)
    outcomes = iter([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1], [1, 1], [1, 1]])
    real = Kind.DIFFERENTIABLE_MINIMUM, Kind.NOT_STATIONARY

    def verdicts(statistics, *_):
        from lightning_mnn.landscape import FirstOrderVerdict

        return [
            FirstOrderVerdict(real[0] if ok else real[1], Reason.of(ReasonCode.ZERO_ERROR), 0.0, 0.0)
            for ok in next(outcomes)
        ]

    monkeypatch.setattr("lightning_mnn.callbacks.evidence.certificate.MAX_CERTIFICATE_WORK", 1)
    monkeypatch.setattr("lightning_mnn.callbacks.evidence.certificate.first_order_verdicts", verdicts)
    trainer = make_trainer(max_epochs=50, callbacks=[detector])
    trainer.fit(MNN(3, (4, 4), replicas=2), GaussianData(8, 3, replicas=2))
    assert trainer.current_epoch == 5  # checks before training and after epochs 1 to 5; the last two in a row pass


def test_recorder_agrees_with_the_weights_of_each_step(make_trainer, tmp_path):
    seen = {}

    class Watcher(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen[0] = pl_module.hidden_weights[0].detach().clone()

        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[trainer.global_step] = pl_module.hidden_weights[0].detach().clone()

    recorder = ActivationPatternRecorder(Schedule(every=3, unit="step"))
    watch = LocalMinimumDetector(stop_training=False)
    logger = CSVLogger(tmp_path / "log", name="", version="")
    trainer = make_trainer(max_epochs=5, callbacks=[recorder, watch, Watcher()], logger=logger)
    data = GaussianData(30, 4, batch_size=11)
    trainer.fit(MNN(4, (5,), optimizer={"name": "adam", "lr": 0.1}), data)
    assert recorder.store.steps == [0, 3, 6, 9, 12, 15]
    assert recorder.store.path == tmp_path / "log" / "patterns.zarr"
    x, _ = GaussianData(30, 4).tensors()
    patterns = {step: ActivationPattern(x @ seen[step].T > 0) for step in recorder.store.steps}
    for step, pattern in patterns.items():
        assert torch.equal(recorder.store.read(step)["layer_1"].active, pattern.active)
        assert recorder.store.attributes(step)["digest"] == pattern.digest()
    rows = {int(row["step"]): row for row in read_rows(logger) if "pattern/flips" in row}
    assert list(rows) == recorder.store.steps
    for before, step in itertools.pairwise(recorder.store.steps):
        a, b, start = patterns[before].active, patterns[step].active, patterns[0].active
        assert rows[step]["pattern/flips"] == int((a != b).sum())
        assert rows[step]["pattern/flips_from_start"] == int((start != b).sum())
        assert rows[step]["pattern/hamming_from_start"] == pytest.approx(float((start != b).double().mean()))
        assert rows[step]["pattern/never_active_units"] == sum(not b[:, i].any() for i in range(5))
        assert rows[step]["pattern/always_active_units"] == sum(bool(b[:, i].all()) for i in range(5))
        assert rows[step]["pattern/unactivated_samples"] == sum(not row.any() for row in b)
    assert recorder.summary()["regions_visited"] == len({p.digest() for p in patterns.values()})
    assert rows[15]["pattern/regions_visited"] == recorder.summary()["regions_visited"]


@pytest.mark.usefixtures("away")
def test_recorder_on_a_probe_and_with_replicas(make_trainer, tmp_path):
    recorder = ActivationPatternRecorder(probe=7, seed=3)
    trainer = make_trainer(max_epochs=3, callbacks=[recorder])
    model = MNN(4, (9,), 0.1, replicas=2)
    trainer.fit(model, GaussianData(30, 4, replicas=2))
    active = recorder.store.read(3)["layer_1"].active
    assert active.shape == (2, 7, 9)
    x, _ = GaussianData(30, 4, replicas=2).tensors()
    whole = x @ model.hidden_weights[0].detach().mT > 0
    matches = [[n for n in range(30) if torch.equal(whole[:, n], active[:, k])] for k in range(7)]
    assert all(matches)
    assert len(recorder.store.attributes(3)["digest"]) == 2
    assert [m[0] for m in matches] == sorted(m[0] for m in matches)
    assert len(recorder.summary()["regions_visited"]) == 2


@pytest.mark.usefixtures("away")
def test_a_store_is_never_overwritten(make_trainer, tmp_path):
    paths = []
    for _ in range(2):
        trainer = make_trainer(max_epochs=1)
        trainer.fit(MNN(3, (4,)), GaussianData(8, 3))
        paths.append(callback(trainer, ActivationPatternRecorder).store.path)
    assert paths == [tmp_path / "patterns.zarr", tmp_path / "patterns-v1.zarr"]
    assert PatternStore(paths[0]).steps == PatternStore(paths[1]).steps == [0, 1]


@pytest.mark.usefixtures("away")
def test_store_is_readable_while_the_run_goes_on_and_by_zarr_alone(make_trainer, tmp_path):
    class Reader(pl.Callback):
        counts = ()

        def on_train_epoch_end(self, trainer, pl_module):
            group = zarr.open_group(tmp_path / "patterns.zarr", mode="r")
            Reader.counts += (len(list(group.groups())),)
            for _, snapshot in group.groups():
                assert snapshot["layer_1"].shape == (8, 1)
                assert snapshot["layer_1"].attrs["width"] == 4

    recorder = ActivationPatternRecorder(Schedule(every=1))
    make_trainer(max_epochs=4, callbacks=[recorder, Reader()]).fit(MNN(3, (4,)), GaussianData(8, 3))
    assert Reader.counts == (2, 3, 4, 5)


def test_a_half_written_snapshot_is_not_seen(tmp_path):
    store = PatternStore(tmp_path / "patterns.zarr")
    pattern = ActivationPattern(torch.ones(3, 9, dtype=torch.bool))
    store.write(1, 1, {"layer_1": pattern.pack()}, "a")
    zarr.create_group(tmp_path / "patterns.zarr.tmp")  # what a kill leaves behind
    assert PatternStore(store.path).steps == [1]
    store.write(2, 1, {"layer_1": pattern.pack()}, "b")
    store.write(2, 1, {"layer_1": pattern.pack()}, "c")
    assert store.steps == [1, 2]
    assert store.attributes(2)["digest"] == "c"
    store.discard_after(1)
    assert store.steps == [1]
    with pytest.raises(KeyError, match=r"has no step 2; it has \[1\]"):
        store.read(2)


def test_monitor_logs_the_bound_and_the_theorems(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path / "log")
    trainer = make_trainer(max_epochs=3, callbacks=[AngularVolumeMonitor(Schedule(every=1), 0.2)], logger=logger)
    model = MNN(5, (6,), 0.1)
    trainer.fit(model, GaussianData(20, 5))
    x, _ = GaussianData(20, 5).tensors()
    w = model.hidden_weights[0].detach()
    expected = log_volume_lower_bound(Region(x, ActivationPattern(x @ w.T > 0), 0.1), w)
    monitor = callback(trainer, AngularVolumeMonitor)
    assert monitor.summary()["log_volume_lower_bound"] == pytest.approx(expected, rel=1e-9)
    assert float(trainer.callback_metrics["volume/log_lower_bound"]) == pytest.approx(expected, rel=1e-9)
    rows = [row for row in read_rows(logger) if "volume/theorem_6_suboptimal" in row]
    assert len(rows) == 1
    assert rows[0]["volume/theorem_6_suboptimal"] == pytest.approx(-0.23 * (5 / 20) ** 0.75 * 20**0.75 * 30**0.25)
    assert rows[0]["volume/theorem_8_width"] == 12
    assert len([row for row in read_rows(logger) if "volume/log_lower_bound" in row]) == 4


def test_one_pass_serves_all_three(make_trainer, monkeypatch):
    calls = []
    from lightning_mnn.callbacks.evaluation import training_set

    real = training_set.network_statistics
    monkeypatch.setattr(training_set, "network_statistics", lambda *a: calls.append(1) or real(*a))
    schedule = Schedule(every=2)
    callbacks = [AngularVolumeMonitor(schedule), ActivationPatternRecorder(schedule), LocalMinimumDetector(schedule)]
    make_trainer(max_epochs=6, callbacks=callbacks).fit(MNN(3, (4,)), GaussianData(8, 3))
    assert len(calls) == 4  # before, and after 2, 4 and 6 epochs


def test_any_order_gives_the_same_numbers(make_trainer):
    found = []
    for order in itertools.permutations([LocalMinimumDetector, ActivationPatternRecorder, AngularVolumeMonitor]):
        trainer = make_trainer(max_epochs=5, callbacks=[kind() for kind in order])
        trainer.fit(MNN(3, (4,)), GaussianData(8, 3))
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert len(found[0]) > 10
    assert all(numbers == found[0] for numbers in found)


@pytest.mark.usefixtures("away")
def test_a_resumed_run_leaves_the_stores_of_others_alone(make_trainer, tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    for seed in (0, 1):
        saver = ModelCheckpoint(tmp_path / str(seed), filename="{step}", save_top_k=-1, every_n_epochs=4)
        trainer = make_trainer(max_epochs=16, callbacks=[saver], enable_checkpointing=True)
        trainer.fit(MNN(3, (4,), seed=seed), GaussianData(8, 3))
    trainer = make_trainer(max_epochs=16, callbacks=[saver], enable_checkpointing=True)
    checkpoint = tmp_path / "1" / "step=8.ckpt"
    trainer.fit(MNN(3, (4,), seed=1), GaussianData(8, 3), ckpt_path=checkpoint, weights_only=True)
    assert callback(trainer, ActivationPatternRecorder).store.path == tmp_path / "patterns-v1.zarr"
    first, second = (PatternStore(tmp_path / name) for name in ("patterns.zarr", "patterns-v1.zarr"))
    assert first.steps == second.steps == [0, 1, 2, 4, 8, 16]
    assert [second.attributes(step)["epoch"] for step in second.steps] == [0, 1, 2, 4, 8, 16]


def test_a_foreign_loader_is_not_disturbed_either(make_trainer):
    x, y = GaussianData(28, 12).tensors()
    weights = []
    for callbacks in ([], [LocalMinimumDetector(), ActivationPatternRecorder(), AngularVolumeMonitor()]):
        pl.seed_everything(3, verbose=False)
        module = Regressor()
        loader = DataLoader(TensorDataset(x.reshape(28, 3, 4), y), batch_size=5, shuffle=True)
        make_trainer(max_epochs=4, callbacks=callbacks).fit(module, loader)
        weights.append((*module.parameters(), torch.rand(3)))
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_a_module_may_state_its_network(make_trainer):
    class Stated(Regressor):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(12).double())  # keeps the Sequential from being found

        def network(self):
            return Network((self.net[1].weight,), self.net[3].weight[0], 0.1)  # parameters, gradients and all

    x, y = GaussianData(28, 12).tensors()
    callbacks = [ActivationPatternRecorder(), LocalMinimumDetector(), AngularVolumeMonitor()]
    module = Stated()
    make_trainer(max_epochs=2, callbacks=callbacks).fit(
        module, DataLoader(TensorDataset(x.reshape(28, 3, 4), y), batch_size=28)
    )
    out = module.net(x.reshape(28, 3, 4))[:, 0].detach()
    assert callbacks[1].summary()["mse"] == pytest.approx(float((out - y).square().mean()))


def test_attributes_of_users_are_not_taken_for_ours(make_trainer):
    class Named(Regressor):
        def __init__(self):
            super().__init__()
            self.network, self.threshold = self.net, nn.Threshold(0.1, 0.0)

    x, y = GaussianData(28, 12).tensors()
    detector = LocalMinimumDetector()
    trainer = make_trainer(max_epochs=1, callbacks=[detector, ActivationPatternRecorder()])
    trainer.fit(Named(), DataLoader(TensorDataset(x.reshape(28, 3, 4), y), batch_size=28))
    assert detector.summary()["wrong"] is not None


def test_a_part_of_a_module_is_not_judged_for_the_whole(make_trainer):
    class Wrapped(Regressor):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3).double()

    x, y = GaussianData(28, 12).tensors()
    detector = LocalMinimumDetector()
    make_trainer(max_epochs=1, callbacks=[detector]).fit(
        Wrapped(), DataLoader(TensorDataset(x.reshape(28, 3, 4), y), batch_size=28)
    )
    assert detector.summary()["evidence"] == "second_order"
    assert detector.statistics is None


@pytest.mark.usefixtures("away")
def test_recorder_follows_the_precision_of_training(make_trainer):
    recorder = ActivationPatternRecorder()
    dataset = TensorDataset(torch.randn(10, 1, 6, 6), torch.randint(0, 2, (10,)))
    make_trainer(max_epochs=1, callbacks=[recorder], precision="64-true").fit(
        Foreign(), DataLoader(dataset, batch_size=5)
    )
    assert recorder.store.steps == [0, 2]


def test_theorem_9_needs_its_width():
    monitor = AngularVolumeMonitor()
    assert monitor.theorems(70000, 784, 89, 0.0)["volume/theorem_9_global"] is None
    assert monitor.theorems(320, 40, 16, 0.0)["volume/theorem_9_global"] == pytest.approx(-3691.725, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_training_is_not_touched_by_the_callbacks(make_trainer, seed):
    weights = []
    for default_callbacks in (True, False):
        torch.manual_seed(5)
        model = MNN(3, (4,), seed=seed, default_callbacks=default_callbacks)
        make_trainer(max_epochs=9).fit(model, GaussianData(20, 3, batch_size=6))
        weights.append((*model.parameters(), torch.rand(3)))  # the global generator too
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("away")
def test_a_second_fit_knows_nothing_of_the_first(make_trainer):
    torch.manual_seed(0)
    x, y = GaussianData(28, 12).tensors()
    callbacks = [LocalMinimumDetector(), ActivationPatternRecorder(), AngularVolumeMonitor()]
    module, found = Regressor(), []
    for inputs, targets in ((x, y), (x[:9] * 2, (y[:9] + 1) / 2)):
        trainer = make_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, DataLoader(TensorDataset(inputs.reshape(-1, 3, 4), targets), batch_size=28))
        found.append(callbacks[0].summary() | callbacks[1].summary())
    assert [summary["rank_cap"] for summary in found] == [28, 9]
    out = module.net(x[:9].reshape(-1, 3, 4) * 2)[:, 0]
    assert found[1]["wrong"] == int(((out > 0.5) != (y[:9] > 0)).sum())
    assert callbacks[1].store.steps == [0, 1, 2]


def test_fast_dev_run_writes_nothing(make_trainer, tmp_path):
    make_trainer(fast_dev_run=True).fit(MNN(3, (4,)), GaussianData(8, 3))
    assert list(tmp_path.iterdir()) == []


class Foreign(pl.LightningModule):
    """Somebody's own module with a convolution, batch norm, dropout and a shared ReLU."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.drop, self.leaky, self.head = nn.Dropout(0.5), nn.LeakyReLU(0.2), nn.Linear(3 * 4 * 4, 2)

    def forward(self, x):
        self.hidden = self.norm(self.conv(x))
        return self.leaky(self.head(self.drop(self.relu(self.relu(self.hidden) - 0.1).flatten(1))))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.usefixtures("away")
def test_recorder_in_a_foreign_module(make_trainer):
    dataset = TensorDataset(torch.randn(10, 1, 6, 6), torch.randint(0, 2, (10,)))
    recorder, module = ActivationPatternRecorder(Schedule(every=1)), Foreign()
    trainer = make_trainer(max_epochs=2, callbacks=[recorder])
    trainer.fit(module, DataLoader(dataset, batch_size=4, shuffle=True))
    found = recorder.store.read(recorder.store.steps[-1])
    assert {name: p.active.shape for name, p in found.items()} == {
        "relu": (10, 48),
        "relu.call_2": (10, 48),
        "leaky": (10, 2),
    }
    assert module.training
    assert all(part.training for part in module.modules())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())
    module.eval()
    with torch.no_grad():
        module(dataset.tensors[0])
    assert torch.equal(found["relu"].active, module.hidden.flatten(1) > 0)
    assert torch.equal(found["relu.call_2"].active, torch.relu(module.hidden).flatten(1) > 0.1)


class Regressor(pl.LightningModule):
    """A two-layer network as users write it."""

    def __init__(self):
        super().__init__()
        parts = nn.Flatten(), nn.Linear(12, 12, bias=False), nn.LeakyReLU(0.1), nn.Linear(12, 1, bias=False)
        self.net = nn.Sequential(*parts).double()

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_all_three_in_a_sequential_of_ones_own(make_trainer):
    torch.manual_seed(0)
    x, y = GaussianData(28, 12).tensors()
    callbacks = [LocalMinimumDetector(Schedule(every=20)), ActivationPatternRecorder(), AngularVolumeMonitor()]
    trainer = make_trainer(max_epochs=3000, callbacks=callbacks)
    module = Regressor()
    trainer.fit(module, DataLoader(TensorDataset(x.reshape(28, 3, 4), y), batch_size=28))
    assert callbacks[0].summary()["kind"] == "differentiable_minimum"
    assert callbacks[0].summary()["mce"] == 0.0
    assert trainer.global_step < 3000
    w = module.net[1].weight.detach()
    region = Region(x, ActivationPattern(x @ w.T > 0), 0.1)
    assert callbacks[2].summary()["log_volume_lower_bound"] == pytest.approx(log_volume_lower_bound(region, w))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        LocalMinimumDetector(patience=0)
    with pytest.raises(ValueError, match="probe must be at least 1"):
        ActivationPatternRecorder(probe=0)
    with pytest.raises(ValueError, match="epsilon must be a number, at least 0 and at most 1"):
        AngularVolumeMonitor(epsilon=2)


def test_a_module_without_kinks_is_named(make_trainer):
    class Linear(Regressor):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 1)).double()

        def forward(self, x):
            return self.net(x)

    with pytest.raises(TypeError, match="Linear has no kink"):
        make_trainer(max_epochs=1, callbacks=[ActivationPatternRecorder(strict=True)]).fit(
            Linear(), TensorData(torch.ones(4, 3), torch.ones(4), dtype="float64")
        )


def test_progress_draws_one_bar_on_a_terminal(make_trainer, monkeypatch):
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    bar = RunProgress(Console(file=screen, force_terminal=True, width=120))
    make_trainer(max_epochs=30, enable_progress_bar=True, callbacks=[bar]).fit(MNN(3, (4,)), GaussianData(8, 3))
    assert "30/30" in screen.getvalue()
    assert "MSE" in screen.getvalue()
    screen = StringIO()
    silent = RunProgress(Console(file=screen, force_terminal=False))
    make_trainer(max_epochs=3, enable_progress_bar=True, callbacks=[silent]).fit(MNN(3, (4,)), GaussianData(8, 3))
    assert screen.getvalue() == ""
