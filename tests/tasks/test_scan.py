"""The scan as users run it, and its numbers beside those of single networks."""

import csv
import json
import logging
import os
import shutil
import signal
import statistics
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from lightning_mnn import MNN
from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.callbacks.evidence import certificate
from lightning_mnn.data import GaussianData
from lightning_mnn.tasks.scan import Fit, Size, _sizes, scan, size_summary
from lightning_mnn.utilities.errors import DivergenceError
from tests.children import PATIENCE, all_ended, command, start, wait_for
from tests.wandb_files import summary_of

EPOCHS = 30
SMALL = (
    "experiment=figure_5_1", "scan.input_dims=[5,6]", "scan.ratios=[0.2,0.45]", f"scan.max_epochs={EPOCHS}",
    "replicas=3", "scan.replicas_per_part=2", "seed=4", "logger.mode=disabled",
)  # fmt: skip

pytestmark = pytest.mark.xdist_group("scan")  # whose fixture takes seconds: for one process, not for each
PARTS = 2 * 2 * 2 * 2  # layers, widths, ratios, parts of each
ADAM, TAIL = {"name": "adam", "lr": 0.01}, {"name": "exponential_tail", "hold": 0.5}


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def results(folder):
    """All that a scan leaves, but for the seconds and the command."""
    summary = json.loads((folder / "summary.json").read_text())
    for node in (summary, *summary["sizes"]):
        del node["seconds"]
    del summary["command"]
    return table(folder / "scan.csv"), summary


def alone(row, trainer):
    """What a single network with the row's sizes and seed ends in."""
    widths = [int(width) for width in row["hidden_dims"].split("x")]
    d0, n, seed = (int(row[name]) for name in ("input_dim", "num_samples", "seed"))
    model = MNN(d0, widths, optimizer=ADAM, schedule=TAIL, threshold=0.0, seed=seed, default_callbacks=False)
    detector = LocalMinimumDetector(Schedule(every=EPOCHS), stop_training=False)
    trainer(max_epochs=EPOCHS, callbacks=[detector]).fit(model, GaussianData(n, d0, seed=seed))
    return detector.summary()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan") / "run"
    said = command(folder.parent, *SMALL, "hydra.run.dir=run", "scan.processes=1")
    assert "Warning" not in said, said
    assert "treespec" not in said, said
    return folder


@pytest.mark.slow
def test_the_table_holds_what_single_networks_end_in(unbroken, make_trainer):
    rows, summary = results(unbroken)
    sizes = [(r["hidden_dims"], r["num_samples"], r["parameters"]) for r in rows[::3]]
    assert sizes == [
        ("5", "6", "30"), ("5", "13", "30"), ("6", "8", "42"), ("6", "18", "42"),
        ("5x5", "11", "55"), ("5x5", "24", "55"), ("6x6", "15", "78"), ("6x6", "35", "78"),
    ]  # fmt: skip
    assert [(row["replica"], row["seed"]) for row in rows[:3]] == [("0", "4"), ("1", "5"), ("2", "6")]
    assert {row["epochs"] for row in rows} == {str(EPOCHS)}
    for row in (rows[1], rows[2], rows[-1]):
        found = alone(row, make_trainer)
        for name in ("mse", "mce", "min_preactivation", "stationarity"):
            assert float(row[name]) == pytest.approx(found[name], rel=1e-10), name
        assert row["wrong"] == str(found["wrong"])
        assert row["kind"] == found["kind"]
    for size, first in zip(summary["sizes"], range(0, len(rows), 3), strict=True):
        errors = [float(row["mce"]) for row in rows[first : first + 3]]
        assert size["mce_mean"] == pytest.approx(statistics.fmean(errors))
        assert size["mce_std"] == pytest.approx(statistics.stdev(errors))
        assert sum(size["kinds"].values()) == size["replicas"] == 3
    assert summary["networks"] == len(rows) == 24
    assert (unbroken / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_begun_with_fewer_sizes_and_interrupted_it_ends_in_the_files_of_an_unbroken_run(unbroken, tmp_path):
    folder = Path("outputs/quick/seed_4")
    process = start(tmp_path, *SMALL, "name=quick", "scan.processes=2", "scan.input_dims=[6]", "scan.figure=minima")
    wait_for(lambda: list(folder.glob("parts/*.json")), process)
    pids = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(pids) >= 2
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    out, err = (Path(f"{name}.txt").read_text() for name in ("out", "err"))
    assert process.exitcode == 130, err
    assert "Traceback" not in err
    assert "Resume with\n  lightning-mnn experiment=figure_5_1" in out
    wait_for(lambda: all_ended(pids))

    kept = {path: path.stat().st_mtime_ns for path in folder.glob("parts/*.json")}
    assert 1 <= len(kept) < PARTS // 2
    said = command(tmp_path, *SMALL, "name=quick", "scan.processes=1")
    assert str(folder) in said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(folder.glob("parts/*"))) == PARTS
    assert results(folder) == results(unbroken)


