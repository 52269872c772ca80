"""The experiment on random interpolators as users run it: killed and started again, with and without W&B."""

import csv
import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from lightning_mnn.landscape import Architecture, random_interpolators
from lightning_mnn.runs.resume import run_lock
from lightning_mnn.tasks.interpolators import Problem, case_means, interpolators, mean_with_interval
from tests.children import command, start, wait_for
from tests.wandb_files import summary_of

SMALL = (
    "experiment=interpolators", "interpolators.num_samples=[4,6]", "interpolators.input_dim=2",
    "interpolators.networks=[[3],[]]", "interpolators.label_noise=[0.0,0.2]", "interpolators.num_test=20",
    "interpolators.data_sets=2", "interpolators.particles=10", "interpolators.runs=3", "interpolators.steps=1",
    "interpolators.replicas=3", "interpolators.max_steps=40", "seed=4",
)  # fmt: skip
SILENT = (*SMALL, "logger.mode=disabled")
CASES = 2 * 2 * 2  # networks, noises and sizes
PARTS = CASES * 2 * 4  # data sets, and random networks beside three optimisers

pytestmark = pytest.mark.xdist_group("interpolators")


def results(folder):
    """All that the experiment leaves, but for the seconds and the folder's name in the command."""
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "interpolators.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in (*rows, summary):
        del row["seconds"]
    del summary["command"]
    return rows, summary


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpolators") / "run"
    command(folder.parent, *SILENT, "hydra.run.dir=run", "interpolators.processes=1")
    return folder


