"""Where descent leads to from the end of training: the direct polish of the final weights, and no more."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.advice import ADVICE
from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.callbacks.evidence import certification, model_tier
from lightning_mnn.callbacks.evidence.certificate import CertificateTier
from lightning_mnn.callbacks.evidence.certification import steps_of_descent
from lightning_mnn.callbacks.evidence.models import objective as model_objective
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import polish, polish_model
from lightning_mnn.utilities.interruption import TimeLimitError

SIZE = (30, 6)
KEYS = ("descends_to", "descends_to_mse", "descends_to_distance", "descends_to_zero_error")


def fit(make_trainer, replicas=1, epochs=3, width=4, **options):
    torch.manual_seed(0)
    detector = LocalMinimumDetector(Schedule(every=1000), **options)
    model = MNN(SIZE[1], (width,), replicas=replicas, optimizer={"name": "adam", "lr": 1e-2})
    make_trainer(max_epochs=epochs, callbacks=[detector]).fit(model, GaussianData(*SIZE, replicas=replicas))
    return model, detector.summary()


def directly(model, replicas):
    """What a direct call of polish says of the final weights."""
    data = GaussianData(*SIZE, replicas=replicas)
    found = polish(model.hidden_weights[0].detach(), model.output_weights.detach(), *data.tensors())
    return [
        (str(one.certificate.kind), one.certificate.mse, one.distance, one.certificate.zero_error)
        for one in (found if isinstance(found, list) else [found])
    ]


@pytest.mark.parametrize("replicas", [1, 3])
def test_it_is_what_polish_says_of_the_final_weights_which_stay(make_trainer, replicas):
    model, found = fit(make_trainer, replicas)
    other, without = fit(make_trainer, replicas, follow_descent=False)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    columns = [found[key] if replicas > 1 else [found[key]] for key in KEYS]
    for row, expected in zip(zip(*columns, strict=True), directly(model, replicas), strict=True):
        assert (row[0], row[3]) == (expected[0], expected[3])
        assert row[1:3] == pytest.approx(expected[1:3], rel=1e-6)
        assert row[2] > 1e-3
    same = {key: value for key, value in found.items() if key not in KEYS}
    assert same == {key: value for key, value in without.items() if key not in KEYS}
    assert [without[key] for key in KEYS] == [[None] * 3 if replicas > 1 else None] * 4


def test_a_certified_minimum_descends_to_nothing_and_needs_no_advice(make_trainer):
    _, found = fit(make_trainer, width=16, polish=True, max_distance=math.inf)
    assert found["kind"] in ("differentiable_minimum", "kink_minimum")
    assert [found[key] for key in (*KEYS, "advice")] == [None] * 5


def test_only_replicas_without_a_minimum_are_followed(make_trainer, monkeypatch):
    seen = []
    following = certification._polish_in_turn
    monkeypatch.setattr(
        certification,
        "_polish_in_turn",
        lambda chosen, *args, **kw: seen.append(chosen) or following(chosen, *args, **kw),
    )
    _, found = fit(make_trainer, 3, epochs=400)
    minima = [kind.endswith("minimum") for kind in found["kind"]]
    assert [value is None for value in found["descends_to"]] == minima
    assert seen == ([] if all(minima) else [[not minimum for minimum in minima]])


def test_each_chosen_replica_gets_its_own_result():
    model, data = MNN(SIZE[1], (4,), replicas=3), GaussianData(*SIZE, replicas=3)
    weights = model.hidden_weights[0].detach(), model.output_weights.detach()
    options = {"hidden_bias": None, "output_bias": None}
    found = certification._polish_in_turn([True, False, True], *weights, *data.tensors(), 0.0, work=2.0**37, **options)
    expected = polish(*weights, *data.tensors())
    assert found[1] is None
    assert [(found[k].distance, found[k].losses) for k in (0, 2)] == [
        (expected[k].distance, expected[k].losses) for k in (0, 2)
    ]


@pytest.mark.parametrize(("steps", "followed"), [(0, [False, False]), (3, [True, False])])
def test_replicas_share_a_limit_of_work(make_trainer, monkeypatch, steps, followed):
    work = certification._work_of_a_step(SIZE[0], 4 * SIZE[1])
    monkeypatch.setattr(certification, "_MAX_DESCENT_WORK", steps * work)
    monkeypatch.setattr(steps_of_descent, "__defaults__", (steps * work,))
    _, found = fit(make_trainer, 2)
    assert [kind is not None for kind in found["descends_to"]] == followed


def test_a_long_training_allows_a_longer_descent(make_trainer, monkeypatch):
    allowed = []

    def in_turn(chosen, *_, work, **__):
        allowed.append(work)
        return [None] * len(chosen)

    monkeypatch.setattr(certification, "_polish_in_turn", in_turn)
    monkeypatch.setattr(certification, "_MIN_DESCENT_WORK", 0)
    monkeypatch.setattr(certification, "CHECK_SHARE", 100.0)
    for epochs in (2, 4):
        fit(make_trainer, epochs=epochs)
    assert allowed[1] == pytest.approx(2 * allowed[0])


def test_the_objective_with_weight_decay_is_followed(make_trainer, monkeypatch):
    for module in (model_objective, model_tier):
        monkeypatch.setattr(module, "work_of_descent", lambda _: 1 << 34)
    detector = LocalMinimumDetector(Schedule(every=1000))
    model = MNN(SIZE[1], (4,), optimizer={"name": "adam", "lr": 1e-2, "weight_decay": 1e-2})
    make_trainer(max_epochs=2, callbacks=[detector]).fit(model, GaussianData(*SIZE))
    net = nn.Sequential(nn.Linear(SIZE[1], 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(model.hidden_weights[0])
        net[2].weight.copy_(model.output_weights[None])
    steps = model_objective.steps_of_descent(28, 30 * 28, 0)
    expected = polish_model(net, *GaussianData(*SIZE).tensors(), weight_decay=1e-2, max_steps=steps).certificate
    found = detector.summary()
    assert found["descends_to"] == expected.kind
    assert found["descends_to_loss"] == pytest.approx(expected.loss, rel=1e-9)
    assert found["descends_to_mse"] < found["descends_to_loss"]
    assert found["descends_to_distance"] == pytest.approx(expected.distance, rel=1e-6)
    assert found["advice"] in ADVICE.values()


def test_the_work_of_a_step_grows_with_the_network():
    for samples, weights in ((30, 24), (100, 100), (10_000, 20)):
        assert steps_of_descent(samples, weights) >= steps_of_descent(2 * samples, 2 * weights)
    assert steps_of_descent(30, 24) == 1000
    assert steps_of_descent(20_000, 20_000) == 0


class Biased(pl.LightningModule):
    """A two-layer network with biases that is not MNN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1)).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x)[:, 0] - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_a_network_with_biases_is_followed(make_trainer):
    x, y = GaussianData(*SIZE).tensors()
    detector, module = LocalMinimumDetector(Schedule(every=1000)), Biased()
    make_trainer(max_epochs=3, callbacks=[detector]).fit(module, DataLoader(TensorDataset(x, y), batch_size=30))
    hidden, _, output = module.net
    biases = {"hidden_bias": hidden.bias.detach(), "output_bias": output.bias.detach()[0]}
    expected = polish(hidden.weight.detach(), output.weight.detach()[0], x, y, **biases)
    found = detector.summary()
    assert found["descends_to"] == expected.certificate.kind
    assert found["descends_to_mse"] == pytest.approx(expected.certificate.mse, rel=1e-6)
    assert found["descends_to_distance"] == pytest.approx(expected.distance, rel=1e-6)


def test_without_time_to_follow_the_verdict_stays(make_trainer, monkeypatch):
    def run_out(*args):
        raise TimeLimitError

    _, without = fit(make_trainer, follow_descent=False)
    monkeypatch.setattr(CertificateTier, "follow_descent", run_out)
    _, found = fit(make_trainer)
    assert found == without | {"out_of_time": "descent"}
