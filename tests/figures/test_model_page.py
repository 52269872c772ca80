"""The page of a run of any program: findings first, then pictures and numbers, from the files of its folder."""

import json
import math
import re

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_mnn.figures.model_panels import panels_of
from lightning_mnn.figures.report_page.model_page import has_model_run, read_model_run, write_model_page
from lightning_mnn.findings import FINDINGS, CallbackFindings, Fact, Finding, FindingCode, Unknown, UnknownCode
from tests.browser import browser

EVIL = "</p><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
LONG = "; ".join(f"clause {k} of a reason that goes on" for k in range(30))


def dead(layer, share):
    return Fact.of(Finding(FindingCode.DEAD_UNITS, layer, share))


FOUND = [
    CallbackFindings(
        "ActivationPatternRecorder",
        (Fact("freeze", "patterns froze"), *(dead(f"net.{k}", 0.1 + 0.01 * k) for k in range(5))),
        (Unknown("local_complexity", UnknownCode.NOT_MEASURED, EVIL),),
        {"regions_visited": 3, "findings": [{"code": "dead_units"}], "freeze_step": None},
    ),
    CallbackFindings(
        "LocalMinimumDetector",
        (Fact("gradient_above_tolerance", f"not stationary: {LONG}", advice="train on"),),
        (),
        {"kind": "not_stationary", "evidence": "second_order"},
    ),
]


def write(folder, found=FOUND, **about):
    folder.mkdir(exist_ok=True)
    content = {"module": "Net", "epochs": 2, "steps": 6, "seconds": 1.5, "ended_by": None} | about
    (folder / FINDINGS).write_text(json.dumps(content | {"callbacks": [one.plain() for one in found]}))
    rows = [f"{k},{0.5**k},{1 + k},{'' if k else 'nan'}" for k in range(6)]
    head = "step,train_loss,pattern/net.0/dead_fraction,gradient/norm"
    (folder / "metrics.csv").write_text("\n".join([head, *rows, ""]))
    (folder / "hparams.yaml").write_text("lr: 0.1\nname: é\n")
    return folder


def page_of(folder):
    return write_model_page(read_model_run(folder)).read_text(encoding="utf-8")


def test_the_findings_come_first_the_unusual_ones_before_the_others(tmp_path):
    page = page_of(write(tmp_path / "run"))
    order = ["not stationary", "14 % of net.4", "and 4 more like this", LONG[:20], "train on", "patterns froze"]
    order += ["What could not be found", "local_complexity", "Pictures", "Numbers", "train_loss", "regions_visited"]
    assert [page.index(text) for text in order] == sorted(page.index(text) for text in order)
    assert "GradientStatistics was not in the Trainer" in page
    for text in ("0.1", "é", "1.5"):
        assert text in page
    assert "<script" not in page
    assert EVIL not in page


def test_what_is_missing_or_damaged_is_said_and_the_rest_is_shown(tmp_path):
    folder = write(tmp_path / "run")
    (folder / "metrics.csv").write_text("step,loss\n1,two\n")
    (folder / "hparams.yaml").write_text("- [")
    assert "metrics.csv is damaged (line 2" in page_of(folder)
    (folder / "metrics.csv").unlink()
    assert "no metrics.csv. Give the Trainer a CSVLogger" in page_of(folder)
    for content in ("{}", '{"callbacks": [{"callback": 1}]}', "no"):
        (folder / FINDINGS).write_text(content)
        assert re.search("findings.json is (damaged|of another version)", page_of(folder))
    (folder / FINDINGS).unlink()
    assert "There is no findings.json here" in page_of(folder)
    assert not has_model_run(folder)


def test_a_run_that_an_error_ended_says_so(tmp_path):
    assert "RuntimeError: no more memory" in page_of(write(tmp_path / "run", ended_by="RuntimeError: no more memory"))


def test_a_log_of_tensorboard_is_read(tmp_path):
    pytest.importorskip("tensorboard")
    folder = write(tmp_path / "run")
    (folder / "metrics.csv").unlink()
    logger = TensorBoardLogger(tmp_path, "", "run")
    for step in range(3):
        logger.log_metrics({"train_loss": 0.5**step, "epoch": 0}, step)
    logger.finalize("success")
    run = read_model_run(folder)
    assert run.series == {"train_loss": ([0, 1, 2], [1.0, 0.5, 0.25])}
    assert not run.notes


def test_what_a_program_logs_is_grouped_and_drawn_as_it_is(drawn):
    steps = list(range(2000))
    series = {
        "train_loss": (steps, [math.exp(-step / 100) for step in steps]),
        "val/loss": ([0, 1000], [1.0, math.nan]),
        "acc_epoch": ([1, 2], [0.5, -0.25]),
        "gradient/a/relative_norm": ([1, 2], [1.0, 1e-3]),
        "gradient/b/relative_norm": ([1, 2], [1.0, 0.5]),
        "pattern/a/effective_rank": ([0], [3.0]),
    }
    titles = [title for title, png in panels_of(series) if png.startswith(b"\x89PNG")]
    assert titles == ["loss", "acc", "Effective rank of the activations", "Gradients beside their weights"]
    loss, acc, rank, gradients = (figure.axes[0] for figure in drawn)
    assert [len(line.get_xdata()) for line in loss.lines] == [501, 1]
    assert loss.lines[0].get_xdata()[-1] == 1999
    assert [ax.get_yscale() for ax in (loss, acc, rank, gradients)] == ["log", "linear", "linear", "log"]
    assert list(acc.lines[0].get_ydata()) == [0.5, -0.25]
    assert len(gradients.lines) == 2


def test_nothing_logged_is_no_picture():
    assert [*panels_of({})] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_it_without_scripts_and_without_scrolling_sideways(tmp_path, width):
    page_of(write(tmp_path / "run"))
    with browser() as tab:
        tab.open(tmp_path / "run" / "report.html", width)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
        assert tab.run("document.title").startswith("Run ")
        assert tab.run("[...document.images].every((image) => image.naturalWidth > 0)")
        assert tab.run("document.getElementById('unknown').getBoundingClientRect().bottom < 1400")
        assert not tab.errors
