"""What the launcher writes of a sweep, and the command that resumes it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_mnn.launchers.jobs.records import SweepCommand, hydra_value, recorded, returned

COMMAND = SweepCommand(("python", "src/train.py"), ("-m", "seed=1,2"), "", "hydra.launcher.resume=true")
NO_PLACES = OmegaConf.create({"trainer": {}})


def started_by(monkeypatch, *words, arguments):
    monkeypatch.setattr(sys, "orig_argv", [*words, *arguments])
    monkeypatch.setattr(sys, "argv", [words[-1], *arguments])
    return SweepCommand.of_this_process(NO_PLACES)


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"], exclude_characters="$"), min_size=1))
def test_hydra_reads_the_folder_that_was_meant(text):
    override = OverridesParser.create().parse_override(f"hydra.sweep.dir={hydra_value(text)}")
    assert override.value() == text


def test_a_program_is_started_as_it_was(monkeypatch, tmp_path):
    arguments = ["--config-name", "other", "-m", "hydra.sweep.dir=old", "++hydra.launcher.resume=true", "x='a b',c"]
    command = started_by(monkeypatch, "python3", "-W", "ignore", "src/train.py", arguments=arguments)
    given = "python3 -W ignore src/train.py --config-name other -m 'x='\"'\"'a b'\"'\"',c'"
    assert command.resumed(Path("logs/new")) == f"{given} hydra.launcher.resume=true hydra.sweep.dir=logs/new"
    monkeypatch.chdir("/")
    assert command.resumed(tmp_path / "logs" / "new") == (
        f"cd {tmp_path} && {given} hydra.launcher.resume=true hydra.sweep.dir=logs/new"
    )
    assert command.resumed(Path("/elsewhere")).endswith(" hydra.sweep.dir=/elsewhere")


def test_an_installed_program_is_started_by_its_name(monkeypatch, tmp_path):
    script = tmp_path / "bin" / "their-program"
    script.parent.mkdir()
    script.touch(0o755)
    command = started_by(monkeypatch, sys.executable, str(script), arguments=["-m"])
    assert command.program == (sys.executable, str(script))
    monkeypatch.setenv("PATH", str(script.parent))
    assert started_by(monkeypatch, sys.executable, str(script), arguments=["-m"]).program == ("their-program",)


def test_callbacks_of_the_environment_are_part_of_the_command(monkeypatch):
    monkeypatch.setenv("LIGHTNING_MNN_CALLBACKS", "recorder,monitor")
    command = started_by(monkeypatch, "python", "train.py", arguments=["-m"])
    assert command.resumed(Path("out")).startswith("LIGHTNING_MNN_CALLBACKS=recorder,monitor python train.py -m ")


@pytest.mark.parametrize(("key", "expected"), [(True, "resume=true"), ("last.ckpt", "hydra.launcher.resume=true")])
def test_a_key_of_the_program_that_is_no_yes_or_no_is_not_taken_for_ours(key, expected):
    assert SweepCommand.of_this_process(OmegaConf.create({"resume": key})).resume == expected


def test_the_command_is_read_as_it_was_written_and_what_is_torn_is_none():
    folder = Path("sweep").absolute()
    COMMAND.write(folder)
    assert SweepCommand.read(folder) == COMMAND
    whole = (folder / "sweep.json").read_text()
    for text in (whole[: len(whole) // 2], "", "[]", "{}", json.dumps({"program": 3, "arguments": []})):
        (folder / "sweep.json").write_text(text)
        assert SweepCommand.read(folder) is None
    (folder / "sweep.json").unlink()
    assert SweepCommand.read(folder) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, 0.25),
        (torch.tensor(0.5), 0.5),
        (np.float64(0.5), 0.5),
        ({"val/acc": torch.tensor([1, 2]), "sizes": (1, [2.5, None])}, {"val/acc": [1, 2], "sizes": [1, [2.5, None]]}),
        (float("-inf"), float("-inf")),
        ("word", "word"),
    ],
)
def test_what_a_job_returned_is_given_again(value, expected):
    assert returned(json.loads(json.dumps(recorded(value), allow_nan=False))) == expected


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": print}])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(TypeError, match="JSON cannot represent"):
        recorded(value)
