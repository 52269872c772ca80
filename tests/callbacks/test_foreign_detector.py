"""LocalMinimumDetector in modules of other people's making."""

import itertools
import json
import math
import os
import re

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    FirstOrderTolerances,
    LocalMinimumDetector,
    LocalVolumeSettings,
    Schedule,
    SecondOrderSettings,
)
from lightning_mnn.callbacks.evidence.certificate import CertificateTier
from lightning_mnn.callbacks.evidence.first_order import FirstOrderTier
from lightning_mnn.callbacks.evidence.second_order import SecondOrderTier
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import planted_model_kink_minimum
from lightning_mnn.landscape.kinks.layers import NoKinksError
from lightning_mnn.utilities.errors import DivergenceError
from tests.children import side_by_side


class Plain(pl.LightningModule):
    """A net, a loss and an optimiser."""

    def __init__(self, net, loss, lr=0.0, **options):
        super().__init__()
        self.net, self.loss, self.lr, self.options = net, loss, lr, options

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]).squeeze(-1), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, **self.options)


def two_layers(width=12):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1)).double()


def data(num_samples=14):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 4, generator=random, dtype=torch.float64)
    return x, (x[:, 0] * x[:, 1] > 0).double()


def fit(make_trainer, module, x, y, detector=None, *, batch_size=50, epochs=2, **options):
    detector = detector or LocalMinimumDetector(Schedule(every=1), stop_training=False)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    trainer = make_trainer(max_epochs=epochs, callbacks=[detector], **options)
    trainer.fit(module, loader)
    json.dumps(detector.summary(), allow_nan=False)
    return detector, trainer


# Certificates


@pytest.mark.parametrize(
    "loss",
    [
        nn.functional.mse_loss,
        lambda out, y: 3 * (out - y).square().mean() + 7,
        lambda out, y: nn.functional.smooth_l1_loss(out, y, beta=100.0),
    ],
    ids=["mse", "a multiple of it and a constant", "as smooth_l1 is near zero"],
)
def test_a_two_layer_network_with_biases_is_certified(make_trainer, loss):
    net, (x, _) = two_layers(), data()
    with torch.no_grad():
        y = net(x)[:, 0]  # zero error: a minimum at the start, where both gradients vanish
    detector, trainer = fit(make_trainer, Plain(net, loss), x, y, batch_size=5)
    summary = detector.summary()
    assert summary["evidence"] == "certificate"
    assert summary["kind"] == "differentiable_minimum"
    assert summary["zero_error"] is True
    assert detector.converged
    assert detector.certificates[0].hidden_bias is not None
    assert trainer.callback_metrics["minimum/certified"] == 1


def with_weight_decay(module, batch):
    penalty = sum(p.square().sum() for p in module.parameters())
    return nn.functional.mse_loss(module(batch[0])[:, 0], batch[1]) + 1e-4 * penalty


@pytest.mark.parametrize(
    ("loss", "loss_fn"),
    [
        (lambda out, y: nn.functional.binary_cross_entropy_with_logits(out, y, pos_weight=torch.tensor(2.0)), None),
        (nn.functional.l1_loss, None),
        (lambda out, y: -nn.functional.mse_loss(out, y), None),
        (nn.functional.mse_loss, with_weight_decay),
    ],
    ids=["weights of classes", "l1", "negative", "with a penalty"],
)
def test_another_loss_than_the_squared_error_has_no_certificate(make_trainer, loss, loss_fn):
    detector = LocalMinimumDetector(Schedule(every=1), loss_fn=loss_fn)
    fit(make_trainer, Plain(two_layers(), loss), *data(), detector)
    summary = detector.summary()
    assert summary["evidence"] == "second_order"
    assert "no certificate: the loss that it trains is not the mean squared error" in summary["reason"]
    assert detector.certificates == []
    with pytest.raises(TypeError, match=r"polish=True needs.*Plain has none: the loss that it trains is not"):
        fit(make_trainer, Plain(two_layers(), loss), *data(), LocalMinimumDetector(polish=True, loss_fn=loss_fn))


class Penalised(Plain):
    """Two layers in float32 with a penalty, on the parameters of the module or on some that were kept elsewhere."""

    def __init__(self, size, *, kept=False, net=None):
        net = two_layers().float() if net is None else net
        super().__init__(net, nn.functional.mse_loss)
        self.size, self.kept = size, [*net.parameters()] if kept else None

    def training_step(self, batch, batch_idx):
        penalty = sum(p.square().sum() for p in self.kept or self.parameters())
        return super().training_step(batch, batch_idx) + self.size * penalty


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"size": 1e-6}, "gradients are not parallel (their directions differ by"),
        ({"size": 1e-9}, "as with a penalty, a frozen layer"),
        ({"size": 1e-6, "kept": True}, "it depends on weights that are not found through the module's submodules"),
    ],
    ids=str,
)
def test_a_small_penalty_is_seen_in_float32(make_trainer, options, why):
    module, (x, _) = Penalised(**options), data()
    with torch.no_grad():
        y = module(x.float())[:, 0]  # zero error: a minimum of the squared error, and not of this loss
    summary = fit(make_trainer, module, x.float(), y, batch_size=5)[0].summary()
    assert summary["evidence"] == "second_order"
    assert summary["kind"] == "not_stationary"
    assert why in summary["reason"]


