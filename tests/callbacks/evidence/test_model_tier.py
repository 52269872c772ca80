"""The detector's certificates of any piecewise-linear ``nn.Sequential``, in real fits."""

import copy
import json

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import ActivationPatternRecorder, AngularVolumeMonitor, LocalMinimumDetector, Schedule
from lightning_mnn.callbacks.evidence import model_tier
from lightning_mnn.callbacks.evidence.models import objective
from lightning_mnn.callbacks.evidence.models.objective import steps_of_descent
from lightning_mnn.data import ArrayData
from lightning_mnn.landscape import (
    certify_model,
    planted_model_kink_minimum,
    planted_model_minimum,
    planted_model_saddle,
    polish_model,
)
from lightning_mnn.landscape.minima.models.classification import MAX_UNKNOWNS

LOSSES = {
    "squared_error": lambda out, y: (out - y).square().sum(1).mean(),
    "cross_entropy": functional.cross_entropy,
    "logistic": lambda out, y: functional.binary_cross_entropy_with_logits(out, y, reduction="sum") / len(y),
}
SIZES = {"squared_error": (100, (3, 4, 3, 2))}


def module_of(package=pl):
    """A module of one of Lightning's namespaces."""

    class Fixed(package.LightningModule):
        """A net, a loss and an optimiser that does not move it, unless a learning rate is given."""

        def __init__(self, net, loss, lr=0.0, optimizer=torch.optim.SGD, **options):
            super().__init__()
            self.net, self.loss, self.lr, self.optimizer, self.options = net, loss, lr, optimizer, options

        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            free = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return self.optimizer(free, lr=self.lr, **self.options)

    return Fixed


Fixed = module_of()


def fit(make_trainer, module, x, y, detector=None, *, batch_size=64, epochs=1, loader=None, **options):
    detector = detector or LocalMinimumDetector(follow_descent=False)
    loader = loader or DataLoader(TensorDataset(x, y), batch_size=batch_size)
    trainer = make_trainer(max_epochs=epochs, callbacks=[detector, *options.pop("callbacks", [])], **options)
    trainer.fit(module, loader)
    json.dumps(detector.summary(), allow_nan=False)
    return detector.summary()


