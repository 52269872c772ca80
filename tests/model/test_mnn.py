import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN, DivergenceError
from lightning_mnn.callbacks import ActivationPatternRecorder, AngularVolumeMonitor, LocalMinimumDetector
from lightning_mnn.data import GaussianData, TensorData
from tests import naive

ADAM = {"name": "adam", "lr": 1e-2}


@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.sampled_from([0.0, 0.1, -1.0, 2.5]),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_forward_agrees_with_loops(input_dim, hidden_dims, slope, replicas, own_data):
    model = MNN(input_dim, hidden_dims, slope, replicas)
    x = torch.randn(*([replicas] if own_data and replicas > 1 else []), 4, input_dim, dtype=torch.float64)
    problem = naive.Problem(model.network(), x, torch.zeros(4))
    singles = [problem] if replicas == 1 else [problem.replica(r) for r in range(replicas)]
    expected = [naive.forward(single)[1] for single in singles]
    np.testing.assert_allclose(model(x).detach(), expected[0] if replicas == 1 else expected, atol=1e-10)


def test_weights_follow_he():
    for slope in (0.0, -1.0, 0.5):
        model = MNN(400, (300, 200), slope)
        for weights, fan_in in zip([*model.hidden_weights, model.output_weights], [400, 300, 200], strict=True):
            assert float(weights.detach().std()) * math.sqrt(fan_in * (1 + slope**2) / 2) == pytest.approx(1, abs=0.13)


def test_replicas_start_and_train_as_single_networks(make_trainer):
    data = {"num_samples": 24, "input_dim": 5, "batch_size": 7}

    def trained(seed, replicas):
        model = MNN(5, (6,), 0.1, replicas, optimizer=ADAM, schedule={"name": "one_cycle"}, seed=seed)
        start = model.hidden_weights[0].detach().clone()
        make_trainer(max_epochs=8).fit(model, GaussianData(**data, replicas=replicas, seed=seed))
        return start, model

    start, together = trained(3, 3)
    for r in range(3):
        alone_start, alone = trained(3 + r, 1)
        assert torch.equal(start[r], alone_start)
        assert not torch.equal(alone.hidden_weights[0], alone_start)
        for a, b in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a[r], b, rtol=1e-10, atol=1e-10)