@pytest.mark.parametrize(
    ("loss", "batch_size"),
    [
        (nn.functional.mse_loss, 5),
        (lambda out, y: 0.5 * (out - y).square().mean(), 14),
        (lambda out, y: nn.functional.mse_loss(out, y, reduction="sum"), 7),
        (lambda out, y: nn.functional.mse_loss(out.float(), y.to(out.dtype)) + torch.zeros(1), 5),
    ],
    ids=["mini-batches", "half", "sum", "casts"],
)
def test_the_squared_error_in_float32_is_certified(make_trainer, loss, batch_size):
    class Cast(Plain):
        def forward(self, x):
            return self.net(x.float())

    net, (x, _) = two_layers(40).float(), data()
    with torch.no_grad():
        y = net(x.float())[:, 0]
    for module, inputs in ((Plain(net, loss), x.float()), (Cast(net, loss), x)):
        summary = fit(make_trainer, module, inputs, y, batch_size=batch_size)[0].summary()
        assert (summary["evidence"], summary["kind"]) == ("certificate", "differentiable_minimum")


class Noise(Dataset):
    """Draws from a generator of its own."""

    def __init__(self):
        self.x, self.y = data()
        self.random = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + torch.randn(4, generator=self.random).double(), self.y[index]


def test_samples_that_change_have_no_certificate(make_trainer):
    left = []
    for callbacks in (
        [],
        [
            detector := LocalMinimumDetector(Schedule(every=1)),
            AngularVolumeMonitor(local_volume=LocalVolumeSettings(num_draws=2)),
        ],
    ):
        module = Plain(two_layers(), nn.functional.mse_loss, lr=0.1)
        make_trainer(max_epochs=2, callbacks=callbacks).fit(module, DataLoader(Noise(), batch_size=5))
        left.append(module.state_dict())
    assert detector.summary()["evidence"] == "second_order"
    assert "differ each time that they are read" in detector.summary()["reason"]
    torch.testing.assert_close(left[0], left[1], rtol=0, atol=0)


def no_batch_but(dtype):
    def loss(out, y):
        assert out.dtype == dtype
        return nn.functional.mse_loss(out, y)

    return loss


@pytest.mark.parametrize("given", [False, True])
def test_a_loss_that_cannot_be_had_in_float64(make_trainer, given):
    loss = no_batch_but(torch.float32)
    x, y = (part.float() for part in data())
    detector = LocalMinimumDetector(
        loss_fn=(lambda module, batch: loss(module(batch[0])[:, 0], batch[1])) if given else None
    )
    summary = fit(make_trainer, Plain(two_layers().float(), loss), x, y, detector)[0].summary()
    assert summary["evidence"] == "second_order"
    assert "cannot be compared with the squared error: it cannot be evaluated in float64" in summary["reason"]


@pytest.mark.parametrize("shift", [0, 1])
def test_a_loss_that_is_the_squared_error_in_places_only(make_trainer, shift):
    def loss(out, y):
        mse = nn.functional.mse_loss(out, y)
        return mse if mse > 1e-6 else 2 * mse + shift

    net, (x, _) = two_layers(), data()
    with torch.no_grad():
        y = net(x)[:, 0]
    detector, _ = fit(make_trainer, Plain(net, loss), x, y)
    summary = detector.summary()
    assert summary["evidence"] == "second_order"
    assert "at some weights only, and not here" in summary["reason"]
    assert summary["loss"] == shift


class Rows(Dataset):
    """Samples of any form."""

    def __init__(self, make, *parts):
        self.make, self.parts = make, parts

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, index):
        return self.make(*(part[index] for part in self.parts))


X, Y = torch.randn(14, 3, 4, generator=torch.Generator().manual_seed(4)), torch.arange(14.0) / 14
FORMS = {
    "dicts": (Rows(lambda x, y: {"x": x, "y": y}, X[:, 0], Y), lambda net, b: (net(b["x"])[:, 0], b["y"]), None),
    "weights": (Rows(lambda *parts: parts, X[:, 0], Y, Y), lambda net, b: (net(b[0])[:, 0], b[1] * b[2]), "got list"),
    "made features": (
        Rows(lambda *parts: parts, X[:, 0, :2], Y),
        lambda net, b: (net(torch.cat([b[0], b[0] ** 2], 1))[:, 0], b[1]),
        None,
    ),
    "sequences": (
        Rows(lambda *parts: parts, X, Y[:, None].expand(-1, 3)),
        lambda net, b: (net(b[0])[..., 0], b[1]),
        "have 12 numbers, and its network has 4 inputs",
    ),
    "several targets": (
        Rows(lambda *parts: parts, X[:, 0], Y[:, None].expand(-1, 3)),
        lambda net, b: (net(b[0]).expand(-1, 3), b[1]),
        "a batch of 8 samples has 24 targets",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_two_layers_on_batches_of_any_form(make_trainer, form, tmp_path):
    samples, outputs_and_targets, why = FORMS[form]

    class Formed(Plain):
        def training_step(self, batch, batch_idx):
            return self.loss(*outputs_and_targets(self.net, batch))

    module = Formed(two_layers().float(), nn.functional.mse_loss, lr=0.1)
    detector = LocalMinimumDetector(Schedule(every=1), stop_training=False)
    loader = DataLoader(samples, batch_size=5)

    def forward_fn(module, batch):
        return outputs_and_targets(module.net, batch)

    others = (
        AngularVolumeMonitor(local_volume=LocalVolumeSettings(num_draws=2, sigmas=(1e-3, 1.0), forward_fn=forward_fn)),
        ActivationPatternRecorder(dirpath=tmp_path, forward_fn=forward_fn),
    )
    make_trainer(max_epochs=2, callbacks=[detector, *others]).fit(module, loader)
    summary = detector.summary()
    if why is None:  # what the model gets, and its targets, are found in the steps
        undecided = "no certificate: there are flat directions" in summary["reason"]
        assert undecided or summary["evidence"] == "certificate"
    else:
        assert summary["evidence"] == "second_order"
        assert "no certificate: its loss cannot be compared with the squared error" in summary["reason"]
        assert why in summary["reason"]
    whole = next(iter(DataLoader(samples, batch_size=14)))
    assert summary["loss"] == pytest.approx(module.training_step(whole, 0).item(), rel=1e-6)
    assert others[0].summary()["log_volume"] is None


@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_are_computed_have_no_certificate(make_trainer, bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias), nn.ReLU(), nn.Linear(6, 1, bias)).double()
    for layer in (net[0], net[2]):
        nn.utils.parametrizations.weight_norm(layer)
    module, (x, y) = Plain(net, nn.functional.mse_loss, lr=0.1), data()
    summary = fit(make_trainer, module, x, y)[0].summary()
    loss = nn.functional.mse_loss(net(x)[:, 0], y)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*net.parameters()])]).norm()
    assert summary["evidence"] == "second_order"
    assert summary["gradient_norm"] == pytest.approx(norm.item(), rel=1e-10)


