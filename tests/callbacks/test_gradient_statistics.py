"""GradientStatistics against the gradients that a plain loop computes, in training that goes on as without it."""

import json

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn.callbacks import ActivationPatternRecorder, GradientStatistics, Schedule
from lightning_mnn.callbacks import gradient_statistics as module_of_it
from lightning_mnn.findings import FindingCode
from tests.children import side_by_side
from tests.foreign_models import foreign_model, foreign_trainer

EVERY_STEP = Schedule(every=1, unit="step")


class Spy(pl.Callback):
    """Keeps the gradients of each step by parameter, and what is logged after it."""

    def __init__(self):
        self.gradients, self.weights, self.logged = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, *args):
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gradient/")})


def naive(gradients, weights):
    """What is logged of a step, by loops over the parameters."""
    layers = {}
    for name in gradients:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    found, near, size = {}, 0, 0
    for layer, names in layers.items():
        g = torch.cat([gradients[name].flatten() for name in names]).double()
        w = torch.cat([weights[name].flatten() for name in names]).double()
        few = int((g.abs() <= 1e-3 * g.square().mean().sqrt()).sum())
        found[f"{layer}/norm"], found[f"{layer}/relative_norm"] = float(g.norm()), float(g.norm() / w.norm())
        found[f"{layer}/near_zero_fraction"] = few / len(g)
        near, size = near + few, size + len(g)
    g, w = (torch.cat([v[name].flatten() for name in gradients]).double() for v in (gradients, weights))
    found |= {"norm": float(g.norm()), "relative_norm": float(g.norm() / w.norm()), "near_zero_fraction": near / size}
    return {f"gradient/{key}": value for key, value in found.items()}


