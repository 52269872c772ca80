"""Certificates of replicas that are deep, penalised or partly frozen: those of each network by itself."""

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback

from lightning_mnn import MNN
from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.callbacks.evidence import certificate, replica_tier
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import certify_model
from lightning_mnn.utilities.interruption import TimeLimitError

SIZE = (40, 4)
DECAY = 2e-2


def fit(make_trainer, hidden=(3,), replicas=3, epochs=300, decay=DECAY, detector=None, **options):
    detector = detector or LocalMinimumDetector(Schedule(every=10_000), **options)
    optimizer = {"name": "adam", "lr": 1e-2, "weight_decay": decay}
    model = MNN(SIZE[1], hidden, replicas=replicas, optimizer=optimizer)
    make_trainer(max_epochs=epochs, callbacks=[detector]).fit(model, GaussianData(*SIZE, replicas=replicas))
    return model, detector


def directly(model, decay=DECAY, frozen=(), replicas=3):
    """Certificates of the final weights, each network by itself."""
    inputs, targets = GaussianData(*SIZE, replicas=replicas).tensors()
    network = model.network().to(torch.float64)
    options = {"weight_decay": decay, "frozen": frozen, "max_distance": 1e-3}
    return [
        certify_model(network.replica(number).to_sequential(), inputs[number], targets[number], **options)
        for number in range(replicas)
    ]


@pytest.mark.parametrize(("hidden", "decay"), [((3,), DECAY), ((3, 2), DECAY), ((3, 2), 0.0)])
def test_each_replica_has_the_certificate_of_its_own_network(make_trainer, hidden, decay):
    model, detector = fit(make_trainer, hidden, decay=decay, follow_descent=False)
    found, expected = detector.summary(), directly(model, decay)
    assert found["evidence"] == "certificate"
    assert found["kind"] == [str(one.kind) for one in expected]
    assert found["reason_code"] == [str(one.reason_code) for one in expected]
    assert [one.kind for one in detector.certificates] == [one.kind for one in expected]
    assert found["descends_to"] == [None] * 3


def test_polishing_moves_each_replica_to_its_minimum(make_trainer):
    # far enough for minima at some distance, which the weights reach: a second detector finds them where they are
    model, detector = fit(make_trainer, polish=True, max_distance=10.0)
    found = detector.summary()
    assert any(kind.endswith("minimum") for kind in found["kind"])
    for kind, loss, again in zip(found["kind"], found["minimum_loss"], directly(model), strict=True):
        if kind.endswith("minimum"):
            assert str(again.kind) == kind
            assert again.distance < 1e-6
            assert loss == pytest.approx(again.loss, rel=1e-9)


def test_descent_is_followed_from_those_without_a_minimum(make_trainer, monkeypatch):
    monkeypatch.setattr(replica_tier, "steps_of_descent", lambda *_: 50)  # as after a long training
    monkeypatch.setattr(replica_tier, "work_of_descent", lambda _: 1 << 37)
    model, detector = fit(make_trainer, epochs=30)
    without, _ = fit(make_trainer, epochs=30, follow_descent=False)
    found = detector.summary()
    for kind, to, distance in zip(found["kind"], found["descends_to"], found["descends_to_distance"], strict=True):
        assert (to is None) == kind.endswith("minimum")
        assert to is None or distance > 0
    for a, b in zip(model.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_output_weights_are_constants(make_trainer):
    detector = LocalMinimumDetector(Schedule(every=10_000), follow_descent=False)
    model = MNN(SIZE[1], (3,), replicas=3, optimizer={"name": "adam", "lr": 1e-2, "weight_decay": DECAY})
    model.output_weights.requires_grad_(requires_grad=False)
    make_trainer(max_epochs=300, callbacks=[detector]).fit(model, GaussianData(*SIZE, replicas=3))
    assert detector.summary()["kind"] == [str(one.kind) for one in directly(model, frozen=("2.weight",))]
    assert detector.summary()["objective"] == "mse_with_weight_decay_of_trained_weights"


def test_replicas_that_would_take_too_long_have_none(make_trainer, monkeypatch):
    monkeypatch.setattr(certificate, "MAX_CERTIFICATE_WORK", 1)
    _, detector = fit(make_trainer, epochs=2)
    found = detector.summary()
    assert found["kind"] == ["undecided"] * 3
    assert set(found["reason_code"]) == {"objective_of_replicas"}
    assert "3 replicas" in found["reason"][0]
    assert found["advice"] == ["use fewer replicas, or smaller networks"] * 3


@pytest.mark.parametrize("out_of_time", [False, True])
def test_without_certificates_there_is_one_verdict_per_replica_and_no_evidence(make_trainer, monkeypatch, out_of_time):
    def stop(*_):
        raise TimeLimitError

    detector, seen = LocalMinimumDetector(Schedule(every=1), follow_descent=False), []
    if out_of_time:
        monkeypatch.setattr(replica_tier, "replica_objectives", stop)
    watch = LambdaCallback(on_train_epoch_end=lambda *_: seen.append(detector.summary()))
    model = MNN(SIZE[1], (3,), replicas=3, optimizer={"name": "adam", "lr": 1e-2, "weight_decay": DECAY})
    make_trainer(max_epochs=1, callbacks=[detector, watch]).fit(model, GaussianData(*SIZE, replicas=3))
    for found in [*seen, *([detector.summary()] if out_of_time else [])]:
        assert found["kind"] == ["undecided"] * 3
        assert found["evidence"] == "none"


def test_scheduled_checks_certify_where_that_is_cheap_beside_training(make_trainer, monkeypatch):
    seen = []
    certify = replica_tier.ReplicaModelTier.certify_minimum
    monkeypatch.setattr(
        replica_tier.ReplicaModelTier,
        "certify_minimum",
        lambda self, *a: seen.append(a[0].global_step) or certify(self, *a),
    )
    fit(make_trainer, epochs=20, detector=LocalMinimumDetector(Schedule(every=1), follow_descent=False))
    assert seen == [20]  # the end only
    seen.clear()
    monkeypatch.setattr(replica_tier, "CHECK_SHARE", 1e9)
    fit(make_trainer, epochs=20, detector=LocalMinimumDetector(Schedule(every=5), follow_descent=False))
    assert len(seen) > 1
    assert seen[-1] == 20
