"""The launcher that computes jobs together: each job against the same job alone."""

import csv
import json
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import open_dict

import lightning_mnn.app  # noqa: F401 (registers the resolvers)
from lightning_mnn.config.job_configs import JobConfigs
from lightning_mnn.launchers.batched import Batched
from lightning_mnn.launchers.jobs.batch import JobBatch
from lightning_mnn.launchers.jobs.devices import Devices
from tests import children
from tests.wandb_files import summary_of

SMALL = (
    *("data.num_samples=12", "data.input_dim=5", "model.hidden_dims=[6]", "trainer.accelerator=cpu"),
    *("trainer.log_every_n_steps=5", "callbacks.angular_volume_monitor.measure=[]"),
)
OFF = "logger.mode=disabled"
VERDICT = ("kind", "reason_code", "zero_error", "steps", "epochs", "mce", "wrong", "kinks", "seed", "negative_slope")


def sweep(folder, launcher, *arguments, expect=0):
    options = ("hydra.launcher.n_jobs=2",) if launcher == "batched" else ()
    every = (*SMALL, f"hydra/launcher={launcher}", *options, f"hydra.sweep.dir={folder}", *arguments)
    return children.command(Path.cwd(), "-m", *every, expect=expect)


def result(folder):
    return json.loads((folder / "summary.json").read_text())


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_job(job, alone):
    """Up to rounding: where an error is at rounding level, only that it is there, too."""
    found, expected = result(job), result(alone)
    assert {key: found[key] for key in VERDICT} == {key: expected[key] for key in VERDICT}
    assert found["mse"] == pytest.approx(expected["mse"], rel=1e-7, abs=1e-14)
    assert (job / "patterns.zarr").is_dir()
    assert (job / "checkpoints" / "last.ckpt").is_file()
    assert (job / ".hydra" / "config.yaml").read_text() == (alone / ".hydra" / "config.yaml").read_text()
    mine, other = rows(job), rows(alone)
    assert [row["step"] for row in mine] == [row["step"] for row in other]
    for row, their in zip(mine, other, strict=True):
        assert row["train/mse"] == their["train/mse"] or float(row["train/mse"]) == pytest.approx(
            float(their["train/mse"]), rel=1e-7, abs=1e-14
        )


def test_jobs_equal_lone_jobs_and_one_that_fails_leaves_the_others(tmp_path):
    swept = (
        "optimizer.lr=0.01,1e200,0.003",
        "model.negative_slope=0,0.2",
        "seed=0,1",
        "optimizer=sgd",
        "schedule=constant",
    )
    said = sweep("together", "batched", *swept, OFF, "trainer.max_epochs=40", expect=1)
    assert "8 done, 4 FAILED" in said.replace("failed", "FAILED")
    sweep("alone", "basic", "optimizer.lr=0.01,0.003,1e200", *swept[1:], OFF, "trainer.max_epochs=40", expect=1)
    lone = {settings(folder): folder for folder in Path("alone").glob("[0-9]*")}
    for job in Path("together").glob("[0-9]*"):
        record, alone = json.loads((job / "job.json").read_text()), lone[settings(job)]
        if lr(job) > 1:
            assert record["status"] == "failed"
            assert "failed: UserError: training diverged" in record["error"]
            assert {k: result(job)[k] for k in ("reason", "steps")} == {
                k: result(alone)[k] for k in ("reason", "steps")
            }
            continue
        assert record["status"] == "finished"
        assert record["return_value"] == result(job)["mse"]
        assert_same_job(job, alone)
        assert "verdict" in (job / "console.log").read_text()


def settings(folder):
    return tuple(sorted((folder / ".hydra" / "overrides.yaml").read_text().split()))


def lr(folder):
    (found,) = [word for word in settings(folder) if word.startswith("optimizer.lr")]
    return float(found.partition("=")[2])


def test_each_job_has_a_wandb_run_and_others_run_alone(tmp_path):
    said = sweep(
        "sweep", "batched", "seed=0,1", "replicas=1,2", "trainer.max_epochs=4", "hydra.launcher.max_replicas=1"
    )
    assert said.count("starts on CPU") == 2
    assert said.count("jobs start together") == 2
    for job in Path("sweep").glob("[0-3]"):
        (run,) = job.glob("wandb/offline-run-*")
        assert summary_of(run)["mse"] == result(job)["mse"]


def test_after_a_failure_fail_fast_starts_no_further_jobs(tmp_path):
    swept = ("seed=0,1,2", "optimizer=sgd", "optimizer.lr=1e200", OFF, "trainer.max_epochs=40")
    options = ("hydra.launcher.n_jobs=1", "hydra.launcher.max_replicas=1", "hydra.launcher.fail_fast=true")
    said = sweep("sweep", "batched", *swept, *options, expect=1)
    assert "hydra.launcher.fail_fast=true: a job has failed, so 2 were not started" in said
    records = [json.loads(path.read_text())["status"] for path in Path("sweep").glob("*/job.json")]
    assert records.count("failed") == 1
    assert "finished" not in records


def test_a_killed_sweep_is_resumed(tmp_path):
    swept = ("seed=range(6)", "optimizer.lr=0.01,0.003", OFF, "trainer.max_epochs=3000", "hydra.sweep.dir=sweep")
    every = (*SMALL, "hydra/launcher=batched", "hydra.launcher.max_replicas=4", *swept)
    process = children.start(Path.cwd(), "-m", *every)
    children.wait_for(lambda: len(list(Path("sweep").glob("*/job.json"))) > 1, process)
    process.kill()
    process.join()
    before = {path: path.stat().st_mtime_ns for path in Path("sweep").glob("*/job.json")}
    assert len(before) < 12
    children.wait_for(lambda: not list(Path("sweep").glob("*/run.lock")) or all_free(Path("sweep")))
    said = children.command(Path.cwd(), "-m", *every, "resume=true")
    assert f"{12 - len(before)} done" in said
    results = [result(folder) for folder in Path("sweep").glob("[0-9]*")]
    assert len(results) == 12
    assert all(found["finished"] for found in results)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def all_free(folder):
    """Whether no process trains there any more."""
    import filelock

    for path in folder.glob("*/run.lock"):
        try:
            with filelock.FileLock(path, blocking=False):
                pass
        except filelock.Timeout:
            return False
    return True


@pytest.mark.parametrize("choices", [(1, 2), ()])
def test_jobs_share_a_process_if_they_set_the_same_threads(choices, monkeypatch):
    """Those of a program without such a key, too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", ["hydra.sweep.dir=out"], run_mode=RunMode.MULTIRUN)

        def compose(overrides):
            config = loader.load_sweep_config(master, overrides)
            if not choices:
                with open_dict(config):
                    del config["threads"]
            return config

        launcher, pool = Batched(n_jobs=1), Devices([], cpu_slots=1)
        launcher._configs, launcher._sweep_dir = JobConfigs(compose), "out"
        own = [
            [*SMALL, f"seed={seed}", "trainer.devices=1", *choice]
            for seed in (0, 1)
            for choice in ([[f"threads={number}"] for number in choices] or [[]])
        ]
        jobs = [launcher._job(number, list(one), pool, set()) for number, one in enumerate(own)]
        batches = launcher._processes(jobs, pool)
    assert all(isinstance(batch, JobBatch) for batch in batches)
    together = [[plan.values.get("threads") for plan in batch.plans] for batch in batches]
    assert together == ([[1, 1], [2, 2]] if choices else [[None, None]])
    assert [plan.config().seed for batch in batches for plan in batch.plans] == [0, 1] * len(batches)
