"""The detector's certificates and polish, in real fits."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import certify

ADAM = {"name": "adam", "lr": 1e-2}


class Foreign(pl.LightningModule):
    """A two-layer network with biases that is not MNN."""

    def __init__(self, kink, bias):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16, bias=bias), kink, nn.Linear(16, 1, bias=bias)).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x)[:, 0] - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(make_trainer, detector, replicas=1, epochs=1200, size=(28, 12)):
    model = MNN(size[1], (12,), replicas=replicas, optimizer=ADAM, schedule={"name": "exponential_tail"})
    trainer = make_trainer(max_epochs=epochs, callbacks=[detector])
    trainer.fit(model, GaussianData(*size, replicas=replicas))
    return model, trainer


@pytest.mark.parametrize("replicas", [1, 3])
def test_polish_ends_a_run_early_on_the_exact_minimum(make_trainer, replicas):
    plain = LocalMinimumDetector(Schedule(every=20))
    _, without = fit(make_trainer, plain, replicas)
    detector = LocalMinimumDetector(Schedule(every=20), polish=True)
    model, trainer = fit(make_trainer, detector, replicas)
    assert trainer.current_epoch < without.current_epoch
    found = detector.summary()
    for name in ("kind", "zero_error", "mse", "distance", "margin_ratio", "rank"):
        assert isinstance(found[name], list) == (replicas > 1)
    listed = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    assert listed["kind"] == ["differentiable_minimum"] * replicas
    assert all(listed["zero_error"])
    assert max(listed["mse"]) <= 1e-28
    assert max(listed["distance"]) <= 1e-3
    assert min(listed["margin_ratio"]) > 0
    assert listed["rank"] == [28] * replicas
    weights = model.hidden_weights[0].detach().reshape(replicas, 12, 12)
    for row, certificate in zip(weights, detector.certificates, strict=True):
        assert torch.equal(row, certificate.hidden_weights)
    assert float(trainer.callback_metrics["minimum/certified"]) == 1.0
    assert float(trainer.callback_metrics["minimum/distance"]) <= 1e-3


def test_without_polish_the_weights_stay_and_the_minimum_is_reported_beside_them(make_trainer):
    detector = LocalMinimumDetector(Schedule(every=1000))
    model, _ = fit(make_trainer, detector, epochs=400)
    found = detector.summary()
    assert found["kind"] == "differentiable_minimum"
    assert 0 < found["distance"] <= 1e-3
    assert found["mse"] > 1e3 * found["minimum_mse"]
    x, y = GaussianData(28, 12).tensors()
    direct = certify(model.hidden_weights[0], model.output_weights, x, y)
    assert (direct.kind, direct.distance) == (found["kind"], pytest.approx(found["distance"], rel=1e-6))


def test_a_minimum_out_of_reach_is_not_moved_to(make_trainer):
    detector = LocalMinimumDetector(Schedule(every=1000), polish=True)
    model, trainer = fit(make_trainer, detector, epochs=2)
    other, _ = fit(make_trainer, LocalMinimumDetector(Schedule(every=1000)), epochs=2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    found = detector.summary()
    assert found["kind"] == "not_stationary"
    assert found["reason"].startswith("moved: polishing led a relative distance of ")
    assert found["minimum_mse"] is None
    assert "minimum/distance" not in trainer.callback_metrics


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kink", [nn.ReLU(), nn.LeakyReLU(0.2)])
def test_a_foreign_network_is_certified_and_polished_in_place(make_trainer, kink, bias):
    x, y = GaussianData(12, 6).tensors()  # so few that the way to a minimum is short, and off the kinks
    detector = LocalMinimumDetector(Schedule(every=1000), polish=True, max_distance=math.inf)
    module = Foreign(kink, bias)
    make_trainer(max_epochs=50, callbacks=[detector]).fit(module, DataLoader(TensorDataset(x, y), batch_size=12))
    found = detector.certificates[0]
    assert found.is_minimum
    with torch.no_grad():
        assert float((module.net(x)[:, 0] - y).square().mean()) == pytest.approx(found.mse, rel=1e-9, abs=1e-25)
    assert torch.equal(module.net[0].weight, found.hidden_weights)
    assert (found.hidden_bias is not None) == (found.output_bias is not None) == bias
    module.zero_grad()
    (module.net(x)[:, 0] - y).square().mean().backward()
    if found.kind == "differentiable_minimum":
        assert max(float(p.grad.norm()) for p in module.parameters()) < 1e-10


def test_float32_is_certified_in_float64_next_to_its_weights(make_trainer):
    detector = LocalMinimumDetector(Schedule(every=1000))
    model = MNN(12, (12,), dtype="float32", optimizer=ADAM, schedule={"name": "exponential_tail"})
    make_trainer(max_epochs=600, callbacks=[detector]).fit(model, GaussianData(28, 12))
    found = detector.certificates[0]
    assert (found.kind, found.zero_error) == ("differentiable_minimum", True)
    assert found.hidden_weights.dtype == torch.float64
    assert found.distance < 1e-5


@pytest.mark.parametrize("polish", [False, True])
def test_a_set_too_large_to_certify_on_is_judged_by_necessary_conditions(make_trainer, monkeypatch, polish):
    monkeypatch.setattr("lightning_mnn.callbacks.evidence.certification._MAX_PER_PROCESS", 28 * 12 - 1)
    detector = LocalMinimumDetector(polish=polish)
    fit(make_trainer, detector, epochs=3)
    assert detector.certificates == []
    found = detector.summary()
    assert found["kind"] == "not_stationary"
    assert "a certificate would have 3.4e+02 input numbers in the memory of a process" in found["reason"]
    assert not found["distance"]


def test_bad_distance():
    with pytest.raises(ValueError, match=r"max_distance must be a number, at least 0, got -0\.1"):
        LocalMinimumDetector(max_distance=-0.1)
