"""The monitor's measurements of volume, in real fits."""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import (
    AngularVolumeMonitor,
    ConeSettings,
    LocalMinimumDetector,
    LocalVolumeSettings,
    Schedule,
)
from lightning_mnn.callbacks.angular_volume_monitor import MOMENTS
from lightning_mnn.callbacks.volumes.cones import ConePlan, OverBudgetError
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import ActivationPattern, Region, bounds, region_log_volume, tolerances
from lightning_mnn.landscape.volumes.ep_sampling import predicted_samples
from lightning_mnn.landscape.volumes.expectation_propagation import ep_multiplications
from lightning_mnn.utilities.seeding import generator
from tests.test_ddp import run as run_processes
from tests.wandb_files import records_of

NAMES = {
    "volume/log_volume", "volume/log_volume_standard_error", "volume/unit_mean", "volume/unit_least",
    "volume/unit_most", "volume/log_ratio_to_average_cell",
}  # fmt: skip


def by_hand(inputs, rows, step, seed=0, **options):
    region = Region(inputs, ActivationPattern.from_preactivations(inputs @ rows.T))
    seed = generator(seed, "volume", step).initial_seed()
    return region_log_volume(region, rows, target_standard_error=0.5, seed=seed, **options)


def first_step_in_region(monitor, replica=0):
    """The step at which the volume of the present region was measured: it is not measured again."""
    return monitor._monitor.regions[replica][1]


def measured_steps(logger):
    with Path(logger.experiment.metrics_file_path).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("volume/log_volume")]
    assert all(row[name] for row in rows for name in NAMES)
    return [int(row["step"]) for row in rows]


def biased():
    return nn.Sequential(nn.Linear(5, 4), nn.LeakyReLU(0.1), nn.Linear(4, 1)).double()


