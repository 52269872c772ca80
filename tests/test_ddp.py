"""One process and two real gloo processes give the same answers."""

import json

import pytest
import torch

from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import certify, polish
from tests.children import side_by_side
from tests.two_processes import main


def run(devices, options, folder):
    side_by_side(folder, devices, main, devices, options, folder / "found.json")
    return json.loads((folder / "found.json").read_text())


def numbers(value):
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in (key, *numbers(value[key]))]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 21},
        {"num_samples": 23, "batch_size": 8, "num_test": 17},
        {"num_samples": 17, "batch_size": 4, "replicas": 2, "read": True, "num_test": 1},  # none on one process
        {"num_samples": 21, "batch_size": 5, "hidden_dims": [7, 5]},
        {"num_samples": 12, "hidden_dims": [16], "polish": True},  # four steps, far from any kink
        {"num_samples": 61, "hidden_dims": [3], "split": 6000},
        {"num_samples": 61, "hidden_dims": [3], "split": 0},
    ],
    ids=[
        "full batch",
        "mini-batches",
        "replicas, and a reader of the loader",
        "two layers, a batch of one",
        "polish",
        "shards",
        "shards, iterated",
    ],
)
def test_two_processes_agree_with_one(tmp_path, options):
    one, two = run(1, options, tmp_path / "one"), run(2, options, tmp_path / "two")
    assert (one.pop("world_size"), two.pop("world_size")) == (1, 2)
    assert one["visits"] == two["visits"] == [6, 6]
    if options.get("replicas", 1) == 1:
        assert set(one["counts"]) == set(two["counts"]) == {6.0}  # every sample once in each of the 6 epochs
    assert one.keys() == two.keys()
    assert one["digests"] == two["digests"]
    assert one["logged"].keys() == two["logged"].keys()
    one |= one.pop("logged")
    two |= two.pop("logged")
    for name in one:
        for a, b in zip(numbers(one[name]), numbers(two[name]), strict=True):
            same_text = isinstance(a, str) or a is None or b is None
            assert a == b if same_text else b == pytest.approx(a, rel=1e-9, abs=1e-10), name


@pytest.mark.slow
def test_polishing_from_afar_ends_in_a_minimum_on_any_number_of_processes(tmp_path):
    """Not in the same one: on its way across kinks the last bit of the weights decides."""
    one, two = (run(devices, {"num_samples": 21, "polish": True}, tmp_path / str(devices)) for devices in (1, 2))
    assert one["digests"] == two["digests"]  # of before
    assert one["logged"]["train/mse"] == pytest.approx(two["logged"]["train/mse"], rel=1e-9)
    inputs, targets = GaussianData(21, 6).tensors()
    for found in (one, two):
        assert (found["evidence"], found["zero_error"], found["mce"]) == ("certificate", True, 0)
        output, hidden = (torch.tensor(weights, dtype=torch.float64) for weights in sorted(found["weights"], key=len))
        again = certify(hidden.reshape(9, 6), output, inputs, targets, max_distance=1e-9)
        assert (again.kind, again.zero_error) == (found["kind"], True)
        assert again.is_minimum


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_descent_is_followed_where_one_process_has_all_samples(tmp_path, split):
    options = {"num_samples": 21, "hidden_dims": [3], "max_distance": 1e-6, "follow_descent": True}
    found = run(2, options | ({"split": 6000} if split else {}), tmp_path / "two")
    if split:
        assert found["descends_to"] is None
        return
    output, hidden = (torch.tensor(weights, dtype=torch.float64) for weights in sorted(found["weights"], key=len))
    expected = polish(hidden.reshape(3, 6), output, *GaussianData(21, 6).tensors())
    assert found["descends_to"] == expected.certificate.kind
    assert found["descends_to_mse"] == pytest.approx(expected.certificate.mse, rel=1e-6)


@pytest.mark.slow
def test_all_processes_stop_where_one_was_told_to_and_seldom_ask_one_another(tmp_path):
    found = run(2, {"stop": 150}, tmp_path / "stopped")
    assert 150 <= found["steps"] == found["saved"] <= 250
    assert found["visits"] == {"samples": 21, "fewest": found["steps"]}  # of both processes
    assert found["questions"] <= 5 + 4 * found["seconds"]  # about twice a second, however slow the steps are
