"""Sweeps on a SLURM cluster: a real one, of two nodes, in the tests with the marker."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_mnn.launchers.slurm import SlurmRequest, _files_of, allocation
from tests.children import PATIENCE, wait_for

COMMAND = (sys.executable, "-m", "lightning_mnn", "-m")
RUN = (
    *("data.num_samples=40", "data.input_dim=6", "model.hidden_dims=[8]", "trainer.max_epochs=400"),
    *("trainer.log_every_n_steps=10", "callbacks.local_minimum_detector.stop_training=false"),
    *("callbacks.angular_volume_monitor.measure=[]", "threads=1", "report=false"),
)
TWO_NODES = ("hydra/launcher=slurm", "trainer=cpu_ddp", "trainer.devices=1")


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"accelerator": "gpu", "devices": 4, "num_nodes": 2}, SlurmRequest(2, 4, 4)),
        ({"accelerator": "cuda", "devices": [0, 1]}, SlurmRequest(1, 2, 2)),
        ({"accelerator": "cpu", "devices": "3", "num_nodes": 1}, SlurmRequest(1, 3, None)),
    ],
)
def test_a_job_gets_a_task_for_each_device_of_each_node(trainer, expected):
    assert allocation(trainer) == expected


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"devices": "auto"}, r"trainer.devices=auto .* such as trainer.devices=2"),
        ({"devices": -1}, r"trainer.devices=-1 does not determine how many"),
        ({"devices": [2, 3]}, r"trainer.devices=\[2, 3\]"),
        ({"devices": True}, "trainer.devices=True"),
        ({"num_nodes": 0}, "trainer.num_nodes must be a positive number, got 0"),
        ({"accelerator": "auto"}, "choose trainer.accelerator=cpu"),
    ],
)
def test_what_does_not_say_how_much_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        allocation({"accelerator": "gpu", "devices": 2, "num_nodes": 2} | wrong)


def test_a_sweep_whose_size_is_open_is_refused_before_anything_is_submitted(tmp_path):
    arguments = ("hydra/launcher=slurm", "trainer=ddp", "trainer.num_nodes=2", "trainer.devices=2,auto")
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "trainer.devices=auto does not determine how many devices of a node to request from SLURM" in done.stderr
    assert not list(tmp_path.rglob("*submission*"))


@pytest.mark.parametrize("name", ["sweep_%j", "50%", r"one\two"])
def test_a_folder_that_slurm_would_read_otherwise_is_refused(tmp_path, name):
    assert _files_of(str(tmp_path / "a 'folder'")) == tmp_path / "a 'folder'" / ".submitit"
    with pytest.raises(ValueError, match=r"hydra.sweep.dir=.*: choose a folder without"):
        _files_of(str(tmp_path / name))


def test_without_submitit_it_is_said_how_to_get_it():
    code = "import sys; sys.modules['submitit'] = None; from lightning_mnn.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", "hydra/launcher=slurm"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install lightning-mnn[slurm]" in done.stderr


def slurm(*command, check=True):
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout.strip()


def state_of(job):
    """State and number of nodes of a job of SLURM's."""
    return slurm("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T %D", check=False)


def has_rows(run, rows):
    path = run / "metrics.csv"
    return path.exists() and path.read_text().count("\n") > rows


def summary_of(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary.pop("finished")
    return {key: value for key, value in summary.items() if key != "seconds"}


class Sweeps:
    """Sweeps by the real command, each in a folder and with a log of its name."""

    def __init__(self, folder):
        self.folder = folder
        self._running = {}

    def start(self, name, *arguments):
        command = [*COMMAND, *RUN, *arguments, f"hydra.sweep.dir={name}"]
        own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # of the process that tests
        with (self.folder / f"{name}.log").open("w") as log:
            self._running[name] = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=own)

    def signal(self, name, number):
        self._running[name].send_signal(number)

    def end(self, name):
        """The exit code."""
        return self._running[name].wait(PATIENCE)

    def said(self, name):
        return (self.folder / f"{name}.log").read_text()

    def jobs(self, name):
        return re.findall(r"#\d+ is SLURM's job (\w+)", self.said(name))

    def close(self):
        for name, process in self._running.items():
            if process.poll() is None:
                process.kill()
                process.wait()
                slurm("scancel", *self.jobs(name), check=False)


@pytest.fixture(scope="module")
def cluster():
    if shutil.which("sinfo") is None:
        pytest.skip("there is no SLURM here")
    nodes = [line.split() for line in slurm("sinfo", "--noheader", "--format=%D %t", check=False).splitlines()]
    if sum(int(number) for number, state in nodes if state in ("idle", "alloc", "mix", "comp")) < 2:
        pytest.skip("SLURM has no two nodes that are up")


