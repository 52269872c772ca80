"""The page of a sweep, as a browser shows it, and what is written in it."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_mnn.figures.report_page.render import Column, Page, Problem, html_of
from lightning_mnn.sweeps.jobs import read_sweep
from lightning_mnn.sweeps.page import write_report_page
from lightning_mnn.verdicts import AT_GLOBAL
from tests.browser import browser
from tests.tasks.test_sweep_report import write_job, write_plan

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">&amp;"
SIZES, SEEDS = (10, 20, 40), (0, 1, 2, 3)


def verdict(size, seed):
    kinds = ("differentiable_minimum", "kink_minimum", "saddle", "differentiable_minimum")
    return {"kind": kinds[seed], "zero_error": size == 40 and seed == 0, "evidence": "certificate"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of twelve finished jobs, a failed one and one that waits."""
    folder = tmp_path_factory.mktemp("page") / "sweep"
    write_plan(folder, "data.num_samples=10,20,40,80", "seed=0,1,2,3")
    for number, (size, seed) in enumerate(product(SIZES, SEEDS)):
        measures = {"mse": size * (1 + seed), "test_mse": 0.1 * seed + 1 / size, "num_samples": size, "seed": seed}
        write_job(folder / str(number), [f"data.num_samples={size}", f"seed={seed}"], **measures, **verdict(size, seed))
        steps = "".join(f"{step},{1 / (1 + step + seed)}\n" for step in range(500))
        (folder / str(number) / "metrics.csv").write_text("step,train/mse\n" + steps)
    write_job(folder / "12", ["data.num_samples=80", "seed=0"], finished=False, num_samples=None)
    record = {"status": "failed", "error": EVIL, "overrides": ["data.num_samples=80", "seed=0"]}
    (folder / "12" / "job.json").write_text(json.dumps(record))
    (folder / "12" / "console.log").write_text(f"first\n\x1b[31m{EVIL}\x1b[0m\n")
    return write_report_page(read_sweep(folder))


@pytest.fixture(scope="module")
def tab():
    with browser() as found:
        yield found


COLUMN = """(name) => {
  const place = [...document.querySelectorAll("th")].findIndex((th) => th.textContent === name);
  const shown = [...document.querySelectorAll("tbody tr")].filter((row) => !row.hidden);
  return shown.map((row) => row.cells[place].textContent);
}"""
CHOOSE = """(part, label, value) => {
  const labels = [...document.querySelectorAll(`${part} label`)];
  const select = labels.find((one) => one.firstChild.textContent.trim() === label).querySelector("select");
  select.value = value;
  select.dispatchEvent(new Event("change"));
}"""
SEARCH = """(words) => {
  const box = document.getElementById("search");
  box.value = words;
  box.dispatchEvent(new Event("input"));
}"""


def column(tab, name):
    """The texts of a column of the table, as it stands in the page."""
    return tab.call(COLUMN, name)


def choose(tab, part, label, value):
    tab.call(CHOOSE, part, label, value)


def marks(tab, part):
    return tab.run(f"[...document.querySelectorAll('{part} [aria-label][tabindex]')].map((one) => one.ariaLabel)")


def test_texts_are_escaped_everywhere():
    columns = [Column(EVIL, [EVIL])]
    parts = {"facts": [(EVIL, EVIL)], "swept": [(EVIL, EVIL)], "common": [(EVIL, EVIL)], "notes": [EVIL]}
    problems = [Problem(EVIL, EVIL, EVIL, EVIL), Problem(EVIL, EVIL, EVIL)]
    data = {"columns": {EVIL: [EVIL]}, "scales": {}, "runs": [EVIL], "not finite": [float("nan")]}
    text = html_of(
        Page(
            EVIL,
            columns=columns,
            classes=[AT_GLOBAL],
            jobs=[0],
            problems=problems,
            resume=[EVIL],
            data=data,
            **parts,
        )
    )
    assert text.count("<script") == text.count("</script>") == 2  # the data and the program
    assert "<img" not in text
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(found)["columns"] == {EVIL: [EVIL]}
    assert json.loads(found)["not finite"] == [None]
    assert not re.search(r"(src|href)=[\"'](?!data:)|@import|url\(", text), "it needs another file"


def test_the_page_works_without_a_network_and_says_what_happened(page, tab):
    tab.open(page)
    assert tab.run("document.title").startswith("Sweep ")
    text = tab.run("document.body.innerText")
    for words in (
        "12 finished, 1 failed, 3 waiting",
        "10, 20, 40, 80",
        "lightning-mnn -m data.num_samples=10,20,40,80",
    ):
        assert words in text, words
    assert "resume=true" in tab.run("document.querySelector('#resume pre').innerText")
    tab.run("document.querySelector('#problems details').open = true")
    assert f"first\n{EVIL}" in tab.run("document.querySelector('#problems details pre').innerText")
    assert EVIL in tab.run("document.querySelector('#problems .error').innerText")
    assert tab.errors == []