def same(found, certificate):
    """Whether a summary has what a certificate says."""
    keys = ("kind", "reason_code", "kinks", "growth", "likq", "radius", "symmetries", "zero_error")
    assert found["evidence"] == "certificate"
    for key in keys:
        value = getattr(certificate, key)
        assert found[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
    assert found["tangential_eigenvalue"] == pytest.approx(certificate.smallest_eigenvalue, rel=1e-6)
    assert found["minimum_loss"] == pytest.approx(certificate.loss, rel=1e-9)


@pytest.mark.parametrize(("decay", "package"), [(0.0, pl), (1e-3, pl), (1e-3, lightning.pytorch)])
@pytest.mark.parametrize(("loss", "sizes"), [(loss, SIZES.get(loss, (60, (3, 4, 2)))) for loss in LOSSES])
def test_a_planted_minimum_on_kinks_is_certified(make_trainer, loss, sizes, decay, package):
    planted = planted_model_kink_minimum(*sizes, kinks=2, loss=loss, weight_decay=decay)
    module = module_of(package)(copy.deepcopy(planted.module), LOSSES[loss], weight_decay=decay)
    if package is not pl:
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        make_trainer = lambda **more: package.Trainer(**options, **more, enable_model_summary=False)  # noqa: E731
    found = fit(make_trainer, module, planted.inputs, planted.targets, batch_size=15)
    expected = certify_model(
        planted.module, planted.inputs, planted.targets, loss=loss, weight_decay=decay, max_distance=1e-3
    )
    assert expected.kind == "kink_minimum"
    same(found, expected)
    assert found["objective"] == ("mse" if loss == "squared_error" else loss) + "_with_weight_decay" * bool(decay)
    assert found["advice"] is None


def test_differentiable_minima_and_saddles_are_certified(make_trainer):
    for planted, kind in (
        (planted_model_minimum(100, (3, 4, 3, 1), weight_decay=1e-3), "differentiable_minimum"),
        (planted_model_saddle(60, (3, 4, 3, 2), weight_decay=1e-3), "saddle"),
    ):
        module = Fixed(copy.deepcopy(planted.module), LOSSES["squared_error"], weight_decay=1e-3)
        found = fit(make_trainer, module, planted.inputs, planted.targets)
        assert found["kind"] == kind
        same(found, certify_model(planted.module, planted.inputs, planted.targets, weight_decay=1e-3))


def test_constants_and_the_mean_over_outputs_are_found(make_trainer):
    planted = planted_model_kink_minimum(40, (3, 4, 2), kinks=2, weight_decay=1e-3)
    module = Fixed(
        planted.module, lambda out, y: 3 + 5 * nn.functional.mse_loss(out, y), weight_decay=1e-3 * 5 / 2
    )  # the mean over two outputs is half of their sum
    found = fit(make_trainer, module, planted.inputs, planted.targets)
    expected = certify_model(planted.module, planted.inputs, planted.targets, weight_decay=1e-3)
    assert (found["evidence"], found["kind"]) == ("certificate", "kink_minimum")
    assert found["minimum_loss"] == pytest.approx(3 + 2.5 * expected.loss, rel=1e-9)
    assert found["loss"] == pytest.approx(found["minimum_loss"], rel=1e-9)


def test_polish_moves_float32_weights_to_the_exact_minimum(make_trainer):
    planted = planted_model_kink_minimum(40, (3, 4, 4, 2), kinks=2, weight_decay=1e-3)
    net = copy.deepcopy(planted.module).float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + 1e-5)
    x, y = planted.inputs.float(), planted.targets.float()
    before = polish_model(net, x, y, weight_decay=1e-3).certificate
    module, detector = Fixed(net, LOSSES["squared_error"], weight_decay=1e-3), LocalMinimumDetector(polish=True)
    found = fit(make_trainer, module, x, y, detector)
    assert found["kind"] == before.kind == "kink_minimum"
    assert 0 < found["distance"] <= 1e-3
    assert found["distance"] == pytest.approx(before.distance, rel=1e-6)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before.state_dict[name].float())
    assert found["loss"] == pytest.approx(found["minimum_loss"], rel=1e-5)
    assert detector.converged
    assert detector.certificates[0].is_minimum


def test_a_minimum_too_far_away_leaves_the_weights(make_trainer):
    planted = planted_model_kink_minimum(60, (3, 4, 2), kinks=2, weight_decay=1e-3)
    with torch.no_grad():
        for parameter in planted.module.parameters():
            parameter.mul_(1 + 1e-5)
    weights = copy.deepcopy(planted.module.state_dict())
    module = Fixed(planted.module, LOSSES["squared_error"], weight_decay=1e-3)
    found = fit(
        make_trainer, module, planted.inputs, planted.targets, LocalMinimumDetector(polish=True, max_distance=1e-7)
    )
    assert (found["kind"], found["reason_code"]) == ("not_stationary", "polished_too_far")
    assert found["descends_to"] == "kink_minimum"
    assert found["descends_to_distance"] > 1e-7
    torch.testing.assert_close(planted.module.state_dict(), weights, rtol=0, atol=0)


class Net(MNN):
    """An MNN whose optimiser does not move it."""

    def __init__(self, widths, decay=0.0, frozen=()):
        super().__init__(4, list(widths), regression=True, frozen=frozen)
        self.decay = decay

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0, weight_decay=self.decay)


@pytest.mark.parametrize("frozen", [(), ("hidden_weights.0",)])
@pytest.mark.parametrize(("widths", "decay"), [((4, 3, 3, 1), 0.0), ((4, 3, 3, 1), 1e-3), ((4, 5, 1), 1e-3)])
def test_networks_of_any_depth_and_with_weight_decay_are_certified(make_trainer, widths, decay, frozen):
    planted = planted_model_minimum(100, widths, weight_decay=decay, bias=False)
    model, weights = Net(widths[1:-1], decay, frozen), list(planted.module.parameters())
    with torch.no_grad():
        for weight, value in zip((*model.hidden_weights, model.output_weights), weights, strict=True):
            weight.copy_(value.reshape(weight.shape))
    detector = LocalMinimumDetector(follow_descent=False)
    make_trainer(max_epochs=1, callbacks=[detector]).fit(model, ArrayData(planted.inputs, planted.targets[:, 0]))
    still = ["0.weight"] if frozen else []
    expected = certify_model(
        planted.module, planted.inputs, planted.targets, weight_decay=decay, frozen=still, max_distance=1e-3
    )
    assert expected.is_minimum
    found = detector.summary()
    same(found, expected)
    assert found["objective"] == "mse" + "_with_weight_decay" * bool(decay) + "_of_trained_weights" * bool(frozen)
    assert found["minimum_mse"] == pytest.approx(found["mse"], rel=1e-6)


