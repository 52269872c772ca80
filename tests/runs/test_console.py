"""What the verdict says of the volume, and of a run that was interrupted."""

import math

import pytest

from lightning_mnn.runs.console import _facts

RUN = {"kind": None, "mse": 0.1, "wrong": None, "epochs": 1, "steps": 2, "seconds": 3.0, "num_samples": 4}


@pytest.mark.parametrize(
    ("value", "error", "bound", "words"),
    [
        (-3698.04, 0.91, -13536.44, "-3698.0 ± 0.9 nats (at least -13536.4)"),
        (None, None, -13536.44, "at least -13536.4 nats"),
        (None, None, -math.inf, "none, it lies on a kink"),
        ([-7.0, None, -5.0], [0.2, None, 0.1], [-9.0, -math.inf, -8.0], "-7.0 … -5.0 ± 0.1 … 0.2 nats (at least"),
        (None, None, None, None),
    ],
)
def test_the_volume_of_the_region(value, error, bound, words):
    found = {"log_volume": value, "log_volume_standard_error": error, "log_volume_lower_bound": bound}
    said = dict(_facts(RUN | found)).get("log-volume of its region")
    assert said is None if words is None else said.startswith(words)


@pytest.mark.parametrize("replicas", [1, 3])
def test_an_interrupted_run_says_so(replicas):
    found = {"kind": "not_stationary", "reason": "interrupted after 2 steps", "rank": None, "rank_cap": 4}
    found = {key: [value] * replicas if replicas > 1 else value for key, value in found.items()}
    said = dict(_facts(RUN | found | {"ended_by": "interruption"}))
    assert said["converged to"] == "nothing yet: the run was interrupted"
    assert said["because"] == "interrupted after 2 steps"
    assert said["rank of A∘X"] == "not computed, at most 4, of 4 samples"


DESCENT = {"kind": "not_stationary", "descends_to": "kink_minimum", "descends_to_mse": 0.1234}
DESCENT |= {"descends_to_distance": 0.81, "descends_to_zero_error": False, "advice": "train on"}


def test_where_descent_leads_and_what_to_do():
    said = dict(_facts(RUN | DESCENT))
    assert said["descent leads to"] == "a local minimum on kinks with MSE 0.12, 0.81 away"
    assert said["advice"] == "train on"
    said = dict(_facts(RUN | {"kind": "kink_minimum", "descends_to": None, "advice": None}))
    assert not {"descent leads to", "advice"} & said.keys()


def test_where_descent_leads_replicas():
    lists = {
        "kind": ["not_stationary", "kink_minimum", "saddle", "saddle"],
        "descends_to": ["differentiable_minimum", None, "kink_minimum", "kink_minimum"],
        "descends_to_mse": [1e-31, None, 0.5, 0.25],
        "descends_to_distance": [0.5, None, 2.0, 1.0],
        "descends_to_zero_error": [True, None, False, False],
        "advice": ["train on", None, "stop", "stop"],
    }
    said = dict(_facts(RUN | lists))
    assert said["descent leads to"] == (
        "1 × a differentiable local minimum with zero error, 0.5 away; "
        "2 × a local minimum on kinks with MSE 0.25 … 0.5, 1 … 2 away"
    )
    assert said["advice"] == "stop\ntrain on"