class TakesInputs(Plain):
    def network(self, x):
        return self.net(x)


class Builds(Plain):
    def network(self):
        return nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))


class Fails(Plain):
    def network(self):
        raise KeyError("width")


@pytest.mark.parametrize("kind", [TakesInputs, Builds, Fails])
def test_a_method_called_network_that_is_for_something_else(make_trainer, kind):
    left = []
    for callbacks in ([], [LocalMinimumDetector(Schedule(every=1)), AngularVolumeMonitor()]):
        torch.manual_seed(0)
        trainer = make_trainer(max_epochs=2, callbacks=callbacks)
        module = kind(two_layers(), nn.functional.mse_loss, lr=0.1)
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=5, shuffle=True))
        left.append((module.state_dict(), torch.rand(2)))
    assert callbacks[0].summary()["evidence"] == "certificate"
    torch.testing.assert_close(left[0], left[1], rtol=0, atol=0)


@pytest.mark.parametrize(("widths", "evidence"), [([5], "certificate"), ([5, 4], "certificate")])
def test_the_package_s_own_networks_need_no_loss(make_trainer, widths, evidence):
    detector = LocalMinimumDetector()
    make_trainer(max_epochs=1, callbacks=[detector]).fit(MNN(4, widths), GaussianData(9, 4))
    assert detector.summary()["evidence"] == evidence
    assert len(detector.verdicts) == 1


def test_a_deep_sequential_of_ones_own_has_a_certificate_and_weight_decay_is_told(make_trainer):
    parts = nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 1, bias=False)
    for net in (nn.Sequential(*parts).double(), two_layers()):
        module = Plain(net, nn.functional.mse_loss, weight_decay=1e-3)
        found = fit(make_trainer, module, *data())[0].summary()
        assert found["evidence"] == "certificate"
        assert "the loss includes the optimiser's weight decay" in found["reason"]
        x, y = data()
        with torch.no_grad():
            penalty = 0.5e-3 * sum(float(p.square().sum()) for p in module.parameters())
            expected = float((module(x).squeeze(-1) - y).square().mean()) + penalty
        assert found["loss"] == pytest.approx(expected, rel=1e-12)


class Decayed(MNN):
    """Its optimiser, by its class and arguments, does not move it."""

    def __init__(self, kind, frozen=(), replicas=1, **options):
        super().__init__(4, [12], regression=True, frozen=frozen, replicas=replicas)
        self.kind, self.options = kind, options

    def configure_optimizers(self):
        return self.kind([p for p in self.parameters() if p.requires_grad], lr=0.0, **self.options)


class OwnAdamW(torch.optim.AdamW):
    """Derived from torch's."""


class NotOfTorch(torch.optim.Optimizer):
    """Of which it is not known how it decays weights."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure=None):
        return None if closure is None else closure()


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
FIRST, LAST = "hidden_weights.0", "output_weights"


@pytest.mark.parametrize(
    ("module", "kind", "objective", "differs"),
    [
        (Decayed(SGD, weight_decay=1e-3), "not_stationary", "mse_with_weight_decay", ["weight_decay"]),
        (Decayed(SGD, [FIRST], weight_decay=1e-3), "not_stationary", "mse_with_weight_decay_of_trained_weights", None),
        (Decayed(ADAMW, weight_decay=1e-3), "undecided", "none", ["decoupled_weight_decay"]),
        (Decayed(OwnAdamW, weight_decay=1e-3), "undecided", "none", ["decoupled_weight_decay"]),
        (Decayed(NotOfTorch, weight_decay=1e-3), "undecided", "none", ["decoupled_weight_decay"]),
        (Decayed(torch.optim.ASGD, lambd=1e-3), "not_stationary", "mse_with_weight_decay", ["weight_decay"]),
        (Decayed(SGD, [FIRST]), "differentiable_minimum", "mse_of_trained_weights", ["frozen_weights"]),
        (Decayed(SGD, [LAST]), "differentiable_minimum", "mse", []),
        (
            Decayed(SGD, replicas=2, weight_decay=1e-3),
            ["not_stationary"] * 2,
            "mse_with_weight_decay",
            ["weight_decay"],
        ),
    ],
)
def test_the_verdict_is_on_the_objective_that_training_lowers(make_trainer, module, kind, objective, differs):
    x, _ = (part.float() for part in data())
    with torch.no_grad():
        y = module(x.double()).reshape(-1, len(x))[0]  # zero error: a minimum of the squared error at once
    detector = LocalMinimumDetector(Schedule(every=1), patience=1, second_order=SecondOrderSettings(1e-6))
    fit(make_trainer, module, x.double(), y, detector, epochs=3)
    found = detector.summary()
    assert (found["kind"], found["objective"]) == (kind, objective)
    assert differs is None or found["objective_differs_by"] == differs
    assert detector.converged == (kind == "differentiable_minimum")
    assert found["mse"] == pytest.approx(0, abs=1e-20) if isinstance(kind, str) else True


def test_weight_decay_is_part_of_the_gradient_and_the_curvature(make_trainer):
    """With frozen first layer the penalised error is a quadratic form, whose minimum is known."""
    x, y = data()
    module = Decayed(SGD, [FIRST], weight_decay=0.1)
    features = torch.relu(x @ module.hidden_weights[0].detach().mT)
    gram = 2 * features.mT @ features / len(x) + 0.1 * torch.eye(12, dtype=torch.float64)
    with torch.no_grad():
        module.output_weights.copy_(torch.linalg.solve(gram, 2 * features.mT @ y.squeeze() / len(x)))
    detector = LocalMinimumDetector(Schedule(every=1), patience=1)
    found = fit(make_trainer, module, x, y, detector)[0].summary()
    assert found["kind"] == "differentiable_minimum"
    values = torch.linalg.eigvalsh(gram)
    assert found["evidence"] == "certificate"
    assert found["tangential_eigenvalue"] == pytest.approx(float(values[0]), rel=1e-9)
    assert found["loss"] == pytest.approx(found["minimum_loss"], rel=1e-9)
    assert detector.converged


# Second order


class Deep(Plain):
    """Four layers and cross-entropy with smoothed labels, which has a minimum."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        torch.manual_seed(0)
        parts = [nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
        super().__init__(nn.Sequential(*parts).double(), nn.CrossEntropyLoss(label_smoothing=0.2))
        self.optimizer, self.options = optimizer, options

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)


