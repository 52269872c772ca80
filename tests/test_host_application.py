"""A program that is not ours, under our launcher, with our callbacks: sweep, kill, resume, report.

The program is in tests/host_application. One sweep of four jobs serves all tests: the first job finishes, the second is
killed by SIGKILL, the third is at work when the launcher gets SIGTERM, the fourth has not begun; then the command that
the launcher printed is given.
"""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.tasks.report import report
from lightning_mnn.utilities.compat.hydra_internals import split_sweep
from tests.children import processes, run_a_script
from tests.documented import page, undocumented_keys

pytestmark = [
    pytest.mark.timeout(1800),  # of a sweep of processes that import Lightning, on a machine that may be busy
    pytest.mark.xdist_group("host application"),  # whose fixture takes a minute: for one process, not for each
]
PROGRAM = Path(__file__).parent / "host_application"
HOLD = "HOST_APPLICATION_HOLD"
SWEEP = [
    *("train.py", "-m", "hydra/launcher=device_pool", "hydra.launcher.n_jobs=1"),
    *("callbacks=[default,mnn]", "hydra.searchpath=[pkg://lightning_mnn.conf]"),
    *("model.width=4,8", "model.optimizer.lr=0.01,0.1", "hydra.sweep.dir=logs/two keys"),
]
KEYS = ("model.width", "model.optimizer.lr")
VALUES = [(4, 0.01), (4, 0.1), (8, 0.01), (8, 0.1)]


@dataclass
class Swept:
    """A sweep that was killed and resumed.

    Attributes:
        folder: in which the program is.
        killed: a copy of the sweep's folder as the kill left it.
        whole: the sweep's folder, after it was resumed.
        said: what the launcher printed before the kill.
        command: that it printed.
        said_again: what it printed when that was given.
    """

    folder: Path
    killed: Path
    whole: Path
    said: str
    command: str
    said_again: str