@pytest.fixture(scope="module")
def sweeps(cluster, tmp_path_factory):
    """A sweep of two jobs, one whose first job is requeued and whose second is cancelled, and one without SLURM."""
    sweeps = Sweeps(tmp_path_factory.mktemp("sweeps"))
    try:
        sweeps.start("cut", *TWO_NODES, "trainer.num_nodes=2,1", "seed=1")
        first, second = wait_for(lambda: sweeps.jobs("cut")[:2])
        sizes = [state_of(job).split()[1] for job in (first, second)]
        slurm("scancel", second)
        run = sweeps.folder / "cut" / "0"
        wait_for(lambda: has_rows(run, 10))
        slurm("scancel", "--signal=USR1", first)
        sweeps.start("alone", "trainer=cpu", "seed=1,2", "logger.mode=disabled")
        sweeps.start("whole", *TWO_NODES, "trainer.num_nodes=2", "seed=1,2")
        wait_for(lambda: state_of(first).startswith("PENDING"))
        kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        slurm("scontrol", "update", f"JobId={first}", "StartTime=now")  # it would wait two minutes
        codes = {name: sweeps.end(name) for name in ("alone", "cut", "whole")}
        yield SimpleNamespace(
            folder=sweeps.folder, said=sweeps.said, codes=codes, kept=kept, sizes=sizes, cancelled=second
        )
    finally:
        sweeps.close()


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_two_jobs_of_two_nodes_each_agree_with_one_process(sweeps):
    assert (sweeps.codes["whole"], sweeps.codes["alone"]) == (0, 0), sweeps.said("whole") + sweeps.said("alone")
    for job in ("0", "1"):
        two, one = (summary_of(sweeps.folder / name / job) for name in ("whole", "alone"))
        assert (two["processes"], one["processes"]) == (2, 1)
        assert two["visits"] == one["visits"] == [400, 400]  # of every sample, the least and the most
        for key in ("epochs", "steps", "num_samples", "seed", "kind", "kinks", "rank", "regions_visited"):
            assert two[key] == one[key], key
        for key in ("mse", "mce", "distance", "stationarity"):
            assert two[key] == pytest.approx(one[key], rel=1e-8), key


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_a_job_that_was_requeued_goes_on_where_it_was(sweeps):
    assert 0 < sweeps.kept["global_step"] < 400  # saved when the signal came: the clock's first is after a minute
    cut, whole = (sweeps.folder / name / "0" for name in ("cut", "whole"))
    assert summary_of(cut) == summary_of(whole)
    assert (cut / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    runs = [path.name.rpartition("-")[2] for path in cut.glob("wandb/offline-run-*")]
    assert len(runs) == 2  # the parts
    assert len(set(runs)) == 1  # of one


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_each_job_has_its_own_size_and_one_that_slurm_ends_fails_alone(sweeps):
    assert sweeps.sizes == ["2", "1"]
    assert sweeps.codes["cut"] == 1
    assert f"SLURM's job {sweeps.cancelled} ended early" in sweeps.said("cut")
    assert "#1 failed: " in sweeps.said("cut")
    (_, command) = sweeps.said("cut").split("this command resumes the sweep:\n  ")
    assert command.splitlines()[0].endswith("resume=true hydra.sweep.dir=cut")


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_a_command_that_is_ended_leaves_its_jobs_to_slurm_and_none_is_submitted_beside_them(cluster, tmp_path):
    sweeps = Sweeps(tmp_path)
    held = ("hydra/launcher=slurm", "trainer=cpu", "seed=1,2", "+hydra.launcher.additional_parameters.hold=true")
    names = []
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            sweeps.start("left", *held)
            jobs = wait_for(lambda: sweeps.jobs("left")[1:] and sweeps.jobs("left"))
            names.append(jobs[0].partition("_")[0])
            sweeps.signal("left", number)
            assert sweeps.end("left") == 128 + number
            assert [state_of(job) for job in jobs] == ["PENDING 1", "PENDING 1"]
            assert f"jobs that continue in the cluster: 2; to end them: scancel {names[-1]}\n" in sweeps.said("left")
            assert "resume=true hydra.sweep.dir=left\n" in sweeps.said("left")
            assert "Traceback" not in sweeps.said("left")
            if number == signal.SIGINT:
                sweeps.start("left", *held, "resume=true")
                assert sweeps.end("left") == 1
                assert "jobs of this folder are in SLURM's queue (2)" in sweeps.said("left")
                assert f"or end them by: scancel {names[-1]}\n" in sweeps.said("left")
                assert not sweeps.jobs("left")
                slurm("scancel", names[-1])
    finally:
        sweeps.close()
        slurm("scancel", *names, check=False)