# What is found in the steps


def head(features=6, outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(features, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, outputs)).double()


X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).double()
CLASSES = torch.arange(30) % 3
LABELS = (torch.arange(30) % 2).double()


class Steps(Fixed):
    """A step of one's own."""

    def __init__(self, net, step, **options):
        super().__init__(net, None, **options)
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)


class Backbone(Fixed):
    """A frozen part below the model that is trained."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double().requires_grad_(requires_grad=False)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(self.backbone(batch[0])), batch[1])


class Offers(Fixed):
    """Layers by themselves, offered as a model."""

    def __init__(self, net, loss, **options):
        super().__init__(None, loss, **options)
        self.first, self.second, self.last = net[0], net[2], net[4]

    def network(self):
        return nn.Sequential(self.first, nn.ReLU(), self.second, nn.ReLU(), self.last)

    def training_step(self, batch, batch_idx):
        hidden = torch.relu(self.second(torch.relu(self.first(batch[0]))))
        return self.loss(self.last(hidden), batch[1])


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(4, 3)).double()


COVERED = {
    "cross-entropy in two steps": (Fixed, head, lambda f, y: functional.nll_loss(f.log_softmax(1), y), CLASSES),
    "the mean of one-hot errors": (
        Fixed,
        head,
        lambda f, y: functional.mse_loss(f, functional.one_hot(y, 3).to(f)),
        CLASSES,
    ),
    "softplus with signs": (
        Fixed,
        lambda: head(outputs=1),
        lambda f, y: functional.softplus(-(2 * y - 1) * f[:, 0]).mean(),
        LABELS,
    ),
    "an autoencoder": (
        Steps,
        lambda: head(outputs=6),
        lambda module, x, _: functional.mse_loss(module.net(x), x),
        CLASSES,
    ),
    "a frozen backbone": (Backbone, head, functional.cross_entropy, CLASSES),
    "a model that is offered": (Offers, head, functional.cross_entropy, CLASSES),
    "convolutions": (
        lambda net, loss: Fixed(nn.Sequential(nn.Unflatten(1, (1, 6)), net), loss),
        convolutions,
        functional.cross_entropy,
        CLASSES,
    ),
}


@pytest.mark.parametrize("name", COVERED)
def test_the_model_its_inputs_and_its_targets_are_found(make_trainer, name):
    make, net, loss, y = COVERED[name]
    module = make(net(), loss)
    found = fit(make_trainer, module, X, y, LocalMinimumDetector(Schedule(every=1), follow_descent=False))
    assert found["kind"] == "not_stationary"
    if found["evidence"] != "certificate":  # then there is one, which proves nothing
        assert "no certificate: there are flat directions" in found["reason"]


def smoothed(module, x, y):
    return functional.cross_entropy(module.net(x), y, label_smoothing=0.1)


def plain(module, x, y):
    return functional.cross_entropy(module.net(x), y)


class Masked(nn.Linear):
    """A layer that only looks like torch's."""

    def forward(self, x):
        return functional.linear(x, self.weight.tril(), self.bias)


def with_layer(place, layer):
    net = head()
    net.insert(place, layer)
    return net


def halved():
    net = head()
    net[1].register_forward_hook(lambda module, args, output: output / 2)
    return net


class Augmented(Steps):
    """Inputs that a hook changes by chance."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1e-2 * torch.randn_like(batch[0]), batch[1]


class Jittered(Dataset):
    """A transform that now and then changes a sample."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] * (1 if torch.rand(()) < 0.8 else -1), CLASSES[index]


