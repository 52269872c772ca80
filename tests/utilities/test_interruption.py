"""Requests to stop: where they are answered, and how processes hear of one another's."""

import copy
import pickle

import pytest

from lightning_mnn.utilities import interruption
from lightning_mnn.utilities.interruption import Interrupted, Pace, alone, forget, request, requested, safe_point


def test_the_first_request_counts_until_it_is_forgotten():
    safe_point()
    request(15)
    request(2)
    assert requested() == 15
    with pytest.raises(Interrupted) as stop:
        safe_point()
    assert (stop.value.number, stop.value.code) == (15, 143)
    forget()
    safe_point()


def test_a_process_of_several_stops_only_where_none_waits_for_it(monkeypatch):
    monkeypatch.setattr(interruption.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(interruption.dist, "get_world_size", lambda: 2)
    request(15)
    safe_point()
    with pytest.raises(Interrupted), alone():
        safe_point()
    safe_point()


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301 (what it has just pickled)
def test_another_process_gets_the_same_interruption(copied):
    found = copied(Interrupted(2))
    assert (found.number, found.code) == (2, 130)


def test_the_pace_follows_the_clock_within_limits(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    pace = Pace(seconds=1.0)
    assert pace.is_time()
    for seconds_a_call, expected in ((0.1, 10), (0.1, 10), (1e-9, 100), (5.0, 1), (0.25, 4)):
        clock[0] += pace.pause * seconds_a_call
        pace.restart(pace.proposal())
        assert pace.pause == expected
    assert [pace.is_time() for _ in range(4)] == [False, False, False, True]
