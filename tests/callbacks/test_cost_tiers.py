"""Callbacks keep to a share of training's time, and to a time at its end; what they leave out they say."""

import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from lightning_mnn import MNN
from lightning_mnn.advice import ADVICE
from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    GradientStatistics,
    LearningCoefficient,
    LocalMinimumDetector,
    Schedule,
    added,
    local_minimum_detector,
    scheduled,
)
from lightning_mnn.callbacks.environment import VARIABLE, asked_for, factory
from lightning_mnn.callbacks.evidence.certificate import CertificateTier
from lightning_mnn.callbacks.local_minimum_detector import Part
from lightning_mnn.callbacks.trainer import cost
from lightning_mnn.data import GaussianData
from lightning_mnn.utilities.interruption import TimeLimitError
from lightning_mnn.verdicts import ReasonCode
from tests.foreign_models import foreign_model, foreign_trainer

EVERY = Schedule(every=1)
SMALL = {"chains": 2, "budget": 200}
MAKERS = {
    "detector": lambda folder, **options: LocalMinimumDetector(EVERY, stop_training=False, **options),
    "recorder": lambda folder, **options: ActivationPatternRecorder(EVERY, dirpath=folder, **options),
    "monitor": lambda folder, **options: AngularVolumeMonitor(EVERY, **options),
    "coefficient": lambda folder, **options: LearningCoefficient(**SMALL, **options),
    "gradients": lambda folder, **options: GradientStatistics(**options),
}


