"""What callbacks found is in findings.json where the logger writes, once, and training does not notice."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_mnn.callbacks import ActivationPatternRecorder, GradientStatistics, LocalMinimumDetector, Schedule
from lightning_mnn.findings import FINDINGS, CallbackFindings, UnknownCode
from lightning_mnn.loggers.csv_logs import ResumableCSVLogger
from tests.foreign_models import NAMESPACES, foreign_model, foreign_trainer
from tests.strange_projects import project

STEPS = Schedule(growth=2.0, unit="step")


def callbacks():
    return [ActivationPatternRecorder(), GradientStatistics(STEPS), LocalMinimumDetector(max_seconds=30)]


def fit(trainer, name="mlp", namespace="pytorch_lightning"):
    module, loader = foreign_model(name, namespace)
    trainer.fit(module, loader)
    return module


def read(folder):
    content = json.loads((Path(folder) / FINDINGS).read_text())
    return content, {found["callback"]: CallbackFindings.from_plain(found) for found in content["callbacks"]}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_folder_of_the_log_has_what_each_callback_found(tmp_path, namespace):
    logger = CSVLogger(tmp_path, "logs", version=0)
    watching = callbacks()
    watched = fit(foreign_trainer(namespace, callbacks=watching, logger=logger), namespace=namespace)
    content, found = read(logger.log_dir)
    assert {key: content[key] for key in ("format", "module", "epochs", "steps", "ended_by")} == {
        "format": 1, "module": "MLP", "epochs": 2, "steps": 6, "ended_by": None,
    }  # fmt: skip
    assert list(found) == ["ActivationPatternRecorder", "GradientStatistics", "LocalMinimumDetector"]
    for callback in watching:
        mine = found[type(callback).__name__]
        assert mine == CallbackFindings.from_plain(json.loads(json.dumps(callback.report().plain())))
        assert mine.numbers == json.loads(json.dumps(callback.summary()))
        assert mine.found
    plain = fit(foreign_trainer(namespace), namespace=namespace)
    for before, after in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(before, after)


def test_a_second_fit_replaces_what_the_first_found(tmp_path):
    trainer = foreign_trainer(callbacks=callbacks(), logger=CSVLogger(tmp_path, "logs", version=0))
    fit(trainer)
    trainer.fit_loop.max_epochs = 4
    module, loader = foreign_model("functional")
    trainer.fit(module, loader)
    content, found = read(tmp_path / "logs" / "version_0")
    assert (content["module"], content["epochs"]) == ("Functional", 4)
    assert len(found) == 3


def test_the_first_logger_and_each_table_have_it(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")]
    fit(foreign_trainer(callbacks=[GradientStatistics(STEPS)], logger=loggers))
    assert read(tmp_path / "board" / "version_0") == read(tmp_path / "table" / "version_0")


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}])
def test_nothing_is_written_where_no_files_are_wanted(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    fit(foreign_trainer(callbacks=callbacks(), **options))
    assert not [*tmp_path.rglob("*")]


def test_without_a_logger_it_is_in_a_root_folder_that_was_chosen(tmp_path):
    fit(foreign_trainer(callbacks=[GradientStatistics(STEPS)], logger=False, default_root_dir=tmp_path / "root"))
    assert list(read(tmp_path / "root")[1]) == ["GradientStatistics"]


def test_a_run_of_this_program_has_only_its_own_summary(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    fit(foreign_trainer(callbacks=[GradientStatistics(STEPS)], logger=ResumableCSVLogger(tmp_path)))
    assert not (tmp_path / FINDINGS).exists()


def test_an_error_that_ends_training_is_told_with_what_was_found_before(tmp_path):
    module, loader = foreign_model("mlp")
    step = module.training_step

    def failing(batch, batch_idx):
        if module.trainer.global_step == 4:
            raise RuntimeError("no more memory")
        return step(batch, batch_idx)

    module.training_step = failing
    trainer = foreign_trainer(callbacks=[GradientStatistics(STEPS)], logger=CSVLogger(tmp_path, "", ""))
    with pytest.raises(RuntimeError, match="no more memory"):
        trainer.fit(module, loader)
    content, found = read(tmp_path)
    assert (content["ended_by"], content["steps"]) == ("RuntimeError: no more memory", 4)
    assert found["GradientStatistics"].found


def test_what_is_not_known_has_a_code(tmp_path):
    watching = [ActivationPatternRecorder(), GradientStatistics(Schedule(every=1000, unit="step"), noise_scale=True)]
    with pytest.warns(UserWarning, match="ActivationPatternRecorder stops here"):
        foreign_trainer(callbacks=watching, logger=CSVLogger(tmp_path, "", "")).fit(*project("Flow"))
    _, found = read(tmp_path)
    (stopped,) = found["ActivationPatternRecorder"].unknown
    assert stopped.code is UnknownCode.ERROR
    assert "NoKinksError" in stopped.reason
    assert stopped.remedy
    codes = {unknown.code for unknown in found["GradientStatistics"].unknown}
    assert codes == {UnknownCode.NOT_DUE}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(
            foreign_trainer(
                callbacks=[GradientStatistics(STEPS)], logger=False, default_root_dir=tmp_path / "logs" / "deeper"
            )
        )
    assert any("findings.json cannot be written" in str(warning.message) for warning in record)
