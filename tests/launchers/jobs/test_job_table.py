"""What a terminal shows of a sweep."""

from pathlib import Path

import pytest
from rich.console import Console

from lightning_mnn.launchers.jobs.devices import Allocation, Request
from lightning_mnn.launchers.jobs.job import Job
from lightning_mnn.launchers.jobs.records import JobState
from lightning_mnn.launchers.jobs.table import JobTable, counts

REQUEST = Request(gpus=True, count=2, processes=2)
STATES = [
    *[JobState.FINISHED] * 5, JobState.FAILED, *[JobState.RUNNING] * 2, *[JobState.WAITING] * 20, JobState.KEPT,
    JobState.INTERRUPTED,
]  # fmt: skip


def job(number, state):
    started = state in (JobState.FINISHED, JobState.FAILED, JobState.RUNNING)
    allocation = Allocation(REQUEST, ("0", "3"), 1) if started else None
    progress = {"epochs": 1200, "max_epochs": 2000, "loss": 0.0123456} if number == 6 else {}
    return Job(
        number,
        [],
        f"seed={number}",
        None,
        Path(),
        REQUEST,
        "digest",
        state,
        allocation,
        seconds=83.0,
        progress=progress,
    )


def screen(jobs, height, width=100):
    console = Console(width=width, height=height, force_terminal=True, color_system=None, record=True, file=None)
    with console.capture() as captured:
        console.print(JobTable(jobs), height=height)
    return captured.get().splitlines()


def test_the_table_fits_the_screen_and_keeps_what_matters():
    jobs = [job(number, state) for number, state in enumerate(STATES)]
    for height in (10, 15, 60):
        lines = screen(jobs, height)
        assert len(lines) <= height
        rows = [line.split() for line in lines]
        assert ["6", "seed=6", "running", "GPU", "0,3", "1,200/2,000", "0.0123", "1:23"] in rows
        assert ["7", "seed=7", "starting", "GPU", "0,3", "1:23"] in rows
        assert ["5", "seed=5", "failed", "GPU", "0,3", "1:23"] in rows
        assert lines[-1].strip() == "20 waiting, 2 running, 5 done, 1 done before, 1 failed, 1 interrupted"
    assert all(f"seed={number} " in "\n".join(lines) for number in range(len(jobs)))


def test_a_long_name_is_cut_and_leaves_the_rest_its_place():
    long = job(6, "running")
    long.label = "optimizer.lr=0.001 " * 20
    (row,) = (line for line in screen([long], 20, width=80) if "running" in line and "…" in line)
    assert len(row) <= 80
    assert row.split()[-3:] == ["1,200/2,000", "0.0123", "1:23"]


@pytest.mark.parametrize("state", sorted(set(STATES)))
def test_each_state_is_counted(state):
    assert counts([job(0, state)]).startswith("1 ")