class Steps(pl.Callback):
    """Lets the clock of the callbacks' shares go on at each step."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, *_):
        self.clock.now += self.seconds


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """Fits a model with callbacks, where a step takes so many seconds by their clock and nothing else takes any."""

    def fitted(callbacks, *, model="mlp", seconds=0.0, epochs=2):
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr(cost, "time", SimpleNamespace(monotonic=lambda: clock.now))
        module, loader = foreign_model(model)
        trainer = foreign_trainer(
            callbacks=[*callbacks, Steps(clock, seconds)], default_root_dir=tmp_path, max_epochs=epochs
        )
        trainer.fit(module, loader)
        return module

    return fitted


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("tier", ["light", "standard", "full"])
@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_training_is_the_same_whatever_there_is_time_for(fit, tmp_path, tier, seconds):
    plain = weights(fit([]))
    callbacks = [make(tmp_path / name, tier=tier) for name, make in MAKERS.items()]
    assert torch.equal(weights(fit(callbacks, seconds=seconds)), plain)
    assert all(callback.failure is None for callback in callbacks)


def test_without_time_nothing_is_done_and_that_is_said(fit, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(scheduled, "rank_zero_info", said.append)
    detector, recorder, monitor, coefficient, _ = (make(tmp_path, tier="light") for make in MAKERS.values())
    fit([detector, recorder, monitor, coefficient])
    found = detector.summary()
    assert (found["evidence"], found["kind"], found["out_of_time"]) == ("first_order", "undecided", "check")
    assert found["advice"] == next(text for text in ADVICE.values() if "end_seconds" in text)
    why = "1 % of training's time (tier=light) left too little for the end of training: use tier=full, or end_seconds="
    assert why in found["reason"]
    assert why in recorder.summary()["patterns_reason"]
    assert recorder.summary()["regions_visited"] is None
    assert why in monitor.summary()["local_volume_reason"]
    assert monitor.summary()["local_volume"] is None
    estimate = coefficient.summary()
    assert why in estimate["sampled_learning_coefficient_reason"]
    assert estimate["sampled_learning_coefficient_reason_code"] == ReasonCode.TIME_LIMIT
    costs = [line for line in said if "(limit 1 %)" in line]  # at the start, after two epochs, and at the end
    for line, times in zip(costs, (4, 4, 4, 1), strict=True):
        assert f"{times} of {times} times were left out" in line


def test_with_time_a_tier_finds_what_there_is_to_find(fit, tmp_path, monkeypatch):
    for name in ("detector", "monitor", "coefficient"):
        whole, limited = (MAKERS[name](tmp_path, tier=tier) for tier in ("full", "standard"))
        fit([whole])
        monkeypatch.setattr(type(limited), "least_seconds", lambda *_: 0.0)
        fit([limited], seconds=1e6)
        assert limited.summary() == whole.summary()
    recorder = MAKERS["recorder"](tmp_path, tier="standard", probe=1)
    fit([recorder], seconds=1e6)
    assert recorder.store.steps == [3, 6]  # there is no time before the first step
    assert "patterns_reason" not in recorder.summary()


def test_the_end_has_its_own_limit(fit, tmp_path):
    for tier in ("full", "standard"):
        detector = LocalMinimumDetector(Schedule(every=100), tier=tier, end_seconds=0)
        fit([detector], seconds=1e6)
        assert detector.out_of_time is Part.CHECK
        assert "the end of training has 0 s: use end_seconds=, for more" in detector.summary()["reason"]
    detector = LocalMinimumDetector(Schedule(every=100), tier="light", end_seconds=math.inf)
    fit([detector])
    assert detector.summary()["out_of_time"] is None
    assert detector.summary()["evidence"] in ("certificate", "second_order")


@pytest.mark.parametrize(
    ("method", "part", "evidence"),
    [("certify_minimum", "certificate", "first_order"), ("follow_descent", "descent", "certificate")],
)
def test_what_takes_too_long_at_the_end_is_named(make_trainer, monkeypatch, method, part, evidence):
    def run_out(*_):
        raise TimeLimitError

    monkeypatch.setattr(CertificateTier, method, run_out)
    detector = LocalMinimumDetector(Schedule(every=1000), end_seconds=30)
    model = MNN(6, (4,), optimizer={"name": "adam", "lr": 1e-2}, default_callbacks=False)
    make_trainer(max_epochs=3, callbacks=[detector]).fit(model, GaussianData(30, 6))
    found = detector.summary()
    assert (found["out_of_time"], found["evidence"], found["descends_to"]) == (part, evidence, None)
    assert ("the end of training has 30 s" in found["reason"]) == (part == "certificate")
    assert found["mse"] is not None


def test_an_mnn_has_no_limit_at_the_end_so_that_every_machine_gives_the_same(make_trainer, monkeypatch):
    limits = []
    finish = LocalMinimumDetector._finish_in_time
    monkeypatch.setattr(
        LocalMinimumDetector,
        "_finish_in_time",
        lambda self, *a: (finish(self, *a), limits.append(self._seconds_at_end)),
    )
    for options in ({}, {"end_seconds": 7.0}, {"tier": "standard"}):
        model = MNN(6, (4,), optimizer={"name": "adam", "lr": 1e-2}, default_callbacks=False)
        detector = LocalMinimumDetector(Schedule(every=1000), **options)
        make_trainer(max_epochs=1, callbacks=[detector]).fit(model, GaussianData(30, 6))
    assert limits[:2] == [math.inf, 7.0]
    assert limits[2] < math.inf


def test_a_scheduled_check_without_time_leaves_no_trace(fit, monkeypatch):
    """The evidence of the next check is not weaker for it."""
    checked = []

    def check(self, trainer, pl_module):
        checked.append(trainer.global_step)
        if len(checked) == 1:
            raise TimeLimitError
        return checking(self, trainer, pl_module)

    checking = LocalMinimumDetector._check_or_weaken
    monkeypatch.setattr(LocalMinimumDetector, "_check_or_weaken", check)
    monkeypatch.setattr(LocalMinimumDetector, "least_seconds", lambda *_: 0.0)
    detector = LocalMinimumDetector(EVERY, stop_training=False, tier="standard")
    fit([detector], seconds=1e6)
    assert checked == [3, 6]
    assert (detector.cost.done, detector.cost.left_out) == (1, 2)
    assert detector.summary()["evidence"] == "second_order"
    assert detector.out_of_time is None


def test_a_preparation_that_takes_too_long_is_done_later(fit, tmp_path, monkeypatch):
    prepared = []

    def prepare(self, *args):
        prepared.append(1)
        if len(prepared) == 1:
            raise TimeLimitError
        return preparing(self, *args)

    preparing = ActivationPatternRecorder.prepare
    monkeypatch.setattr(ActivationPatternRecorder, "prepare", prepare)
    recorder = MAKERS["recorder"](tmp_path, tier="standard", probe=1)
    fit([recorder], seconds=1e6)
    assert recorder.store.steps == [6]
    assert (len(prepared), recorder.cost.done, recorder.cost.left_out) == (2, 1, 2)


def test_nothing_is_begun_that_takes_longer_than_there_is_time_for(fit, monkeypatch):
    """A check takes at least as long as an epoch: half of a training of two, and a hundredth of one of a hundred."""
    checked = []
    checking = LocalMinimumDetector._check_or_weaken
    monkeypatch.setattr(
        LocalMinimumDetector, "_check_or_weaken", lambda self, *args: checked.append(1) or checking(self, *args)
    )
    detector = LocalMinimumDetector(Schedule(every=1000), tier="standard")
    fit([detector], seconds=1e6)
    assert (checked, detector.out_of_time) == ([], Part.CHECK)
    assert detector.summary()["gradient_norm"] > 0
    fit([detector], seconds=1e6, epochs=100)
    assert (checked, detector.out_of_time) == ([1], None)
    assert detector.summary()["evidence"] in ("certificate", "second_order")


@pytest.mark.parametrize("name", ["mnn", "mlp"])
def test_a_volume_of_other_weights_is_no_result(make_trainer, name):
    module, data = (
        (MNN(6, (4,), default_callbacks=False), GaussianData(30, 6)) if name == "mnn" else foreign_model(name)
    )
    monitor = AngularVolumeMonitor(Schedule(every=1000), measure=["start", "end"], end_seconds=0)
    before = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before.append(monitor.summary())

    make_trainer(max_epochs=3, callbacks=[monitor, Look()]).fit(module, data)
    found = monitor.summary()
    key = "log_volume" if name == "mnn" else "local_volume"
    assert before[0][key] is not None
    assert found[key] is None
    assert found["log_volume_lower_bound"] is None
    assert "the end of training has 0 s" in found[f"{key}_reason"]


@pytest.mark.parametrize("name", list(MAKERS))
def test_an_unknown_tier_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="tier must be one of light, standard, full, got 'heavy'"):
        MAKERS[name](tmp_path, tier="heavy")


@pytest.mark.parametrize("value", [-1, "5", math.nan])
def test_a_limit_must_be_a_number(tmp_path, value):
    for name in ("detector", "recorder", "monitor"):
        with pytest.raises(ValueError, match="end_seconds must be a number, at least 0"):
            MAKERS[name](tmp_path, end_seconds=value)


def test_the_environment_variable_sets_a_tier(monkeypatch):
    assert asked_for("light") == (("detector", "recorder", "monitor"), "light")
    assert asked_for("monitor, standard") == (("monitor",), "standard")
    with pytest.raises(ValueError, match="there can be one tier"):
        asked_for("light,full")
    monkeypatch.setenv(VARIABLE, "light")
    (callback,) = factory()
    made = [added._MAKERS[name](tier=callback.tier) for name in callback.names]
    assert [str(one.tier) for one in made] == ["light"] * 3


def test_the_time_of_one_check_is_limited_within_that_of_the_end():
    detector = LocalMinimumDetector(max_seconds=5.0)
    detector._spent = (-1, 5.0)
    assert "max_seconds=5" in detector._over_time
    detector._spent, detector._seconds_at_end = (-1, 1.0), 30.0
    assert detector._over_time == "the end of training has 30 s: use end_seconds=, for more"
    assert local_minimum_detector.Part.DESCENT == "descent"