def test_statistics_are_those_of_scipy(page, tab):
    tab.open(page)
    for df in (1, 2, 3, 9, 59, 4999):
        assert tab.run(f"reportStatistics.studentQuantile({df})") == pytest.approx(stats.t.ppf(0.975, df), rel=1e-7)
    for hits, trials in ((0, 1), (1, 1), (3, 7), (0, 60), (59, 60), (500, 5000), (4999, 5000)):
        found = tab.run(f"reportStatistics.shareInterval({hits}, {trials})")
        expected = stats.binomtest(hits, trials).proportion_ci(method="exact")
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-7, abs=1e-12)
    values = np.random.default_rng(0).normal(size=12)
    found = tab.run(f"reportStatistics.meanInterval({values.tolist()})")
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-7)
    assert tab.run("reportStatistics.meanInterval([3])") == {"n": 1, "middle": 3, "low": None, "high": None}
    assert tab.run("reportStatistics.meanInterval([0, 1])")["low"] == 0  # a mean of values that are never negative


def test_rows_are_sorted_by_mouse_and_keyboard_and_filtered(page, tab):
    tab.open(page)
    tab.run("[...document.querySelectorAll('th button')].find((one) => one.textContent === 'mse').click()")
    known = sorted(size * (1 + seed) for size, seed in product(SIZES, SEEDS))
    assert column(tab, "mse") == [*map(str, known), "", "", "", ""]
    tab.run("[...document.querySelectorAll('th button')].find((one) => one.textContent === 'mse').focus()")
    tab.press("Enter", 13)
    assert column(tab, "mse") == [*map(str, reversed(known)), "", "", "", ""]  # what has no value stays last
    assert tab.run("document.querySelector('th[aria-sort]').ariaSort") == "descending"
    choose(tab, "#filters", "data.num_samples", "1")
    assert set(column(tab, "data.num_samples")) == {"20"}
    choose(tab, "#filters", "ended in", "kink")
    assert column(tab, "seed") == ["1"]
    choose(tab, "#filters", "ended in", "")
    one_row = "document.getElementById('count').textContent.includes('1 of 16 rows')"
    tab.call(SEARCH, "SADDLE")
    tab.wait(one_row)
    assert column(tab, "seed") == ["2"]
    tab.run("window.isOld = true; location.reload()")  # as a page does that is watched
    tab.wait("!window.isOld && document.readyState === 'complete'")
    tab.wait("document.getElementById('search').value === 'SADDLE'")
    tab.wait(one_row)
    assert column(tab, "seed") == ["2"]


def test_figures_show_means_shares_and_curves(page, tab):
    tab.open(page)
    choose(tab, "#results", "draw", "mse")
    choose(tab, "#results", "of", "")
    values = [20.0 * (1 + seed) for seed in SEEDS]
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    found = [mark for mark in marks(tab, "#results") if mark.startswith("data.num_samples = 20:")]
    assert found == [f"data.num_samples = 20: mean 50 of n = 4, 95 % [{low:.4g}, {high:.4g}]"]
    assert tab.run("document.querySelectorAll('#results circle').length") == 12
    choose(tab, "#results", "draw", "share of suboptimal")
    exact = stats.binomtest(2, 4).proportion_ci(method="exact")
    assert f"data.num_samples = 10: 2 of 4 = 0.5, 95 % [{exact.low:.4g}, {exact.high:.4g}]" in marks(tab, "#results")
    bars = [mark for mark in marks(tab, "#kinds") if mark.startswith("data.num_samples = 40:")]
    counted = [(mark.split(": ")[1], mark.split(": ")[2].split(" = ")[0]) for mark in bars]
    assert counted == [
        ("global minimum (zero error)", "1 of 4"), ("sub-optimal differentiable minimum", "1 of 4"),
        ("minimum on kinks, with error", "1 of 4"), ("no certified minimum", "1 of 4"),
    ]  # fmt: skip
    assert tab.run("document.querySelectorAll('#curves polyline').length") == 6
    tab.run("[...document.querySelectorAll('td input')].at(-1).click()")
    assert tab.run("document.querySelectorAll('#curves polyline').length") == 7
    points = tab.run("document.querySelector('#curves polyline').points.numberOfItems")
    assert 100 <= points <= 200
    assert tab.errors == []


def test_it_fits_a_phone_and_the_table_needs_no_script(page, tab):
    tab.open(page, width=390, height=800)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.open(page, scripts=False)
    assert len(column(tab, "mse")) == 16
    assert tab.run("getComputedStyle(document.querySelector('.figures')).display") == "none"
    assert tab.run("getComputedStyle(document.querySelector('#verdicts table')).display") == "table"


def test_a_page_of_a_running_sweep_loads_itself_again(page, tab):
    sweep = read_sweep(page.parent)
    text = html_of(Page("a", (), (), [], [], []))
    assert 'http-equiv="refresh"' not in text
    watched = write_report_page(sweep, reload=1)
    try:
        tab.open(watched)
        tab.run("document.title = 'before'")
        tab.wait("document.title !== 'before' && document.readyState === 'complete'")
        assert not tab.run("document.getElementById('watch').hidden")
    finally:
        write_report_page(sweep)
    tab.wait("document.readyState === 'complete' && document.getElementById('watch').hidden")
    assert '"reload":null' in Path(page).read_text()
