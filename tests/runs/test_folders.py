"""Where a command works, and which folder resume=true finds: real runs, and records as Hydra writes them."""

import copy
import functools
import pickle
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from lightning_mnn.app import main as _  # noqa: F401 (which registers the resolvers)
from lightning_mnn.runs.folders import RunFolderCallback, record_folder, run_folder, sweep_record
from lightning_mnn.runs.resume import run_state
from lightning_mnn.sweeps.jobs import read_sweep
from tests.children import command

TINY = (
    "data.num_samples=12", "data.input_dim=3", "model.hidden_dims=[4]", "trainer.max_epochs=2", "logger.mode=disabled",
    "callbacks.angular_volume_monitor=null",
)  # fmt: skip
TIMES = [f"2026-01-0{day}_10-00-00-000000" for day in range(1, 8)]


def record(folder, *overrides, sweep=False):
    path = folder / "multirun.yaml" if sweep else folder / ".hydra" / "overrides.yaml"
    path.parent.mkdir(parents=True)
    OmegaConf.save({"hydra": {"overrides": {"task": list(overrides)}}} if sweep else list(overrides), path)


def composed(*overrides, mode=RunMode.MULTIRUN):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return GlobalHydra.instance().config_loader().load_configuration("config", list(overrides), mode)


def found(*overrides, mode=None):
    folder = Path(run_folder("runs", overrides=overrides, resume=True, mode=mode))
    return folder.name if folder.exists() else None


def test_the_newest_folder_of_the_same_command_is_found(capsys):
    runs = Path("runs")
    assert found("seed=1") is None
    assert (
        "resume=true: nothing in runs was started by this command: starting a new run in runs/20"
        in capsys.readouterr().err
    )
    for time, overrides in zip(
        TIMES, (["seed=1"], ["a=2", "+resume=true", "seed=1"], ["seed=1"], ["seed=2"]), strict=False
    ):
        record(runs / time, *overrides)
    record(runs / "mine", "seed=1")  # was begun with hydra.run.dir=runs/mine
    assert found("seed=1", "resume=true") == TIMES[2]
    assert capsys.readouterr().err == f"resume=true continues in runs/{TIMES[2]}\n"
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


def test_of_what_is_given_twice_the_order_counts():
    """The last one holds."""
    record(Path("runs", TIMES[0]), "seed=1", "a=3", "seed=2")
    record(Path("runs", TIMES[1]), "seed=1,2", "a=3", "seed=4", sweep=True)
    assert found("a=3", "seed=2", "seed=1") is None
    assert found("a=3", "seed=1", "seed=2") == TIMES[0]
    assert found("a=3", "seed=4", "seed=1,2") is None
    assert found("a=3", "seed=1,2", "seed=4") == TIMES[1]


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_a_command_with_references_is_found(mode):
    sweep = mode is RunMode.MULTIRUN
    overrides = ["data.num_samples=${data.input_dim}", "seed=1,2" if sweep else "seed=1"]
    folder = Path("outputs/quickstart", "multirun" if sweep else "", TIMES[0])
    record(folder, *overrides, sweep=sweep)
    cfg = composed(*overrides, "resume=true", f"hydra.mode={mode.name}", mode=mode)
    assert cfg.hydra["sweep" if sweep else "run"].dir == str(folder)


def test_a_run_without_hydras_record_is_told_of(capsys):
    """As of hydra.output_subdir=null."""
    Path("runs", TIMES[0]).mkdir(parents=True)
    Path("runs", TIMES[1], "checkpoints").mkdir(parents=True)
    assert found("seed=1") is None
    folder = Path("runs", TIMES[1])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{folder} does not record which command started it: resume it with hydra.run.dir={folder}"
    assert len(said) == 2


def test_a_given_folder_with_nothing_to_go_on_with_is_told_of(capsys):
    run_state(composed("resume=true", "run_dir=typo", mode=RunMode.RUN))
    assert capsys.readouterr().err == "resume=true: nothing to resume in typo: starting a new run\n"
    for silent in (["run_dir=new"], ["resume=true", f"run_dir=runs/{TIMES[0]}"]):  # of which run_folder told
        run_state(composed(*silent, mode=RunMode.RUN))
        assert not capsys.readouterr().err


@pytest.mark.parametrize("task", ["report", "dashboard", "train"])
def test_a_task_that_leaves_no_folder_says_nothing_of_it(task, capsys):
    folder = composed(f"task={task}", "resume=true", mode=RunMode.RUN).hydra.run.dir
    assert folder.startswith("outputs/quickstart/20")
    assert bool(capsys.readouterr().err) is (task == "train")


