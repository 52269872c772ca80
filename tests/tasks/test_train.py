"""The command as users run it: real processes, real folders, real offline W&B runs."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

from lightning_mnn import MNN
from lightning_mnn.callbacks import PatternStore
from lightning_mnn.config.build import build
from lightning_mnn.figures import read_metrics
from lightning_mnn.utilities.files import write_json
from tests import children, wandb_files
from tests.documented import undocumented_keys, undocumented_names

SUMMARY = {
    "mse", "mce", "wrong", "kind", "zero_error", "distance", "margin_ratio", "min_preactivation", "kinks", "rank",
    "rank_cap", "log_volume", "log_volume_standard_error", "log_volume_lower_bound", "learning_coefficient",
    "regions_visited", "freeze_step", "weights_freeze_step", "findings", "epochs",
    "steps", "seconds", "num_samples", "input_dim", "hidden_dims", "negative_slope", "replicas", "seed", "processes",
    "visits", "reason_code", "advice", "descends_to", "descends_to_mse", "descends_to_distance",
    "descends_to_zero_error", "out_of_time",
}  # fmt: skip
FOLDER = {"summary.json", "metrics.csv", "figure.png", "patterns.zarr", "checkpoints", ".hydra", "wandb"}
SMALL = ("data.num_samples=20", "data.input_dim=6", "model.hidden_dims=[8]", "trainer.accelerator=cpu")


def command(*arguments, expect=0):
    return children.command(Path.cwd(), *arguments, expect=expect)


def program(*arguments):
    """A Python of its own, as users start it."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mnn", *arguments],
        capture_output=True,
        text=True,
        timeout=children.PATIENCE,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def only(pattern):
    (found,) = Path().glob(pattern)
    return found