NOT_COVERED = {
    "label smoothing": (Steps, head, smoothed, {}, "is not the mean squared error, the cross-entropy or the logistic"),
    "weights of classes": (
        Steps,
        head,
        lambda m, x, y: functional.cross_entropy(m.net(x), y, weight=torch.tensor([1.0, 2.0, 1.0]).double()),
        {},
        "is not the mean squared error",
    ),
    "two losses": (
        Steps,
        head,
        lambda m, x, y: plain(m, x, y) + 1e-6 * m.net[4].weight.square().sum(),
        {},
        "is not the mean squared error",
    ),
    "dropout": (Steps, lambda: with_layer(2, nn.Dropout(0.1)), plain, {}, "dropout is active in training"),
    "dropout in the step": (
        Steps,
        head,
        lambda m, x, y: plain(m, functional.dropout(x, 0.1, m.training), y),
        {},
        "differ each time",
    ),
    "dropout of outputs in the step": (
        Steps,
        head,
        lambda m, x, y: functional.cross_entropy(functional.dropout(m.net(x), 0.1, m.training), y),
        {},
        "in training its step computes something else",
    ),
    "noise in training": (
        Steps,
        head,
        lambda m, x, y: plain(m, x + 1e-2 * torch.randn_like(x) * m.training, y),
        {},
        "differ each time",
    ),
    "batch norm": (
        Steps,
        lambda: with_layer(1, nn.BatchNorm1d(5).double()),
        plain,
        {},
        "batch norm normalises by its batch",
    ),
    "a random transform of batches": (Augmented, head, plain, {}, "differ each time"),
    "a decoupled decay": (
        Steps,
        head,
        plain,
        {"optimizer": torch.optim.AdamW, "weight_decay": 1e-2},
        "decoupled from the gradient",
    ),
    "ascent": (Steps, head, plain, {"maximize": True}, "the optimiser maximises"),
    "a layer of one's own": (Steps, lambda: with_layer(0, Masked(6, 6).double()), plain, {}, "not torch's own: Masked"),
    "a hook": (Steps, halved, plain, {}, "is not the mean squared error"),
    "a smooth layer": (Steps, lambda: with_layer(3, nn.GELU()), plain, {}, "cannot be certified"),
    "two calls": (
        Steps,
        head,
        lambda m, x, y: functional.cross_entropy((m.net(x) + m.net(-x)) / 2, y),
        {},
        "several times",
    ),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_another_objective_has_weaker_evidence(make_trainer, name):
    make, net, step, options, why = NOT_COVERED[name]
    found = fit(make_trainer, make(net(), step, **options), X, CLASSES)
    assert found["evidence"] == "second_order"
    assert "no certificate: " in found["reason"]
    assert why in found["reason"]


def test_samples_that_change_and_samples_that_are_dropped_have_weaker_evidence(make_trainer):
    random = DataLoader(Jittered(), batch_size=30)
    dropping = DataLoader(TensorDataset(X, CLASSES), batch_size=7, drop_last=True, shuffle=True)
    for loader, why in ((random, "differ each time"), (dropping, "drops the last 2 samples")):
        found = fit(make_trainer, Steps(head(), plain), None, None, loader=loader)
        assert found["evidence"] == "second_order"
        assert why in found["reason"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "within the step"])
def test_reduced_precision_has_weaker_evidence(make_trainer, precision):
    def autocast(module, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(module, x, y)

    mixed = precision == "bf16-mixed"
    module = Steps(head().float(), plain if mixed else autocast)
    found = fit(make_trainer, module, X.float(), CLASSES, precision=precision if mixed else "32-true")
    assert found["evidence"] == "second_order"
    assert ("in mixed precision" if mixed else "or autocast") in found["reason"]


def test_of_two_layers_too_dropout_in_the_step_is_seen(make_trainer):
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    module = Steps(net, lambda m, x, y: functional.mse_loss(functional.dropout(m.net(x)[:, 0], 0.5, m.training), y))
    found = fit(make_trainer, module, X, LABELS)
    assert found["evidence"] == "second_order"
    assert "in training its step computes something else" in found["reason"]


def test_too_large_a_model_has_weaker_evidence(make_trainer, monkeypatch):
    large = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 3)).double()
    assert f"{MAX_UNKNOWNS} of dense linear algebra" in fit(make_trainer, Steps(large, plain), X, CLASSES)["reason"]
    monkeypatch.setattr(model_tier, "MAX_CERTIFICATE_WORK", 1)
    found = fit(make_trainer, Steps(head(), plain), X, CLASSES)
    assert found["evidence"] == "second_order"
    assert "would take more than about a minute" in found["reason"]


