"""Sweeps whose jobs are forked from a server: they are as separate as new processes, and survive its end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import PATIENCE, all_ended, wait_for

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CONFIG = """
do: report
size: 1
resume: false
trainer: {devices: 1, accelerator: cpu}
"""
APP = """
import os, random, signal, sys, threading, time
from pathlib import Path

import hydra
import lazily_imported
from hydra.core.hydra_config import HydraConfig

print("imported")
seen = []


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.do == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if cfg.do == "exit":
        os._exit(7)
    if cfg.do == "raise":
        raise ValueError("wrong")
    if cfg.do == "wait":
        (folder / "pids").write_text(f"{os.getpid()} {os.getppid()}")
        while not Path("go").exists():
            time.sleep(0.01)
    if cfg.do == "crash_once" and not (folder / "crashed").exists():
        (folder / "crashed").touch()
        os.abort()
    if cfg.do == "threads":
        threading.Thread(target=time.sleep, args=(999,), daemon=True).start()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        random.seed(0)
    seen.append(cfg.size)
    os.environ["LEFT_BEHIND"] = os.environ.get("LEFT_BEHIND", "") + "x"
    return {
        "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(), "session": os.getsid(0), "seen": seen,
        "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "environ": os.environ["LEFT_BEHIND"], "random": random.random(),
        "here": os.getcwd(), "input": sys.stdin.read(), "threads": threading.active_count(), "resume": cfg.resume,
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "server": "connection" in dir(),
        "files": sorted(os.readlink(f"/proc/self/fd/{n}") for n in (0, 1, 2)),
    }


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def app(tmp_path):
    """The command of a sweep of a small application."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "lazily_imported.py").write_text("")
    return [sys.executable, "app.py", "-m", "hydra/launcher=device_pool", "hydra.sweep.dir=sweep"]


def say(command, expect=0):
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=ENVIRONMENT)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def records():
    paths = sorted(Path("sweep").glob("*/job.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text()) for path in paths]


def test_forked_jobs_share_nothing(app):
    gpus = ["trainer.accelerator=gpu", "hydra.launcher.gpus=[4,5]"]
    say([*app, *gpus, "do=report,threads", "size=1,2,3", "hydra.launcher.n_jobs=2"])
    assert all(record["warm"] for record in records())
    values = [record["return_value"] for record in records()]
    assert len({value["parent"] for value in values}) == 1
    assert len({value["pid"] for value in values}) == 6
    assert len({value["random"] for value in values}) == 4  # those of the three that seed are the same
    for number, value in enumerate(values):
        assert value["pid"] == value["group"] == value["session"]
        assert len(value["seen"]) == len(value["environ"]) == 1
        assert value["gpu"] in "45"
        assert value["here"] == str(Path.cwd())
        assert value["input"] == ""
        assert value["threads"] == 2 + (number > 2)  # its own, and the one that waits for the launcher's end
        assert value["sigterm"] == (number < 3)
        log = Path.cwd() / "sweep" / str(number) / "console.log"
        assert value["files"] == sorted(["/dev/null", str(log), str(log)])
        assert log.read_text().startswith("imported\n")
    assert {value["gpu"] for value in values} == {"4", "5"}


@pytest.mark.parametrize("warm", ["true", "false"])
def test_crashes_are_told_alike_with_and_without_a_server(app, warm):
    said = say([*app, "do=segv,exit,raise,report", f"hydra.launcher.warm={warm}", "hydra.launcher.n_jobs=2"], expect=1)
    assert [record["exit_code"] for record in records()] == [-signal.SIGSEGV, 7, 1, 0]
    assert [record["warm"] for record in records()] == [warm == "true"] * 4
    for words in ("was ended by SIGSEGV", "failed with exit code 7", "ValueError: wrong", "1 done, 3 failed"):
        assert words in said
    assert "cold" not in said


def pids_of(job):
    path = Path("sweep", job, "pids")
    return [int(pid) for pid in wait_for(lambda: path.exists() and path.read_text()).split()]


def test_jobs_survive_their_server_and_further_ones_start_without_it(app):
    command = [*app, "do=wait", "size=1,2,3", "hydra.launcher.n_jobs=2"]
    launcher = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    (_, server), (killed, same) = (pids_of(job) for job in "01")
    assert server == same
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: all_ended([server]))
    os.kill(killed, signal.SIGKILL)
    wait_for(Path("sweep/1/job.json").exists)
    pids_of("2")
    Path("go").touch()
    said, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 1
    assert [(record["status"], record["exit_code"], record["warm"]) for record in records()] == [
        ("finished", 0, True),
        ("failed", None, True),
        ("finished", 0, False),
    ]
    assert "has ended, and its exit code is not known" in said
    assert said.count("jobs start cold, each with its own imports: the server that imports the program has ended") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_the_server_ends_with_the_launcher(app, number):
    launcher = subprocess.Popen([*app, "do=wait"], env=ENVIRONMENT)
    pids = pids_of("0")
    launcher.send_signal(number)
    launcher.wait(PATIENCE)
    wait_for(lambda: all_ended(pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_the_server_ends_with_the_launcher_also_while_it_imports(app, number):
    hang = "open('pid', 'w').write(str(os.getpid())); time.sleep(999)"
    Path("lazily_imported.py").write_text(f"import os, sys, time\nif sys.argv[-1] == '':\n    {hang}")
    launcher = subprocess.Popen(app, env=ENVIRONMENT)
    server = int(wait_for(lambda: Path("pid").exists() and Path("pid").read_text()))
    launcher.send_signal(number)
    assert launcher.wait(PATIENCE) == (-9 if number is signal.SIGKILL else 130)
    wait_for(lambda: all_ended([server]))
    assert not Path("sweep/0").exists()


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(999,), daemon=True).start()",
            (),
            "importing the program starts threads",
        ),
        ("import os; os.environ.get('CUDA_VISIBLE_DEVICES')", ("hydra.launcher.gpus=[4,5]",), "CUDA_VISIBLE_DEVICES"),
        ("", ("+hydra.job.env_set.OMP_NUM_THREADS=3",), "the variable OMP_NUM_THREADS"),
        ("import os; os.environ.get('CI'); os.environ['SET'] = '1'", (), None),
    ],
)
def test_where_a_fork_is_not_safe_jobs_start_without_a_server(app, module, options, words):
    Path("lazily_imported.py").write_text(module)
    accelerator = "gpu" if options and "gpus" in options[0] else "cpu"
    said = say([*app, *options, f"trainer.accelerator={accelerator}", "size=1,2", "hydra.launcher.n_jobs=2"])
    assert "2 done" in said
    assert said.count("jobs start cold, each with its own imports") == (words is not None)
    if words is not None:
        assert words in said
        assert not all(record["warm"] for record in records())


def test_a_job_that_crashes_is_started_again_and_resumes(app):
    said = say([*app, "do=crash_once,raise,segv", "hydra.launcher.retries=2"], expect=1)
    assert [(record["status"], record["retries"]) for record in records()] == [
        ("finished", 1),
        ("failed", 0),  # an error of the program
        ("failed", 2),
    ]
    assert records()[0]["return_value"]["resume"] is True
    assert "job #0 (do=crash_once) was ended by SIGABRT" in said
    assert "it is started again (1 of 2), resuming it" in said
    assert said.count("it is started again") == 3


def test_after_a_failure_no_further_jobs_start(app):
    said = say([*app, "do=raise,report", "size=1,2", "hydra.launcher.n_jobs=1", "hydra.launcher.fail_fast=true"], 1)
    assert len(records()) == 1
    assert "hydra.launcher.fail_fast=true: a job has failed, so 3 were not started" in said
    assert "4 of 4 jobs are not finished; this command runs them:" in said


def test_after_a_failure_those_that_run_continue(app):
    launcher = subprocess.Popen(
        [*app, "do=wait,raise,report", "hydra.launcher.n_jobs=2", "hydra.launcher.fail_fast=true"], env=ENVIRONMENT
    )
    pids_of("0")
    wait_for(Path("sweep/1/job.json").exists)
    Path("go").touch()
    assert launcher.wait(PATIENCE) == 1
    assert [record["status"] for record in records()] == ["finished", "failed"]


@pytest.mark.parametrize("option", ["retries=-1", "jobs_per_gpu=0"])
def test_options_that_cannot_be(app, option):
    assert f"hydra.launcher.{option}: must be" in say([*app, f"hydra.launcher.{option}", "size=1,2"], expect=1)
