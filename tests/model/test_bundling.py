import math
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger

from lightning_mnn import MNN
from lightning_mnn.callbacks import ActivationPatternRecorder, LocalMinimumDetector, RunProgress, Schedule
from lightning_mnn.data import GaussianData
from lightning_mnn.figures import read_metrics
from lightning_mnn.model.bundling import epochs_at_a_time, may_bundle


class Watcher(pl.Callback):
    """Looks at batches, which keeps training from being bundled."""

    steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert batch[0].shape[-1] == 6  # a batch as any callback knows it
        self.steps += 1


def fit(make_trainer, folder, callbacks, *, epochs=9, replicas=1, ckpt_path=None, **options):
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    trainer = make_trainer(
        max_epochs=epochs, callbacks=callbacks, logger=logger, log_every_n_steps=7, default_root_dir=folder, **options
    )
    optimizer = {"name": "adam", "lr": 1e-2}
    model = MNN(6, (8,), replicas=replicas, optimizer=optimizer, schedule={"name": "one_cycle"})
    data = GaussianData(50, 6, batch_size=8, replicas=replicas)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
    return trainer, model


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("steps", [3, 10, 50])  # of 7 an epoch: bundles of 3, 3 and 1; of one epoch; of seven
def test_bundled_training_is_the_same_training(make_trainer, tmp_path, monkeypatch, replicas, steps):
    monkeypatch.setattr("lightning_mnn.data.loaders.exact.STEPS", steps)
    watcher = Watcher()
    one, a = fit(make_trainer, tmp_path / "one", [watcher], replicas=replicas)
    two, b = fit(make_trainer, tmp_path / "two", [], replicas=replicas)
    assert a.automatic_optimization
    assert not b.automatic_optimization
    assert watcher.steps == one.global_step == two.global_step == 63
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)  # the gradient is computed in another order
    assert one.optimizers[0].param_groups[0]["lr"] == two.optimizers[0].param_groups[0]["lr"]
    logged = [read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    assert logged[0].keys() == logged[1].keys()
    for name, (at, values) in logged[0].items():
        assert at == logged[1][name][0]
        assert values == pytest.approx(logged[1][name][1], rel=1e-6, abs=1e-9)
    assert logged[0]["train/mse"][0] == list(range(6, 63, 7))


def test_a_bundled_run_resumes_exactly(make_trainer, tmp_path):
    def saver():
        return ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1, enable_version_counter=False)

    options = {"epochs": 9, "enable_checkpointing": True}
    _, whole = fit(make_trainer, tmp_path / "whole", [saver()], **options)
    trainer, resumed = fit(
        make_trainer, tmp_path / "rest", [saver()], ckpt_path=tmp_path / "saved" / "epoch=4.ckpt", **options
    )
    assert not resumed.automatic_optimization
    assert trainer.global_step == 63
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_run_saved_between_bundles_of_epochs_resumes_exactly(make_trainer, tmp_path):
    def saver():
        return ModelCheckpoint(
            tmp_path / "saved", filename="{epoch}", save_top_k=-1, every_n_epochs=4, enable_version_counter=False
        )

    options = {"epochs": 9, "enable_checkpointing": True}
    _, whole = fit(make_trainer, tmp_path / "whole", [saver()], **options)
    saved = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert [path.name for path in saved] == ["epoch=3.ckpt", "epoch=7.ckpt"]
    for path in saved:
        trainer, resumed = fit(make_trainer, tmp_path / path.stem, [saver()], ckpt_path=path, **options)
        assert trainer.global_step == 63
        assert trainer.current_epoch == 9
        for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(p, q)


class EpochWatcher(pl.Callback):
    epochs = 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs += 1
        assert trainer.current_epoch + 1 == self.epochs


def test_a_callback_that_looks_at_epochs_sees_them_all(make_trainer, tmp_path):
    watcher = EpochWatcher()
    trainer, model = fit(make_trainer, tmp_path, [watcher])
    assert not model.automatic_optimization
    assert watcher.epochs == 9
    assert trainer.global_step == 63


class WatchingDetector(LocalMinimumDetector):
    def on_train_batch_end(self, *arguments):
        super().on_train_batch_end(*arguments)


