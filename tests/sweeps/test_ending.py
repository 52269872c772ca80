"""What the command of a sweep writes at its end."""

import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from lightning_mnn.sweeps import ending
from lightning_mnn.sweeps.ending import SweepEnd, finish
from lightning_mnn.utilities.interruption import Interrupted
from tests.children import command
from tests.tasks.test_sweep_report import write_job, write_plan
from tests.wandb_files import records_of, summary_of

SMALL = (
    *("-m", "data.num_samples=16", "data.input_dim=4", "data.num_test=20", "model.hidden_dims=[8]"),
    *("callbacks.activation_pattern_recorder=null", "callbacks.angular_volume_monitor=null", "callbacks.progress=null"),
    *("trainer.max_epochs=20", "hydra.sweep.dir=both/sweep"),
)
OFFLINE = "wandb/offline-run-*"


@pytest.fixture
def sweep(monkeypatch):
    """A sweep that has just ended in this process."""
    write_plan(Path("sweep"), "seed=1,2")
    write_job(Path("sweep/0"), ["seed=1"])
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        config = compose("config", ["hydra.sweep.dir=sweep", "logger.mode=disabled"], return_hydra_config=True)
    monkeypatch.setattr(ending, "_current", SweepEnd(config))
    return Path("sweep")


@pytest.mark.slow
def test_a_sweep_ends_with_its_report_and_one_summary_run_in_wandb(tmp_path):
    swept = ("seed=1,2", "optimizer.lr=0.01,0.02")
    said = command(tmp_path, *SMALL, *swept)
    folder = tmp_path / "both" / "sweep"
    files = {"sweep.csv", "sweep.parquet", "figure.png", "report.html"}
    assert {path.name for path in folder.iterdir()} >= files
    for words in ("jobs: 4 finished", "swept: seed, optimizer.lr", "written: both/sweep/report.html", "± "):
        assert words in said, words
    assert all((folder / str(job) / "figure.png").exists() for job in range(4))  # drawn at the end
    assert not list(folder.glob("*/wandb/offline-run-*/files/media/images"))  # and not by the jobs
    assert not list(folder.glob("*.lock"))

    (run,) = folder.glob(OFFLINE)
    assert_has_report(run, rows=4)
    described = next(record["run"] for record in records_of(run) if record["type"] == "run")
    assert described["run_group"] == "sweep both/sweep"
    assert described["job_type"] == "sweep"
    assert described["tags"] == ["quickstart", "sweep"]

    command(tmp_path, *SMALL, *swept, "resume=true")
    assert list(folder.glob(OFFLINE)) == [run]  # nothing is new
    command(tmp_path, *SMALL, "seed=1,2,3", "optimizer.lr=0.01,0.02", "resume=true")
    (again,) = folder.glob(OFFLINE)
    assert again != run
    assert again.name.rpartition("-")[2] == run.name.rpartition("-")[2]
    assert_has_report(again, rows=6)


def assert_has_report(run, rows):
    """The table and the figure are there once, whole."""
    (table,) = run.glob("files/media/table/*.table.json")
    content = json.loads(table.read_text())
    assert len(content["data"]) == rows
    summaries = [json.loads((run.parents[1] / str(job) / "summary.json").read_text()) for job in range(rows)]
    assert [row[content["columns"].index("mse")] for row in content["data"]] == [one["mse"] for one in summaries]
    shown = summary_of(run)
    assert shown["jobs_finished"] == rows
    assert shown["sweep"]["path"] == f"media/table/{table.name}"
    (figure,) = run.glob("files/media/images/figure_*.png")
    assert shown["figure"]["count"] == 1
    assert figure.read_bytes() == (run.parents[1] / "figure.png").read_bytes()
    assert len([record for record in records_of(run) if record["type"] == "history"]) == 1


def test_without_a_report_each_job_draws_its_own_figure(tmp_path):
    said = command(tmp_path, *SMALL, "seed=1", "report=false", "logger.mode=disabled")
    assert "written:" not in said
    assert {path.name for path in (tmp_path / "both" / "sweep").iterdir()} == {"0", "multirun.yaml"}
    assert (tmp_path / "both" / "sweep" / "0" / "figure.png").exists()


def test_a_failing_report_leaves_the_result_of_the_command(sweep, monkeypatch, capsys):
    monkeypatch.setattr("lightning_mnn.sweeps.report.sweep_figure", lambda folder: 1 / 0)
    finish(None)
    said = capsys.readouterr().err
    assert said == (
        "the report of the sweep is not complete (ZeroDivisionError: division by zero): lightning-mnn task=report "
        "sweep=sweep writes it\n"
    )
    finish(None)  # it ends once
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130), Interrupted(15)])
def test_an_interrupted_sweep_says_how_to_resume_and_draws_nothing(sweep, capsys, error):
    finish(error)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert shlex.split(line) == ["lightning-mnn", "-m", "seed=1,2", "hydra.sweep.dir=sweep", "resume=true"]
    assert not (sweep / "report.html").exists()


def test_a_sweep_with_a_failed_job_has_a_report(sweep, capsys):
    write_job(sweep / "1", ["seed=2"], finished=False, reason="training diverged", ended_by="divergence")
    finish(ValueError("job 1"))
    assert "failed: 1 (seed=2): training diverged" in capsys.readouterr().out
    assert "training diverged" in (sweep / "report.html").read_text()


def test_what_the_launcher_has_said_is_not_said_again(sweep, capsys):
    (sweep / "sweep.json").write_text("{}")  # of a launcher that records the command, and names unfinished jobs
    finish(ValueError("job 1"))
    said = capsys.readouterr().out
    assert "jobs: 1 finished, 1 waiting" in said
    assert "waiting: " not in said
    assert "resume" not in said
    assert "seed=1,2 hydra.sweep.dir=sweep resume=true" in (sweep / "report.html").read_text()


def test_a_refused_sweep_and_one_of_another_task_leave_nothing(tmp_path):
    command(tmp_path, "-m", "seed=1,2", "data.num_samples=0", "logger.mode=disabled", expect=1)
    command(tmp_path, "-m", "seed=1,2", "name=..", expect=1)
    assert {path.name for path in tmp_path.iterdir()} == {"out.txt", "err.txt"}
