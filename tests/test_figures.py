import json

import pytest
from matplotlib.image import imread

from lightning_mnn.figures import PANELS, Figure, read_metrics, run_figure

SUMMARY = {
    "input_dim": 3, "hidden_dims": [4], "negative_slope": 0.1, "num_samples": 50, "replicas": 1,
    "kind": "not_stationary", "mse": 0.25, "wrong": 3,
}  # fmt: skip


def write_run(folder, rows, **changes):
    names = sorted({name for row in rows for name in row})
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figure that is drawn."""
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), real(self, *a, **k))[1])
    return figures


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