@pytest.mark.parametrize(
    ("callbacks", "options", "epochs"),
    [
        ([], {}, 20),
        ([], {"max_epochs": -1}, 1000),
        ([Timer(), RunProgress()], {}, 20),
        ([ActivationPatternRecorder(Schedule(every=6))], {}, 6),
        ([ActivationPatternRecorder(Schedule(every=6)), LocalMinimumDetector(Schedule(growth=2.0))], {}, 1),
        ([ModelCheckpoint(every_n_epochs=5)], {}, 5),
        ([EpochWatcher()], {}, 1),
        ([LambdaCallback(on_train_epoch_end=lambda *_: None)], {}, 1),
        ([LambdaCallback(on_train_end=lambda *_: None)], {}, 20),
        ([], {"reload_dataloaders_every_n_epochs": 3}, 1),
    ],
)
def test_epochs_are_taken_together_up_to_the_next_that_is_looked_at(make_trainer, callbacks, options, epochs):
    progress = any(isinstance(c, RunProgress) for c in callbacks)
    saving = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    options = {"max_epochs": 20, "enable_progress_bar": progress, "enable_checkpointing": saving} | options
    assert epochs_at_a_time(make_trainer(callbacks=callbacks, **options)) == epochs


@pytest.mark.parametrize(
    ("options", "bundled"),
    [
        ({}, True),
        ({"callbacks": [Timer(), RunProgress(), ModelCheckpoint(every_n_epochs=5)]}, True),
        ({"callbacks": [ActivationPatternRecorder(Schedule(every=3))]}, True),
        ({"precision": "64-true"}, True),
        ({"callbacks": [ActivationPatternRecorder(Schedule(every=3, unit="step"))]}, False),
        ({"callbacks": [ModelCheckpoint(every_n_train_steps=5)]}, False),
        ({"callbacks": [ModelCheckpoint(train_time_interval=timedelta(minutes=1))]}, False),
        ({"callbacks": [Timer(duration="00:00:01:00")]}, False),
        ({"callbacks": [Watcher()]}, False),
        ({"callbacks": [LearningRateMonitor()], "logger": True}, False),
        ({"callbacks": [TQDMProgressBar()]}, False),
        ({"accumulate_grad_batches": 2}, False),
        ({"gradient_clip_val": 1.0}, False),
        ({"precision": "bf16-mixed"}, False),
        ({"max_steps": 10}, False),
        ({"limit_train_batches": 3}, False),
        ({"limit_train_batches": 0.5}, False),
        ({"limit_train_batches": 1}, False),
        ({"limit_train_batches": 1.0}, True),
        ({"callbacks": [LambdaCallback(on_train_batch_end=lambda *_: None)]}, False),
        ({"callbacks": [LambdaCallback(on_train_start=lambda *_: None)]}, True),
        ({"callbacks": [WatchingDetector()]}, False),
        ({"callbacks": [GradientAccumulationScheduler({4: 2})]}, False),
        ({"callbacks": [StochasticWeightAveraging(1e-2)]}, False),
        ({"overfit_batches": 1}, False),
        ({"fast_dev_run": True}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_training_is_bundled_only_where_nothing_would_notice(make_trainer, options, bundled):
    callbacks = options.get("callbacks", [])
    progress = any(isinstance(c, RunProgress | TQDMProgressBar) for c in callbacks)
    saving = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = make_trainer(**{"enable_progress_bar": progress, "enable_checkpointing": saving} | options)
    assert may_bundle(trainer) == bundled


def test_divergence_inside_a_bundle_is_noticed(make_trainer, tmp_path):
    from lightning_mnn import DivergenceError

    trainer = make_trainer(max_epochs=50, log_every_n_steps=5)
    model = MNN(6, (8,), optimizer={"name": "sgd", "lr": 1e3})
    with pytest.raises(DivergenceError, match="training diverged"):
        trainer.fit(model, GaussianData(50, 6, batch_size=8))
    assert not model.automatic_optimization
    assert trainer.global_step < 50 * math.ceil(50 / 8)


def weights_after(make_trainer, change, watched, **options):
    """Weights of a run whose module is changed before it starts, bundled or not."""
    callbacks = [Watcher()] if watched else []
    model = MNN(6, (8,), optimizer={"name": "sgd", "lr": 1e-2}, schedule={"name": "one_cycle"}, default_callbacks=False)
    callbacks += change(model) or []
    trainer = make_trainer(max_epochs=9, callbacks=callbacks, **options)
    trainer.fit(model, GaussianData(50, 6, batch_size=8, dtype="float64"))
    assert model.automatic_optimization == watched
    return [p.detach().clone() for p in model.parameters()], trainer


def freeze(model):
    model.hidden_weights[0].requires_grad_(requires_grad=False)


def hook_weights(model):
    model.output_weights.register_hook(lambda gradient: 0 * gradient)


def hook_module(model):
    model.activation.register_forward_hook(lambda module, inputs, output: 2 * output)


def replace_weights(model):
    def halve(trainer, pl_module):
        if trainer.current_epoch == 4:
            pl_module.output_weights.data = 0.5 * pl_module.output_weights.data

    return [LambdaCallback(on_train_epoch_end=halve)]


def freeze_later(model):
    def freeze_at_epoch_four(trainer, pl_module):
        pl_module.output_weights.requires_grad_(trainer.current_epoch < 4)

    return [LambdaCallback(on_train_epoch_start=freeze_at_epoch_four)]


@pytest.mark.parametrize("change", [freeze, hook_weights, hook_module, replace_weights, freeze_later])
def test_what_a_user_does_to_the_weights_counts_in_a_bundle_too(make_trainer, change):
    one, _ = weights_after(make_trainer, change, watched=True)
    two, _ = weights_after(make_trainer, change, watched=False)
    plain, _ = weights_after(make_trainer, lambda model: None, watched=False)
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(plain, two, strict=True))


def test_an_anomaly_is_found_in_a_bundle(make_trainer):
    def spoil(model):
        with torch.no_grad():
            model.output_weights[0] = 1e200

    with pytest.raises(RuntimeError, match="returned nan values"):
        weights_after(make_trainer, spoil, watched=False, detect_anomaly=True, log_every_n_steps=1000)


@pytest.mark.parametrize("first", [True, False])
def test_steps_are_counted_on_when_bundled_and_plain_fits_meet(make_trainer, tmp_path, first):
    def saver():
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)

    watch = {True: [Watcher()], False: []}
    fit(make_trainer, tmp_path / "one", [saver(), *watch[first]], epochs=5, enable_checkpointing=True)
    saved = tmp_path / "epoch=4.ckpt"
    callbacks = [saver(), *watch[not first]]
    trainer, _ = fit(make_trainer, tmp_path / "two", callbacks, epochs=9, ckpt_path=saved, enable_checkpointing=True)
    assert trainer.global_step == 63
    again = make_trainer(max_epochs=5, callbacks=watch[first])
    data = GaussianData(50, 6, batch_size=8, dtype="float64")
    again.fit(MNN(6, (8,)), data)
    again.fit_loop.max_epochs = 9
    again.callbacks += [Watcher()]
    again.fit(MNN(6, (8,)), data)
    assert again.global_step == 63
    trainer.predict(MNN(6, (8,)), torch.utils.data.DataLoader(torch.ones(4, 6, dtype=torch.float64)))
    assert trainer.global_step == 63


def test_a_checkpoint_within_an_epoch_asks_for_the_same_bundles(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_mnn.data.loaders.exact.STEPS", 3)

    def save(trainer, pl_module):
        if trainer.global_step == 10:
            trainer.save_checkpoint(tmp_path / "ten.ckpt", weights_only=False)

    watching = LambdaCallback(on_train_batch_end=lambda trainer, module, *_: save(trainer, module))
    fit(make_trainer, tmp_path / "one", [watching])
    with pytest.raises(ValueError, match="with 1 steps per batch, and this one has 3"):
        fit(make_trainer, tmp_path / "two", [], ckpt_path=tmp_path / "ten.ckpt")


def test_training_goes_on_to_min_epochs(make_trainer, tmp_path):
    def stop(trainer, pl_module):
        trainer.should_stop = trainer.current_epoch >= 2

    class Stopper(ActivationPatternRecorder):
        def act(self, trainer, pl_module):
            stop(trainer, pl_module)

    stopper = Stopper(Schedule(every=3), dirpath=tmp_path)
    trainer, model = fit(make_trainer, tmp_path, [stopper], epochs=20, min_epochs=8)
    assert not model.automatic_optimization
    assert trainer.global_step == 8 * 7


def test_what_a_callback_logs_of_an_epoch_has_the_number_of_its_last_step(make_trainer, tmp_path):
    found = []
    for number, watch in enumerate(([Watcher()], [])):
        log = LambdaCallback(on_train_epoch_end=lambda trainer, module: module.log("epochs", trainer.current_epoch))
        folder = tmp_path / str(number)
        fit(make_trainer, folder, [log, *watch])
        found.append(read_metrics(folder / "metrics.csv")["epochs"])
    assert found[0] == found[1]
    assert found[0][0] == list(range(6, 63, 7))


def test_data_serve_any_module_after_a_bundled_fit(make_trainer):
    data = GaussianData(50, 6, batch_size=8, dtype="float64")
    trainer = make_trainer(max_epochs=2)
    model = MNN(6, (8,))
    trainer.fit(model, data)
    assert not model.automatic_optimization
    assert model._gradient is None
    assert [len(y) for _, y in data.train_dataloader()] == [8] * 6 + [2]
    other = MNN(6, (8,), dtype="float64")
    trainer.fit_loop.max_epochs = 3
    inputs, targets = data.tensors()
    trainer.fit(other, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=10))
    assert other.automatic_optimization
