import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from lightning_mnn.figures import PANELS, census_figure, read_metrics, run_figure, scan_figure
from lightning_mnn.landscape.bounds import global_log_volume, suboptimal_log_volume
from lightning_mnn.landscape.intervals import Proportion
from tests.scans import write_scan

SUMMARY = {
    "input_dim": 3, "hidden_dims": [4], "negative_slope": 0.1, "num_samples": 50, "replicas": 1,
    "kind": "not_stationary", "mse": 0.25, "wrong": 3,
}  # fmt: skip


def write_run(folder, rows, **changes):
    names = sorted({name for row in rows for name in row})
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))


def test_metrics_are_read_by_name(tmp_path):
    write_run(
        tmp_path, [{"step": 0, "train/mse": 0.5}, {"step": 3, "minimum/mse": 1e-31}, {"step": 4, "train/mse": 0.25}]
    )
    assert read_metrics(tmp_path / "metrics.csv") == {"train/mse": ([0, 4], [0.5, 0.25]), "minimum/mse": ([3], [1e-31])}


def test_every_curve_is_drawn_with_its_values_and_legends_lie_outside(tmp_path, drawn):
    names = [name for panel in PANELS for name, _ in panel.curves]
    rows = [{"step": step} | {name: (i + 1) * 10.0**-step for i, name in enumerate(names)} for step in (0, 5, 9)]
    write_run(tmp_path, rows)
    path = run_figure(tmp_path)
    assert path == tmp_path / "figure.png"
    assert imread(path).shape[:2] == (720, 1300)
    (figure,) = drawn
    axes = figure.axes
    assert [len(ax.lines) for ax in axes] == [len(panel.curves) for panel in PANELS]
    for ax, panel in zip(axes, PANELS, strict=True):
        assert ax.get_ylabel() == panel.unit
        assert ax.get_xlabel() == "optimiser step"
        for line, (name, _) in zip(ax.lines, panel.curves, strict=True):
            steps, values = read_metrics(tmp_path / "metrics.csv")[name]
            assert line.get_xdata().tolist() == steps
            assert line.get_ydata().tolist() == values
        if legend := ax.get_legend():
            assert legend.get_window_extent().y1 <= ax.get_window_extent().y0  # below the panel
    assert "3 wrong" in figure.get_suptitle()
    assert list(tmp_path.glob(".*")) == []


def test_what_was_not_logged_is_said(tmp_path, drawn):
    write_run(tmp_path, [{"step": 1, "train/mse": 0.5}], mse=[0.1, 0.2], wrong=[1, 2], kind=["a", "a"], replicas=2)
    run_figure(tmp_path)
    texts = [text.get_text() for ax in drawn[0].axes for text in ax.texts]
    assert texts == ["not logged in this run"] * 5
    assert "mean of 2 replicas" in drawn[0].get_suptitle()
    assert "2 × a" in drawn[0].get_suptitle()


def census_rows(scan, sizes, slope, shares):
    """Rows of a census: shares of (rank deficient, any minimum, global, sub-optimal at ε = 0, at ε = 0.1) by size."""
    for (n, d0, d1), (rank, found, zero, lenient, strict) in zip(sizes, shares, strict=True):
        for epsilon, suboptimal in ((0.0, lenient), (0.1, strict)):
            proportions = {
                "rank_deficient": Proportion.of(round(5000 * rank), 5000),
                "suboptimal_minimum": Proportion.of(round(5000 * suboptimal), 5000),
                "any_minimum": Proportion.of(round(600 * found), 600),
                "global_minimum": Proportion.of(round(600 * zero), 600),
            }
            yield {
                "scan": scan, "num_samples": n, "input_dim": d0, "width": d1, "negative_slope": slope,
                "epsilon": epsilon, "parameters_per_sample": d0 * d1 / n,
                "log_theorem_6_suboptimal": min(0.0, float(suboptimal_log_volume(n, d0, d1, epsilon, slope))),
                "log_theorem_9_global": float(global_log_volume(n, d0, d1)) if d0 * d1 >= 2 * n else "",
                **{f"{name}_{key}": v for name, share in proportions.items() for key, v in vars(share).items()},
            }  # fmt: skip