def labels(num_samples=12):
    random = torch.Generator().manual_seed(2)
    x = torch.randn(num_samples, 3, dtype=torch.float64, generator=random)
    return x, torch.randint(0, 3, (num_samples,), generator=random)


def dense(module, x, y):
    """Loss, gradient and Hessian by torch's own means, all samples at once."""
    names, values = zip(*((name, p.detach()) for name, p in module.net.named_parameters()), strict=True)
    sizes = [value.numel() for value in values]

    def loss(flat):
        parts = [part.view_as(value) for part, value in zip(flat.split(sizes), values, strict=True)]
        return module.loss(functional_call(module.net, dict(zip(names, parts, strict=True)), x).squeeze(-1), y)

    flat = torch.cat([value.flatten() for value in values])
    return loss(flat).item(), torch.func.grad(loss)(flat), torch.autograd.functional.hessian(loss, flat)


def test_numbers_agree_with_dense_autograd(make_trainer):
    x, y = labels()
    norms = []

    class Watched(Deep):
        def on_before_optimizer_step(self, optimizer):
            norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm())

    module = Watched(lr=0.1)
    detector, trainer = fit(make_trainer, module, x, y, batch_size=5, epochs=3)
    loss, gradient, _ = dense(module, x, y)
    summary = detector.summary()
    assert summary["evidence"] == "second_order"
    assert summary["kind"] == "not_stationary"
    assert summary["loss"] == pytest.approx(loss, rel=1e-12)
    assert summary["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-10)
    assert summary["relative_gradient"] == pytest.approx((gradient.norm() / max(norms)).item(), rel=1e-10)
    assert summary["smallest_eigenvalue"] is None
    hidden, nearest = x, []
    for part in module.net:
        if isinstance(part, nn.ReLU):
            nearest.append((hidden.abs().min() / hidden.square().mean().sqrt(), hidden.abs().min()))
        hidden = part(hidden).detach()
    assert summary["min_preactivation"] == pytest.approx(min(least for _, least in nearest).item(), rel=1e-9)
    assert summary["relative_preactivation"] == pytest.approx(min(part for part, _ in nearest).item(), rel=1e-6)
    logged = {name for name in trainer.callback_metrics if name.startswith("minimum/")}
    names = ["loss", "gradient_norm", "relative_gradient", "min_preactivation", "relative_preactivation", "kinks"]
    assert logged == {f"minimum/{name}" for name in names}


def go_beside_a_minimum(module, x, y):
    """Go to weights with a known minimum next to them, and no kink.

    Each unit is active on all samples, so that the network is linear, and the loss convex in the linear map.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in module.net[:-1:2]:
            nn.init.orthogonal_(layer.weight)
            layer.bias += 1 - layer(x).amin(0)
            x = layer(x)
    last = module.net[-1]
    optimizer = torch.optim.LBFGS(last.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = module.loss(last(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))


def test_a_deep_network_comes_to_its_minimum_and_stops(make_trainer):
    x, y = labels()
    module = Deep(torch.optim.LBFGS, lr=1.0, line_search_fn="strong_wolfe")
    go_beside_a_minimum(module, x, y)
    detector = LocalMinimumDetector(Schedule(every=2))
    _, trainer = fit(make_trainer, module, x, y, detector, epochs=60)
    summary = detector.summary()
    loss, gradient, hessian = dense(module, x, y)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert summary["kind"] == "differentiable_minimum"
    assert detector.converged
    assert trainer.current_epoch < 60
    assert summary["loss"] == pytest.approx(loss, rel=1e-12)
    assert summary["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
    low, error, high = (summary[name] for name in ("smallest_eigenvalue", "eigenvalue_error", "largest_eigenvalue"))
    assert low - error <= eigenvalues[0] <= low + 1e-9 * high
    assert high == pytest.approx(eigenvalues[-1].item(), rel=1e-6)
    assert float(trainer.callback_metrics["minimum/smallest_eigenvalue"]) == low


class Features(Plain):
    """A head on frozen random ReLU features, trained by Adam."""

    def __init__(self, dtype, loss):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 1)).to(dtype)
        net[0].requires_grad_(requires_grad=False)
        super().__init__(net, loss)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net[2].parameters(), lr=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_on_separable_features_is_trained_on(make_trainer, dtype):
    x, y = (part.to(dtype) for part in data())
    module = Features(dtype, nn.functional.binary_cross_entropy_with_logits)
    detector = LocalMinimumDetector(Schedule(every=50))
    _, trainer = fit(make_trainer, module, x, y, detector, epochs=600)
    found = detector.summary()
    assert trainer.current_epoch == 600
    assert not detector.converged
    assert found["relative_gradient"] < 1e-3
    assert found["kind"] == "undecided"
    assert found["newton_gain"] == pytest.approx(found["loss"] / 2, rel=0.5)  # as of exp(−y)


def with_a_penalty(out, y):
    return nn.functional.binary_cross_entropy_with_logits(out, y) + 1e-2 * out.square().mean()


def test_of_float32_the_float64_is_judged(make_trainer):
    x, y = data()
    module = Features(torch.float64, with_a_penalty)
    module.net[2] = nn.Linear(30, 1, bias=False).double()
    optimizer = torch.optim.LBFGS(module.net[2].parameters(), max_iter=1000, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = module.training_step((x, y), 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    module = module.float()
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[2].parameters(), lr=0.0)
    detector = LocalMinimumDetector(Schedule(every=1))
    _, trainer = fit(make_trainer, module, x.float(), y.float(), detector, epochs=9)
    found = detector.summary()
    assert found["kind"] == "differentiable_minimum"
    assert trainer.current_epoch < 9
    assert "flat" in found["reason"]  # 30 weights, 14 samples
    assert abs(found["smallest_eigenvalue"]) < 1e-12 * found["largest_eigenvalue"]  # float32 would tell of 1e-8
    assert all(p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("layer", ["spectral norm", "batch norm"])
def test_the_reference_is_of_training_not_of_eval_mode_at_its_start(make_trainer, layer):
    """Spectral norm has not come to itself there: the gradient is many times too large; batch norm has not either."""
    torch.manual_seed(0)
    first = nn.utils.spectral_norm(nn.Linear(4, 16)) if layer == "spectral norm" else nn.Linear(4, 16)
    rest = nn.BatchNorm1d(16) if layer == "batch norm" else nn.Identity()
    module = Plain(nn.Sequential(first, rest, nn.ReLU(), nn.Linear(16, 1)).double(), nn.functional.mse_loss, lr=0.01)
    norms = []

    def watch(optimizer):
        norms.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item())

    module.on_before_optimizer_step = watch
    detector, _ = fit(make_trainer, module, *data(), batch_size=5, epochs=2)
    found = detector.summary()
    assert found["gradient_norm"] / found["relative_gradient"] == pytest.approx(max(norms), rel=1e-9)
    assert found["kind"] == "not_stationary"


def test_a_saddle_and_a_kink_are_told(make_trainer):
    x, y = labels()[0], torch.arange(12) % 3
    saddle = Deep(lr=0.0)  # stationary, as the classes are equally frequent; W₇ and W₄ together lower the loss
    with torch.no_grad():
        for p in (*saddle.net[-1].parameters(), saddle.net[4].weight):
            p.zero_()
        saddle.net[4].bias.fill_(1.0)
    found = fit(make_trainer, saddle, x, y)[0].summary()
    assert found["kind"] == "saddle"
    assert found["relative_gradient"] < 1e-12
    eigenvalues = torch.linalg.eigvalsh(dense(saddle, x, y)[2])
    assert 0.9 * eigenvalues[0] >= found["smallest_eigenvalue"] >= eigenvalues[0] - 1e-9
    kink = Deep(lr=0.0)
    with torch.no_grad():
        kink.net[0].bias[2] = -(kink.net[0].weight[2] @ x[5])
        kink.net[0].bias[2] -= kink.net[0](x[5])[2]
    found = fit(make_trainer, kink, x, y)[0].summary()
    assert (found["kind"], found["kinks"]) == ("not_stationary", 1)  # −∇L leads downhill on both its sides
    assert "1 of 216 units are on a kink within rounding" in found["reason"]
    fitted = Plain(nn.Sequential(*two_layers(), nn.Identity()), nn.functional.l1_loss)
    with torch.no_grad():
        y = fitted(x := data()[0])[:, 0]
    found = fit(make_trainer, fitted, x, y)[0].summary()
    assert (found["kind"], found["kinks"]) == ("on_kink", 14)
    assert found["smallest_eigenvalue"] is None
    found = fit(make_trainer, fitted, x, y + torch.tensor([1e-9, -1e-9] * 7))[0].summary()
    assert (found["kind"], found["kinks"]) == ("not_stationary", 0)
    assert "oscillate across kinks, where a gradient need not vanish, as with an L1 loss" in found["reason"]


def test_notes_tell_what_the_numbers_are_of(make_trainer):
    class Noted(Plain):
        def forward(self, x):
            return torch.where(x[:, :1] > 0, torch.sigmoid(super().forward(x)), super().forward(x))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    module = Noted(net.double(), nn.functional.mse_loss, weight_decay=0.1)
    detector = LocalMinimumDetector(modules="net.2")
    reason = fit(make_trainer, module, *data(), detector)[0].summary()["reason"]
    for note in (
        "the loss includes the optimiser's weight decay",
        "batch norm is at its running statistics",
        "kinks of where cannot be seen",
        "kinks of net.4, net.4.call_2 are left out",
        "smooth functions, not piecewise linear: sigmoid",
    ):
        assert note in reason


@pytest.mark.parametrize("head_only", [False, True])
def test_frozen_layers_below_the_last_kink(make_trainer, head_only):
    class Head(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module, (x, y) = Head(nn.Sequential(*two_layers(), nn.Identity()), nn.functional.mse_loss), data()
    module.net[0].requires_grad_(requires_grad=not head_only)
    detector = LocalMinimumDetector(
        Schedule(every=1), stop_training=False, patience=1, second_order=SecondOrderSettings(gradient_tolerance=2.0)
    )
    found = fit(make_trainer, module, x, y, detector)[0].summary()
    assert ("no kink depends on a weight that is trained now (net.1 depend on none)" in found["reason"]) is head_only
    features = torch.cat([module.net[:2](x), torch.ones(14, 1)], 1).detach()
    top = torch.linalg.eigvalsh(2 / 14 * features.T @ features)[-1].item()  # of the head
    if head_only:
        assert found["kind"] == "undecided"  # it is convex, but the tolerance is loose
        assert 0 < found["newton_gain"] <= found["loss"]
        assert "train on" in found["reason"]
        assert found["largest_eigenvalue"] == pytest.approx(top, rel=1e-6)
        assert found["kinks"] == 0
    else:
        assert found["largest_eigenvalue"] > top


@pytest.mark.parametrize(
    ("make", "options", "seen"),
    [
        (lambda: Deep(lr=0.1), {"overfit_batches": 1}, "sees 1 of 3 batches"),
        (lambda: Deep(lr=0.1), {}, None),
        (lambda: Plain(two_layers(), nn.functional.mse_loss), {"limit_train_batches": 2}, "sees 2 of 3 batches"),
        (lambda: MNN(4, [5]), {"limit_train_batches": 2}, "sees 2 of 3 batches"),
    ],
)
def test_training_on_a_part_of_the_data_is_told(make_trainer, make, options, seen):
    x, y = labels() if isinstance(module := make(), Deep) else data(12)
    x, y = (x.float(), y.float()) if isinstance(module, MNN) else (x, y)
    reason = fit(make_trainer, module, x, y, batch_size=5, **options)[0].summary()["reason"]
    assert ("an epoch of training sees" in reason) is (seen is not None)
    assert (seen or "") in reason


@pytest.mark.parametrize(("reduction", "batch_size", "told"), [("sum", 5, True), ("sum", 7, False), ("mean", 5, False)])
def test_a_sum_over_batches_of_several_sizes_is_told(make_trainer, reduction, batch_size, told):
    def loss(out, y):
        return nn.functional.binary_cross_entropy_with_logits(out, y, reduction=reduction)

    found = fit(make_trainer, Plain(two_layers(), loss), *data(), batch_size=batch_size)[0].summary()
    assert ("the loss is a sum over the samples of a batch" in found["reason"]) is told


def test_a_mean_over_tokens_is_no_sum(make_trainer):
    """Tokens of the target −1 are padding, of which the samples have different numbers."""

    class Tokens(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x).flatten(0, 1), y.flatten(), ignore_index=-1)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(14, 5, 4, dtype=torch.float64), torch.randint(3, (14, 5))
    for padded, told in ((True, True), (False, False)):
        y[:2, 1:] = -1 if padded else 0
        reason = fit(make_trainer, Tokens(net, None), x, y, batch_size=6)[0].summary()["reason"]
        assert ("not a mean over its samples" in reason) is told
        assert "is a sum" not in reason


def test_a_last_batch_that_training_drops_is_left_out(make_trainer):
    class Fixed(Plain):
        def training_step(self, batch, batch_idx):
            assert len(batch[0]) == 4
            return super().training_step(batch, batch_idx)

    module, (x, y) = Fixed(two_layers(), nn.functional.binary_cross_entropy_with_logits, lr=0.1), data()
    detector = LocalMinimumDetector(Schedule(every=1), stop_training=False)
    trainer = make_trainer(max_epochs=2, callbacks=[detector])
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4, drop_last=True))
    found = detector.summary()
    assert found["evidence"] == "second_order"
    assert "the last 2 samples are left out" in found["reason"]
    seen = module.loss(module(x[:12]).squeeze(-1), y[:12])
    assert found["loss"] == pytest.approx(seen.item(), rel=1e-12)


def test_autocast_within_the_step_is_named(make_trainer):
    class Casts(Plain):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x).float()

    module, (x, y) = Casts(two_layers(200).float(), nn.functional.binary_cross_entropy_with_logits), data()
    found = fit(make_trainer, module, x.float(), y.float())[0].summary()
    assert found["kinks"] > 0
    assert "in the rounding of bfloat16, in which the module's own step computes (autocast" in found["reason"]


class OnceOnly(torch.autograd.Function):
    """A function that torch can differentiate once."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def test_what_cannot_be_differentiated_is_no_crash(make_trainer):
    class Once(Plain):
        def forward(self, x):
            return OnceOnly.apply(super().forward(x))

    net, (x, _) = two_layers(), data()
    net.append(nn.Identity())
    with torch.no_grad():
        y = net(x)[:, 0] + torch.tensor([0.1, -0.1]).repeat(7)
    flat = LocalMinimumDetector(second_order=SecondOrderSettings(gradient_tolerance=2.0))
    found = fit(make_trainer, Once(net, nn.functional.mse_loss), x, y, flat)[0].summary()
    assert found["kind"] == "undecided"
    assert "no eigenvalue of the Hessian: the loss cannot be differentiated twice" in found["reason"]
    assert found["evidence"] == "second_order"

    class Reentrant(Plain):
        def forward(self, x):
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=True)

    found = fit(make_trainer, Reentrant(two_layers(), nn.functional.l1_loss), x, y)[0].summary()
    assert found["evidence"] == "first_order"
    assert "reentrant checkpointing" in found["reason"]
    assert found["kinks"] is None or found["min_preactivation"] > 0


