"""In projects of any kind training goes to its end, and what was found, and what could not be, is said on one page."""

import re
import warnings
from html import unescape
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    GradientStatistics,
    LocalMinimumDetector,
    Schedule,
    scheduled,
)
from lightning_mnn.callbacks import activation_pattern_recorder as recorder_module
from lightning_mnn.callbacks import gradient_statistics as gradients_module
from lightning_mnn.figures.report_page.model_page import read_model_run, write_model_page
from tests.foreign_models import foreign_trainer
from tests.strange_projects import PROJECTS, project

# What cannot be measured, and why.
NOT_MEASURED = {"Transformer": {"local_complexity": "the samples are not real numbers but int64"}}
NOT_RECORDED = {
    "Flow": "NoKinksError",
    "GRU": "NoKinksError",
    "PINN": "NoKinksError",
    "GNN": "which numbers of the layer F.relu belong to which sample is unknown",
}
# Where the samples are those of the first batch, or what training calls the forward with.
LAYERS = {"GAN": ["generator.1"], "DQN": ["net.1"]}
SECTIONS = ("What was found", "What could not be found", "Pictures", "Numbers")


def fit(name, callbacks, **options):
    pl.seed_everything(0, verbose=False)
    module, loader = project(name)
    trainer = foreign_trainer(callbacks=callbacks, **options)
    trainer.fit(module, loader)
    return trainer, module


def text_of(html):
    """The text of a page, without its tags."""
    return unescape(re.sub(r"<[^>]*>", "", html))


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_trains_to_its_end_and_is_told_what_was_found(name, tmp_path, monkeypatch):
    said = []
    for place in (recorder_module, gradients_module, scheduled):
        monkeypatch.setattr(place, "rank_zero_info", said.append)
    plain, module = fit(name, [])
    recorder = ActivationPatternRecorder(Schedule(every=1))
    statistics = GradientStatistics(Schedule(every=2, unit="step"), noise_scale=True)
    detector = LocalMinimumDetector(stop_training=False)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        logger = CSVLogger(tmp_path, "", "")
        trainer, watched = fit(name, [recorder, statistics, detector], logger=logger)
    assert trainer.global_step == plain.global_step > 0
    for before, after in zip(module.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    assert statistics.failure is None
    assert any(line.startswith("GradientStatistics: ") for line in said)
    assert "gradient/norm" in trainer.callback_metrics
    assert not any("Activation patterns: dormant" in str(warning.message) for warning in record)
    own = [line for line in said if line.startswith("ActivationPatternRecorder: ")]
    if name in NOT_RECORDED:
        assert NOT_RECORDED[name] in recorder.failure
        assert own == [f"ActivationPatternRecorder: {recorder.missing}, because of {recorder.failure}"]
    else:
        assert recorder.failure is None
        assert list(recorder.layers) == LAYERS.get(name, list(recorder.layers))
        assert len(own) >= 2
        assert recorder.not_measured == NOT_MEASURED.get(name, {})
        for sign in ("dead_fraction", "dormant_fraction", "effective_rank", "local_complexity"):
            assert (f"pattern/{sign}" in trainer.callback_metrics) == (sign not in recorder.not_measured)
    check_page(tmp_path, [recorder, statistics, detector])


def check_page(folder, callbacks):
    """The page begins with all that was found, then has all that was not, in the words of the callbacks."""
    html = write_model_page(read_model_run(folder)).read_text(encoding="utf-8")
    places = [html.index(f"<h2>{title}</h2>") for title in SECTIONS]
    assert places == sorted(places)
    found, unknown, _ = (text_of(html[a:b]) for a, b in pairwise(places))
    for callback in callbacks:
        report = callback.report()
        assert report.found or report.unknown
        for fact in report.found:
            assert squeezed(fact.text) in squeezed(found)
        for one in report.unknown:
            assert one.what in unknown
            assert squeezed(one.reason) in squeezed(unknown)
    assert "AngularVolumeMonitor was not in the Trainer" in unknown
    assert html.count("data:image/png;base64,") >= 3
    assert "<script" not in html


def squeezed(text):
    """A text without what folding its end adds or drops."""
    return re.sub(r"[\s;]|more", "", text)