@pytest.mark.parametrize(
    "name", ["mlp", "lenet", "gru", "transformer", "functional", pytest.param("resnet18", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_logs_what_a_loop_finds(name, accumulate):
    module, loader = foreign_model(name)
    spy = Spy()
    callbacks = [GradientStatistics(EVERY_STEP, strict=True), spy]
    trainer = foreign_trainer(callbacks=callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=1e-3)
    trainer.fit(module, loader)
    assert len(spy.gradients) == trainer.global_step == 6 // accumulate
    after_steps = spy.logged[accumulate - 1 :: accumulate]
    for logged, gradients, weights in zip(after_steps, spy.gradients, spy.weights, strict=True):
        assert logged == pytest.approx(naive(gradients, weights), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", ["mlp", "lenet", "gru", "transformer", "manual"])
def test_training_goes_on_as_without_the_callbacks(name, tmp_path):
    outcomes = []
    for watched in (False, True):
        module, loader = foreign_model(name, shuffle=True)
        callbacks = [
            ActivationPatternRecorder(EVERY_STEP, dirpath=tmp_path, strict=True),
            GradientStatistics(EVERY_STEP, noise_scale=True, strict=True),
        ]
        pl.seed_everything(1, verbose=False)
        foreign_trainer(callbacks=callbacks if watched else []).fit(module, loader)
        outcomes.append((*module.state_dict().values(), torch.rand(3)))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_it_reads_at_scheduled_steps_only(monkeypatch):
    read = []
    sizes = module_of_it.gradient_sizes
    monkeypatch.setattr(module_of_it, "gradient_sizes", lambda *args: read.append(1) or sizes(*args))
    module, loader = foreign_model("mlp")
    statistics = GradientStatistics(Schedule(every=4, unit="step"), strict=True)
    foreign_trainer(callbacks=[statistics], max_epochs=3).fit(module, loader)
    assert len(read) == 2 * 4  # two of nine steps, four layers
    with pytest.raises(ValueError, match="schedule must count steps"):
        GradientStatistics(Schedule(every=1))


def test_both_optimisers_of_a_gan_are_read_together():
    module, loader = foreign_model("manual")
    spy = Spy()
    trainer = foreign_trainer(callbacks=[GradientStatistics(Schedule(every=5, unit="step"), strict=True), spy])
    trainer.fit(module, loader)
    assert {"gradient/generator.0/norm", "gradient/discriminator.2/norm"} <= trainer.callback_metrics.keys()


class Slope(pl.LightningModule):
    """A loss θ·x, whose gradient is the mean of a batch."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(4))

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.weights).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-9)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_noise_scale_is_that_of_the_gradients_of_eight_steps(accumulate):
    x = torch.randn(320, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    statistics = GradientStatistics(Schedule(every=16 // accumulate, unit="step"), noise_scale=True, strict=True)
    trainer = foreign_trainer(callbacks=[statistics], max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(Slope(), DataLoader(TensorDataset(x), batch_size=20))
    size = 20 * accumulate
    g = x.reshape(-1, size, 4).mean(1)[-8:].double()
    variance = g.var(0).sum() * size
    signal = g.mean(0).square().sum() - g.var(0).sum() / len(g)
    assert float(trainer.callback_metrics["gradient/noise_scale"]) == pytest.approx(float(variance / signal), rel=1e-4)


class Faulty(pl.LightningModule):
    """Its first layer hardly gets a gradient, and at a step all of them are huge or infinite."""

    def __init__(self, at=-1, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.at, self.factor = at, factor

    def training_step(self, batch, batch_idx):
        hidden = F.relu(self.first(batch[0]))
        hidden = 1e-7 * hidden + (1 - 1e-7) * hidden.detach()
        loss = F.cross_entropy(self.last(hidden), batch[1])
        return loss * (self.factor if batch_idx == self.at else 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-9)


@pytest.mark.parametrize(
    ("fault", "code"),
    [((), None), ((6, 1e6), FindingCode.EXPLODING_GRADIENT), ((6, torch.inf), FindingCode.NON_FINITE_GRADIENT)],
)
def test_vanishing_and_exploding_gradients_are_found_and_said(fault, code, monkeypatch):
    said = []
    monkeypatch.setattr(module_of_it, "rank_zero_info", said.append)
    data = TensorDataset(torch.randn(80, 3, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 2)
    statistics = GradientStatistics(EVERY_STEP, strict=True)
    foreign_trainer(callbacks=[statistics], max_epochs=1).fit(Faulty(*fault), DataLoader(data, batch_size=8))
    found = {finding.code: finding for finding in statistics.findings}
    if code is not FindingCode.NON_FINITE_GRADIENT:  # with which the weights are lost
        assert found[FindingCode.VANISHING_GRADIENT].layer == "first"
        assert any("the gradient of first, relative to its weights, is " in line for line in said)
    assert code is None or code in found
    assert statistics.summary()["gradient_findings"] == [finding.plain() for finding in statistics.findings]


def test_a_resumed_run_finds_what_an_unbroken_one_does(tmp_path):
    found = []
    for stops in ((4,), (2, 4)):
        for epochs in stops:
            module, loader = foreign_model("mlp")
            statistics = GradientStatistics(Schedule(every=2, unit="step"), strict=True)
            trainer = foreign_trainer(callbacks=[statistics], max_epochs=epochs)
            resumed = tmp_path / "last.ckpt" if epochs == 4 and len(stops) == 2 else None
            trainer.fit(module, loader, ckpt_path=resumed)
            trainer.save_checkpoint(tmp_path / "last.ckpt")
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gradient/")}
        found.append((metrics, statistics.state_dict(), statistics.summary()))
    assert found[0] == found[1]
    assert len(found[0][1]["norms"]) == 6


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        side_by_side(folder, devices, main, devices, folder)
        found.append(json.loads((folder / "found.json").read_text()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert "gradient/noise_scale" in found[0]


def main(devices, folder):
    torch.set_num_threads(1)
    module, loader = foreign_model("mlp", batch_size=24 // devices)
    options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "precision": "64-true"}
    statistics = GradientStatistics(Schedule(every=2, unit="step"), noise_scale=True, strict=True)
    trainer = foreign_trainer(callbacks=[statistics], max_epochs=4, **options)
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gradient/")}
        (folder / "found.json").write_text(json.dumps(logged))
