"""The census as users run it: real processes, killed and started again."""

import csv
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from lightning_mnn.landscape import bounds
from lightning_mnn.landscape.volumes.rare_events.suboptimal import rare_census
from lightning_mnn.landscape.volumes.region_census import GaussianSamples, ensemble_census
from lightning_mnn.runs.resume import run_lock
from lightning_mnn.tasks.census import census
from tests.children import PATIENCE, all_ended, command, start, wait_for
from tests.wandb_files import summary_of

SMALL = (
    "experiment=census", "census.scans.width.sizes=[[6,2,2],[6,2,4]]", "census.scans.width.num_regions=12",
    "census.scans.width.num_screened=28", "census.scans.samples.sizes=[[4,2,3]]", "census.scans.samples.num_regions=5",
    "census.scans.samples.num_screened=0", "census.splitting.cases=[[6,2,4,0.0,20]]",
    "census.splitting.runs=3", "census.splitting.steps=2", "census.splitting.regions=2", "census.parts=3", "seed=4",
    "logger.mode=disabled",
)  # fmt: skip

pytestmark = pytest.mark.xdist_group("census")  # whose fixture takes seconds: for one process, not for each
PARTS = 3 * 2 * 3 + 2  # sizes, slopes and parts of each; data sets of one case of splitting


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def results(folder):
    """All that a census leaves, but for the seconds and the folder's name in the command."""
    summary = json.loads((folder / "summary.json").read_text())
    tables = [table(folder / name) for name in ("census.csv", "splitting.csv")]
    for rows in (*tables, [summary]):
        for row in rows:
            del row["seconds"]
    del summary["command"]
    return *tables, summary


def started(process, folder, number):
    """Wait until that many parts are finished."""
    wait_for(lambda: len(list(folder.glob("parts/*.json"))) >= number, process)