def summary_of(folder):
    text = (folder / "summary.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def wandb_summary(folder):
    """The summary of an offline run, read back by W&B's own reader; of metrics the last value."""
    run = only(f"{folder}/wandb/offline-run-*/run-*.wandb")
    return {
        key: value["last"] if isinstance(value, dict) and "last" in value else value
        for key, value in wandb_files.summary_of(run).items()
    }


def test_quickstart_leaves_a_complete_run_folder():
    said = program()
    folder = only("outputs/quickstart/*")
    assert {p.name for p in folder.iterdir()} >= FOLDER
    summary = summary_of(folder)
    assert summary.keys() >= SUMMARY
    assert undocumented_keys("summary.json", summary) == []
    with (folder / "metrics.csv").open(newline="") as file:
        assert undocumented_names(set(next(csv.reader(file))) - {"step"}) == []
    assert (summary["kind"], summary["reason_code"]) == ("differentiable_minimum", "zero_error")
    assert summary["zero_error"] is True
    assert summary["mse"] <= 1e-25
    assert (summary["mce"], summary["wrong"]) == (0.0, 0)
    assert summary["rank"] == summary["rank_cap"] == summary["num_samples"] == 320
    assert summary["epochs"] < 2000
    assert (summary["processes"], summary["visits"]) == (1, [summary["epochs"]] * 2)
    for words in ("a differentiable local minimum", "0 of 320 wrong", "rank of A∘X", str(folder), "num_samples: 320"):
        assert words in said, words
    assert (folder / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    store = PatternStore(folder / "patterns.zarr")
    assert store.steps[0] == 0
    assert store.steps[-1] == summary["steps"]
    model = MNN.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    from lightning_mnn.data import GaussianData

    x, y = GaussianData().tensors()
    with torch.no_grad():
        assert float((model(x) - y).square().mean()) <= 1e-25  # as the summary's, which rounds otherwise
        assert torch.equal(store.read(store.steps[-1])["layer_1"].active, x @ model.hidden_weights[0].T > 0)
    series = read_metrics(folder / "metrics.csv")
    logged = wandb_summary(folder)
    assert {"train/mse", "minimum/mse", "pattern/flips", "volume/log_lower_bound"} <= series.keys()
    for name, (_, values) in series.items():
        assert logged[name] == pytest.approx(values[-1], rel=1e-12), name
    assert (logged["kind"], logged["reason_code"]) == ("differentiable_minimum", "zero_error")
    assert "figure" in logged
    assert series["minimum/mse"][1][-1] == summary["mse"]


def test_a_sweep_over_replicas_and_slopes():
    swept = ("model.negative_slope=0.0,0.1", "replicas=2", "seed=5")
    command("-m", *SMALL, "trainer.max_epochs=30", *swept, "report=false")
    folders = sorted(Path().glob("outputs/quickstart/multirun/*/*/summary.json"))
    assert [path.parent.name for path in folders] == ["0", "1"]
    for path, slope in zip(folders, (0.0, 0.1), strict=True):
        summary = summary_of(path.parent)
        assert summary["negative_slope"] == slope
        assert {
            len(summary[key])
            for key in ("mse", "mce", "kind", "advice", "descends_to", "rank", "log_volume_lower_bound")
        } == {2}
        assert {p.name for p in path.parent.iterdir()} >= FOLDER
        assert wandb_summary(path.parent)["train/mse"] == read_metrics(path.parent / "metrics.csv")["train/mse"][1][-1]


def test_lbfgs_two_layers_teacher_and_no_loggers():
    command(
        *SMALL, "data=gaussian_teacher", "optimizer=lbfgs", "schedule=constant", "model.hidden_dims=[7,5]",
        "trainer.max_epochs=5", "~logger.wandb", "callbacks.angular_volume_monitor=null", "task=train",
    )  # fmt: skip
    summary = summary_of(only("outputs/quickstart/*"))
    assert summary.keys() >= SUMMARY
    assert summary["mce"] is None
    assert summary["hidden_dims"] == [7, 5]
    assert not only("outputs/quickstart/*").joinpath("wandb").exists()


def test_resume_from_a_checkpoint_and_two_processes():
    command(*SMALL, "trainer.max_epochs=40", "schedule=constant", "logger.mode=disabled")
    first = only("outputs/quickstart/*")
    command(
        *SMALL, "trainer.max_epochs=60", "schedule=constant", "logger.mode=disabled",
        f"ckpt_path={first}/checkpoints/last.ckpt", "hydra.run.dir=resumed",
    )  # fmt: skip
    ranks = children.start_ranks(
        Path.cwd(), 2, *SMALL, "trainer=cpu_ddp", "trainer.max_epochs=60", "schedule=constant", "hydra.run.dir=ddp",
        "logger.mode=offline",
    )  # fmt: skip
    for rank in ranks:
        rank.join(children.PATIENCE)
    resumed, two = summary_of(Path("resumed")), summary_of(Path("ddp"))
    assert resumed["steps"] == two["steps"] == 60
    assert resumed["visits"] == two["visits"] == [60, 60]
    assert (resumed["processes"], two["processes"]) == (1, 2)
    for key in ("mse", "min_preactivation", "log_volume_lower_bound", "stationarity"):
        assert two[key] == pytest.approx(resumed[key], rel=1e-8)
    assert {p.name for p in Path("ddp").iterdir()} >= FOLDER


def test_divergence_ends_with_a_message_and_keeps_what_it_had():
    said = command(*SMALL, "optimizer=sgd", "optimizer.lr=100", "trainer.max_epochs=300", expect=1)
    assert "training diverged" in said
    folder = only("outputs/quickstart/*")
    assert {p.name for p in folder.iterdir()} >= FOLDER - {"checkpoints"}
    summary = summary_of(folder)
    assert summary["kind"] == "not_stationary"
    assert summary["reason_code"] == "diverged"
    assert (summary["advice"], summary["descends_to"]) == ("lower the learning rate", None)
    command(*SMALL, "optimizer=sgd", "optimizer.lr=100", "replicas=2", "hydra.run.dir=two", expect=1)
    assert summary_of(Path("two"))["kind"] == ["not_stationary"] * 2


def test_an_interrupted_run_leaves_what_it_had():
    process = children.start(
        Path.cwd(), *SMALL, "trainer.max_epochs=10000000", "schedule=constant",
        "callbacks.local_minimum_detector.stop_training=false", "hydra.run.dir=cut",
    )  # fmt: skip
    metrics = Path("cut/metrics.csv")
    children.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 50, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(children.PATIENCE)
    assert process.exitcode == 128 + signal.SIGINT
    assert {p.name for p in Path("cut").iterdir()} >= FOLDER - {"checkpoints", "figure.png"}
    summary = summary_of(Path("cut"))
    assert summary["reason_code"] == "interrupted"
    assert (summary["advice"], summary["descends_to"]) == ("continue the run with resume=true", None)
    assert summary["reason"] == f"interrupted after {summary['steps']} steps"
    assert summary["steps"] > 0
    assert "interrupted" in Path("out.txt").read_text()


def test_max_time_ends_a_run_that_has_no_other_end():
    command(*SMALL, "trainer.max_epochs=-1", "schedule=constant", "+trainer.max_time=00:00:00:01", "hydra.run.dir=run",
            "callbacks.local_minimum_detector.stop_training=false", "logger.mode=disabled")  # fmt: skip
    summary = summary_of(Path("run"))
    assert summary["finished"]
    assert summary["steps"] > 0


def test_fast_dev_run_ends_well():
    said = command(*SMALL, "+trainer.fast_dev_run=true", "hydra.run.dir=run")
    assert "no errors in 1 step(s) of a fast_dev_run; nothing is saved" in said
    assert not [*Path("run").rglob("*.json"), *Path("run").rglob("*.ckpt")]


def test_a_run_that_never_came_to_train_does_not_hold_its_folder():
    """Its plan may be another: the command was mended."""
    Path("run").mkdir()
    write_json(Path("run/plan.json"), {"wandb_id": "x", "config": {"seed": 5}, "versions": {}})
    options = (*SMALL, "trainer.max_epochs=1", "logger.wandb=null", "hydra.run.dir=run")
    assert "verdict" in command(*options)
    assert json.loads(Path("run/plan.json").read_text())["config"]["seed"] == 0


@pytest.fixture
def _own_hydra_config():
    before = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = before


@pytest.mark.parametrize(("overrides", "tiers"), [([], "full full full"), (["tier=light"], "light light light")])
def test_one_key_sets_the_tier_of_all_callbacks(overrides, tiers):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        cfg = compose("config", ["run_dir=.", *overrides])
        one = compose("config", ["run_dir=.", "callbacks.local_minimum_detector.tier=standard", *overrides])
    names = ("local_minimum_detector", "activation_pattern_recorder", "angular_volume_monitor")
    built = [build(cfg, f"callbacks.{name}") for name in names]
    assert " ".join(callback.tier for callback in built) == tiers
    assert build(one, "callbacks.local_minimum_detector").tier == "standard"
    assert build(one, "callbacks.angular_volume_monitor").tier == built[0].tier


@pytest.mark.usefixtures("_own_hydra_config")
@pytest.mark.parametrize("overrides", [[], ["data=cifar10", "seed=3", "name=mine"]])
def test_a_sweep_over_table_1_finds_the_folders_of_single_runs(overrides):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        cfg = compose("config", ["experiment=table_1", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    single, sweep = cfg.hydra.run.dir, cfg.hydra.sweep
    assert single == ("outputs/mine/cifar10/seed_3" if overrides else "outputs/table_1/mnist/seed_0")
    assert Path(sweep.dir, sweep.subdir) == Path(single)


def test_a_run_folder_is_not_overwritten():
    command(*SMALL, "trainer.max_epochs=2", "logger.mode=disabled", "hydra.run.dir=here")
    before = Path("here/summary.json").read_bytes()
    said = command(*SMALL, "trainer.max_epochs=2", "logger.mode=disabled", "hydra.run.dir=here", expect=1)
    assert "already contains a run" in said
    assert Path("here/summary.json").read_bytes() == before


def test_help_and_config_are_shown():
    assert "lightning-mnn experiment=mnist" in program("--help")
    assert "num_samples: 320" in program("--cfg", "job")


@pytest.mark.slow
def test_mnist_learns_on_the_real_digits(mnist_root):
    command(
        "experiment=mnist", f"data.root={mnist_root}", "trainer.max_epochs=6", "logger.mode=disabled", "dtype=float32"
    )
    folder = only("outputs/mnist/*")
    summary = summary_of(folder)
    assert summary["num_samples"] == 70000
    assert summary["wrong"] < 1500
    assert summary["rank_cap"] <= 89 * 784
    with (folder / "metrics.csv").open() as file:
        assert all(math.isfinite(float(row["train/mse"])) for row in csv.DictReader(file) if row["train/mse"])