@pytest.mark.slow
def test_the_table_holds_what_the_landscape_estimates(unbroken):
    rows, summary = results(unbroken)
    assert len(rows) == CASES * 2
    for row in rows:
        widths = () if row["hidden_dims"] == "none" else (3,)
        network, seed = Architecture(2, widths), 4 + int(row["data_set"])
        problem = Problem(int(row["num_samples"]), network, float(row["label_noise"]), (), 20, seed)
        x, y, test, labels = problem.draw()
        found = random_interpolators(
            x, y, widths, threshold=0.0, test_inputs=test, test_targets=labels, particles=10, runs=3, steps=1, seed=seed
        )
        if found.test_error is None:
            assert row["log_probability"] == row["random_test_error"] == ""
        else:
            assert float(row["log_probability"]) == pytest.approx(found.probability.log_value, rel=1e-9)
            assert float(row["random_test_error_high"]) == pytest.approx(found.test_error.high, rel=1e-9)
            assert float(row["random_test_error_50_percent"]) == pytest.approx(found.quantiles[0.5])
        for name in ("gradient_descent", "sgd", "adam"):
            reached = int(row[f"{name}_interpolating"])
            assert 0 <= reached <= int(row[f"{name}_networks"]) == 3
            assert (row[f"{name}_test_error"] == "") == (reached == 0)
    assert [case["num_samples"] for case in summary["cases"]] == [4, 6] * 4
    assert all(case["data_sets"] == 2 for case in summary["cases"])
    assert not (unbroken / "wandb").exists()
    assert (unbroken / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_killed_and_run_again_it_ends_in_the_files_of_an_unbroken_run(unbroken, tmp_path):
    folder = Path("outputs/quick/seed_4")
    process = start(tmp_path, *SILENT, "name=quick", "interpolators.processes=2")
    wait_for(lambda: len(list(folder.glob("parts/*.json"))) >= 3, process)
    process.kill()
    process.join()
    assert not (folder / "summary.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("parts/*.json")}
    assert 3 <= len(kept) < PARTS
    assert str(folder) in command(tmp_path, *SILENT, "name=quick", "interpolators.processes=2")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(folder.glob("parts/*"))) == PARTS
    assert results(folder) == results(unbroken)


@pytest.mark.slow
def test_more_data_sets_are_added_to_a_folder_and_go_to_the_same_run_of_wandb(tmp_path):
    few = (*SMALL, "interpolators.networks=[[]]", "interpolators.label_noise=[0.0]", "hydra.run.dir=run")
    command(tmp_path, *few, "interpolators.data_sets=1")
    folder = Path("run")
    (first,) = folder.glob("wandb/offline-run-*")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("parts/*.json")}
    command(tmp_path, *few, "interpolators.data_sets=1")
    assert list(folder.glob("wandb/offline-run-*")) == [first]  # the same table is not logged again
    command(tmp_path, *few)
    (second,) = folder.glob("wandb/offline-run-*")
    assert first.name.split("-")[-1] == second.name.split("-")[-1]  # its id
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(folder.glob("parts/*"))) == 2 * len(before)
    found = summary_of(second)
    assert {"seconds", "cases", "figure", "interpolators"} <= found.keys()
    assert len(list(second.glob("files/media/table/*"))) == 1
    assert len(list(second.glob("files/media/images/*"))) == 1


def test_data_of_a_seed_share_teacher_and_test_set_over_sizes():
    network = Architecture(3, (4,))
    small, large = (Problem(size, network, 0.0, (), 500, 7).draw() for size in (10, 200))
    torch.testing.assert_close(small[2:], large[2:])
    weights = torch.linalg.lstsq(large[2], large[3]).solution
    assert float(((large[0] @ weights).sign() == large[1]).double().mean()) > 0.9
    noisy = Problem(200, network, 0.1, (), 500, 7).draw()
    torch.testing.assert_close(noisy[0], large[0])
    assert int((noisy[1] != large[1]).sum()) == 20
    torch.testing.assert_close(noisy[3], large[3])
    coin = Problem(200, network, 0.0, None, 500, 7).draw()
    assert 0.3 < float((coin[1] > 0).double().mean()) < 0.7
    wide = Problem(200, network, 0.0, (3,), 500, 7).draw()
    assert set(wide[1].tolist()) <= {-1.0, 1.0}


def test_means_over_data_sets_are_paired_and_count_what_is_left_out():
    base = {"hidden_dims": "3", "label_noise": 0.0, "num_samples": 4, "input_dim": 2, "weights": 9}
    values = [(-3.0, 0.2, 0.3, 5), (-5.0, 0.4, 0.45, 5), (None, None, None, 0)]
    rows = [
        {
            **base, "log_probability": log, "random_test_error": random, "adam_test_error": adam,
            "adam_networks": 5, "adam_interpolating": count,
        }
        for log, random, adam, count in values
    ]  # fmt: skip
    (case,) = case_means(rows, ["adam"])
    assert (case["log_probability"], case["not_reached"], case["data_sets"]) == (-4.0, 1, 3)
    assert case["random_test_error"] == pytest.approx(0.3)
    assert case["adam_minus_random"] == pytest.approx(0.075)
    assert case["adam_minus_random_high"] == pytest.approx(0.075 + 12.706 * 0.025, abs=1e-4)
    assert (case["adam_networks"], case["adam_interpolating"]) == (15, 10)
    assert case["random_test_error_high"] == 1  # a mean of fractions is one
    assert mean_with_interval("x", []) == {"x": None, "x_low": None, "x_high": None}


def settings(*overrides):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return compose("config", ["experiment=interpolators", "run_dir=.", *overrides])


@pytest.mark.slow
def test_another_plan_is_refused(unbroken):
    with pytest.raises(FileExistsError, match=r"interpolators.particles is 10, not 11: choose another"):
        interpolators(settings(*SILENT, "interpolators.particles=11", f"run_dir={unbroken}"))


def test_a_folder_in_which_another_process_works_is_refused():
    with run_lock(Path()), pytest.raises(FileExistsError, match="another process works in"):
        interpolators(settings())
    assert not Path("plan.json").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("interpolators.num_samples=[0]", "interpolators.num_samples must be at least 1"),
        ("interpolators.num_samples=[]", "interpolators.num_samples must be a list of 1 or more"),
        ("interpolators.networks=[3]", r"interpolators.networks must be a list of widths, got 3: such as \[10\]"),
        ("interpolators.networks=[[0]]", "interpolators.networks must be at least 1"),
        ("interpolators.teacher=3", "interpolators.teacher must be a list of widths"),
        ("interpolators.label_noise=[1.5]", "interpolators.label_noise must be a number, at least 0 and at most 1"),
        ("interpolators.runs=1", "interpolators.runs must be at least 2"),
        ("interpolators.data_sets=0", "interpolators.data_sets must be at least 1"),
        ("interpolators.trained.adam.lr=0", "interpolators.trained.adam.lr must be a number, above 0"),
        ("interpolators.trained.adam.optimizer=muon", "interpolators.trained.adam.optimizer must be one of sgd, adam"),
        ("+interpolators.trained.x={lr: 1}", "interpolators.trained.x must have the keys optimizer, lr, batch_size"),
        ("interpolators.trained.sgd.batch_size=0", "interpolators.trained.sgd.batch_size must be at least 1"),
        ("interpolators.processes=0", "interpolators.processes must be at least 1"),
        ("optimizer=sgd", "optimizer: task=interpolators does not use it"),
        ("data=mnist", "data: task=interpolators does not use it: leave data out"),
        ("+logger.other={_target_: a.B}", "logger.other: task=interpolators logs to W&B only: leave it out"),
        ("seed=-1", "seed must not be negative"),
    ],
)  # fmt: skip
def test_bad_settings_are_named_before_any_work(override, message):
    with pytest.raises(ValueError, match=message):
        interpolators(settings(override))
    assert not list(Path().iterdir())


def test_the_task_needs_its_settings():
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        cfg = compose("config", ["task=interpolators", "run_dir=."])
    with pytest.raises(ValueError, match="experiment=interpolators"):
        interpolators(cfg)
