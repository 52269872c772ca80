"""A callback that is interrupted in what it does: the run stops at that step, and does all of it when it goes on."""

from datetime import timedelta

import pytest
import torch

from lightning_mnn import MNN
from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    FirstOrderTolerances,
    LastCheckpoint,
    LocalMinimumDetector,
    PatternStore,
    Schedule,
)
from lightning_mnn.callbacks.evaluation import training_set
from lightning_mnn.callbacks.evidence import certification
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.volumes import cones
from lightning_mnn.data import GaussianData
from lightning_mnn.loggers.csv_logs import ResumableCSVLogger
from lightning_mnn.utilities.interruption import Interrupted, forget, request

EPOCHS = 12
trainers = []  # the last one is at work


@pytest.fixture
def interrupt(monkeypatch):
    """Lets a function request to stop, before it does its work, when it is first called at a step."""

    def patch(module, name, step):
        real, steps = getattr(module, name), []

        def watched(*args, **kwargs):
            (trainer,) = trainers[-1:]
            steps.append(trainer.global_step)
            if steps.count(step) == 1 and trainer.global_step == step:
                request(15)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
        return steps

    return patch


def train(make_trainer, folder, *, resume=False, **options):
    """What the callbacks found, and the weights."""
    detector = {"stop_training": False, "max_distance": 10.0}
    detector["first_order"] = FirstOrderTolerances(10.0, 1e-12)  # a certificate is soon asked for
    every = Schedule(every=4)
    callbacks = [
        LocalMinimumDetector(every, **detector | options.get("detector", {})),
        ActivationPatternRecorder(every, dirpath=folder),
        AngularVolumeMonitor(every, **options.get("monitor", {})),
    ]
    saver, table = LastCheckpoint(folder, timedelta(hours=1)), ResumableCSVLogger(folder)
    trainer = make_trainer(
        max_epochs=EPOCHS, callbacks=[*callbacks, saver], logger=table, enable_checkpointing=True, log_every_n_steps=2
    )
    trainers[:] = [trainer]
    model = MNN(16, (8,), optimizer={"name": "adam", "lr": 1e-2})
    if resume:
        table.resume(torch.load(saver.path, weights_only=True)["logged_rows"])
    trainer.fit(model, GaussianData(2, 16), ckpt_path=saver.path if resume else None, weights_only=True)
    found = [callback.summary() for callback in trainer.callbacks if isinstance(callback, ScheduledCallback)]
    return found, [weights.tolist() for weights in model.parameters()], trainer.current_epoch, trainer.global_step


CERTIFICATE = certification, "certify"
VOLUME = cones, "region_log_volume"
LOOK = training_set, "exact_shard"
AT_END = {"monitor": {"measure": ["end"]}}
AT_CERTIFICATE = {"monitor": {"measure": ["certificate", "end"]}}
STOPPING = {"detector": {"stop_training": True}, **AT_CERTIFICATE}


@pytest.mark.parametrize(
    ("place", "step", "options"),
    [
        (LOOK, 4, {}),
        (CERTIFICATE, 4, {}),
        (CERTIFICATE, EPOCHS, {}),
        (VOLUME, EPOCHS, AT_END),
        (VOLUME, 4, AT_CERTIFICATE),
        (VOLUME, EPOCHS, AT_CERTIFICATE),
        (VOLUME, 8, {"monitor": {"measure_every": 2}}),
        (VOLUME, EPOCHS, {"monitor": {"measure_every": 3}}),
        (CERTIFICATE, 4, STOPPING),
        (VOLUME, 4, STOPPING),
        (CERTIFICATE, 8, {"detector": {"polish": True}}),
        (VOLUME, EPOCHS, {"detector": {"polish": True}, **AT_END}),
        (LOOK, 0, {}),
        (VOLUME, 0, {"monitor": {"measure": ["start"]}}),
    ],
)
def test_interrupted_anywhere_it_ends_in_the_numbers_of_a_whole_run(
    place, step, options, interrupt, make_trainer, tmp_path
):
    whole = train(make_trainer, tmp_path / "whole", **options)
    steps = interrupt(*place, step)
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        train(make_trainer, cut, **options)
    assert steps[-1] == step
    forget()
    if step:
        assert torch.load(cut / "last.ckpt", weights_only=True)["global_step"] == step
    else:  # before the first step there is nothing to save
        assert not (cut / "last.ckpt").exists()
        cut = tmp_path / "anew"
    assert train(make_trainer, cut, resume=step > 0, **options) == whole
    assert (cut / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    stores = [PatternStore(folder / "patterns.zarr") for folder in (cut, tmp_path / "whole")]
    assert stores[0].steps == stores[1].steps
    for each in stores[1].steps:
        assert stores[0].attributes(each) == stores[1].attributes(each)
