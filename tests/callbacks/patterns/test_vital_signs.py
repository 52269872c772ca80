"""Vital signs in other people's models, against passes of the models with torch's functions replaced."""

import math
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import ActivationPatternRecorder, Schedule, scheduled
from lightning_mnn.callbacks import activation_pattern_recorder as recorder_module
from lightning_mnn.callbacks.patterns import vital_signs
from lightning_mnn.callbacks.trainer import cost
from lightning_mnn.data import GaussianData
from lightning_mnn.findings import FindingCode
from lightning_mnn.landscape import random_frame
from lightning_mnn.landscape.kinks.layers import KinkLayer
from lightning_mnn.utilities.seeding import generator
from tests.foreign_models import foreign_model, foreign_trainer

MODELS = (
    "mlp",
    "lenet",
    "gru",
    "transformer",
    "functional",
    "resnet",
    pytest.param("resnet18", marks=pytest.mark.slow),
)
DIRECTIONS, RADIUS = 4, 0.05


class SmallResNet(pl.LightningModule):
    """Two residual blocks with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(4)])
        self.convolutions = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
        self.output = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for i in (0, 2):
            y = F.relu(self.norms[i](self.convolutions[i](x)))
            x = F.relu(x + self.norms[i + 1](self.convolutions[i + 1](y)))
        return self.output(x.mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def model(name):
    if name != "resnet":
        return foreign_model(name, num_samples=8 if name == "resnet18" else 24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(24, 3, 8, 8), torch.randint(3, (24,)))
        return SmallResNet(), DataLoader(data, batch_size=8)


@contextmanager
def spied(found):
    """Note what ReLUs and max-poolings return, which piece each of their units is on, and whether that is active."""
    pool, of_torch = F.max_pool2d, torch.relu

    def note(values, pieces):
        has_active = pieces.dtype == torch.bool  # a maximum has no active piece
        found.append((values.detach().flatten(1), pieces.detach().flatten(1), has_active))
        return values

    def spy_relu(x, inplace=False):  # noqa: FBT002
        return note(of_torch(x), x > 0)

    def spy_pool(x, *args, **kwargs):
        values, indices = pool(x, *args, **kwargs | {"return_indices": True})
        return note(values, indices)

    with (
        mock.patch.object(F, "relu", spy_relu),
        mock.patch.object(F, "max_pool2d", spy_pool),
        mock.patch.object(torch, "relu", lambda x: note(of_torch(x), x > 0)),
    ):
        yield


def rank_of(matrix):
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    p = values[values > 0] / values.sum()
    return math.exp(-(p * np.log(p)).sum())


def dormant(values):
    sizes = values.double().abs().mean(0)
    return sizes <= 0.025 * sizes.mean()


def expected_signs(name, state, inputs):
    """Vital signs by layer, in the order of the calls, of a fresh model with these weights."""
    found = []
    with spied(found):
        module, _ = model(name)  # an encoder layer takes hold of F.relu when it is made
        module.load_state_dict(state)
        module.eval()
        module(inputs)
        layers = list(found)
        frame = random_frame(inputs[0].numel(), DIRECTIONS, generator(0, "frame"))
        radius = RADIUS * inputs.flatten(1).norm(dim=1).square().mean().sqrt()
        pieces = []
        for direction in frame.float():
            for sign in (1, -1):
                found.clear()
                module(inputs + (sign * radius * direction).reshape(inputs.shape[1:]))
                pieces.append([p for _, p, _ in found])
    crossing = [
        float((torch.stack(on) != on[0]).any(0).double().sum()) / len(inputs) for on in zip(*pieces, strict=True)
    ]
    whole = torch.cat([values for values, _, _ in layers], 1)
    flags = [dormant(values) for values, _, _ in layers]
    dead = [float((~on).all(0).double().mean()) if has_active else None for _, on, has_active in layers]
    return {
        "dead_fraction": dead,
        "dormant_fraction": [float(flag.double().mean()) for flag in flags],
        "effective_rank": [rank_of(values) for values, _, _ in layers],
        "local_complexity": crossing,
    }, {
        "dormant_fraction": float(torch.cat(flags).double().mean()),
        "effective_rank": rank_of(whole),
        "local_complexity": sum(crossing),
    }


@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_a_naive_pass(name, tmp_path):
    module, loader = model(name)
    recorder = ActivationPatternRecorder(dirpath=tmp_path, strict=True)
    trainer = foreign_trainer(callbacks=[recorder], max_epochs=2)
    trainer.fit(module, loader)
    layers, total = expected_signs(name, module.state_dict(), loader.dataset.tensors[0])
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    for sign, values in layers.items():
        found = [logged.get(f"pattern/{layer}/{sign}") for layer in recorder.layers]
        assert found == pytest.approx(values, rel=1e-4, abs=1e-6), sign
        assert sign not in total or logged[f"pattern/{sign}"] == pytest.approx(total[sign], rel=1e-4), sign
    assert total["local_complexity"] > 0
    assert recorder.not_measured == {}


def test_those_of_an_mnn_are_of_its_network_replica_by_replica(make_trainer):
    recorder = ActivationPatternRecorder(strict=True)
    trainer = make_trainer(max_epochs=2, callbacks=[recorder])
    module, data = MNN(4, (7,), replicas=2, negative_slope=0.2), GaussianData(30, 4, replicas=2)
    trainer.fit(module, data)
    inputs = data.inputs.reshape(2, -1, 4)[:, :30]
    z = inputs @ module.network().hidden_weights[0].detach().mT
    a = F.leaky_relu(z, 0.2)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert logged["pattern/layer_1/effective_rank"] == pytest.approx(np.mean([rank_of(part) for part in a]), rel=1e-6)
    assert logged["pattern/layer_1/dormant_fraction"] == pytest.approx(
        np.mean([float(dormant(part).double().mean()) for part in a])
    )
    summary = recorder.summary()
    assert [len(summary[key]) for key in ("freeze_step", "weights_freeze_step", "findings")] == [2, 2, 2]


class Planted(pl.LightningModule):
    """Of 12 units 5 are dead and 4 dormant; the second layer has 8 channels on 6 positions, 2 of them dead."""

    def __init__(self, function=F.relu):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.second, self.output = nn.Linear(6, 12), nn.Conv1d(1, 8, 1), nn.Linear(48, 3)
        self.third = nn.Linear(12, 6)
        with torch.no_grad():
            self.first.bias[:5] = -100
            self.first.weight[5:9] *= 1e-4
            self.first.bias[5:9] = 1e-5
            self.second.bias[:2] = -100
            self.second.bias[2:] = 0

    def forward(self, x):
        x = self.third(self.function(self.first(x)))
        return self.output(self.function(self.second(x[:, None])).flatten(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit_planted(recorder, function=F.relu, **options):
    data = TensorDataset(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)
    trainer = foreign_trainer(callbacks=[recorder], **{"max_epochs": 4} | options)
    trainer.fit(Planted(function), DataLoader(data, batch_size=10))
    return trainer


def test_planted_dead_and_dormant_units_are_found(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(recorder_module, "rank_zero_info", said.append)
    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path, strict=True)
    logged = fit_planted(recorder).callback_metrics
    assert float(logged["pattern/F.relu/dead_fraction"]) == pytest.approx(5 / 12)
    assert float(logged["pattern/F.relu/dormant_fraction"]) == pytest.approx(9 / 12)
    assert float(logged["pattern/F.relu.call_2/dead_fraction"]) >= 0.25
    (found,) = recorder.findings
    values = {(finding.code, finding.layer): finding.value for finding in found}
    assert values[FindingCode.DEAD_UNITS, "F.relu"] == pytest.approx(5 / 12)
    assert values[FindingCode.DORMANT_UNITS, "F.relu"] == pytest.approx(4 / 12)
    assert values[FindingCode.DEAD_UNITS, "F.relu.call_2"] == pytest.approx(2 / 8)
    summary = recorder.summary()
    assert {"code": "dead_units", "layer": "F.relu", "value": pytest.approx(5 / 12)} in summary["findings"]
    assert any("42 % of F.relu's units are dead: they get no gradient" in line for line in said)
    assert summary["freeze_step"] == 0  # with that learning rate nothing changes
    assert any("patterns froze at step 0 of 16" in line for line in said)


def test_units_of_a_leaky_relu_are_never_called_dead():
    recorder = ActivationPatternRecorder(strict=True)
    fit_planted(recorder, F.leaky_relu)
    assert not any(finding.code is FindingCode.DEAD_UNITS for finding in recorder.findings[0])


def test_a_channel_is_dead_if_all_its_units_are():
    flags = torch.tensor([True, False, True, True, True, True])
    assert KinkLayer(6, rest=(2, 3), channel=0).whole_channels(flags).tolist() == [False, True]
    assert KinkLayer(6, rest=(2, 3), channel=1).whole_channels(flags).tolist() == [True, False, True]
    merged = KinkLayer(6, inner=2, rest=(3,), channel=0)  # two steps of a sequence on the axis of the samples
    assert merged.whole_channels(flags.expand(4, 6))[0].tolist() == [True, False, True]
    assert KinkLayer(6, rest=(6,)).whole_channels(flags) is flags


def test_the_freeze_step_is_that_of_the_recorded_patterns(tmp_path):
    module, loader = foreign_model("mlp")
    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path)
    foreign_trainer(callbacks=[recorder], max_epochs=30).fit(module, loader)
    steps = recorder.store.steps
    rows = [torch.cat([p.unpack().active for p in recorder.store.read_packed(s).values()], 1) for s in steps]
    changes = torch.stack([a != b for a, b in pairwise(rows)])
    expected = next(s for i, s in enumerate(steps) if i == len(rows) - 1 or changes[i:].any(0).double().mean() < 0.01)
    (freeze,) = recorder.freezes
    assert freeze.step == expected == recorder.summary()["freeze_step"]
    assert freeze.last_step == steps[-1] == 90


def test_without_a_store_the_freeze_step_is_unknown_and_that_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(recorder_module, "rank_zero_info", said.append)
    recorder = ActivationPatternRecorder(Schedule(every=1))
    fit_planted(recorder)
    assert recorder.summary()["freeze_step"] is None
    assert any("freeze_step is not known: no patterns.zarr was written" in line for line in said)


class Tokens(pl.LightningModule):
    """Its samples are words."""

    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, words):
        return self.output(F.relu(self.embedding(words)))

    def training_step(self, batch, batch_idx):
        (words,) = batch
        return F.cross_entropy(self(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_there_is_nothing_around_words():
    loader = DataLoader(TensorDataset(torch.randint(9, (16, 5))), batch_size=8)
    recorder = ActivationPatternRecorder(strict=True)
    trainer = foreign_trainer(callbacks=[recorder])
    trainer.fit(Tokens(), loader)
    assert "pattern/effective_rank" in trainer.callback_metrics
    assert "pattern/local_complexity" not in trainer.callback_metrics
    assert recorder.not_measured["local_complexity"] == "the samples are not real numbers but int64"


def test_an_error_in_them_does_not_end_the_recording(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("a pass of 24 samples needs too much memory")

    monkeypatch.setattr(vital_signs.VitalProbe, "num_centres", fail)
    module, loader = foreign_model("mlp")
    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path)
    with pytest.warns(
        UserWarning, match="local complexity are not measured: RuntimeError: a pass of 24 samples"
    ) as told:
        foreign_trainer(callbacks=[recorder]).fit(module, loader)
    assert len([w for w in told if "Recording goes on" in str(w.message)]) == 1
    assert recorder.store.steps == [0, 3, 6]
    assert set(recorder.not_measured) >= {"dormant_fraction", "effective_rank", "local_complexity"}


def test_the_budget_bounds_what_they_hold():
    module, loader = foreign_model("lenet", num_samples=40)
    one = 3 * sum((units + 7) // 8 * digits for units, digits in ((3136, 1), (784, 2), (600, 1), (150, 2), (16, 1)))
    for budget, centres in ((30 * one, 10), (60 * one, 32), (40 * one + one, 14)):
        recorder = ActivationPatternRecorder(memory_budget=budget)
        foreign_trainer(callbacks=[recorder], max_epochs=1).fit(module, loader)
        probe = vital_signs.VitalProbe(vital_signs.VitalSettings(), 0, budget)
        kinks = recorder._kinks
        assert probe.num_centres(kinks, 32) == centres
        assert (2 * kinks.num_samples + 3 * centres) * one // 3 <= budget


@pytest.mark.parametrize(("tier", "present"), [("light", False), ("standard", True), ("full", True)])
def test_tiers_choose_what_is_measured(tier, present, tmp_path):
    recorder = ActivationPatternRecorder(dirpath=tmp_path, tier=tier, end_seconds=math.inf)
    trainer = fit_planted(recorder)
    assert ("pattern/local_complexity" in trainer.callback_metrics) == present
    assert "pattern/dead_fraction" in trainer.callback_metrics
    assert recorder.schedule == Schedule(growth=2.0, unit="epoch" if tier == "full" else "step")


def test_times_beyond_the_limit_are_left_out_and_that_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(scheduled, "rank_zero_info", said.append)
    monkeypatch.setattr(cost, "time", SimpleNamespace(monotonic=lambda: 0.0))  # a training without time
    every = Schedule(every=1, unit="step")
    recorder = ActivationPatternRecorder(every, dirpath=tmp_path, tier="light", end_seconds=math.inf)
    fit_planted(recorder)
    assert recorder.store.steps == [16]
    assert any("% of training (limit 1 %); to stay within it, 17 of 18 times" in line for line in said)
