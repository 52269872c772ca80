"""The command as one meets it: its help, completion in the shell, and trial runs by debug=."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lightning_mnn import app
from lightning_mnn.runs.console import config_tree, print_config, print_verdict
from lightning_mnn.tasks import TASKS
from tests.children import PATIENCE, command, start_ranks

CONF = Path(__file__).parent.parent / "conf"
NO_LOG = ("logger.mode=disabled", "callbacks.angular_volume_monitor.measure=[]")


def test_the_help_names_all_there_is_and_fits_a_terminal(tmp_path):
    said = command(tmp_path, "--help")
    lines = said.splitlines()
    assert len(lines) <= 70
    assert max(map(len, lines)) <= 100
    assert lines[2].startswith("usage: lightning-mnn [-m] [experiment=NAME]")
    words = set(re.findall(r"\w+", said))
    for group in ("experiment", "model", "data", "optimizer", "schedule", "trainer", "callbacks", "logger", "debug"):
        options = {path.stem for path in (CONF / group).glob("*.yaml")} - {"default"}
        assert options | {group} <= words, group
    known = set(TASKS)
    assert known <= words
    for shown in (
        "resume=true", "debug=limit", "hydra/launcher=device_pool hydra.launcher.n_jobs=2", "hydra/launcher=slurm",
        "task=report sweep=", "dry_run", "logger.mode=", 'eval "$(lightning-mnn -sc install=bash)"',
    ):  # fmt: skip
        assert shown in said


def complete(*lines):
    """What bash offers for each line, its last word being begun."""
    script = 'eval "$(lightning-mnn -sc install=bash)"\n'
    for line in lines:
        script += f"COMP_LINE={line!r} COMP_POINT={len(line)} COMP_CWORD={len(line.split()) - 1}\n"
        script += 'hydra_bash_completion 2> /dev/null; echo "${COMPREPLY[*]}"\n'
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [shutil.which("bash"), "--norc", "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    return [line.split() for line in done.stdout.splitlines()]


def test_bash_completes_groups_and_keys():
    experiments, keys = complete("lightning-mnn experiment=fi", "lightning-mnn -m data=mnist debug=limit data.pa")
    assert experiments == ["experiment=figure_5_1", "experiment=figure_5_2"]
    assert keys == ["data.part="]


def trial(folder, *arguments):
    """What a trial run said, and the folder that it worked in."""
    name = arguments[0].removeprefix("experiment=")
    before = set(folder.glob(f"outputs/debug/{name}/*"))
    said = command(folder, *arguments)
    (run,) = set(folder.glob(f"outputs/debug/{name}/*")) - before
    assert [path.name for path in (folder / "outputs").iterdir()] == ["debug"]
    return said, run


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def assert_whole(run):
    names = {"summary.json", "metrics.csv", "figure.png", "patterns.zarr", "checkpoints", "plan.json", ".hydra"}
    assert names <= {path.name for path in run.iterdir()}
    assert summary_of(run)["finished"]


@pytest.mark.parametrize("experiment", ["quickstart", pytest.param("mnist", marks=pytest.mark.slow)])
def test_every_trial_runs(experiment, tmp_path, request):
    options = [f"experiment={experiment}", *NO_LOG]
    if experiment == "mnist":
        options.append(f"data.root={request.getfixturevalue('mnist_root')}")

    said, run = trial(tmp_path, *options, "debug=fast", *(["data.part=test"] if experiment == "mnist" else []))
    assert "no errors in 1 step(s) of a fast_dev_run; nothing is saved" in said
    assert {path.name for path in run.iterdir()} == {".hydra", f"{experiment}.log"}

    _, run = trial(tmp_path, *options, "debug=limit")
    assert_whole(run)
    assert (summary_of(run)["epochs"], summary_of(run)["num_samples"]) == (
        3,
        40 if experiment == "quickstart" else 2115,
    )

    _, run = trial(tmp_path, *options, "debug=overfit", "trainer.max_epochs=100")
    assert_whole(run)
    assert summary_of(run)["steps"] == summary_of(run)["epochs"] <= 100
    assert summary_of(run)["mse"] < 0.01
    assert summary_of(run)["mce"] == 0

    if experiment == "mnist":
        return
    _, run = trial(tmp_path, *options, "debug=profiler", "trainer.max_epochs=2", "data.num_samples=20")
    assert_whole(run)
    profile = (run / "fit-profile.txt").read_text()
    assert "run_training_epoch" in profile
    assert "[Callback]LocalMinimumDetector.on_train_end" in profile


def test_experiments_in_parts_have_a_small_form(tmp_path):
    said = command(tmp_path, "experiment=census", "debug=fast", expect=1)
    assert "error: debug=fast: sets trainer, which task=census does not use: choose debug=limit\n" in said
    _, run = trial(tmp_path, "experiment=figure_5_1", "debug=limit", "scan.processes=1")
    assert summary_of(run)["networks"] == 2 * 2 * 3 * 3
    assert (run / "figure.png").exists()


@pytest.mark.parametrize(
    ("experiment", "override", "message"),
    [
        (
            "census",
            "ckpt_path=a",
            "ckpt_path=a: task=census does not use it: leave ckpt_path out, or choose ckpt_path=null",
        ),
        (
            "census",
            "replicas=2",
            "replicas=2: task=census does not use it: leave replicas out, or choose replicas=1",
        ),
        ("census", "dtype=float32", "dtype=float32: task=census does not use it: leave dtype out"),
        ("figure_5_2", "ckpt_path=a", "ckpt_path=a: task=scan does not use it"),
    ],
)
def test_what_an_experiment_in_parts_would_pass_over_is_refused(experiment, override, message):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        cfg = compose("config", [f"experiment={experiment}", override, "run_dir=run"])
    with pytest.raises(ValueError, match=message):
        app.run(cfg)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume=yes"], "resume=yes: must be true or false"),
        (["-m", "resume=1", "seed=1,2"], "resume=1: must be true or false"),
        (["resume=null"], "resume=null: must be true or false"),
        (["name=a/b"], "name=a/b: must be the name of one folder in outputs, without a slash"),
        (["name=null", "hydra.run.dir=run"], "name=null: must be the name of one folder in outputs, without a slash"),
        (["-m", "name=..", "seed=1,2"], "name=..: must be the name of one folder in outputs, without a slash"),
    ],
)
def test_what_would_be_misunderstood_is_refused_before_there_is_a_folder(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-mnn", *arguments])
    with pytest.raises(SystemExit, match="1"):
        app.main()
    assert capsys.readouterr().err.startswith(f"error: {message}: ")
    assert not [*Path().iterdir()]


def test_a_name_is_shown_as_it_is(capsys):
    """Square brackets are no markup."""
    summary = {"kind": None, "mse": 0.1, "wrong": None, "epochs": 1, "steps": 2, "seconds": 3.0, "num_samples": 4}
    print_verdict("q [y]", summary | {"reason": "net [a]"}, Path("out/q [y]").absolute(), offline=False)
    print_verdict(2024, summary, Path(), offline=False)  # name=2024 is a number
    print_config(config_tree(OmegaConf.create({"name": "q [x]", "at": ["[/b]"]})))
    said = capsys.readouterr().out
    for words in (
        "2024: verdict",
        "q [y]: verdict",
        "net [a]",
        "everything is in out/q [y]\n",
        "name: q [x]",
        "at: ['[/b]']",
    ):
        assert words in said, words


def test_a_job_of_a_sweep_refuses_it_too():
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        cfg = compose("config", ["resume=ture", "run_dir=run"])
    with pytest.raises(ValueError, match="resume=ture: must be true or false"):
        app.run(cfg)


@pytest.mark.slow
def test_a_trial_by_two_processes(tmp_path):
    arguments = ("trainer=cpu_ddp", "debug=profiler", "trainer.max_epochs=2", *NO_LOG, "data.num_samples=20")
    ranks = start_ranks(tmp_path, 2, *arguments, "hydra.run.dir=run")
    for rank in ranks:
        rank.join(PATIENCE)
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "err.txt").read_text()[-3000:]
    run = tmp_path / "run"
    assert_whole(run)
    assert {"fit-profile-0.txt", "fit-profile-1.txt"} <= {path.name for path in run.iterdir()}
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("name", app.__preload__)
def test_what_jobs_of_a_sweep_will_import_is_there(name):
    assert importlib.import_module(name)