class Foreign(pl.LightningModule):
    """Somebody's own module."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0])[:, 0] - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class KinkAt(pl.Callback):
    """Puts unit 0 of one replica on every kink after each step."""

    def __init__(self, replica):
        self.replica = replica

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module.hidden_weights[0][self.replica, 0] = 0


def test_the_summary_holds_the_volume_at_the_end(make_trainer):
    monitor = AngularVolumeMonitor(seed=3)
    trainer = make_trainer(max_epochs=4, callbacks=[monitor])
    model = MNN(6, (5,), 0.1)
    trainer.fit(model, GaussianData(20, 6))
    x, _ = GaussianData(20, 6).tensors()
    expected = by_hand(x, model.hidden_weights[0].detach(), first_step_in_region(monitor), seed=3)
    found = monitor.summary()
    assert (found["log_volume"], found["log_volume_standard_error"]) == (expected.value, expected.standard_error)
    assert found["log_volume"] > found["log_volume_lower_bound"]
    assert found["log_volume_reason"] is None
    logged = {name.removeprefix("volume/"): float(value) for name, value in trainer.callback_metrics.items()}
    assert (logged["log_volume"], logged["log_volume_standard_error"]) == (expected.value, expected.standard_error)
    units = expected.unit_values
    for name, expected in (("mean", units.mean()), ("least", units.min()), ("most", units.max())):
        assert logged[f"unit_{name}"] == pytest.approx(float(expected), rel=1e-12)
    cells = 2 * sum(math.comb(19, k) for k in range(6))
    assert logged["log_ratio_to_average_cell"] == pytest.approx(float(units.mean()) + math.log(cells))
    json.dumps(found)


def test_arcs_of_the_plane_are_exact(make_trainer):
    monitor = AngularVolumeMonitor()
    trainer = make_trainer(max_epochs=2, callbacks=[monitor])
    model = MNN(2, (3,))
    trainer.fit(model, GaussianData(7, 2))
    x, _ = GaussianData(7, 2).tensors()
    edges = [math.atan2(v[1], v[0]) + side for v in x.tolist() for side in (math.pi / 2, -math.pi / 2)]
    exact = 0.0
    for row in model.hidden_weights[0].tolist():
        gaps = [(edge - math.atan2(row[1], row[0])) % (2 * math.pi) for edge in edges]
        exact += math.log((min(gaps) + 2 * math.pi - max(gaps)) / (2 * math.pi))
    assert monitor.summary()["log_volume"] == pytest.approx(exact, abs=1e-8)
    assert monitor.summary()["log_volume_standard_error"] < 1e-8


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [7]),
        ({"cones": ConeSettings(check_share=1e9)}, [2, 4, 6, 7]),  # of training, of which there was none at the start
        ({"measure": ["end"]}, [7]),
        ({"measure_every": 2}, [4, 7]),
        ({"measure": ["start", "end"]}, [0, 7]),
        ({"measure": (), "measure_every": 2}, [4, 7]),  # checks after 2, 4, 6 and 7 epochs
        ({"measure": MOMENTS, "measure_every": 3}, [0, 6, 7]),
        ({"measure": ()}, []),
    ],
)
def test_it_measures_when_it_is_told_to(make_trainer, tmp_path, options, steps):
    logger = CSVLogger(tmp_path / "log")
    monitor = AngularVolumeMonitor(Schedule(every=2), **options)
    trainer = make_trainer(max_epochs=7, callbacks=[monitor], logger=logger)
    trainer.fit(MNN(4, (3,)), GaussianData(12, 4))
    assert measured_steps(logger) == steps
    at_end = 7 in steps
    assert (monitor.summary()["log_volume"] is not None) == at_end
    assert monitor.summary()["log_volume_reason"] == (None if at_end else "not measured at the last weights")


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("first", [True, False])
def test_a_certificate_is_a_moment_in_any_order_of_callbacks(make_trainer, tmp_path, first, unit):
    detector = LocalMinimumDetector(Schedule(every=20, unit=unit), stop_training=False, polish=True)
    monitor = AngularVolumeMonitor(Schedule(every=1000), measure=("certificate",))
    logger = CSVLogger(tmp_path / "log")
    callbacks = [monitor, detector] if first else [detector, monitor]
    trainer = make_trainer(max_epochs=300, callbacks=callbacks, logger=logger)
    model = MNN(12, (12,), optimizer={"name": "adam", "lr": 1e-2}, schedule={"name": "exponential_tail"})
    trainer.fit(model, GaussianData(28, 12))
    (step,) = measured_steps(logger)
    with Path(logger.experiment.metrics_file_path).open(newline="") as file:
        certified = [int(row["step"]) for row in csv.DictReader(file) if row["minimum/certified"] == "1.0"]
    assert step == certified[0] < 300
    assert monitor.summary()["log_volume"] is None  # of the weights at the end


@pytest.mark.parametrize("first", [True, False])
def test_the_end_is_where_polishing_goes(make_trainer, first):
    monitor, detector = AngularVolumeMonitor(Schedule(every=2)), LocalMinimumDetector(polish=True, max_distance=10.0)
    callbacks = [monitor, detector] if first else [detector, monitor]
    model = MNN(6, (16,), optimizer={"name": "adam", "lr": 1e-2})  # so wide that the way is short, and off the kinks
    make_trainer(max_epochs=4, callbacks=callbacks).fit(model, GaussianData(12, 6))
    x, _ = GaussianData(12, 6).tensors()
    assert torch.equal(model.hidden_weights[0], detector.certificates[0].hidden_weights)  # it went there
    assert (
        monitor.summary()["log_volume"]
        == by_hand(x, model.hidden_weights[0].detach(), first_step_in_region(monitor)).value
    )


def test_replicas_have_their_own_volumes_and_kinks_have_none(make_trainer):
    monitor = AngularVolumeMonitor(measure=["end"], seed=5)
    trainer = make_trainer(max_epochs=3, callbacks=[KinkAt(1), monitor])
    model = MNN(5, (4,), replicas=3)
    trainer.fit(model, GaussianData(15, 5, replicas=3))
    x, _ = GaussianData(15, 5, replicas=3).tensors()
    rows = model.hidden_weights[0].detach()
    expected = {r: by_hand(x[r], rows[r], 3, seed=5 + r) for r in (0, 2)}
    found = monitor.summary()
    assert found["log_volume"] == [expected[0].value, None, expected[2].value]
    assert found["log_volume_reason"] == [
        None,
        "a pre-activation is zero up to rounding: the weights lie on a kink",
        None,
    ]
    assert found["log_volume_lower_bound"][1] == -math.inf
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["volume/log_volume"] == pytest.approx((expected[0].value + expected[2].value) / 2, rel=1e-12)
    together = math.hypot(expected[0].standard_error, expected[2].standard_error) / 2
    assert logged["volume/log_volume_standard_error"] == pytest.approx(together, rel=1e-12)
    assert logged["volume/unit_least"] == pytest.approx(
        sum(float(expected[r].unit_values.min()) for r in (0, 2)) / 2, rel=1e-12
    )


def test_replicas_measured_at_the_last_check_have_their_own_reasons(make_trainer):
    monitor = AngularVolumeMonitor(Schedule(every=1), measure_every=1)
    model = MNN(5, (4,), replicas=2)
    make_trainer(max_epochs=2, callbacks=[KinkAt(1), monitor]).fit(model, GaussianData(15, 5, replicas=2))
    found = monitor.summary()
    assert [value is None for value in found["log_volume"]] == [False, True]
    none, kink = found["log_volume_reason"]
    assert none is None
    assert "on a kink" in kink
    unmeasured = AngularVolumeMonitor(Schedule(every=1))
    make_trainer(max_epochs=2, callbacks=[unmeasured]).fit(model, GaussianData(15, 5, replicas=2))
    assert unmeasured.summary()["log_volume"] == [None, None]
    assert all("only if measure is given" in reason for reason in unmeasured.summary()["log_volume_reason"])


def test_a_cone_too_thin_for_floats_does_not_end_the_training(make_trainer, monkeypatch):
    monkeypatch.setattr(tolerances, "MIN_SITE_VARIANCE", 1e9)  # EP fails
    monkeypatch.setattr(tolerances, "MIN_CENTRE_MARGIN", 1.0)
    monitor = AngularVolumeMonitor()
    make_trainer(max_epochs=1, callbacks=[monitor]).fit(MNN(6, (3,)), GaussianData(12, 6))
    assert monitor.summary()["log_volume"] is None
    assert "too thin for float64" in monitor.summary()["log_volume_reason"]


def test_a_hidden_bias_is_one_more_dimension(make_trainer):
    torch.manual_seed(1)
    x, y = GaussianData(16, 5).tensors()
    monitor, module = AngularVolumeMonitor(), Foreign(biased())
    trainer = make_trainer(max_epochs=2, callbacks=[monitor])
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
    wide = torch.cat([x, torch.ones(16, 1)], dim=1).double()
    rows = torch.cat([module.net[0].weight, module.net[0].bias[:, None]], dim=1).detach()
    expected = by_hand(wide, rows, first_step_in_region(monitor))
    assert monitor.summary()["log_volume"] == expected.value
    ratio = float(expected.unit_values.mean()) + float(bounds.log_num_cells(16, 6))
    assert float(trainer.callback_metrics["volume/log_ratio_to_average_cell"]) == pytest.approx(ratio)


def test_the_budget_sets_how_many_units_are_measured(make_trainer):
    one, every = 20 * 6 * predicted_samples(6, 0.5), 5 * ep_multiplications(20, 6)
    found = {}
    for units in (1.9, 3.5, 100):
        monitor = AngularVolumeMonitor(cones=ConeSettings(budget=every + units * one))
        trainer = make_trainer(max_epochs=1, callbacks=[monitor])
        trainer.fit(MNN(6, (5,)), GaussianData(20, 6))
        found[units] = monitor.summary(), monitor.volumes[0]
    over, some, everything = found.values()
    assert over[1] is None
    assert over[0]["log_volume"] is over[0]["log_volume_standard_error"] is None
    needed = f"2 cones a network would take {every + 2 * one:.1e} multiplications, above the"
    assert over[0]["log_volume_reason"].startswith(needed)
    assert over[0]["log_volume_lower_bound"] == everything[0]["log_volume_lower_bound"]
    assert (len(some[1].units), len(everything[1].units)) == (3, 5)
    error = math.hypot(some[1].standard_error, everything[1].standard_error)
    assert abs(some[1].value - everything[1].value) < 4 * error


def test_the_size_of_mnist_is_over_budget():
    with pytest.raises(OverBudgetError, match="above the budget"):
        ConePlan.within(ConeSettings(budget=1e12), replicas=1, num_samples=70000, width=89, dim=784)


def test_a_region_is_measured_once(make_trainer, tmp_path, monkeypatch):
    """Training so slow that it stays in the region of the start: one measurement, logged at every check."""
    calls, original = [], ConePlan.measure

    def measure(plan, inputs, rows, seed):
        calls.append(seed)
        return original(plan, inputs, rows, seed)

    monkeypatch.setattr(ConePlan, "measure", measure)
    logger, monitor = (
        CSVLogger(tmp_path / "log"),
        AngularVolumeMonitor(Schedule(every=1), measure_every=1, measure=["start", "end"]),
    )
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_epochs=3)
    slow = {"optimizer": {"name": "sgd", "lr": 1e-9}}
    trainer = make_trainer(max_epochs=4, callbacks=[monitor, saver], logger=logger, enable_checkpointing=True)
    trainer.fit(MNN(5, (4,), **slow), GaussianData(12, 5))
    assert measured_steps(logger) == [0, 1, 2, 3, 4]
    assert len(calls) == 1
    again = AngularVolumeMonitor(Schedule(every=1), measure_every=1, measure=["start", "end"])
    trainer = make_trainer(max_epochs=6, callbacks=[again, saver], enable_checkpointing=True)
    trainer.fit(
        MNN(5, (4,), **slow), GaussianData(12, 5), ckpt_path=tmp_path / "saved" / "step=3.ckpt", weights_only=True
    )
    assert len(set(calls)) == 1  # a resumed run draws the same numbers for the same region
    assert len(calls) == 2
    assert again.summary()["log_volume"] == monitor.summary()["log_volume"]


def test_units_on_which_ep_fails_are_logged(make_trainer, monkeypatch):
    monkeypatch.setattr(tolerances, "MIN_SITE_VARIANCE", 1e9)
    monitor = AngularVolumeMonitor()
    trainer = make_trainer(max_epochs=1, callbacks=[monitor])
    trainer.fit(MNN(6, (3,)), GaussianData(12, 6))
    assert monitor.volumes[0].fallbacks.tolist() == [0, 1, 2]
    assert float(trainer.callback_metrics["volume/units_without_ep"]) == 3.0
    assert monitor.summary()["log_volume"] is not None


def test_two_hidden_layers_have_a_reason(make_trainer):
    monitor = AngularVolumeMonitor(measure=MOMENTS)
    trainer = make_trainer(max_epochs=2, callbacks=[monitor])
    trainer.fit(MNN(4, (3, 3)), GaussianData(12, 4))
    found = monitor.summary()
    assert found["log_volume"] is found["log_volume_lower_bound"] is None
    assert found["log_volume_reason"] == "with more than one hidden layer a region is not a product of cones"
    logged = [name for name in trainer.callback_metrics if name.startswith("volume/")]
    assert not any("lower_bound" in name or "theorem" in name or name == "volume/log_volume" for name in logged)
    assert "volume/half_sigma" in logged


def test_training_is_not_touched(make_trainer):
    weights = []
    for callbacks in ([AngularVolumeMonitor(Schedule(every=1), measure=MOMENTS, measure_every=1)], []):
        torch.manual_seed(5)
        model = MNN(5, (4,), default_callbacks=False)
        make_trainer(max_epochs=3, callbacks=callbacks).fit(model, GaussianData(12, 5, batch_size=6))
        weights.append((*model.parameters(), torch.rand(3)))
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_goes_on_counting_checks(make_trainer, tmp_path):
    def fit(name, checkpoint=None):
        monitor = AngularVolumeMonitor(Schedule(every=2), measure=("start", "end"), measure_every=2)
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_epochs=3)
        logger = CSVLogger(tmp_path / name)
        trainer = make_trainer(max_epochs=9, callbacks=[monitor, saver], logger=logger, enable_checkpointing=True)
        trainer.fit(MNN(5, (4,)), GaussianData(12, 5), ckpt_path=checkpoint, weights_only=True)
        return measured_steps(logger), monitor.summary()

    steps, summary = fit("whole")
    assert steps == [0, 4, 8, 9]
    assert fit("resumed", tmp_path / "saved" / "step=6.ckpt") == ([8, 9], summary)


def test_wandb_shows_a_histogram_and_its_steps_stay_in_order(make_trainer, tmp_path):
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    monitor = AngularVolumeMonitor(Schedule(every=1), measure=("start", "end"), measure_every=2)
    model = MNN(5, (4,), replicas=2)
    make_trainer(max_epochs=4, callbacks=[monitor], logger=logger).fit(model, GaussianData(12, 5, replicas=2))
    wandb.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = [record["history"]["item"] for record in records_of(path) if "history" in record]
    shown = {row["trainer/global_step"]: row for row in rows if "volume/units._type" in row}
    assert list(shown) == [0, 2, 4]
    assert all(row["volume/units._type"] == "histogram" for row in shown.values())
    assert sum(shown[4]["volume/units.values"]) == 8  # units of both replicas
    least = min(float(volume.unit_values.min()) for volume in monitor.volumes)
    assert shown[4]["volume/units.bins"][0] == pytest.approx(least)
    bounds_logged = [row["trainer/global_step"] for row in rows if "volume/log_lower_bound" in row]
    assert bounds_logged == [0, 1, 2, 3, 4]
    assert [row["trainer/global_step"] for row in rows if "volume/log_volume" in row] == [0, 2, 4]
    assert all(a <= b for a, b in itertools.pairwise(row["_step"] for row in rows))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    found = run_processes(2, {"num_samples": 21}, tmp_path / "two")
    x, _ = GaussianData(21, 6).tensors()
    expected = by_hand(x, torch.tensor(found["weights"][1], dtype=torch.float64).reshape(9, 6), 6)
    assert found["log_volume"] == pytest.approx(expected.value, rel=1e-12)
    assert found["log_volume_standard_error"] == pytest.approx(expected.standard_error, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "end"}, r"measure must contain any of .*, got 'end'"),
        ({"measure": ("middle",)}, r"measure must contain any of .*, got \('middle',\)"),
        ({"measure_every": 0}, "measure_every must be at least 1 and a whole number, got 0"),
        ({"cones": 0.5}, r"cones must be a ConeSettings, got 0\.5: give ConeSettings\(…\), or leave it out"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"epsilon": 2}, "epsilon must be a number, at least 0 and at most 1, got 2"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AngularVolumeMonitor(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_standard_error": 0}, "target_standard_error must be a number, above 0, got 0"),
        ({"budget": -1.0}, r"budget must be a number, above 0, got -1\.0: measure=\[\] measures nothing"),
        (
            {"check_share": -1},
            r"check_share must be a number, at least 0, got -1: measure=\[end\] measures only at the end",
        ),
    ],
)
def test_bad_settings_of_cones_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConeSettings(**options)


def test_the_arguments_before_they_were_grouped_still_work():
    with pytest.warns(DeprecationWarning, match="AngularVolumeMonitor") as warned:
        monitor = AngularVolumeMonitor(Schedule(every=3), budget=1e6, probe=8, sigmas=[1e-3])
    assert [str(one.message).partition(" is now ")[::2] for one in warned] == [
        ("AngularVolumeMonitor(budget=…)", "AngularVolumeMonitor(cones=ConeSettings(budget=…))"),
        ("AngularVolumeMonitor(probe=…)", "AngularVolumeMonitor(local_volume=LocalVolumeSettings(probe=…))"),
        ("AngularVolumeMonitor(sigmas=…)", "AngularVolumeMonitor(local_volume=LocalVolumeSettings(sigmas=…))"),
    ]
    assert all(one.filename == __file__ for one in warned)
    assert monitor.cones == ConeSettings(budget=1e6)
    assert monitor.local_volume == LocalVolumeSettings(sigmas=[1e-3], probe=8)
    assert monitor.schedule == Schedule(every=3)