def test_a_job_that_is_gone_on_with_has_the_same_name():
    cfg = composed("seed=1,2", "hydra.sweep.subdir=${hydra.job.override_dirname}")
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        job = GlobalHydra.instance().config_loader().load_sweep_config(cfg, ["seed=1", "resume=True"])
    assert job.hydra.sweep.subdir == "seed=1"


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
        assert f"does not record which command started it: resume it with {option}=runs/{TIMES[1]}\n" in said


@pytest.mark.parametrize("mark", ["metrics.csv", "parts"])
def test_the_record_of_what_has_begun_stays(mark):
    run = Path("run")
    assert record_folder("run") == ".hydra"
    record(run, "seed=1")
    assert record_folder("run") == ".hydra"
    (run / mark).touch()
    assert record_folder("run") is None


def begin_sweep(config, *overrides):
    """What Hydra does with the record of a sweep, and then by which command the sweep is found."""
    cfg = copy.deepcopy(config)
    cfg.hydra.overrides.task = list(overrides)
    RunFolderCallback().on_multirun_start(cfg)
    Path("sweep").mkdir(exist_ok=True)
    OmegaConf.save(cfg, "sweep/multirun.yaml")
    return list(OmegaConf.load(sweep_record(Path("sweep"))).hydra.overrides.task)


def test_the_record_of_a_sweep_stays_but_where_jobs_are_added():
    begin = functools.partial(begin_sweep, composed("hydra.sweep.dir=sweep"))
    assert begin("seed=4,5") == ["seed=4,5"]
    assert begin("seed=1,2", "name=x") == ["seed=1,2", "name=x"]  # no job of the other has begun
    Path("sweep/a/0/checkpoints").mkdir(parents=True)
    for others in (["seed=2,1", "name=x"], ["seed=1", "name=x"], ["seed=1,2", "name=x", "threads=1"]):
        assert begin(*others) == ["seed=1,2", "name=x"]
    assert begin("name=x", "seed=1,2", "resume=true") == ["name=x", "seed=1,2", "resume=true"]
    assert [path.name for path in Path("sweep").glob("*.yaml*")] == ["multirun.yaml"]
    assert begin("seed=2,1,3", "name=x") == ["name=x", "seed=1,2", "resume=true"]
    assert begin("seed=1,2,3", "name=x") == ["seed=1,2,3", "name=x"]
    assert begin("seed=2") == ["seed=1,2,3", "name=x"]
    Path("sweep/multirun.yaml").write_text("hydra:\n  run")
    assert begin("seed=3") == ["seed=1,2,3", "name=x"]
    assert [job.overrides for job in read_sweep(Path("sweep")).jobs] == [(f"seed={n}", "name=x") for n in (1, 2, 3)]


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
    assert f"resume=true continues in {run.relative_to(tmp_path)}\n" in said
    assert "finished: there is nothing left to do" in said
    said = command(tmp_path, *TINY, "seed=2", "resume=true", f"hydra.run.dir={run}", expect=1)
    assert "was started with a different configuration: config.seed is 0, not 2" in said
    assert {path: path.read_bytes() for path in before} == before
    assert list(runs.iterdir()) == [run]
    said = command(tmp_path, *TINY, "resume=true", "seed=2")
    assert (
        "nothing in outputs/quickstart was started by this command: starting a new run in outputs/quickstart/20" in said
    )
    assert len(list(runs.iterdir())) == 2


def test_a_sweep_goes_on_in_its_own_folder(tmp_path):
    sweep = ("-m", *TINY, "seed=1,2", "report=false")
    command(tmp_path, *sweep)
    (folder,) = (tmp_path / "outputs" / "quickstart" / "multirun").iterdir()
    other = ("-m", *TINY, "seed=2,1", "report=false")
    said = command(tmp_path, *other, "resume=true", f"hydra.sweep.dir={folder}", expect=1)
    assert "was started with a different configuration: config.seed is 1, not 2: choose another hydra.sweep.dir" in said
    (folder / "1" / "summary.json").unlink()
    (folder / "1" / "checkpoints" / "last.ckpt").unlink()
    said = command(tmp_path, *sweep, "resume=true")
    assert said.count(f"resume=true continues in {folder.relative_to(tmp_path)}\n") == 1
    assert said.count("finished: there is nothing left to do") == 1
    assert [path.name for path in sorted(folder.iterdir())] == ["0", "1", "multirun.yaml"]
    assert (folder / "1" / "summary.json").exists()
    assert list(folder.parent.iterdir()) == [folder]
