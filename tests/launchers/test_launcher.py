"""The device_pool launcher: Hydra's own tests of launchers, and real sweeps of real applications."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase
from packaging.version import Version

from tests.children import PATIENCE, all_ended, start_ranks, wait_for

# Of this process the jobs are to take nothing that belongs to it alone.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path / "temporary"))


@pytest.fixture
def _hydra_1_1(hydra_restore_singletons, monkeypatch):
    """Hydra's tests are written for the behaviour of its version 1.1, which other tests leave."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # or each of them would look for GPUs
    VersionBase.instance().setbase(Version("1.1"))


@pytest.mark.usefixtures("_hydra_1_1")
@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("device_pool", []), ("device_pool", ["hydra.launcher.warm=false"])]
)
class TestDevicePool(LauncherTestSuite):
    """Hydra's tests of any launcher."""


@pytest.mark.usefixtures("_hydra_1_1")
@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("device_pool", ["hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2"])],
)
class TestDevicePoolInBatches(BatchedSweeperTestSuite):
    """Hydra's tests of launchers under a sweeper that launches several times."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({"defaults": [{"override hydra/launcher": "device_pool"}]}, ["-m"])],
)
class TestDevicePoolIntegration(IntegrationTestSuite):
    """Hydra's tests of launchers with applications that are scripts."""

    test_custom_task_name = None  # ten processes for what Hydra composes: see test_a_script_is_itself_in_its_jobs


CONFIG = """
do: "return"
size: 1
answer: ${twice:${size}}
resume: false
trainer: {devices: 1, accelerator: cpu}
"""
APP = """
import os, shutil, subprocess, sys, time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


class Color(Enum):
    RED = 1


@dataclass
class Style:
    color: Color = Color.RED


ConfigStore.instance().store(group="style", name="plain", node=Style)
OmegaConf.register_new_resolver("twice", lambda x: 2 * x)


class Odd(Exception):
    def __init__(self, first, second):  # does not survive pickling
        super().__init__(f"{first} and {second}")


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    with (folder / "starts").open("a") as file:
        print(time.time(), os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
    print("said by", folder.name)
    if cfg.do == "raise":
        raise Odd("this", "that")
    if cfg.do == "kill":
        os.kill(os.getpid(), 9)
    if cfg.do == "exit":
        sys.exit(3)
    if cfg.do == "wait":
        child = subprocess.Popen(["sleep", "2000"])
        (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(2000)
    if cfg.do == "catch":
        try:
            (folder / "pids").write_text(f"{os.getpid()}")
            time.sleep(2000)
        except KeyboardInterrupt:
            return 0.5
    if cfg.do == "odd":
        return Odd
    if cfg.do == "unreadable":
        return Odd("this", "that")
    if cfg.do == "remove":
        shutil.rmtree(folder)
        return 1
    if cfg.do == "signal":
        os.kill(os.getpid(), 40)
    if cfg.do == "read":
        input()
    if "style" in cfg:
        same = cfg.style.color == Color.RED and isinstance(OmegaConf.to_object(cfg.style), Style)
        return [same, HydraConfig.get().job.name]
    time.sleep(0.2)
    with (folder / "starts").open("a") as file:
        print(time.time(), file=file)
    return {"answer": cfg.answer}


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def app(tmp_path):
    """The command of a sweep of a small application that is not ours."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APP)
    return [sys.executable, "app.py", "-m", "hydra/launcher=device_pool", "hydra.sweep.dir=sweep"]


def say(command, expect=0):
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=ENVIRONMENT)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def record_of(number):
    return json.loads(Path("sweep", str(number), "job.json").read_text())


def starts_of(number):
    return [line.split() for line in Path("sweep", str(number), "starts").read_text().splitlines()]


def test_failures_are_isolated_and_listed_and_only_they_run_again(app):
    sweep = [*app, "hydra.launcher.n_jobs=4", "do=raise,return,kill,exit,odd"]
    said = say(sweep, expect=1)
    assert [record_of(n)["status"] for n in range(5)] == ["failed", "finished", "failed", "failed", "returned"]
    for words in (
        "job #0 (do=raise) failed with exit code 1: Odd: this and that\n",
        "job #2 (do=kill) was ended by SIGKILL: said by 2\n",
        "job #3 (do=exit) failed with exit code 3: said by 3\n",
        "2 done, 3 failed",
        "3 of 5 jobs are not finished; this command runs them:\n",
    ):
        assert words in said
    assert record_of(1)["return_value"] == {"answer": 2}
    assert Path("sweep/0/console.log").read_text().startswith("said by 0\nTraceback")
    assert not list(Path("temporary").iterdir())
    first, last = (line for line in said.splitlines() if line.endswith(" resume=true hydra.sweep.dir=sweep"))
    assert first == last  # that of the beginning, where a kill would leave no other
    again = say(shlex.split(last), expect=1)
    assert "#1 was done before: do=return\n" in again
    assert "1 done before" in again
    assert last in again
    assert [sum(len(line) > 1 for line in starts_of(n)) for n in range(5)] == [2, 1, 2, 2, 2]


