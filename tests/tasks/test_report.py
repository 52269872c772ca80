"""Figures drawn again from saved results, and the table of the runs below a folder."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from lightning_mnn.findings import CallbackFindings, Fact
from lightning_mnn.tasks.report import report
from tests.children import command
from tests.scans import write_scan

REFERENCE = Path(__file__).parents[2] / "outputs" / "reference"
RUN = {
    "mse": 0.01, "mce": 0.002, "wrong": 40, "kind": "not_stationary", "input_dim": 784, "hidden_dims": [89],
    "num_samples": 70000, "negative_slope": 0.0, "replicas": 1, "seconds": 12.5, "seed": 3,
}  # fmt: skip


def settings(folder, *overrides):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return compose("config", ["task=report", "run_dir=.", f"folder={folder}", *overrides])


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def write_run(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(RUN | changes))
    (folder / "metrics.csv").write_text("step,train/mse\n0,0.5\n9,0.1\n")


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in ("figure.png", folder.name)}


def test_the_command_draws_anew_and_leaves_nothing_else():
    folder = Path("results/scan")
    folder.mkdir(parents=True)
    write_scan(folder, "minima")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("the scan's own")
    before = tree(folder)
    assert "drawn again: results/scan/figure.png" in command(Path.cwd(), "task=report", f"folder={folder}")
    assert is_png(folder / "figure.png")
    assert tree(folder) == before
    assert {path.name for path in Path().iterdir()} == {"results", "out.txt", "err.txt"}


@pytest.mark.parametrize("figure", ["error", "minima"])
def test_a_scan_is_drawn_as_it_was_asked_for(figure, capsys):
    write_scan(Path(), figure)
    report(settings("."))
    assert is_png(Path("figure.png"))
    assert "figure.png" in capsys.readouterr().out


def test_a_census_and_a_run_are_drawn():
    shutil.copytree(REFERENCE / "census", "census")
    Path("census/figure.png").unlink()
    write_run(Path("run"))
    for folder in ("census", "run"):
        report(settings(folder))
        assert is_png(Path(folder, "figure.png"))


@pytest.mark.parametrize("with_hydra", [False, True])
def test_a_run_of_another_program_is_drawn(with_hydra, capsys):
    Path("version_0/.hydra").mkdir(parents=True)
    if with_hydra:
        nodes = {"sweep": {}, "sweeper": {}, "overrides": {}}
        sources = [
            {"path": "/their/conf", "provider": "main"},
            {"path": "lightning_mnn.conf", "provider": "searchpath"},
        ]
        hydra = {"hydra": nodes | {"runtime": {"config_sources": sources}}}
        Path("version_0/.hydra/hydra.yaml").write_text(json.dumps(hydra) + "\n")
    Path("version_0/metrics.csv").write_text("epoch,step,pattern/net.1/flips,train_loss\n0,4,7,0.5\n")
    report(settings("version_0"))
    assert is_png(Path("version_0/figure.png"))
    said = capsys.readouterr().out
    assert "drawn: version_0/figure.png" in said
    assert "written: version_0/report.html" in said
    assert "There is no findings.json here" in Path("version_0/report.html").read_text(encoding="utf-8")


def test_what_another_program_s_callbacks_found_is_printed_and_on_its_page(capsys):
    found = CallbackFindings("GradientStatistics", (Fact("nothing_unusual", "nothing out of the ordinary"),))
    Path("version_0").mkdir()
    Path("version_0/findings.json").write_text(json.dumps({"module": "Net", "callbacks": [found.plain()]}))
    Path("version_0/metrics.csv").write_text("epoch,step,train_loss\n0,4,0.5\n")
    report(settings("version_0"))
    assert "GradientStatistics: nothing out of the ordinary" in capsys.readouterr().out
    assert "nothing out of the ordinary" in Path("version_0/report.html").read_text(encoding="utf-8")
    assert not Path("version_0/figure.png").exists()  # nothing that it shows was logged


def test_runs_below_a_folder_make_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    folder = Path("outputs/table_1")
    write_run(folder / "mnist" / "a")
    sizes = {"input_dim": 10, "hidden_dims": [4, 3], "num_samples": 110}
    write_run(
        folder / "gaussian", replicas=2, mce=[0.0, 0.5], wrong=[0, 55], mse=[0.0, 0.3], kind=[None, "saddle"], **sizes
    )
    write_run(folder / "teacher", mce=None, wrong=None)
    (folder / "unfinished").mkdir()
    (folder / "census").mkdir()
    (folder / "census" / "summary.json").write_text('{"regions_searched": 3}')
    report(settings(folder))
    with (folder / "table_1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data"], row["run"], row["seed"]) for row in rows] == [
        ("gaussian", "gaussian", "3"), ("gaussian", "gaussian", "4"), ("mnist", "mnist/a", "3"),
        ("teacher", "teacher", "3"),
    ]  # fmt: skip
    assert float(rows[0]["parameters_per_sample"]) == (10 * 4 + 4 * 3 + 3) / 110
    assert float(rows[2]["parameters_per_sample"]) == (784 * 89 + 89) / 70000
    assert [row["mce_percent"] for row in rows] == ["0.0", "50.0", "0.2", ""]
    assert [(row["d1"], row["d2"], row["kind"]) for row in rows[1:3]] == [("4", "3", "saddle"), ("89", "", RUN["kind"])]
    said = capsys.readouterr().out
    for words in ("mnist/a", "0.2", "70,000", "0.998", "not stationary", "not classified", "table_1.csv"):
        assert words in said, words
    assert not list(folder.rglob("figure.png"))


def test_unfinished_runs_are_left_out_and_named(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    folder = Path("outputs/table_1")
    nothing = dict.fromkeys(("mse", "mce", "wrong", "num_samples"))
    write_run(folder / "cifar10" / "diverged", finished=False)
    write_run(folder / "imagenet64" / "before_its_data", finished=False, **nothing)
    write_run(folder / "imagenet64" / "older", **nothing)
    with pytest.raises(FileNotFoundError, match=r"no finished training run, only cifar10/diverged, .*resume=true"):
        report(settings(folder))
    assert not (folder / "table_1.csv").exists()
    write_run(folder / "mnist" / "a", finished=True)
    write_run(folder / "mnist" / "b")  # of before summaries said so
    report(settings(folder))
    with (folder / "table_1.csv").open(newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["mnist/a", "mnist/b"]
    left_out = "not finished: cifar10/diverged, imagenet64/before_its_data, imagenet64/older\n"
    assert left_out in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prepare", "folder", "message"),
    [
        (None, "null", "give folder=DIR"),
        (None, "nowhere", "folder=nowhere: there is no such folder"),
        (None, ".", "contains no scan.csv, census.csv, interpolators.csv or metrics.csv .* no training runs"),
        ("version_0/metrics.csv", ".", "contains log folders: .* folder=.*version_0"),
        ("csv/version_3/metrics.csv", ".", "contains log folders: .* folder=.*csv/version_3"),
        ("events.out.tfevents.1", ".", "only a log of TensorBoard.*add a CSVLogger"),
        ("plan.json", ".", "an experiment that is not finished: run its command again"),
        ("version_0/findings.json", ".", "contains log folders: .* folder=.*version_0"),
        ("scan.csv", ".", "contains no summary.json, .*resume=true"),
    ],
)
def test_what_cannot_be_drawn_is_said(prepare, folder, message):
    if prepare:
        Path(prepare).parent.mkdir(exist_ok=True, parents=True)
        Path(prepare).write_text("{}")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        report(settings(folder))
    assert not Path("figure.png").exists()
    assert not Path("table_1.csv").exists()