# First order


class Manual(pl.LightningModule):
    """Two optimisers, by hand."""

    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.lr = nn.Linear(4, 6).double(), nn.Linear(6, 1).double(), lr
        self.automatic_optimization = False
        self.norms = []

    def forward(self, x):
        return self.head(nn.functional.relu(self.body(x)))[:, 0]

    def training_step(self, batch, batch_idx):
        loss = nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in self.parameters())))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=self.lr) for part in (self.body, self.head)]


@pytest.mark.parametrize("batch_size", [14, 5])
@pytest.mark.parametrize("schedule", [Schedule(every=1), Schedule(every=2, unit="step"), Schedule(every=100)])
def test_manual_optimisation_has_the_gradients_of_its_steps(make_trainer, batch_size, schedule):
    module = Manual()
    detector = LocalMinimumDetector(schedule)
    _, trainer = fit(make_trainer, module, *data(), detector, batch_size=batch_size, epochs=3)
    found = detector.summary()
    assert found["evidence"] == "first_order"
    assert found["kind"] == ("not_stationary" if batch_size == 14 else "undecided")
    assert "Manual optimises manually" in found["reason"]
    assert found["gradient_norm"] == pytest.approx(module.norms[-1], rel=1e-12)
    assert found["relative_gradient"] == pytest.approx(module.norms[-1] / module.norms[0], rel=1e-12)
    x, _ = data()
    assert found["min_preactivation"] == pytest.approx(module.body(x).abs().min().item(), rel=1e-9)
    assert float(trainer.callback_metrics["minimum/gradient_norm"]) == found["gradient_norm"]
    assert not detector.converged


