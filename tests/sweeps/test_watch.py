"""The page of a sweep that is watched while it runs."""

import io
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from lightning_mnn.sweeps.lock import held, is_locked
from lightning_mnn.sweeps.watch import watch_sweep
from lightning_mnn.tasks.report import report
from tests.tasks.test_sweep_report import settings, write_job, write_plan

SWEEP = Path("sweep")


def console():
    return Console(file=io.StringIO(), soft_wrap=True)


def test_the_page_is_written_until_the_command_of_the_sweep_has_ended():
    write_plan(SWEEP, "seed=1,2,3")
    running, seen = ExitStack(), []
    running.enter_context(held(SWEEP))

    def next_job(seconds):
        assert seconds >= 5
        text = (SWEEP / "report.html").read_text()
        assert '"reload":5' in text
        seen.append(re.search(r"<dt>jobs</dt><dd>(.*?)</dd>", text)[1])
        if len(seen) == 4:
            running.close()
        else:
            write_job(SWEEP / str(len(seen) - 1), [f"seed={len(seen)}"])

    watch_sweep(SWEEP.absolute(), console(), wait=next_job)
    assert seen == ["3 waiting", "1 finished, 2 waiting", "2 finished, 1 waiting", "3 finished"]
    assert not is_locked(SWEEP)


def test_a_killed_sweep_is_over(capsys):
    write_plan(SWEEP, "seed=1,2")
    write_job(SWEEP / "0", ["seed=1"])
    (SWEEP / "sweep.lock").touch()  # a kill leaves the file, but nobody holds it
    report(settings("sweep=sweep", "watch=true"))
    said = capsys.readouterr().out
    assert "jobs: 1 finished, 1 waiting" in said
    assert '"reload":null' in (SWEEP / "report.html").read_text()


def test_ctrl_c_ends_the_watching_and_leaves_a_page_that_stays():
    write_plan(SWEEP, "seed=1,2")
    write_job(SWEEP / "0", ["seed=1"])

    def interrupt(seconds):
        raise KeyboardInterrupt

    with held(SWEEP):
        watched = console()
        watch_sweep(SWEEP.absolute(), watched, wait=interrupt)
    assert "no longer watching" in watched.file.getvalue()


def test_before_its_first_job_a_running_sweep_is_waited_for():
    SWEEP.mkdir()
    with held(SWEEP):
        waited = []
        watch_sweep(SWEEP.absolute(), console(), wait=lambda seconds: (waited.append(seconds), write_first_job(waited)))
    assert len(waited) == 2
    with pytest.raises(FileNotFoundError, match="contains no jobs"):
        watch_sweep(Path().absolute() / "other", console())


def write_first_job(waited):
    if len(waited) == 2:
        raise KeyboardInterrupt
    write_job(SWEEP / "0", ["seed=1"])


def test_only_one_command_holds_the_lock_and_its_file_goes_with_it():
    assert not is_locked(SWEEP)
    with held(SWEEP):
        assert is_locked(SWEEP)
        with held(SWEEP):  # a second command works without it
            assert is_locked(SWEEP)
        assert is_locked(SWEEP)
    assert list(SWEEP.iterdir()) == []