def until(holds):
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host") / "program"
    shutil.copytree(PROGRAM, folder)
    whole, killed = folder / "logs" / "two keys", folder.parent / "killed"
    hold = folder.parent / "hold"
    hold.mkdir()
    for number in "12":
        (hold / number).touch()
    environment = os.environ | {HOLD: str(hold), "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    launcher = subprocess.Popen([sys.executable, *SWEEP], **options)
    try:
        for number, end in (("1", signal.SIGKILL), ("2", None)):
            held = whole / number / "pid"
            until(lambda held=held: (held.exists() and held.read_text()) or launcher.poll() is not None)
            os.kill(int(held.read_text()) if end else launcher.pid, end or signal.SIGTERM)
        said, _ = launcher.communicate(timeout=600)
    finally:
        launcher.kill()
    assert launcher.returncode == 128 + signal.SIGTERM, said
    shutil.copytree(whole, killed)
    shutil.rmtree(hold)
    command = said.splitlines()[-1].strip()
    again = subprocess.run(["/bin/sh", "-c", command], timeout=600, check=False, **options)
    assert again.returncode == 0, again.stdout
    return Swept(folder, killed, whole, said, command, again.stdout)


def report_of(sweep, capsys):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        report(compose("config", ["task=report", "run_dir=.", f"sweep='{sweep}'"]))
    return capsys.readouterr().out, pq.read_table(sweep / "sweep.parquet").to_pylist()


def statuses(sweep):
    records = [sweep / str(number) / "job.json" for number in range(4)]
    return [json.loads(record.read_text())["status"] if record.exists() else None for record in records]


def logged(job):
    """Values of each metric in the newest log, in the order of its rows."""
    newest = max(job.glob("csv/version_*"), key=lambda folder: int(folder.name.removeprefix("version_")))
    with (newest / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_the_command_that_resumes_is_printed_at_the_start_and_when_it_is_needed(swept):
    expected = [sys.executable, *SWEEP[:-1], "hydra.launcher.resume=true", "hydra.sweep.dir='logs/two keys'"]
    assert shlex.split(swept.command) == expected
    before, _, after = swept.said.partition("#0 starts")
    assert f"if it is killed, this command resumes the sweep:\n  {swept.command}\n" in before
    assert f"3 of 4 jobs are not finished; this command runs them:\n  {swept.command}\n" in after
    assert "1 waiting, 1 done, 1 failed, 1 interrupted" in after
    assert "this command runs them" not in swept.said_again


def test_what_is_finished_is_kept_and_all_else_runs_again(swept):
    assert statuses(swept.killed) == ["finished", "failed", "interrupted", None]
    assert statuses(swept.whole) == ["finished"] * 4
    for name in ("job.json", "console.log", "csv/version_0/metrics.csv"):
        assert (swept.whole / "0" / name).read_bytes() == (swept.killed / "0" / name).read_bytes()
    assert "3 done, 1 done before" in swept.said_again
    assert json.loads((swept.killed / "1" / "job.json").read_text())["exit_code"] == -signal.SIGKILL


def test_keys_of_its_records_are_documented(swept):
    for record in (*swept.killed.glob("*/job.json"), *swept.whole.glob("*/job.json")):
        assert undocumented_keys("job.json", json.loads(record.read_text())) == []
    assert undocumented_keys("sweep.json", json.loads((swept.whole / "sweep.json").read_text())) == []


def test_a_report_of_the_killed_sweep_says_what_is_left_and_what_runs_it(swept, capsys, monkeypatch):
    monkeypatch.chdir(swept.folder)
    said, table = report_of(swept.killed, capsys)
    assert [(row["job"], row["status"]) for row in table] == [
        (0, "finished"), (1, "failed"), (2, "unfinished"), (3, "waiting"),
    ]  # fmt: skip
    assert [row["val/loss"] is None for row in table] == [False, True, True, True]
    for line in (
        "jobs: 1 finished, 1 failed, 1 unfinished, 1 waiting\n", f"swept: {KEYS[0]}, {KEYS[1]}\n",
        "failed: 1 (model.width=4 model.optimizer.lr=0.1): job #1", "was ended by SIGKILL", "waiting: 3 (",
    ):  # fmt: skip
        assert line in said, line
    elsewhere = f"hydra.sweep.dir={swept.killed}"  # the copy's place
    (command,) = (line.strip() for line in said.splitlines() if line.endswith(elsewhere))
    assert shlex.split(command)[:-1] == shlex.split(swept.command)[:-1]


def test_a_report_of_the_whole_sweep_has_each_jobs_metrics_return_value_and_kind(swept, capsys, monkeypatch, drawn):
    monkeypatch.chdir(swept.folder.parent)
    said, table = report_of(swept.whole, capsys)
    assert "jobs: 4 finished\n" in said
    assert "resume" not in said
    assert [tuple(row[key] for key in KEYS) for row in table] == VALUES
    for row in table:
        job = swept.whole / str(row["job"])
        record, values = json.loads((job / "job.json").read_text()), logged(job)
        assert row["return_value"] == record["return_value"] == values["val/loss"][-1]
        for name in ("train/loss", "val/acc", "val/loss"):
            found = (row[name], row[f"{name}.min"], row[f"{name}.max"])
            assert found == (values[name][-1], min(values[name]), max(values[name]))
        assert row["test/loss"] == values["test/loss"][0]
        assert (row["epoch"], row["step"], row["seconds"]) == (
            values["epoch"][-1],
            values["step"][-1],
            record["seconds"],
        )
        assert (row["kind"], row["evidence"]) == tuple(record["minimum"][key] for key in ("kind", "evidence"))
        assert f"LocalMinimumDetector: {row['kind']}: " in (job / "console.log").read_text()
        assert row["minimum/loss"] == values["minimum/loss"][-1]
    (figure,) = drawn
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:3] == ["What training ended in", "return_value", "val/acc"]
    assert {"val/loss", "test/acc", "test/loss", "train/loss"} < set(titles)
    assert "4 finished jobs against model.width and model.optimizer.lr" in figure.get_suptitle()


GUIDE = page("how-to/hydra.md").replace("\\\n", " ")
COMMANDS = re.findall(r"^python src/train.py (.*)$", GUIDE, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_guide_compose(line):
    job, *_ = split_sweep([word for word in shlex.split(line, comments=True) if word != "-m"])
    with initialize_config_dir(str(PROGRAM / "conf"), version_base="1.3"):
        composed = compose("train", job, return_hydra_config=True)
    assert OmegaConf.select(composed, "hydra.launcher.resume") is (True if "FOLDER" in line else None)
    assert ("local_minimum_detector" in composed.callbacks) == ("mnn" in line)


def test_the_guide_has_commands_of_such_a_program():
    assert len(COMMANDS) == 3


def test_an_experiment_of_the_program_can_take_the_callbacks_beside_its_own():
    with initialize_config_dir(str(PROGRAM / "conf"), version_base="1.3"):
        overrides = ["experiment=wide", "paths.output=.", "hydra.searchpath=[pkg://lightning_mnn.conf]"]
        callbacks = compose("train", overrides).callbacks
    made = [instantiate(entry) for entry in callbacks.values()]
    assert type(made[0]).__name__ == "ModelCheckpoint"
    assert [isinstance(one, ScheduledCallback) for one in made] == [False, True, True, True]


def test_a_sweep_of_hydras_own_launcher_has_no_record_of_its_ends_but_a_table(tmp_path, capsys, monkeypatch, drawn):
    folder = tmp_path / "program"
    shutil.copytree(PROGRAM, folder)
    options = ("-m", "model.width=2,3", "trainer.max_epochs=2", "hydra.sweep.dir=sweep")
    process = processes.Process(target=run_a_script, args=(folder, "train.py", options))
    process.start()
    process.join(600)
    assert process.exitcode == 0, (folder / "err.txt").read_text()
    shutil.rmtree(folder / "sweep" / "1" / "csv")
    monkeypatch.chdir(folder)
    said, table = report_of(folder / "sweep", capsys)
    assert "jobs: 2 unrecorded\n" in said
    assert "only hydra/launcher=device_pool records" in said
    assert "resume" not in said
    assert [(row["model.width"], row["status"]) for row in table] == [(2, "unrecorded"), (3, "unrecorded")]
    first, second = table
    assert first["val/loss"] == logged(folder / "sweep" / "0")["val/loss"][-1]
    assert second["val/loss"] is None
    assert "2 jobs against model.width" in drawn[0].get_suptitle()