def test_manual_optimisation_with_a_loss_fn(make_trainer):
    def loss_fn(module, batch):
        return nn.functional.binary_cross_entropy_with_logits(module(batch[0]), batch[1])

    module, (x, y) = Manual(), data()
    detector, _ = fit(make_trainer, module, x, y, LocalMinimumDetector(loss_fn=loss_fn), batch_size=5)
    assert detector.summary()["evidence"] == "second_order"
    assert detector.summary()["loss"] == pytest.approx(loss_fn(module, (x, y)).item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize("more", [[], [nn.Identity()]], ids=["two layers", "any"])
def test_a_step_that_returns_no_loss_now_and_then(make_trainer, more):
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx < 2 else None

    net = nn.Sequential(*two_layers(), *more)
    found = fit(make_trainer, Skips(net, nn.functional.mse_loss, lr=0.1), *data(), batch_size=5)[0].summary()
    assert found["evidence"] == "first_order"
    assert "Skips.training_step returned no loss but None" in found["reason"]
    assert found["kinks"] == 0


# What does not fit


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat((torch.zeros(4).double(), torch.tensor(0.0).double()), 3)


def test_errors_name_the_remedy(make_trainer):
    smooth = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    summary = fit(make_trainer, Plain(smooth, nn.functional.mse_loss), *data())[0].summary()
    assert summary["evidence"] == "second_order"
    assert re.search("Plain has no kink in its forward pass: its loss is treated as smooth", summary["reason"])
    deep = nn.Sequential(*two_layers(), nn.Identity())
    with pytest.raises(NoKinksError, match=r"modules='other' matches none of the layers that Plain met: net.1"):
        fit(make_trainer, Plain(deep, nn.functional.mse_loss), *data(), LocalMinimumDetector(modules="other"))
    detector = LocalMinimumDetector()
    make_trainer(max_epochs=1, callbacks=[detector]).fit(
        Plain(two_layers(), nn.functional.mse_loss), DataLoader(Endless())
    )
    assert detector.summary()["evidence"] == "first_order"
    assert (
        "the samples of an IterableDataset cannot be enumerated: train on a map-style" in detector.summary()["reason"]
    )
    with pytest.raises(DivergenceError, match="Lower the learning rate"):
        fit(make_trainer, Plain(deep, nn.functional.mse_loss, lr=1e200), *data(), epochs=4)
    for name in ("gradient_tolerance", "curvature_tolerance"):
        with pytest.raises(ValueError, match=f"{name} must be a number, above 0, got 0"):
            SecondOrderSettings(**{name: 0})
    with pytest.raises(ValueError, match="max_products must be at least 1 and a whole number, got 0"):
        SecondOrderSettings(max_products=0)


# A good guest


class Busy(Plain):
    """Draws noise, drops units, keeps statistics, metrics and a list."""

    def __init__(self):
        torch.manual_seed(0)
        parts = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.ReLU()
        super().__init__(nn.Sequential(*parts, nn.Linear(8, 1)), nn.functional.binary_cross_entropy_with_logits)
        self.accuracy, self.losses = torchmetrics.Accuracy("binary"), []

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x + 0.1 * torch.randn_like(x)).squeeze(-1)
        loss = self.loss(out, y)
        self.accuracy(out, y)
        self.losses.append(loss.detach())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 2}],
    ids=str,
)
def test_training_is_the_same_with_and_without(make_trainer, options):
    x, y = (part.float() for part in data())
    left = []
    detector = LocalMinimumDetector(
        Schedule(every=1, unit="step"),
        patience=1,
        stop_training=False,
        second_order=SecondOrderSettings(gradient_tolerance=10.0, max_products=6),
    )
    for callbacks in ([], [detector]):
        pl.seed_everything(3, verbose=False)
        module = Busy()
        loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
        trainer = make_trainer(max_epochs=2, callbacks=callbacks, **options)
        trainer.fit(module, loader)
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("minimum/")}
        left.append((module.state_dict(), module.losses, metrics, torch.rand(2)))
        assert all(part.training for part in module.modules())
        hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"
        assert not any(getattr(part, name) for part in module.modules() for name in hooks)
    assert detector.summary()["smallest_eigenvalue"] is not None
    torch.testing.assert_close(left[0], left[1], rtol=0, atol=0)