def test_a_bad_end_of_one_job_is_no_other_ones(app):
    said = say([*app, "hydra.launcher.n_jobs=6", "do=unreadable,remove,signal,read,return"], expect=1)
    for words in (
        "job #0 (do=unreadable) ",
        "job #2 (do=signal) was ended by signal 40",
        "#3 (do=read) failed",
        "EOFError",
    ):
        assert words in said
    assert "2 done, 3 failed" in said  # the one without a folder has no record of it
    assert record_of(4)["status"] == "finished"
    assert not list(Path("temporary").iterdir())


def test_a_script_that_cannot_be_imported_is_told_why(app):
    Path("app.py").write_text(APP.partition("if __name__")[0] + "main()\n")
    said = say([*app, "size=1"], expect=1)
    assert "failed with exit code 1: RuntimeError: the program calls its main function when it is imported" in said


def test_a_script_is_itself_in_its_jobs(app):
    """Its classes are the same ones, and it has its name."""
    say([*app, "+style=plain"])
    assert record_of(0)["return_value"] == [True, "app"]


def test_what_finished_with_another_config_runs_again(app):
    say([*app, "size=1,2"])
    Path("config.yaml").write_text(CONFIG.replace('do: "return"', "do: other"))
    assert "2 done\n" in say([*app, "size=1,2", "resume=true"])
    assert "2 done before\n" in say([*app, "size=1,2", "resume=true"])
    Path("sweep/0/job.json").write_text("torn")
    assert "1 done, 1 done before\n" in say([*app, "size=1,2", "resume=true"])