def write_census(folder):
    widths, samples = [(20, 5, d1) for d1 in (2, 4, 7, 8, 20)], [(d * d // 4, d, d) for d in (6, 8, 10, 12)]
    relu = [(1, 0.01, 0, 0.006, 0.006), (0.7, 0.003, 0, 0.004, 0), (0.1, 0.1, 0.06, 0.05, 0.006),
            (0.06, 0.52, 0.48, 0.04, 0.002), (0, 1, 1, 0, 0)]  # fmt: skip
    leaky = [(1, 0, 0, 0, 0), (0.5, 0, 0, 0.003, 0), (0.01, 0.1, 0.1, 0, 0), (0, 0.6, 0.6, 0, 0), (0, 1, 1, 0, 0)]
    rows = []
    for slope, shares in ((0.0, relu), (0.1, leaky)):
        rows += census_rows("width", widths, slope, shares)
        rows += census_rows("samples", samples, slope, [(0, 1, 1, 0, 0)] * 4)
    rare = [
        {"num_samples": n, "negative_slope": slope, "epsilon": 0.1, "log_suboptimal_minimum": value,
         "log_suboptimal_minimum_low": "" if value == "" else value - 1, "log_suboptimal_minimum_high": high}
        for slope, n, value, high in (
            (0.0, 9, -2.0, -1.0), (0.0, 16, -5.0, -4.0), (0.0, 25, -10.0, -9.0), (0.0, 36, -15.0, -14.0),
            (0.1, 9, -13.0, -12.0), (0.1, 16, "", -8.0),
        )
    ]  # fmt: skip
    for name, table in (("census.csv", rows), ("splitting.csv", rare)):
        lines = [",".join(table[0]), *(",".join(str(value) for value in row.values()) for row in table)]
        (folder / name).write_text("\n".join(lines) + "\n")
    return rows


def texts_of(figure):
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def test_a_census_is_drawn_with_its_shares_and_limits(tmp_path, drawn):
    rows = write_census(tmp_path)
    assert census_figure(tmp_path) == tmp_path / "figure.png"
    (figure,) = drawn
    assert [ax.get_yscale() for ax in figure.axes] == ["log"] * 4
    for ax, slope in zip(figure.axes[:2], (0.0, 0.1), strict=True):
        table = [r for r in rows if (r["scan"], r["negative_slope"], r["epsilon"]) == ("width", slope, 0.1)]
        lines = [np.asarray(line.get_ydata()).tolist() for line in ax.lines]
        for name in ("rank_deficient", "global_minimum", "suboptimal_minimum"):
            shares = [row[f"{name}_hits"] / row[f"{name}_trials"] or math.nan for row in table]
            assert any(np.array_equal(shares, line, equal_nan=True) for line in lines), name
            limits = [row[f"{name}_high"] for row in table if not row[f"{name}_hits"]]
            assert any(limits == pytest.approx(line) for line in lines), name
        assert [math.exp(row["log_theorem_6_suboptimal"]) for row in table] in lines
        words = " ".join(text.get_text() for text in texts_of(ax))
        for said in (
            "rank(A∘X) < N",
            "V(G)",
            "any differentiable minimum",
            "Theorem 6",
            "10$^{-52}$",
            "d0·d1 = N",
            "= ½",
        ):
            assert said in words, said
    assert "e$^{-0.49 N}$" in " ".join(text.get_text() for text in texts_of(figure.axes[2]))


@pytest.mark.parametrize("measured", [False, True])
def test_no_text_of_a_census_covers_another(tmp_path, drawn, measured):
    if measured:
        for name in ("census.csv", "splitting.csv"):
            shutil.copy(Path(__file__).parents[2] / "outputs" / "reference" / "census" / name, tmp_path)
    else:
        write_census(tmp_path)
    census_figure(tmp_path)
    (figure,) = drawn
    for ax in figure.axes:
        boxes = [Text.get_window_extent(text) for text in (*ax.texts, ax.title, ax.xaxis.label)]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1


def test_errors_of_a_scan_are_drawn_with_their_spread(tmp_path, drawn):
    _, sizes = write_scan(tmp_path, "error")
    assert scan_figure(tmp_path) == tmp_path / "figure.png"
    (figure,) = drawn
    assert [ax.get_title() for ax in figure.axes] == [
        "one hidden layer, d0 = d1 = d",
        "two hidden layers, d0 = d1 = d2 = d",
    ]
    for ax, layers in zip(figure.axes, (1, 2), strict=True):
        for bars, width in zip(ax.containers, (10, 20, 30), strict=True):
            curve = [size for size in sizes if (size["hidden_layers"], size["input_dim"]) == (layers, width)]
            line, _, (spread,) = bars.lines
            ratios = [size["parameters"] / size["num_samples"] for size in curve]
            assert line.get_xdata().tolist() == pytest.approx(ratios)
            assert line.get_ydata().tolist() == pytest.approx([100 * size["mce_mean"] for size in curve])
            ends = [(low[1], high[1]) for low, high in spread.get_segments()]
            for (low, high), size in zip(ends, curve, strict=True):
                assert high - low == pytest.approx(200 * size["mce_std"])
        assert any(line.get_xdata()[0] == 1 and line.get_linestyle() == "--" for line in ax.lines)
        assert ax.get_legend().get_window_extent().y1 <= ax.get_window_extent().y0  # below the panel
    assert "ReLU, 6 replicas\n2,000 epochs of adam" in figure.get_suptitle()


def test_a_rate_that_is_not_set_is_not_said(tmp_path, drawn):
    write_scan(tmp_path, "error")
    path = tmp_path / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"optimizer": {"name": "adam"}}))
    scan_figure(tmp_path)
    assert drawn[0].get_suptitle().endswith("2,000 epochs of adam, float64")