# When


def test_scheduled_certificates_are_a_small_share_of_training(make_trainer, monkeypatch):
    planted = planted_model_kink_minimum(40, (3, 4, 2), kinks=2, weight_decay=1e-3)
    at, needed = [], 20

    def certify(*args):
        at.append(module.trainer.global_step)
        return found(*args)

    found = model_tier.ModelObjective.certify
    monkeypatch.setattr(model_tier.ModelObjective, "certify", certify)
    monkeypatch.setattr(model_tier, "work_of_a_certificate", lambda *_: 2 * needed)
    monkeypatch.setattr(model_tier, "work_of_steps", lambda _trainer, steps, _products: steps * 40)
    module = Fixed(planted.module, LOSSES["squared_error"], weight_decay=1e-3)
    for stop, steps in ((True, [needed]), (False, [needed, 30])):
        at.clear()
        detector = LocalMinimumDetector(Schedule(every=5), stop_training=stop)
        fit(make_trainer, module, planted.inputs, planted.targets, detector, epochs=30)
        assert at[0] == steps[0]
        assert detector.converged
        assert len(at) <= 2


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_in_any_order_and_fast_dev_run(make_trainer, tmp_path, first):
    planted = planted_model_kink_minimum(40, (3, 4, 2), kinks=2, weight_decay=1e-3)
    others = [ActivationPatternRecorder(dirpath=tmp_path), AngularVolumeMonitor()]
    detector = LocalMinimumDetector()
    callbacks = [detector, *others] if first else [*others, detector]
    module = Fixed(copy.deepcopy(planted.module), LOSSES["squared_error"], weight_decay=1e-3)
    loader = DataLoader(TensorDataset(planted.inputs, planted.targets), batch_size=15)
    make_trainer(callbacks=callbacks, fast_dev_run=True).fit(module, loader)
    assert (detector.summary()["evidence"], detector.summary()["kind"]) == ("certificate", "kink_minimum")
    assert "sees 1 of 3 batches" in detector.summary()["reason"]


def test_after_a_short_training_there_is_no_work_left_for_descent(make_trainer):
    found = fit(
        make_trainer, Fixed(head(), functional.cross_entropy, weight_decay=1e-2), X, CLASSES, LocalMinimumDetector()
    )
    assert found["evidence"] == "certificate"
    assert (found["kind"], found["descends_to"]) == ("not_stationary", None)


def test_training_is_the_same_with_and_without(make_trainer):
    left = []
    for callbacks in ([], [LocalMinimumDetector(Schedule(every=1), follow_descent=False)]):
        torch.manual_seed(0)
        module = Fixed(head(), functional.cross_entropy, lr=0.1)
        loader = DataLoader(TensorDataset(X, CLASSES), batch_size=7, shuffle=True)
        make_trainer(max_epochs=3, callbacks=callbacks).fit(module, loader)
        left.append((module.state_dict(), torch.rand(2)))
    torch.testing.assert_close(left[0], left[1], rtol=0, atol=0)


def test_descent_is_that_of_a_direct_call_and_leaves_the_weights(make_trainer, monkeypatch):
    for module in (objective, model_tier):
        monkeypatch.setattr(module, "work_of_descent", lambda _: 1 << 34)
    module = Fixed(head(), functional.cross_entropy, weight_decay=1e-2)
    weights = copy.deepcopy(module.net.state_dict())
    found = fit(make_trainer, module, X, CLASSES, LocalMinimumDetector())
    steps = steps_of_descent(sum(weight.numel() for weight in weights.values()), 30 * (6 * 5 + 5 * 4 + 4 * 3), 0)
    options = {"loss": "cross_entropy", "weight_decay": 1e-2, "max_steps": steps}
    expected = polish_model(module.net, X, CLASSES, **options).certificate
    assert (found["descends_to"], found["descends_to_mse"]) == (expected.kind, None)
    assert found["descends_to_loss"] == pytest.approx(expected.loss, rel=1e-9)
    assert found["descends_to_distance"] == pytest.approx(expected.distance, rel=1e-6)
    torch.testing.assert_close(module.net.state_dict(), weights, rtol=0, atol=0)
