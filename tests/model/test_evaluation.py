"""Validation and test of an MNN: exact errors of the test set, and what they do to training."""

import csv
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.data import GaussianData, TensorData, exact_shard
from lightning_mnn.data.error_sums import ErrorSums
from lightning_mnn.loggers import ResumableCSVLogger
from tests import naive
from tests.children import side_by_side


def naive_errors(model, inputs, targets, threshold):
    """MSE and MCE by loops over samples and replicas."""
    problem = naive.Problem(model.network(), inputs, targets)
    singles = [problem] if model.replicas == 1 else [problem.replica(r) for r in range(model.replicas)]
    residuals, mistakes = [], []
    for single in singles:
        for guess, target in zip(naive.forward(single)[1], single.targets.tolist(), strict=True):
            residuals.append((guess - target) ** 2)
            mistakes.append((guess - threshold) * (target - threshold) <= 1e-12)  # on the threshold it is wrong
    return float(np.mean(residuals)), float(np.mean(mistakes))


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("batch_size", [None, 700])
def test_errors_of_the_test_set_are_those_of_loops(make_trainer, replicas, batch_size):
    data = GaussianData(20, 4, batch_size=batch_size, replicas=replicas, num_test=1500)
    model = MNN(4, (6,), 0.1, replicas, default_callbacks=False)
    trainer = make_trainer()
    (tested,) = trainer.test(model, data, verbose=False)
    (validated,) = trainer.validate(model, data, verbose=False)
    mse, mce = naive_errors(model, *data.test_tensors(), threshold=0.0)
    assert tested["test/mse"] == validated["val/mse"] == pytest.approx(mse, rel=1e-12)
    assert tested["test/mce"] == validated["val/mce"] == pytest.approx(mce, rel=1e-12)


def test_errors_of_foreign_loaders_are_means_over_samples(make_trainer):
    x, y = GaussianData(30, 4, labels="zero_one").tensors()
    model = MNN(4, (6,), default_callbacks=False)
    loaders = [DataLoader(TensorDataset(x[part], y[part, None]), batch_size=7) for part in (slice(16), slice(16, 30))]
    trainer = make_trainer()
    trainer.validate(model, loaders, verbose=False)
    for index, part in enumerate((slice(16), slice(16, 30))):
        mse, mce = naive_errors(model, x[part], y[part], threshold=0.5)
        assert trainer.callback_metrics[f"val/mse/dataloader_idx_{index}"] == pytest.approx(mse, rel=1e-12)
        assert trainer.callback_metrics[f"val/mce/dataloader_idx_{index}"] == pytest.approx(mce, rel=1e-12)


def test_real_targets_have_no_classification_error(make_trainer):
    model = MNN(4, (6,), regression=True, default_callbacks=False)
    (found,) = make_trainer().test(model, GaussianData(20, 4, labels="teacher", num_test=9), verbose=False)
    assert set(found) == {"test/mse"}


def test_the_threshold_of_training_is_kept_in_checkpoints(make_trainer, tmp_path):
    data = TensorData(torch.eye(4), torch.tensor([-1.0, 1, 1, -1]))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(MNN(4, (6,), default_callbacks=False), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model = MNN.load_from_checkpoint(tmp_path / "a.ckpt")
    ones = DataLoader(TensorDataset(torch.eye(4), torch.ones(4)), batch_size=2)  # which fits {0, 1}, too
    (found,) = make_trainer().test(model, ones, verbose=False)
    assert model.threshold == 0.0
    assert found["test/mce"] == pytest.approx(float((model(torch.eye(4)) <= 0).double().mean()))
    with pytest.raises(ValueError, match="all labels are 1"):
        make_trainer().test(MNN(4, (6,), default_callbacks=False), ones, verbose=False)


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_data_without_a_test_set_are_refused(make_trainer, loop):
    with pytest.raises(ValueError, match="GaussianData has no test set: give num_test"):
        getattr(make_trainer(), loop)(MNN(4, (6,), default_callbacks=False), GaussianData(20, 4))


@pytest.mark.parametrize("data", [GaussianData(20, 4), DataLoader(TensorDataset(*GaussianData(20, 4).tensors()))])
def test_a_fit_without_test_set_gives_no_warning(make_trainer, data):  # warnings are errors here
    make_trainer(max_epochs=2).fit(MNN(4, (6,), default_callbacks=False), data)


def test_other_inputs_are_refused(make_trainer):
    with pytest.raises(ValueError, match="input_dim must match the data, which have 5 inputs"):
        make_trainer().test(MNN(4, (6,), default_callbacks=False), GaussianData(9, 5, num_test=9), verbose=False)


class Epochs(pl.Callback):
    """Notes the epoch and the number of steps at each validation, and the validation's errors."""

    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            mse = float(trainer.callback_metrics["val/mse"])
            inputs, targets = trainer.datamodule.test_inputs, trainer.datamodule.test_targets
            assert mse == pytest.approx(naive_errors(pl_module, inputs, targets, 0.0)[0], rel=1e-12)
            self.found.append((trainer.current_epoch + 1, trainer.global_step))


def trained(make_trainer, epochs, num_test=11, **flags):
    seen = Epochs()
    model = MNN(4, (6,), schedule={"name": "one_cycle"}, default_callbacks=False)
    trainer = make_trainer(max_epochs=epochs, callbacks=[seen], log_every_n_steps=50, **flags)
    trainer.fit(model, GaussianData(20, 4, num_test=num_test, batch_size=7))
    assert trainer.global_step == 3 * epochs
    return seen.found, model, trainer


@pytest.mark.parametrize("sanity", [0, 2])
def test_bundles_end_where_validation_is_due(make_trainer, tmp_path, sanity):
    flags = {"check_val_every_n_epoch": 30, "num_sanity_val_steps": sanity}
    found, model, trainer = trained(make_trainer, 95, **flags, logger=ResumableCSVLogger(tmp_path))
    rows = [step for values, step in trainer.logger.read() if "val/mse" in values]
    assert rows == [90, 180, 270]
    assert found == [(30, 90), (60, 180), (90, 270)]
    alone, other, _ = trained(make_trainer, 95, limit_val_batches=0)
    assert alone == []
    assert trainer.datamodule.exact_loader.steps_per_batch > 3  # several epochs at once
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)  # validation changes nothing