def test_minima_of_a_scan_are_drawn_one_by_one(tmp_path, drawn):
    table, sizes = write_scan(tmp_path, "minima", layers=(1,), ratios=(0.5,))
    scan_figure(tmp_path)
    (figure,) = drawn
    for ax, column in zip(figure.axes, ("min_preactivation", "mse"), strict=False):
        dots = [line for line in ax.lines if len(line.get_xdata()) == 1 and line.get_marker() != "None"]
        heights = [float(line.get_ydata()[0]) for line in dots]
        values = [row[column] for row in table]
        assert ax.get_yscale() == "log"
        assert [round(float(line.get_xdata()[0])) for line in dots] == [0] * 6 + [1] * 6 + [2] * 6
        for height, value in zip(heights, values, strict=True):
            assert height == pytest.approx(value) or (value == 0 and 0 < height < min(v for v in values if v > 0))
        assert len({line.get_color() for line in dots}) == len({line.get_marker() for line in dots}) == 5
    assert any(text.get_text() == "exactly 0" for text in figure.axes[1].texts)
    counts = [text.get_text() for text in figure.axes[2].texts]
    assert counts == ["2", "1", "1", "1", "1"] * 3
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "10\nN = 55",
        "20\nN = 210",
        "30\nN = 465",
    ]
    assert [size["num_samples"] for size in sizes] == [55, 210, 465]


@pytest.mark.parametrize("figure", ["error", "minima"])
@pytest.mark.parametrize(("dims", "layers"), [((10,), (2,)), ((10, 20, 40, 60, 80, 100), (1,)), ((8, 9), (1, 2))])
def test_no_text_of_a_scan_covers_another(tmp_path, drawn, figure, dims, layers):
    write_scan(tmp_path, figure, dims=dims, layers=layers, ratios=(0.5,) if figure == "minima" else (0.5, 1.0, 2.0))
    scan_figure(tmp_path)
    (drawing,) = drawn
    texts = [*drawing.texts, *(text for legend in drawing.legends for text in legend.get_texts())]
    for ax in drawing.axes:
        (low, high), legend = ax.get_xlim(), ax.get_legend()
        texts += [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, *(legend.get_texts() if legend else [])]
        texts += [label for label in ax.get_xticklabels() if low <= label.get_position()[0] <= high]
    texts = [text for text in texts if text.get_text()]
    boxes = [Text.get_window_extent(text) for text in texts]
    for (one, this), (other, that) in itertools.combinations(zip(boxes, texts, strict=True), 2):
        assert not one.overlaps(other), (this.get_text(), that.get_text())
    for box in boxes:
        assert drawing.bbox.x0 <= box.x0 <= box.x1 <= drawing.bbox.x1
