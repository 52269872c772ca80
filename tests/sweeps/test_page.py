"""What the page of a sweep takes from its jobs, and that a large sweep makes no large file."""

import json
import re
from pathlib import Path

import pytest

from lightning_mnn.figures.report_page.render import html_of
from lightning_mnn.sweeps import page as module
from lightning_mnn.sweeps.jobs import Status, Sweep, SweepJob, read_sweep
from lightning_mnn.sweeps.page import page_of, write_report_page
from lightning_mnn.tasks.report import report
from tests.tasks.test_sweep_report import SUMMARY, settings, write_job, write_plan


def large_sweep(jobs, **changes):
    summaries = [SUMMARY | {"mse": 1e-9 * number, "seed": number} | changes for number in range(jobs)]
    each = [
        SweepJob(Path(str(number)), (f"seed={number}", "a=1"), Status.FINISHED, "train", summary)
        for number, summary in enumerate(summaries)
    ]
    swept = {"seed": tuple(range(jobs)), "data.num_samples": tuple(10 * (number % 7) for number in range(jobs))}
    return Sweep(Path("sweep").absolute(), tuple(each), swept)


def test_a_page_of_many_jobs_stays_below_10_mb(monkeypatch):
    logs = {f"metric/{k}": {10 * step: 1.23456789e-7 * step for step in range(300)} for k in range(16)}
    monkeypatch.setattr(module, "_logs", lambda sweep, job: logs)
    Path("sweep").mkdir()
    sweep = large_sweep(module.MAX_ROWS + 1_000)
    path = write_report_page(sweep)
    assert path.stat().st_size < 10e6
    text = path.read_text()
    assert text.count("<tr>") == module.MAX_ROWS + 1
    assert "The table ends after 5,000 of 6,000 rows: sweep.csv has all." in text


def test_rows_know_their_jobs_where_there_are_replicas():
    lists = {
        "replicas": 2,
        "kind": ["saddle", "differentiable_minimum"],
        "zero_error": [False, True],
        "mse": [1.0, 0.0],
    }
    write_job(Path("sweep/0"), ["seed=1"], **lists)
    write_job(Path("sweep/1"), ["seed=3"], finished=False, num_samples=None)
    write_job(Path("sweep/2"), ["seed=5"], **lists)
    page = page_of(read_sweep(Path("sweep").absolute()))
    assert page.jobs == [0, 0, 1, 2, 2]
    assert [ended and ended.key for ended in page.classes] == ["not_told", "global", None, "not_told", "global"]
    assert [problem.name for problem in page.problems] == ["1 (seed = 3)"]
    assert page.data["columns"]["mse"] == [1.0, 0.0, None, 1.0, 0.0]
    assert page.data["scales"]["seed"]["index"] == [0, 0, 1, 2, 2]


def test_the_page_tells_what_is_ahead_from_what_is_reached():
    ahead = {"kind": "not_stationary", "descends_to": "kink_minimum", "descends_to_zero_error": False}
    write_job(Path("sweep/0"), ["seed=1"], **ahead)
    write_job(Path("sweep/1"), ["seed=2"], kind="kink_minimum", zero_error=False)
    page = page_of(read_sweep(Path("sweep").absolute()))
    assert [ended.key for ended in page.classes] == ["kink_ahead", "kink"]
    text = html_of(page)
    names = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])["names"]
    assert list(names) == ["global", "suboptimal", "kink", "kink_ahead", "not_told"]  # ahead: only what there is
    assert len({look["color"] for look in names.values()}) == 5
    assert '<i class="kink_ahead"></i>kink with error ahead' in text
    assert f"td .kink_ahead {{ background: {names['kink_ahead']['color']}; }}" in text


@pytest.mark.parametrize("name", ["console.log", "quickstart.log"])
def test_the_end_of_a_failed_jobs_log_is_shown(name):
    write_plan(Path("sweep"), "seed=1,2")
    write_job(Path("sweep/0"), ["seed=1"], finished=False, num_samples=None)
    lines = [f"line {number}" for number in range(5_000)]
    Path(f"sweep/0/{name}").write_text("\n".join([*lines, " 10 %\r 99 %", "\x1b[31mError: ü\x1b[0m"]) + "\n")
    (problem, waiting) = page_of(read_sweep(Path("sweep").absolute())).problems
    assert problem.log.splitlines()[-3:] == ["line 4999", " 99 %", "Error: ü"]
    assert len(problem.log.splitlines()) == 40
    assert (waiting.status, waiting.log) == ("waiting", "")


def test_curves_are_thinned_and_broken_logs_are_left_out():
    write_job(Path("sweep/0"), ["seed=1"])
    write_job(Path("sweep/1"), ["seed=2"])
    rows = "".join(f"{step},{step / 7}\n" for step in range(1_000))
    Path("sweep/0/metrics.csv").write_text("step,train/mse\n" + rows)
    Path("sweep/1/metrics.csv").write_text("step,train/mse\n1,2,3\n")
    curves = page_of(read_sweep(Path("sweep").absolute())).data["curves"]
    assert curves.keys() == {"0"}
    steps, values = curves["0"]["train/mse"]
    assert len(steps) == module.MAX_POINTS
    assert (steps[0], steps[-1]) == (0, 999)
    assert values[-1] == pytest.approx(999 / 7, rel=1e-4)


def test_a_single_run_gets_a_page(capsys):
    write_job(Path("run"), ["seed=4"], zero_error=True)
    Path("run/metrics.csv").write_text("step,train/mse\n0,0.5\n9,0.1\n")
    report(settings("folder=run"))
    text = Path("run/report.html").read_text()
    assert "Run run" in text
    assert "lightning-mnn seed=4" in text
    assert "written: run/report.html" in capsys.readouterr().out


def test_sweeps_of_other_programs_have_a_page():
    record = {
        "status": "finished",
        "return_value": 0.5,
        "seconds": 2.0,
        "minimum": {"kind": "undecided", "evidence": "second_order"},
    }
    for number in range(3):
        folder = Path(f"sweep/{number}")
        (folder / "logs").mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps(record | {"overrides": [f"lr={10.0**-number}"]}))
        (folder / "logs" / "metrics.csv").write_text(f"step,val/loss\n0,{number}\n5,{number / 2}\n")
    page = page_of(read_sweep(Path("sweep").absolute()))
    assert page.common == [("kind", "undecided"), ("seconds", "2"), ("return_value", "0.5")]
    assert page.data["x"] == "lr"
    assert page.data["y"] == "return_value"
    assert page.data["columns"]["val/loss"] == [0.0, 0.5, 1.0]
    assert {ended.key for ended in page.classes} == {"not_told"}
