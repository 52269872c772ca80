"""Results of runs and sweeps, read as users read them in a notebook."""

import importlib.util
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from lightning_mnn.landscape import certify
from lightning_mnn.results import load_run, load_sweep
from tests import children

SMALL = (
    "data.num_samples=20",
    "data.input_dim=6",
    "model.hidden_dims=[8]",
    "trainer.max_epochs=40",
    "replicas=2",
    "data.label_noise=0.25",
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    off = ("~logger.wandb", "callbacks.angular_volume_monitor=null", "hydra.sweep.dir=sweep", "report=false")
    children.command(folder, "-m", "seed=1,3", *SMALL, *off)
    return folder / "sweep"


def columns_of(table):
    return table.to_pydict() if isinstance(table, pa.Table) else table.to_dict("list")


def test_a_run_has_its_summary_metrics_patterns_module_and_data(sweep):
    run = load_run(sweep / "1")
    assert run.summary["seed"] == 3
    assert run.config.data.num_samples == 20
    metrics = columns_of(run.metrics)
    assert metrics["step"] == sorted(metrics["step"])
    logged = [value for value in metrics["minimum/mse"] if value is not None and not math.isnan(value)]
    data = run.data()
    inputs, targets = data.inputs, data.targets
    module = run.module()
    with torch.no_grad():
        mse = (module(inputs) - targets).square().mean(-1)
    assert mse.tolist() == pytest.approx(run.summary["mse"], rel=1e-9)
    assert logged[-1] == pytest.approx(float(mse.mean()), rel=1e-9)
    network = module.network()
    certificates = certify(network.hidden_weights[0], network.output_weights, inputs, targets)
    assert [str(certificate.kind) for certificate in certificates] == run.summary["kind"]
    assert list(run.patterns) == run.patterns.store.steps
    (last,) = run.patterns[40].values()
    expected = (inputs @ module.hidden_weights[0].mT > 0).numpy()
    assert last.dtype == bool
    np.testing.assert_array_equal(last, expected)


def test_data_can_be_changed(sweep):
    assert load_run(sweep / "0").data(num_samples=7).tensors()[1].shape == (2, 7)


def test_a_sweep_is_a_table_of_jobs_and_replicas(sweep):
    results = load_sweep(sweep)
    table = columns_of(results.table)
    assert results.swept == ("seed",)
    assert table["seed"] == [1, 1, 3, 3]
    assert table["replica"] == [0, 1, 0, 1]
    runs = list(results.runs)
    assert [run.summary["seed"] for run in runs] == [1, 3]
    assert table["mse"] == [value for run in runs for value in run.summary["mse"]]


def test_without_pandas_tables_are_those_of_pyarrow(sweep, monkeypatch):
    monkeypatch.setattr("lightning_mnn.runs.saved.find_spec", lambda name: None)
    assert isinstance(load_run(sweep / "0").metrics, pa.Table)
    assert isinstance(load_sweep(sweep).table, pa.Table)


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed")
def test_with_pandas_tables_are_data_frames(sweep):
    assert list(load_sweep(sweep).table.columns[:3]) == ["job", "folder", "seed"]


def test_wrong_folders_are_named(sweep):
    with pytest.raises(FileNotFoundError, match="is the folder of a sweep: use load_sweep"):
        load_run(sweep)
    with pytest.raises(FileNotFoundError, match="is not that of a run"):
        load_run(sweep.parent / "none")
    with pytest.raises(FileNotFoundError, match=r"checkpoint=best.ckpt: .* is not a file; there are: last.ckpt"):
        load_run(sweep / "0").module("best.ckpt")
    with pytest.raises(FileNotFoundError, match="is the folder of one run"):
        load_sweep(sweep / "0")