def test_validation_within_an_epoch_switches_bundles_off(make_trainer):
    found, _, trainer = trained(make_trainer, 2, val_check_interval=2)
    assert found == [(1, 2), (2, 5)]
    assert trainer.datamodule.exact_loader.steps_per_batch == 1


def test_lightnings_callbacks_use_the_errors(make_trainer, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/mse")
    stop = EarlyStopping("val/mse", patience=1, mode="max", check_on_train_epoch_end=False)
    trainer = make_trainer(max_epochs=400, check_val_every_n_epoch=5, enable_checkpointing=True, callbacks=[best, stop])
    data = GaussianData(40, 4, labels="teacher", num_test=50)
    trainer.fit(MNN(4, (10,), regression=True, optimizer={"name": "adam", "lr": 1e-2}, default_callbacks=False), data)
    assert trainer.current_epoch < 400  # the error falls
    model = MNN.load_from_checkpoint(best.best_model_path)
    (found,) = make_trainer().validate(model, data, verbose=False)
    assert found["val/mse"] == pytest.approx(float(best.best_model_score), rel=1e-12)


def evaluate(devices, replicas, out):
    """Train with validation, then test, on some processes; write what is logged."""
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=out.parent,
    )
    model = MNN(4, (6,), replicas=replicas, default_callbacks=False)
    data = GaussianData(21, 4, num_test=1501, replicas=replicas)  # two batches, neither of which is even
    trainer.fit(model, data)
    validated = trainer.callback_metrics["val/mse"], trainer.callback_metrics["val/mce"]
    (found,) = trainer.test(model, data, verbose=False)
    sums = ErrorSums(model.threshold)
    for inputs, targets in exact_shard(data.exact_test_loader(), trainer.global_rank, trainer.world_size):
        sums.add(model(inputs).detach(), targets)
    means = sums.means(trainer.strategy)
    assert trainer.world_size == devices
    if trainer.is_global_zero:
        out.write_text(json.dumps([[*map(float, validated)], [*found.values()], [m.tolist() for m in means.values()]]))


@pytest.mark.slow
def test_two_processes_find_the_same_errors(tmp_path):
    found = []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.json"
        side_by_side(tmp_path / str(devices), devices, evaluate, devices, 2, out)
        found.append(json.loads(out.read_text()))
    for validated, tested, (mse, mce) in found:
        assert validated == pytest.approx(tested, rel=1e-12)
        assert tested == pytest.approx([np.mean(mse), np.mean(mce)], rel=1e-12)
        assert len(mse) == len(mce) == 2
    assert found[1][2][1] == found[0][2][1]
    assert found[1][2][0] == pytest.approx(found[0][2][0], rel=1e-12)


@pytest.mark.parametrize(("replicas", "labels"), [(1, "zero_one"), (3, "plus_minus"), (1, "teacher")])
def test_the_detector_evaluates_the_test_set_at_its_checks_and_at_the_end(make_trainer, replicas, labels, tmp_path):
    data = GaussianData(20, 4, labels=labels, replicas=replicas, num_test=30)
    model = MNN(4, (6,), replicas=replicas, regression=labels == "teacher", default_callbacks=False)
    detector, logger = LocalMinimumDetector(Schedule(every=2)), ResumableCSVLogger(tmp_path)
    trainer = make_trainer(max_epochs=5, callbacks=[detector], logger=logger, limit_val_batches=0)
    trainer.fit(model, data)
    assert not model.automatic_optimization  # its steps are bundled
    found = detector.summary()
    inputs, targets = data.test_tensors()
    with torch.no_grad():
        squared = (model(inputs) - targets).square().mean(-1)
    assert found["test_mse"] == pytest.approx(squared.tolist(), rel=1e-12)
    mse, mce = naive_errors(model, inputs, targets, threshold=0.5 if labels == "zero_one" else 0.0)
    if labels == "teacher":
        assert "test_mce" not in found
    else:
        assert np.mean(found["test_mce"]) == pytest.approx(mce, rel=1e-12)
    logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["test/mse"]]
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 5]
    assert float(rows[-1]["test/mse"]) == pytest.approx(mse, rel=1e-12)


def test_test_errors_can_be_monitored(make_trainer, tmp_path):
    data, model = GaussianData(20, 4, num_test=30), MNN(4, (6,), default_callbacks=False)
    stop = EarlyStopping("test/mse", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, "best", monitor="test/mse", save_on_train_epoch_end=True)
    seen = []
    watch = LambdaCallback(on_train_epoch_end=lambda trainer, _: seen.append(trainer.callback_metrics["test/mse"]))
    callbacks = [LocalMinimumDetector(Schedule(every=1), stop_training=False), watch, stop, best]
    trainer = make_trainer(max_epochs=9, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0)
    trainer.fit(model, data)
    assert trainer.current_epoch == 2  # no epoch was better than the first by 100
    assert len(set(map(float, seen))) == 2
    assert best.best_model_score == min(seen)
    assert (tmp_path / "best.ckpt").exists()