def plain_loop(model, data, epochs, batch):
    """The same training by a hand-written loop."""
    ours = (model.hidden_weights[0], model.output_weights)
    weights = [w.detach().clone().requires_grad_() for w in ours]
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9)
    loader = data.train_dataloader()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        order = loader.sampler.permutation()
        for index in order.split(batch):
            x, y = data.inputs[index], data.targets[index]
            loss = ((torch.relu(x @ weights[0].T) @ weights[1] - y) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weights


def test_training_is_that_of_a_plain_loop(make_trainer):
    data = GaussianData(23, 4, batch_size=5)
    data.setup()
    model = MNN(4, (7,), optimizer={"name": "sgd", "lr": 0.01, "momentum": 0.9})
    expected = plain_loop(model, data, 6, 5)
    make_trainer(max_epochs=6).fit(model, data)
    for a, b in zip((model.hidden_weights[0], model.output_weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_accumulated_gradients_are_means_of_the_batches(make_trainer):
    data = GaussianData(20, 4, batch_size=10, shuffle=False)
    one, two = (MNN(4, (7,), optimizer={"name": "sgd", "lr": 0.01}) for _ in range(2))
    trainer = make_trainer(max_epochs=5, accumulate_grad_batches=2)
    trainer.fit(one, data)
    assert trainer.global_step == 5
    make_trainer(max_epochs=5).fit(two, GaussianData(20, 4))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_logged_errors_are_those_of_the_batch(make_trainer):
    data = GaussianData(30, 4, labels="zero_one")
    model = MNN(4, (7,))
    x, y = data.tensors()
    out = model(x).detach()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, data)
    assert float(trainer.callback_metrics["train/mse"]) == pytest.approx(float((out - y).square().mean()), rel=1e-12)
    mistakes = sum((o > 0.5) != bool(t) for o, t in zip(out.tolist(), y.tolist(), strict=True))
    assert float(trainer.callback_metrics["train/mce"]) == pytest.approx(mistakes / 30)


@pytest.mark.parametrize("name", ["sgd", "lbfgs"])
def test_other_optimisers_lower_the_loss(make_trainer, name):
    trainer = make_trainer(max_epochs=30)
    model = MNN(6, (10,), -1.0, optimizer={"name": name, "lr": 0.02 if name == "sgd" else 1.0})
    trainer.fit(model, GaussianData(20, 6))
    first = MNN(6, (10,), -1.0)
    x, y = GaussianData(20, 6).tensors()
    before, after = ((m(x).detach() - y).square().mean() for m in (first, model))
    assert after < 0.3 * before


_EIGHT = {
    "Adam": {"lr": 0.02},
    "AdamW": {"lr": 0.02},
    "SGD": {"lr": 0.02, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"lr": 0.005},
    "Adagrad": {"lr": 0.1},
    "NAdam": {"lr": 0.02},
    "RAdam": {"lr": 0.1},
}


@pytest.mark.parametrize("name", _EIGHT)
def test_optimisers_of_torch_train_replicas_as_single_networks(make_trainer, name):
    def trained(seed, replicas):
        options = {"optimizer": {"name": name} | _EIGHT[name], "default_callbacks": False}
        model = MNN(6, (10,), replicas=replicas, seed=seed, **options)
        before = [weights.detach().clone() for weights in model.parameters()]
        trainer = make_trainer(max_epochs=25, log_every_n_steps=1)
        trainer.fit(model, GaussianData(20, 6, replicas=replicas, seed=seed, dtype="float64"))
        assert not model.automatic_optimization  # its steps are bundled, and its gradients written in place
        assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        return model, float(trainer.callback_metrics["train/mse"])

    together, mse = trained(3, 5)
    assert mse < 0.9
    for replica in range(5):
        for several, one in zip(together.parameters(), trained(3 + replica, 1)[0].parameters(), strict=True):
            torch.testing.assert_close(several[replica], one, rtol=0, atol=1e-10)


def test_frozen_parameters_stay(make_trainer):
    model = MNN(6, (8, 5), frozen=["output_weights", "hidden_weights.1"], optimizer=ADAM, default_callbacks=False)
    before = [weights.detach().clone() for weights in model.parameters()]
    make_trainer(max_epochs=5).fit(model, GaussianData(20, 6))
    same = [torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert dict(zip(dict(model.named_parameters()), same, strict=True)) == {
        "output_weights": True,
        "hidden_weights.0": False,
        "hidden_weights.1": True,
    }


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_trains_the_matrices_alone(make_trainer):
    with pytest.raises(ValueError, match=r"optimizer is refused by torch: .*freeze the others"):
        MNN(6, (8,), optimizer={"name": "muon"})
    model = MNN(6, (8,), frozen=["output_weights"], optimizer={"name": "muon", "lr": 0.1}, default_callbacks=False)
    x, y = GaussianData(20, 6).tensors()
    before = (model(x).detach() - y).square().mean()
    make_trainer(max_epochs=30).fit(model, GaussianData(20, 6))
    assert (model(x).detach() - y).square().mean() < 0.5 * before


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("depth", [2, 4])
def test_deeper_networks_train_and_are_checked(make_trainer, depth):
    trainer = make_trainer(max_epochs=20)
    trainer.fit(MNN(6, (8, 5, 4, 3)[:depth], optimizer=ADAM), GaussianData(20, 6))
    detector, recorder, monitor = (
        next(c for c in trainer.callbacks if isinstance(c, kind))
        for kind in (LocalMinimumDetector, ActivationPatternRecorder, AngularVolumeMonitor)
    )
    assert detector.summary()["rank"] is None
    assert len(recorder.store.read(20)) == depth
    assert monitor.summary()["log_volume_lower_bound"] is None


@pytest.mark.parametrize("options", [{}, {"replicas": 2, "negative_slope": 0.1, "dtype": "float32"}])
def test_checkpoints_restore_an_identical_module(make_trainer, tmp_path, options):
    model = MNN(5, [6], optimizer=ADAM, schedule={"name": "exponential_tail"}, seed=4, **options)
    saver = ModelCheckpoint(tmp_path, filename="saved")
    trainer = make_trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(model, GaussianData(12, 5, replicas=options.get("replicas", 1)))
    restored = MNN.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert dict(restored.hparams) == dict(model.hparams)
    for (name, a), (other, b) in zip(model.state_dict().items(), restored.state_dict().items(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "cut", [{"every_n_epochs": 1}, {"every_n_train_steps": 42}], ids=["between epochs", "within one"]
)
@pytest.mark.usefixtures("away")
def test_resumed_training_equals_unbroken_training(make_trainer, tmp_path, cut):
    def fit(folder, cut, *, stop=math.inf, ckpt_path=None):
        model = MNN(5, (6,), optimizer=ADAM, schedule={"name": "exponential_tail"}, seed=1)
        saver = ModelCheckpoint(tmp_path / folder, filename="last", enable_version_counter=False, **cut)

        class Kill(pl.Callback):
            def on_train_batch_start(self, trainer, *_):
                if trainer.global_step == stop:
                    raise SystemError

        options = {"callbacks": [saver, Kill()], "enable_checkpointing": True, "default_root_dir": tmp_path / folder}
        trainer, data = make_trainer(max_epochs=20, **options), GaussianData(24, 5, batch_size=7)
        if stop < math.inf:
            with pytest.raises(SystemError):
                trainer.fit(model, data)
        else:
            trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
        return trainer, model

    whole, expected = fit("whole", cut)
    fit("cut", cut, stop=47)
    assert torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["global_step"] == cut.get(
        "every_n_train_steps", 44
    )
    resumed, found = fit("cut", cut, ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert resumed.global_step == whole.global_step == 80
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    recorders = [next(c for c in t.callbacks if isinstance(c, ActivationPatternRecorder)) for t in (resumed, whole)]
    assert recorders[0].summary() == recorders[1].summary()
    assert recorders[0].store.steps == recorders[1].store.steps
    assert recorders[0].store.path == tmp_path / "cut" / "patterns.zarr"
    for step in recorders[1].store.steps:
        assert recorders[0].store.attributes(step) == recorders[1].store.attributes(step)
    missing = whole.callback_metrics.keys() - resumed.callback_metrics.keys()
    assert all("theorem" in name for name in missing)  # logged once, at the start
    for name, value in resumed.callback_metrics.items():
        assert float(value) == float(whole.callback_metrics[name]), name


def test_the_module_brings_only_the_callbacks_that_are_missing(make_trainer):
    own = LocalMinimumDetector(patience=7)
    trainer = make_trainer(max_epochs=1, callbacks=[own])
    trainer.fit(MNN(3, (4,)), GaussianData(8, 3))
    for kind in (LocalMinimumDetector, ActivationPatternRecorder, AngularVolumeMonitor):
        assert sum(isinstance(c, kind) for c in trainer.callbacks) == 1
    assert own in trainer.callbacks
    trainer = make_trainer(max_epochs=1)
    trainer.fit(MNN(3, (4,), default_callbacks=False), GaussianData(8, 3))
    assert not any(isinstance(c, LocalMinimumDetector) for c in trainer.callbacks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_slope": 1.0}, "negative_slope must be a real number other than 1 .*got 1"),
        ({"negative_slope": math.nan}, "negative_slope must be a real number"),
        ({"hidden_dims": (0,)}, "hidden_dims must be at least 1 and a whole number, got 0"),
        ({"hidden_dims": ()}, "one or more widths"),
        ({"hidden_dims": 40}, "hidden_dims must be a list of one or more widths, got 40"),
        ({"hidden_dims": (4.7,)}, "hidden_dims must be at least 1 and a whole number, got 4.7"),
        (
            {"frozen": ["weights"]},
            "frozen names no parameter, got 'weights': choose from output_weights, hidden_weights.0",
        ),
        ({"frozen": ["*"]}, "frozen must leave a parameter to train"),
        ({"optimizer": {"name": "Adafactor"}, "replicas": 2}, "replicas must be 1 with the optimizer Adafactor, which"),
        ({"input_dim": 0}, "input_dim must be at least 1 and a whole number, got 0"),
        ({"replicas": 0}, "replicas must be at least 1 and a whole number, got 0"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"optimizer": {"name": "adma"}}, "optimizer.name must be one of"),
        ({"schedule": {"name": "one_cycle", "warm": 1}}, "schedule.warm is no argument of one_cycle"),
        ({"optimizer": {"name": "lbfgs"}, "replicas": 2}, "replicas must be 1 with the optimizer lbfgs"),
        ({"negative_slope": "abc"}, "negative_slope must be a real number other than 1 .*got 'abc'"),
        ({"threshold": "abc"}, "threshold must be a number, got 'abc': or choose null"),
        ({"regression": "maybe"}, "regression must be true or false, got 'maybe'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MNN(**{"input_dim": 3, "hidden_dims": (4,)} | arguments)


X, Y = torch.randn(6, 3), torch.tensor([0.0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.randn(6, 4), Y, "input_dim"),
        (X.index_fill(0, torch.tensor([2]), math.nan), Y, "the inputs contain 3 values that are NaN or infinite"),
        (X, Y.index_fill(0, torch.tensor([2]), math.inf), "the targets contain 1 values that are NaN or infinite"),
        (X, torch.arange(6.0), r"labels are not binary: .*found \[2.0|labels are not binary: .*found \[0.0, 1.0, 2.0"),
        (X, torch.ones(6), "all labels are 1"),
    ],
)
@pytest.mark.parametrize("through", ["resident", "loader"])
def test_bad_data_are_named_before_any_step(make_trainer, inputs, targets, message, through):
    trainer, model = make_trainer(max_epochs=1), MNN(3, (4,))
    data = TensorData(inputs, targets) if through == "resident" else DataLoader(TensorDataset(inputs, targets))
    with pytest.raises(ValueError, match=message):
        trainer.fit(model, data)
    assert trainer.global_step == 0


@pytest.mark.parametrize("through", ["resident", "loader"])
def test_labels_are_checked_against_a_given_threshold(make_trainer, through):
    data = TensorData(X, Y + 1) if through == "resident" else DataLoader(TensorDataset(X, Y + 1), batch_size=2)
    with pytest.raises(ValueError, match=r"labels are not binary: threshold=0\.5 expects 0 and 1, found 2"):
        make_trainer(max_epochs=1).fit(MNN(3, (4,), threshold=0.5), data)


def test_sorted_labels_of_a_foreign_loader_are_fine_and_late_nan_is_found(make_trainer):
    labels = Y.sort(descending=True).values
    make_trainer(max_epochs=1).fit(MNN(3, (4,)), DataLoader(TensorDataset(X, labels), batch_size=2))
    broken = X.index_fill(0, torch.tensor([5]), math.nan)
    with pytest.raises(ValueError, match="the inputs contain 3 values that are NaN"):
        make_trainer(max_epochs=1).fit(MNN(3, (4,)), DataLoader(TensorDataset(broken, Y), batch_size=2))


def test_columns_of_targets_and_images_train_as_flat_ones(make_trainer):
    x, y = GaussianData(20, 16).tensors()
    weights = []
    for inputs, targets in ((x, y), (x.reshape(20, 1, 4, 4), y[:, None])):
        model = MNN(16, (4,), optimizer=ADAM)
        trainer = make_trainer(max_epochs=9)
        trainer.fit(model, DataLoader(TensorDataset(inputs, targets), batch_size=20))
        weights.append((model.hidden_weights[0], trainer.callback_metrics["train/mse"]))
    assert torch.equal(weights[0][0], weights[1][0])
    assert weights[0][1] == weights[1][1]


def test_lbfgs_needs_one_process(make_trainer):
    model = MNN(3, (4,), optimizer={"name": "lbfgs"})
    trainer = make_trainer(max_epochs=1)
    model.trainer = trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "world_size", 2)
        with pytest.raises(ValueError, match="lbfgs runs on one process"):
            model.on_fit_start()


def test_a_diverging_replica_is_named(make_trainer):
    x, y = GaussianData(8, 3, replicas=2).tensors()
    x[1] *= 1e6
    model = MNN(3, (4,), replicas=2, optimizer={"name": "sgd", "lr": 0.01}, default_callbacks=False)
    with pytest.raises(DivergenceError, match=r"the MSE of replicas \[1\] is not finite"):
        make_trainer(max_epochs=50).fit(model, TensorData(x, y, replicas=2, dtype="float64"))


def test_data_of_another_number_of_replicas_are_named(make_trainer):
    data = GaussianData(8, 3, replicas=2)
    with pytest.raises(ValueError, match="do not fit a network with replicas=3"):
        make_trainer(max_epochs=1).fit(MNN(3, (4,), replicas=3), data)


def test_real_targets_need_regression(make_trainer):
    data = GaussianData(20, 3, labels="teacher")
    with pytest.raises(ValueError, match="regression=True"):
        make_trainer(max_epochs=1).fit(MNN(3, (4,)), data)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(MNN(3, (4,), regression=True), data)
    assert "train/mce" not in trainer.callback_metrics
    assert next(c for c in trainer.callbacks if isinstance(c, LocalMinimumDetector)).summary()["wrong"] is None


@pytest.mark.parametrize("every", [1, 50])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(make_trainer, tmp_path, every):
    model = MNN(5, (6,), optimizer={"name": "sgd", "lr": 1e3})
    saver = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    trainer = make_trainer(max_epochs=200, callbacks=[saver], enable_checkpointing=True, log_every_n_steps=every)
    with pytest.raises(DivergenceError, match="training diverged"):
        trainer.fit(model, GaussianData(12, 5))
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(bool(w.isfinite().all()) for w in kept["state_dict"].values())


def test_foreign_loaders_and_precision(make_trainer):
    x, y = GaussianData(24, 3).tensors()
    trainer = make_trainer(max_epochs=3, precision="64-true")
    trainer.fit(MNN(3, (4,), dtype="float32"), DataLoader(TensorDataset(x.float(), y), batch_size=5, shuffle=True))
    detector = next(c for c in trainer.callbacks if isinstance(c, LocalMinimumDetector))
    assert detector.statistics.num_samples == 24
