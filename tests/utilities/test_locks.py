"""Locks between processes: they keep others out, and end with the process that holds them."""

import subprocess
import sys

import pytest

from lightning_mnn.utilities.files import locked, locked_if_free

HOLD = """
import sys, time
from pathlib import Path
from lightning_mnn.utilities.files import {name}
with {name}(Path(sys.argv[1])):
    {within}
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds a lock; returns it when it does."""
    started = []

    def start(name, within="pass"):
        code = HOLD.format(name=name, within=within)
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["locked", "locked_if_free"])
def test_a_killed_process_holds_no_lock(name, holder, tmp_path):
    process = holder(name)
    with locked_if_free(tmp_path / "lock") as alone:
        assert not alone
    process.kill()
    process.wait()
    with locked_if_free(tmp_path / "lock") as alone:
        assert alone


def test_a_child_that_is_left_holds_no_lock(holder, tmp_path):
    process = holder("locked", "__import__('subprocess').Popen(['sleep', '20'], stdout=-3)")
    process.kill()
    process.wait()
    with locked_if_free(tmp_path / "lock") as alone:
        assert alone


def test_who_waits_is_told_once_and_gets_the_lock(holder, tmp_path):
    process = holder("locked")

    def end():
        told.append("waiting")
        process.kill()

    told = []
    with locked(tmp_path / "lock", end):
        assert told == ["waiting"]
        with locked(tmp_path / "other", end):
            assert told == ["waiting"]


def test_a_file_that_was_left_does_not_block(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    with locked_if_free(path) as alone:
        assert alone
    assert not path.exists()
    with locked(path):
        pass


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path):
    with locked_if_free(tmp_path / "no folder" / "lock") as alone:
        assert alone