@pytest.mark.slow
def test_its_table_figure_and_counts_go_to_one_run_of_wandb(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")  # all parts are done
    for figure in ("error", "error", "minima"):
        command(tmp_path, *SMALL, "logger.mode=offline", f"scan.figure={figure}", "hydra.run.dir=run")
    (logged,) = Path("run").glob("wandb/offline-run-*")
    found = summary_of(logged)
    assert found["networks"] == found["scan"]["nrows"] == 24
    assert found["figure"]["count"] == 1


def settings(*overrides):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return compose("config", ["experiment=figure_5_1", "run_dir=.", *overrides])


@pytest.mark.slow
def test_another_plan_is_refused(unbroken):
    before = results(unbroken)
    with pytest.raises(FileExistsError, match=r"optimizer.lr is 0.01, not 0.1; scan.max_epochs is 30, not 3: choose"):
        scan(settings(*SMALL, "optimizer.lr=0.1", "scan.max_epochs=3", f"run_dir={unbroken}"))
    assert results(unbroken) == before


def test_a_folder_with_another_run_is_refused():
    Path("summary.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already contains a run"):
        scan(settings())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scan.input_dims=[]", "scan.input_dims must be a list of 1 or more different widths"),
        ("scan.input_dims=[0]", "scan.input_dims must be at least 1"),
        ("scan.input_dims=[5,5]", "scan.input_dims must be a list .* different"),
        ("scan.hidden_layers=[3]", "scan.hidden_layers must be"),
        ("data=mnist", "data: task=scan does not use it: leave data out"),
        ("model=mnn", "model: task=scan does not use it"),
        ("trainer=cpu", "trainer: task=scan does not use it"),
        ("callbacks=mnn", "callbacks: task=scan does not use it"),
        ("+logger.other={_target_: a.B}", "logger.other: task=scan logs to W&B only: leave it out"),
        ("threads=4", "threads=4: each worker process of task=scan uses one thread: .* by scan.processes"),
        ("scan.ratios=[-1]", "scan.ratios must be a number, above 0"),
        ("scan.ratios=[0.001]", "scan.ratios must not contain 0.001, which gives no sample at d = 10"),
        ("scan.ratios=[0.5,0.501]", "scan.ratios must not contain 0.501, which gives N = 55 a second time at d = 10"),
        ("scan.samples_per=cube", "scan.samples_per must be one of"),
        ("scan.labels=teacher", "scan.labels must be one of"),
        ("scan.figure=map", "scan.figure must be one of"),
        ("scan.max_epochs=0", "scan.max_epochs must be at least 1"),
        ("scan.replicas_per_part=0", "scan.replicas_per_part must be at least 1"),
        ("scan.processes=0", "scan.processes must be at least 1"),
        ("scan.negative_slope=1", "negative_slope must be a real number other than 1"),
        ("replicas=0", "replicas must be at least 1"),
        ("dtype=float16", "dtype must be one of"),
        ("optimizer=lbfgs", "replicas must be 1 with the optimizer lbfgs"),
        ("optimizer.name=newton", "optimizer.name must be one of"),
        ("schedule.hold=2", "hold must be a number"),
    ],
)  # fmt: skip
def test_bad_settings_are_named_before_any_work(override, message):
    with pytest.raises(ValueError, match=message):
        scan(settings(override))
    assert not list(Path().iterdir())


def test_the_task_needs_its_settings():
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        cfg = compose("config", ["task=scan", "run_dir=."])
    with pytest.raises(ValueError, match=r"choose experiment=figure_5_1\|figure_5_2"):
        scan(cfg)


def test_sizes_are_exact_as_the_ratios_are_written():
    squares = {"hidden_layers": [1], "input_dims": [10, 20, 40, 60, 80, 100], "samples_per": "square", "ratios": [0.2]}
    assert [size.num_samples for size in _sizes(squares)] == [20, 80, 320, 720, 1280, 2000]
    floor = squares | {"input_dims": [10], "ratios": [0.29]}
    assert [size.num_samples for size in _sizes(floor)] == [29]  # 0.29 · 100 is 28.999… in floats
    both = squares | {"hidden_layers": [1, 2], "input_dims": [10], "samples_per": "parameter", "ratios": [1.0]}
    assert [(size.num_samples, size.hidden_dims) for size in _sizes(both)] == [(110, (10,)), (210, (10, 10))]


@pytest.fixture
def _own_logging():
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("_own_logging")
def test_divergence_ends_with_the_size_and_the_seeds():
    sgd = {"name": "sgd", "lr": 1e4}
    fit = Fit(Size(8, 5, 1), 2, 3, 4, sgd, TAIL, "float64", "plus_minus", 0.0, 60)
    with pytest.raises(DivergenceError, match=r"N = 8, d = 5, 1 hidden .* seeds from 6 on: .* Lower the learning rate"):
        fit.train()


@pytest.mark.usefixtures("_own_logging")
def test_one_replica_gives_a_row_of_plain_values_even_where_all_labels_are_alike():
    (row,) = Fit(Size(1, 4, 1), 2, 1, 4, ADAM, TAIL, "float64", "zero_one", 0.1, 5).train()["rows"]
    assert (row["replica"], row["seed"], row["hidden_dims"], row["epochs"]) == (2, 6, "4", 5)
    assert isinstance(row["mse"], float)
    assert isinstance(row["reason"], str)
    summary = size_summary(Size(1, 4, 1), [row], 1.0)
    assert summary["mce_std"] is None
    assert summary["mse_geometric_mean"] == pytest.approx(row["mse"])


@pytest.mark.usefixtures("_own_logging")
def test_two_hidden_layers_are_certified():
    rows = Fit(Size(3, 6, 2), 0, 2, 0, ADAM, TAIL, "float64", "plus_minus", 0.0, 1500).train()["rows"]
    assert all(row["zero_error"] and row["kind"].endswith("minimum") for row in rows)


@pytest.mark.usefixtures("_own_logging")
def test_what_two_hidden_layers_pass_is_not_called_a_minimum(monkeypatch):
    monkeypatch.setattr(certificate, "MAX_CERTIFICATE_WORK", 1)  # as with many weights
    fit = Fit(Size(3, 6, 2), 0, 2, 0, ADAM, TAIL, "float64", "plus_minus", 0.0, 1500)
    rows = fit.train()["rows"]
    assert max(row["mse"] for row in rows) < 1e-20
    assert {row["kind"] for row in rows} == {None}
    assert all("necessary conditions only" in row["reason"] for row in rows)
