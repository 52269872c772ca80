"""What is read of the logs and records of other programs."""

import json
import math
import os
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger

from lightning_mnn.launchers.jobs.records import recorded
from lightning_mnn.runs.logs import read_logs, results_of


def write(steps, folder=".", value=float, **options):
    """A log of Lightning's own."""
    logger = CSVLogger(folder, **options)
    for step in steps:
        logger.log_metrics({"loss": value(step), "epoch": step // 4}, step)
        logger.save()
    return Path(logger.log_dir, "metrics.csv")


def test_a_job_that_was_run_again_from_its_start_has_the_newest_log():
    write(range(10))
    write(range(5), value=lambda step: 100.0 + step)
    assert read_logs(Path())["loss"] == {step: 100.0 + step for step in range(5)}


def test_a_job_that_was_resumed_has_what_was_logged_before_too():
    write(range(10))
    write(range(6, 9), value=lambda step: 100.0 + step)
    assert read_logs(Path())["loss"] == {step: float(step) for step in range(6)} | {6: 106.0, 7: 107.0, 8: 108.0}


def test_the_tenth_version_is_newer_than_the_second():
    for version in (10, 2):
        write([0], version=version, value=lambda step, version=version: float(version))
    assert read_logs(Path())["loss"] == {0: 10.0}


def test_of_several_logs_with_one_metric_the_last_one_written_counts():
    late, early = write([1], name="late"), write([2], name="early")
    os.utime(early, (1, 1))
    assert read_logs(Path())["loss"] == {1: 1.0}
    os.utime(late, (0, 0))
    assert read_logs(Path())["loss"] == {2: 2.0}


def test_what_lies_in_stores_and_hidden_folders_is_no_log():
    write([1], folder="patterns.zarr")
    write([1], folder=".cache")
    assert read_logs(Path()) == {}


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 20])
def test_a_last_line_that_a_kill_has_torn_is_left_out(cut):
    path = write(range(6))
    path.write_bytes(path.read_bytes()[:-cut])
    whole = path.read_bytes().count(b"\n") - 1  # lines below the head
    assert read_logs(Path())["loss"] == {step: float(step) for step in range(whole)}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"loss,step\n1,\x00\xff\n"])
def test_a_log_that_cannot_be_read_is_named(content):
    path = write([0])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"lightning_logs/version_0/metrics.csv is damaged \("):
        read_logs(Path())


@pytest.mark.parametrize("content", ["", "loss\n", "\n\n", "loss,step\nword,1\n", "loss,step\n,\n"])
def test_a_log_without_numbers_has_no_metrics(content):
    write([0]).write_text(content)
    assert set(read_logs(Path())) <= {"step"}


def test_results_are_last_values_and_extremes_without_what_is_no_number():
    logs = {
        "loss": {0: 3.0, 1: 1.0, 2: math.nan},
        "acc": {2: 0.5},
        "status": {0: 1.0},
        "minimum/loss": {0: 2.0, 1: 1.0},
    }
    found = results_of({}, logs)
    assert math.isnan(found.pop("loss"))
    assert found == {
        "loss.min": 1.0, "loss.max": 3.0, "acc": 0.5, "logged.status": 1.0, "minimum/loss": 1.0, "seconds": None
    }  # fmt: skip


def test_return_values_of_any_form_are_columns():
    def columns(value):
        record = json.loads(json.dumps({"return_value": recorded(value), "seconds": 1.0}))
        found = results_of(record, {})
        del found["seconds"]
        return found

    assert columns(0.5) == {"return_value": 0.5}
    assert columns((0.5, 3)) == {"return_value.0": 0.5, "return_value.1": 3}
    assert columns({"val": {"acc": 1.0}, "note": "x"}) == {"return_value.val.acc": 1.0, "return_value.note": "x"}
    assert columns(None) == {}
    assert columns(float("inf")) == {"return_value": math.inf}


def test_kinds_of_replicas_are_one_each():
    one, two = (
        {"evidence": "certificate", "kind": ["saddle"] * count, "reason_code": ["force_on_inactive_unit"] * count}
        for count in (1, 2)
    )
    assert results_of({"minimum": one}, {}) == {
        "kind": "saddle", "reason_code": "force_on_inactive_unit", "evidence": "certificate", "seconds": None
    }  # fmt: skip
    assert results_of({"minimum": two}, {})["replicas"] == 2
    earlier = results_of({"minimum": {"kind": "saddle", "evidence": "certificate"}}, {})  # without a code
    assert (earlier["kind"], earlier["reason_code"]) == ("saddle", None)