def quiet(module, batch, batch_idx):
    return module.loss(module(batch[0]).squeeze(-1), batch[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Deep(lr=0.1),
        Manual,
        Busy,
        lambda: Plain(two_layers(), nn.functional.mse_loss, lr=0.1),
        lambda: Plain(two_layers(), nn.functional.binary_cross_entropy_with_logits, lr=0.1, weight_decay=1e-2),
    ],
)
def test_a_resumed_run_is_as_an_unbroken_one(make_trainer, tmp_path, make):
    x, y = labels() if isinstance(make(), Deep) else data()
    x, y = (x.float(), y.float()) if isinstance(make(), Busy) else (x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    found = []
    for epochs, checkpoint_path in ((6, None), (3, None), (6, tmp_path / "half.ckpt")):
        pl.seed_everything(0, verbose=False)
        detector = LocalMinimumDetector(Schedule(every=2))
        trainer = make_trainer(max_epochs=epochs, callbacks=[detector])
        if isinstance(module := make(), Busy):  # without noise, for which a generator would have to be saved
            module.net[3].p, module.training_step = 0.0, quiet.__get__(module)
        trainer.fit(module, loader, ckpt_path=checkpoint_path, weights_only=True if checkpoint_path else None)
        if epochs == 3:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        found.append(detector.summary())
    assert found[0] == found[2]
    measure = "mse" if isinstance(module, Plain) and detector.statistics else "relative_gradient"
    assert found[0][measure] not in (1.0, found[1][measure])


FITTED = dict.fromkeys(("factor", "offset", "scale", "gradient_scale"), 1.0)


@pytest.mark.parametrize(
    ("name", "tier", "state"),
    [
        (
            "NetworkJudge",
            CertificateTier,
            {"fitted": FITTED},
        ),
        ("SecondOrderJudge", SecondOrderTier, {}),
        ("FirstOrderJudge", FirstOrderTier, {}),
    ],
)
def test_checkpoints_of_version_0_1_are_understood(name, tier, state):
    detector = LocalMinimumDetector()
    detector.load_state_dict({"judge": {"name": name, "why": "no reason"} | state})
    assert type(detector._tiers.resumed(detector._saved)) is tier


def test_the_arguments_before_they_were_grouped_still_work():
    with pytest.warns(DeprecationWarning, match="first_order=FirstOrderTolerances|second_order=SecondOrderSettings"):
        detector = LocalMinimumDetector(preactivation_tolerance=1e-9, max_products=9)
    assert detector.first_order == FirstOrderTolerances(preactivation_tolerance=1e-9)
    assert detector.second_order == SecondOrderSettings(max_products=9)


CASES = [
    ("Deep", 9),
    ("Deep", 1),
    ("Plain", 9),
    ("Plain", 1),
    ("Model", 60),
    ("Manual", 9),
]  # of one sample one process has none


KINDS_OF_EVIDENCE = {
    "Deep": "second_order",
    "Plain": "certificate",
    "Model": "certificate",
    "Manual": "first_order",
}


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    side_by_side(tmp_path, 2, in_two_processes, tmp_path)
    for case, two in zip(CASES, json.loads((tmp_path / "two.json").read_text()), strict=True):
        one = classified(1, *case, tmp_path)
        assert two.pop("world_size") == 2
        assert one["evidence"] == KINDS_OF_EVIDENCE[case[0]]
        assert one.keys() - {"world_size"} == two.keys()
        of_batches = {"relative_gradient", *(["gradient_norm"] if case[0] == "Manual" else [])}
        for name in two.keys() - {"reason"} - of_batches:
            value, within = one[name], 1e-12
            if "eigenvalue" in name:
                within = one["eigenvalue_error"]  # up to which products are taken
            assert two[name] == (pytest.approx(value, rel=1e-9, abs=within) if isinstance(value, float) else value)


def classified(devices, kind, num_samples, folder):
    """What a detector finds in a module that does not move."""
    detector = LocalMinimumDetector(
        Schedule(every=1), stop_training=False, patience=1, second_order=SecondOrderSettings(gradient_tolerance=10.0)
    )
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[detector],
    )
    planted = planted_model_kink_minimum(60, (3, 4, 2), kinks=2, weight_decay=1e-3)
    module = {
        "Deep": lambda: Deep(lr=0.0),
        "Plain": lambda: Plain(two_layers(), nn.functional.mse_loss),
        "Model": lambda: Plain(planted.module, lambda out, y: (out - y).square().sum(1).mean(), weight_decay=1e-3),
        "Manual": lambda: Manual(lr=0.0),
    }[kind]()
    x, y = labels(num_samples) if kind == "Deep" else data(num_samples)
    x, y = (planted.inputs, planted.targets) if kind == "Model" else (x, y)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4))
    return detector.summary() | {"world_size": trainer.world_size}


def in_two_processes(folder):
    found = [classified(2, *case, folder) for case in CASES]
    if os.environ["LOCAL_RANK"] == "0":
        (folder / "two.json").write_text(json.dumps(found))
