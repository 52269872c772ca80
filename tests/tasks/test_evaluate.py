"""Finished runs evaluated again: their own numbers, other data, other settings, sweeps."""

import csv
import json

import pytest
import torch

from lightning_mnn.data import GaussianData
from lightning_mnn.results import load_run
from tests.children import command

SMALL = ("data.num_samples=20", "data.input_dim=6", "data.num_test=30", "trainer.max_epochs=60", "~logger.wandb")
OFF = ("callbacks.angular_volume_monitor=null", "callbacks.activation_pattern_recorder=null")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    axes = ("model.hidden_dims=[8],[8,5]", "replicas=1,2")
    command(folder, "-m", *axes, *SMALL, *OFF, "hydra.sweep.dir=sweep", "report=false")
    return folder


def same(one, other):
    if isinstance(one, float) or isinstance(other, float):
        return one == pytest.approx(other, rel=1e-12, abs=1e-25)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_evaluation_gives_the_numbers_of_the_summaries_and_adds_them_to_the_table(sweep):
    command(sweep, "task=evaluate", "folder=sweep")
    for job in range(4):
        found, summary = (json.loads((sweep / f"sweep/{job}/{n}.json").read_text()) for n in ("evaluation", "summary"))
        certified = ("kind", "reason_code", "zero_error", "distance", "kinks", "rank")
        for key in ("mse", "mce", "test_mse", "test_mce", *(certified if "kind" in found else ())):
            assert same(found[key], summary[key]), key
        assert found["data"] == ""
        assert ("kind" in found) == (job < 2)  # there are no certificates of deeper networks
    with (sweep / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["evaluated.test_mse"] == row["test_mse"] for row in rows] == [True] * 6
    assert not list(sweep.glob("outputs/*"))


def test_other_data_and_settings_are_those_of_the_command(sweep):
    command(sweep, "task=evaluate", "folder=sweep/0", "data.seed=5", "data.num_test=9")
    found = json.loads((sweep / "sweep/0/evaluation.json").read_text())
    module, data = load_run(sweep / "sweep/0").module(), GaussianData(20, 6, seed=5, num_test=9)
    for prefix, (inputs, targets) in (("", data.tensors()), ("test_", data.test_tensors())):
        with torch.no_grad():
            assert found[f"{prefix}mse"] == pytest.approx(float((module(inputs) - targets).square().mean()), rel=1e-12)
    assert found["max_distance"] == 1e-3
    assert found["data"] == "data.seed=5 data.num_test=9"
    command(sweep, "task=evaluate", "folder=sweep/0", "callbacks.local_minimum_detector.max_distance=0.5")
    assert json.loads((sweep / "sweep/0/evaluation.json").read_text())["max_distance"] == 0.5


def test_a_run_with_another_objective_is_not_certified_again(tmp_path):
    """A certificate is of minima of the MSE over all weights, which this run did not look for."""
    command(tmp_path, *SMALL, *OFF, "optimizer.weight_decay=1e-2", "hydra.run.dir=run")
    said = command(tmp_path, "task=evaluate", "folder=run")
    found, summary = (json.loads((tmp_path / f"run/{name}.json").read_text()) for name in ("evaluation", "summary"))
    assert found["objective"] == summary["objective"] == "mse_with_weight_decay"
    assert "kind" not in found
    assert "not certified again: its objective is mse_with_weight_decay" in said
    assert same(found["mse"], summary["mse"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "task=evaluate needs a finished run or sweep: give folder=DIR"),
        (("folder=none",), "folder=none: there is no such folder"),
        (
            ("folder=sweep/0", "ckpt_path=best.ckpt"),
            "checkpoint=best.ckpt: sweep/0/checkpoints/best.ckpt is not",
        ),
        (("folder=sweep/0", "data.input_dim=7"), "data.input_dim=7: does not fit the network, which has 6"),
        (("folder=sweep/0", "data.replicas=2"), "data.replicas=2: does not fit the network, which has 1"),
    ],
)
def test_mistakes_are_named(sweep, arguments, message):
    assert message in command(sweep, "task=evaluate", *arguments, expect=1)