def test_what_is_interrupted_is_not_finished_whatever_it_returns(app):
    launcher = subprocess.Popen([*app, "do=catch"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    wait_for(Path("sweep/0/pids").exists)
    assert "another process is working in" in say([*app, "do=catch", "resume=true"], expect=1)
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "job #0 (do=catch) was interrupted" in said
    assert record_of(0)["status"] == "interrupted"
    assert "1 of 1 jobs are not finished; this command runs them:\n" in said


def test_jobs_share_the_devices_of_the_pool(app):
    started = time.time()
    sizes = "size=1,2,3,4,5,6"
    say([*app, sizes, "hydra.launcher.n_jobs=3", "hydra.launcher.cpu_slots=6", "trainer.devices=2"])
    spans = [(float(begin[0]), float(end[0])) for begin, end in map(starts_of, range(6))]
    overlaps = [sum(a <= begin <= b for a, b in spans) for begin, _ in spans]
    assert max(overlaps) <= 3
    assert started < min(spans)[0]
    assert [record_of(n)["return_value"]["answer"] for n in range(6)] == [2, 4, 6, 8, 10, 12]
    assert {record_of(n)["devices"] for n in range(6)} <= {"CPU 0,1", "CPU 2,3", "CPU 4,5"}


def test_gpus_are_lent_by_their_names(app):
    gpus = ["trainer.accelerator=gpu", "hydra.launcher.gpus=[4,MIG-7]", "trainer.devices=1,2,-1"]
    say([*app, *gpus])
    assert [starts_of(n)[0][2] for n in range(3)] == ["4", "4,MIG-7", "4,MIG-7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hydra.launcher.n_jobs=0",), "hydra.launcher.n_jobs=0: must be a positive number or null"),
        (("hydra.launcher.jobs=2",), "Key 'jobs' not in 'DevicePoolConf'"),
        (
            ("+trainer.num_nodes=2",),
            "trainer.num_nodes=2: hydra/launcher=device_pool has only the devices of one machine",
        ),
        (("hydra.sweep.subdir=same",), "jobs [0, 1] would share the folder"),
        (
            ("trainer.accelerator=gpu", "hydra.launcher.gpus=[0]", "trainer.devices=2"),
            "trainer.devices=2 asks for 2 GPUs, and the pool has 1",
        ),
    ],
)
def test_bad_input_is_refused_before_any_job_starts(app, arguments, message):
    assert message in say([*app, "size=1,2", *arguments], expect=1)
    assert not list(Path().glob("sweep/*/starts"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_no_process_outlives_the_launcher(app, number):
    launcher = subprocess.Popen([*app, "do=wait", "size=1,2,3", "hydra.launcher.n_jobs=2"], env=ENVIRONMENT)
    files = [Path("sweep", job, "pids") for job in "01"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    started = [int(pid) for file in files for pid in file.read_text().split()]
    launcher.send_signal(number)
    assert launcher.wait(PATIENCE) == (-9 if number is signal.SIGKILL else 128 + number)
    wait_for(lambda: all_ended(started))
    assert not Path("sweep/2").exists()
    assert not list(Path("temporary").glob("lightning-mnn-job-*"))
    if number is not signal.SIGKILL:
        assert "interrupted" in record_of(0)["error"]


def ranks(number):
    """Process numbers of a rank of DDP that jobs in this folder have started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here = (path / "cwd").resolve() == Path.cwd()
            is_job = here and b"jobs/main.py" in (path / "cmdline").read_bytes()
            if is_job and f"LOCAL_RANK={number}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def summaries(folder):
    found = {}
    for path in Path(folder).glob("*/summary.json"):
        summary = json.loads(path.read_text())
        del summary["seconds"]
        found[summary["processes"], summary["seed"]] = summary
    return found


@pytest.mark.slow
def test_a_sweep_over_devices_is_right_and_survives_the_loss_of_a_rank():
    epochs = 300
    common = [
        *("trainer=cpu_ddp", "data.num_samples=41", "data.input_dim=7", "model.hidden_dims=[9]", "seed=2"),
        *("logger.mode=disabled", f"trainer.max_epochs={epochs}"),
        "callbacks.local_minimum_detector.stop_training=false",
        "callbacks.checkpoint.train_time_interval.minutes=0.001",
        "callbacks.angular_volume_monitor.measure=[]",  # an estimate: it agrees within its error
    ]
    unbroken = [
        process
        for count in (1, 2)
        for process in start_ranks(
            Path.cwd(), count, *common, f"trainer.devices={count}", f"hydra.run.dir=whole/{count}"
        )
    ]
    for process in unbroken:
        process.join(PATIENCE)
    whole = summaries("whole")
    assert whole.keys() == {(1, 2), (2, 2)}
    for summary in whole.values():
        assert summary["visits"] == [epochs, epochs]
        assert (summary["num_samples"], summary["epochs"], summary["finished"]) == (41, epochs, True)
    one, two = (dict(whole[devices, 2]) for devices in (1, 2))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one.keys() == two.keys()
    for key, value in one.items():
        close = pytest.approx(value, rel=1e-8, abs=1e-8) if isinstance(value, float) else value
        assert two[key] == close, key

    cut = [
        *(sys.executable, "-m", "lightning_mnn", "-m", "hydra/launcher=device_pool", "hydra.launcher.n_jobs=2"),
        *(*common, "hydra.sweep.dir=cut", "trainer.devices=2,1", "report=false"),
    ]
    launcher = subprocess.Popen(cut, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    wait_for(Path("cut/0/checkpoints/last.ckpt").exists)
    (lost,) = ranks(1)
    os.kill(lost, signal.SIGKILL)
    wait_for(Path("cut/0/job.json").exists)
    said, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 1
    assert "job #0 (trainer.devices=2) " in said
    ended = {key for key, summary in summaries("cut").items() if summary["finished"]}  # or what is left is interrupted
    assert ended == {(1, 2)}
    say([*cut, "resume=true"])
    assert summaries("cut") == {(2, 2): whole[2, 2], (1, 2): whole[1, 2]}
    assert all(json.loads(Path("cut", job, "job.json").read_text())["warm"] for job in "01")


@pytest.mark.slow
def test_a_run_that_is_killed_is_started_again_and_gives_the_same_numbers():
    sweep = [
        *(sys.executable, "-m", "lightning_mnn", "-m", "hydra/launcher=device_pool", "trainer=cpu", "seed=2"),
        *("data.num_samples=41", "data.input_dim=7", "model.hidden_dims=[9]", "trainer.max_epochs=300"),
        *("logger.mode=disabled", "callbacks.angular_volume_monitor=null"),
        "callbacks.local_minimum_detector.stop_training=false",
        "callbacks.checkpoint.train_time_interval.minutes=0.001",
    ]
    launcher = subprocess.Popen(
        [*sweep, "hydra.sweep.dir=cut", "hydra.launcher.retries=1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    wait_for(Path("cut/0/checkpoints/last.ckpt").exists)
    os.kill(writer_of(Path("cut/0/console.log").resolve()), signal.SIGKILL)
    said, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0, said
    assert "was ended by SIGKILL" in said
    assert "it is started again (1 of 1), resuming it" in said
    record = json.loads(Path("cut/0/job.json").read_text())
    assert (record["status"], record["retries"], record["warm"]) == ("finished", 1, True)
    say([*sweep, "hydra.sweep.dir=whole", "hydra.launcher.warm=false"])
    assert summaries("cut") == summaries("whole")


def writer_of(log):
    """The process whose output a file gets."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "fd" / "1").readlink() == log:
                return int(path.name)
    raise AssertionError(f"nobody writes to {log}")


LIGHTNING = """
import hydra
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.mean = MeanMetric()
        self.right = 0

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.mean.update(loss)
        self.log("train_loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self):
        self.mean.compute()  # both are for all processes at once, in one order
        self.mean.reset()
        mean = self.trainer.strategy.reduce(torch.tensor(float(self.global_rank)), reduce_op="mean")
        self.right += float(mean) == (self.trainer.world_size - 1) / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=100, devices=cfg.trainer.devices, enable_model_summary=False, **options)
    model = Model()
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=2))
    return [trainer.world_size, model.right]


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_the_processes_of_another_application_are_left_to_themselves(app):
    """What the launcher wants to know of a training takes no part in what its processes say to one another."""
    Path("app.py").write_text(LIGHTNING)
    say([*app, "trainer.devices=1,2", "hydra.launcher.n_jobs=2"])
    assert [record_of(n)["return_value"] for n in range(2)] == [[1, 100], [2, 100]]
    assert record_of(1)["seconds_to_training"] > 0
