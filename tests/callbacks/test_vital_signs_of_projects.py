"""In projects of any kind training goes to its end, and what was found, and what could not be, is said."""

import warnings

import pytest
import pytorch_lightning as pl
import torch

from lightning_mnn.callbacks import ActivationPatternRecorder, GradientStatistics, Schedule, scheduled
from lightning_mnn.callbacks import activation_pattern_recorder as recorder_module
from lightning_mnn.callbacks import gradient_statistics as gradients_module
from tests.foreign_models import foreign_trainer
from tests.strange_projects import PROJECTS, project

# What cannot be measured, and why.
NOT_MEASURED = {"Transformer": {"local_complexity": "the samples are not real numbers but int64"}}


def fit(name, callbacks):
    pl.seed_everything(0, verbose=False)
    module, loader = project(name)
    trainer = foreign_trainer(callbacks=callbacks)
    trainer.fit(module, loader)
    return trainer, module


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_trains_to_its_end_and_is_told_what_was_found(name, tmp_path, monkeypatch):
    said = []
    for place in (recorder_module, gradients_module, scheduled):
        monkeypatch.setattr(place, "rank_zero_info", said.append)
    plain, module = fit(name, [])
    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path)
    statistics = GradientStatistics(Schedule(every=2, unit="step"), noise_scale=True)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer, watched = fit(name, [recorder, statistics])
    assert trainer.global_step == plain.global_step > 0
    for before, after in zip(module.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    assert statistics.failure is None
    assert any(line.startswith("GradientStatistics: ") for line in said)
    assert "gradient/norm" in trainer.callback_metrics
    assert not any("Activation patterns: dormant" in str(warning.message) for warning in record)
    own = [line for line in said if line.startswith("ActivationPatternRecorder: ")]
    if recorder.failure is not None:
        assert own == [f"ActivationPatternRecorder: {recorder.missing}, because of {recorder.failure}"]
        return
    assert len(own) >= 2
    assert recorder.not_measured == NOT_MEASURED.get(name, {})
    for sign in ("dead_fraction", "dormant_fraction", "effective_rank", "local_complexity"):
        assert (f"pattern/{sign}" in trainer.callback_metrics) == (sign not in recorder.not_measured)