def workers(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("census") / "run"
    command(folder.parent, *SMALL, "hydra.run.dir=run", "census.processes=1")
    return folder


@pytest.mark.slow
def test_the_table_holds_what_the_landscape_counts(unbroken):
    rows, rare, summary = results(unbroken)
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        sizes = [int(row[name]) for name in ("num_samples", "input_dim", "width")]
        slope, epsilon = float(row["negative_slope"]), float(row["epsilon"])
        searched, screened = (12, 28) if row["scan"] == "width" else (5, 0)
        options = {"epsilon": epsilon, "seed": 4, "num_regions": searched}
        few = ensemble_census(*sizes, slope, **options)
        many = ensemble_census(*sizes, slope, **options | {"num_regions": searched + screened})
        for found, names in (
            (few, ("any_minimum", "global_minimum", "undecided")),
            (many, ("rank_deficient", "suboptimal_residual", "suboptimal_minimum")),
        ):
            for name in names:
                share = getattr(found, name)
                for key in ("hits", "trials", "low", "high"):
                    assert float(row[f"{name}_{key}"]) == getattr(share, key), (row, name, key)
        bound = float(bounds.suboptimal_log_volume(*sizes, epsilon, slope))
        assert float(row["log_theorem_6_suboptimal"]) == bound
        assert bool(row["log_theorem_9_global"]) == (sizes[1] * sizes[2] >= 2 * sizes[0]) == False  # noqa: E712
    for number, row in enumerate(rare):
        data = GaussianSamples(6, 2).draw(4, number)
        found = rare_census(
            *data[:2], 4, threshold=data.threshold, epsilon=0.1, particles=20, runs=3, steps=2, regions=2, seed=4
        )
        assert float(row["log_suboptimal_residual"]) == pytest.approx(found.suboptimal_residual.log_value, rel=1e-12)
        assert float(row["log_suboptimal_minimum_high"]) == pytest.approx(found.suboptimal_minimum.log_high, rel=1e-12)
    assert [row["data_set"] for row in rare] == ["0", "1"]
    assert (summary["seed"], summary["regions_searched"], summary["regions_screened"]) == (4, 58, 112)
    assert (unbroken / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_interrupted_then_killed_it_ends_in_the_files_of_an_unbroken_run(unbroken, tmp_path):
    folder = Path("outputs/quick/seed_4")
    process = start(tmp_path, *SMALL, "name=quick", "census.processes=2")
    started(process, folder, 2)
    pids = workers(process)
    assert len(pids) >= 2
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    out, err = (Path(f"{name}.txt").read_text() for name in ("out", "err"))
    assert process.exitcode == 130, err
    assert "Traceback" not in err
    wait_for(lambda: all_ended(pids))

    again = shlex.split(next(line for line in out.splitlines() if line.startswith("  lightning-mnn")))[1:]
    number = len(list(folder.glob("parts/*.json")))
    process = start(tmp_path, *again)
    started(process, folder, number + 2)
    pids = workers(process)
    process.kill()
    process.join()
    wait_for(lambda: all_ended(pids))
    assert not (folder / "summary.json").exists()

    kept = {path: path.stat().st_mtime_ns for path in folder.glob("parts/*.json")}
    assert number + 2 <= len(kept) < PARTS
    assert str(folder) in command(tmp_path, *SMALL, "name=quick", "census.processes=1")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(folder.glob("parts/*"))) == PARTS
    assert results(folder) == results(unbroken)


def settings(*overrides):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return compose("config", ["experiment=census", "run_dir=.", *overrides])


@pytest.mark.slow
def test_its_tables_figure_and_counts_go_to_one_run_of_wandb(unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)  # all parts are done
    for _ in range(2):
        command(tmp_path, *SMALL, "logger.mode=offline", "hydra.run.dir=run")
    (logged,) = folder.glob("wandb/offline-run-*")
    found = summary_of(logged)
    assert found["regions_searched"] == 58
    assert found["census"]["nrows"] == 12
    assert found["splitting"]["nrows"] == 2
    assert found["figure"]["count"] == 1


@pytest.mark.slow
def test_another_plan_is_refused(unbroken):
    before = results(unbroken)
    with pytest.raises(FileExistsError, match=r"census.max_nodes is 20000, not 3; seed is 4, not 5: choose another"):
        census(settings(*SMALL, "seed=5", "census.max_nodes=3", f"run_dir={unbroken}"))
    assert results(unbroken) == before


def test_a_folder_with_another_run_is_refused():
    Path("summary.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already contains a run"):
        census(settings())


def test_a_folder_in_which_another_process_works_is_refused():
    with run_lock(Path()), pytest.raises(FileExistsError, match="another process works in"):
        census(settings())
    assert not Path("plan.json").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("census.scans.width.sizes=[[20,5,0]]", r"width.sizes, .*\[20, 5, 0, 0.0\].*width must be at least 1"),
        ("census.scans.width.sizes=[[20,5]]", r"width.sizes must contain .*\[20, 5\]: they are \[N, d0, d1\]"),
        ("census.scans.width.sizes=[[9,3,3],[9,3,3]]", "census.scans.width.sizes must be a list of different entries"),
        ("census.scans.samples.num_regions=0", "census.scans.samples.num_regions must be at least 1"),
        ("census.scans.samples.num_screened=-1", "census.scans.samples.num_screened must be at least"),
        ("census.negative_slopes=[1.0]", "negative_slope must not be 1"),
        ("census.epsilons=[]", "census.epsilons must be a list of 1 or more"),
        ("census.epsilons=[0.1,1.0]", "census.epsilons must be a number, at least 0 and below 1"),
        ("census.labels=colours", "census.labels must be one of"),
        ("census.splitting.runs=1", "census.splitting.runs must be at least 2"),
        ("census.splitting.cases=[[20,5,8,1.0,9]]", "census.splitting.cases, .*negative_slope must not be 1"),
        ("census.splitting.cases=[[20,5,8,0.0,0]]", "census.splitting.cases: particles, .* must be at least 1"),
        ("data=mnist", "data: task=census does not use it: leave data out"),
        ("+logger.other={_target_: a.B}", "logger.other: task=census logs to W&B only: leave it out, or choose logger"),
        ("optimizer=sgd", "optimizer: task=census does not use it"),
        ("schedule=constant", "schedule: task=census does not use it"),
        ("threads=2", "threads=2: each worker process of task=census uses one thread: .* by census.processes"),
        ("census.parts=0", "census.parts must be at least 1"),
        ("census.processes=0", "census.processes must be at least 1"),
        ("seed=-1", "seed must not be negative"),
    ],
)  # fmt: skip
def test_bad_settings_are_named_before_any_work(override, message):
    with pytest.raises(ValueError, match=message):
        census(settings(override))
    assert not list(Path().iterdir())


def test_the_task_needs_its_settings():
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        cfg = compose("config", ["task=census", "run_dir=."])
    with pytest.raises(ValueError, match="experiment=census"):
        census(cfg)
