"""Where a command works, and which folder resume=true finds: real runs, and records as Hydra writes them."""

import copy
import pickle
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from lightning_mnn.app import main as _  # noqa: F401 (which registers the resolvers)
from lightning_mnn.tasks._folders import record_folder, run_folder
from tests.tasks.test_resume import command

TINY = (
    "data.num_samples=12", "data.input_dim=3", "model.hidden_dims=[4]", "trainer.max_epochs=2", "logger.mode=disabled",
    "callbacks.angular_volume_monitor=null",
)  # fmt: skip
TIMES = [f"2026-01-0{day}_10-00-00-000000" for day in range(1, 8)]


def record(folder, *overrides, sweep=False):
    path = folder / "multirun.yaml" if sweep else folder / ".hydra" / "overrides.yaml"
    path.parent.mkdir(parents=True)
    OmegaConf.save({"hydra": {"overrides": {"task": list(overrides)}}} if sweep else list(overrides), path)


def found(*overrides, mode=None):
    folder = Path(run_folder("runs", overrides=overrides, resume=True, mode=mode))
    return folder.name if folder.exists() else None


def test_the_newest_folder_of_the_same_command_is_found(capsys):
    runs = Path("runs")
    assert found("seed=1") is None
    assert "resume=true: nothing in runs was begun by this command: it begins in runs/20" in capsys.readouterr().err
    for time, overrides in zip(
        TIMES, (["seed=1"], ["a=2", "+resume=true", "seed=1"], ["seed=1"], ["seed=2"]), strict=False
    ):
        record(runs / time, *overrides)
    record(runs / "mine", "seed=1")  # was begun with hydra.run.dir=runs/mine
    assert found("seed=1", "resume=true") == TIMES[2]
    assert capsys.readouterr().err == f"resume=true goes on in runs/{TIMES[2]}\n"
    assert found("resume=true", "seed=1", "a=2") == TIMES[1]
    assert found("a=2") is None
    assert found("~seed=1") is None
    assert found("seed=1", mode=RunMode.MULTIRUN) is None
    for resume in (False, None):
        assert not Path(run_folder("runs", resume=resume, overrides=["seed=1"])).exists()


def test_of_a_sweep_the_order_of_what_is_swept_counts():
    """It numbers the jobs."""
    record(Path("runs", TIMES[0]), "seed=1,2", "name=x", "width=range(3)", sweep=True)
    assert found("name=x", "seed=1,2", "resume=true", "width=range(3)") == TIMES[0]
    assert found("name=x", "width=range(3)", "seed=1,2") is None


@pytest.mark.parametrize("torn", ["", "- seed=[1,\n", "hydra:\n  overrides: {", "hydra:\n  run", "- 'a"])
def test_a_record_that_a_kill_has_torn_is_passed_over(torn, capsys):
    record(Path("runs", TIMES[0]), "seed=1")
    record(Path("runs", TIMES[1]), "seed=1", sweep=torn.startswith("h"))
    (path,) = (path for path in Path("runs", TIMES[1]).rglob("*.yaml"))
    path.write_text(torn)
    Path("runs", TIMES[2]).mkdir()
    assert found("seed=1") == TIMES[0]
    said = capsys.readouterr().err
    option = "hydra.sweep.dir" if torn.startswith("h") else "hydra.run.dir"
    if torn:
        assert f"does not say which command began it: {option}=runs/{TIMES[1]} goes on there\n" in said


def test_the_record_of_a_run_that_has_begun_to_train_stays():
    run = Path("run")
    assert record_folder("run") == ".hydra"
    record(run, "seed=1")
    assert record_folder("run") == ".hydra"
    (run / "metrics.csv").touch()
    assert record_folder("run") is None


def test_a_config_keeps_the_folder_that_it_was_given():
    record(Path("outputs/quickstart/multirun", TIMES[0]), "seed=1,2", sweep=True)
    overrides = ["seed=1,2", "resume=true", "hydra.mode=MULTIRUN"]
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("config", overrides, RunMode.MULTIRUN)
        folder = cfg.hydra.sweep.dir
        assert folder == f"outputs/quickstart/multirun/{TIMES[0]}"
        record(Path("outputs/quickstart/multirun", TIMES[1]), "seed=1,2", sweep=True)
        job = loader.load_sweep_config(cfg, ["seed=1", "resume=true", "name=other"])
        fresh = loader.load_configuration("config", overrides, RunMode.MULTIRUN)
    for same in (cfg, copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg)), job):  # noqa: S301 (its own)
        assert same.hydra.sweep.dir == folder
    assert fresh.hydra.sweep.dir != folder


def test_the_same_command_goes_on_where_it_was_and_another_begins_anew(tmp_path):
    runs = tmp_path / "outputs" / "quickstart"
    command(tmp_path, *TINY, "resume=true")
    (run,) = runs.iterdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".log"}
    assert ".hydra/overrides.yaml" in {str(path.relative_to(run)) for path in before}
    said = command(tmp_path, "resume=true", *reversed(TINY))
    assert f"resume=true goes on in {run.relative_to(tmp_path)}\n" in said
    assert "finished: there is nothing left to do" in said
    said = command(tmp_path, *TINY, "seed=2", "resume=true", f"hydra.run.dir={run}", expect=1)
    assert "was begun otherwise: config.seed is 0, not 2" in said
    assert {path: path.read_bytes() for path in before} == before
    assert list(runs.iterdir()) == [run]
    said = command(tmp_path, *TINY, "resume=true", "seed=2")
    assert "nothing in outputs/quickstart was begun by this command: it begins in outputs/quickstart/20" in said
    assert len(list(runs.iterdir())) == 2


def test_a_sweep_goes_on_in_its_own_folder(tmp_path):
    sweep = ("-m", *TINY, "seed=1,2")
    command(tmp_path, *sweep)
    (folder,) = (tmp_path / "outputs" / "quickstart" / "multirun").iterdir()
    (folder / "1" / "summary.json").unlink()
    (folder / "1" / "checkpoints" / "last.ckpt").unlink()
    said = command(tmp_path, *sweep, "resume=true")
    assert said.count(f"resume=true goes on in {folder.relative_to(tmp_path)}\n") == 1
    assert said.count("finished: there is nothing left to do") == 1
    assert [path.name for path in sorted(folder.iterdir())] == ["0", "1", "multirun.yaml"]
    assert (folder / "1" / "summary.json").exists()
    assert list(folder.parent.iterdir()) == [folder]
