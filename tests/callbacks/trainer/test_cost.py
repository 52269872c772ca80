"""What a callback costs is measured, and kept within its share."""

from contextlib import suppress
from itertools import pairwise

import pytest
import torch

from lightning_mnn.callbacks.trainer import cost
from lightning_mnn.callbacks.trainer.cost import CostTier, TimeShare

CPU = torch.device("cpu")


class Clock:
    """Stands still unless it is told to go on."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cost, "time", clock)
    return clock


def work(share, clock, seconds, **options):
    with share.measured(CPU, **options):
        clock.now += seconds


@pytest.mark.parametrize("tier", [CostTier.LIGHT, CostTier.STANDARD])
def test_work_every_second_stays_within_the_share(tier, clock):
    share = TimeShare(tier.share)
    work(share, clock, 3.0, repeats=False)
    work(share, clock, 2.0)
    done = 0
    for _ in range(5000):
        clock.now += 1.0
        if share.affordable():
            work(share, clock, 1.0, completes=False)
            work(share, clock, 1.0)
            done += 1
    work(share, clock, 2.0)  # at the end
    assert share.spent == 3 + 2 * (done + 2) <= tier.share * 5000
    assert share.spent > 0.45 * tier.share * 5000  # half of it is for the end
    assert share.left_out == 5000 - done
    assert f"{share.left_out} of {share.left_out + done + 2} times were left out" in str(share)
    share.begin()
    assert (share.spent, share.left_out) == (0.0, 0)


def test_without_a_limit_there_is_time_at_the_end(clock):
    share = TimeShare(CostTier.FULL.share)
    work(share, clock, 9.0)
    assert share.affordable()
    assert share.seconds_now() is None
    assert (share.spent, share.left_out) == (9.0, 0)
    assert share.seconds_at_end() == cost.END_SECONDS
    clock.now += 1e5
    assert share.seconds_at_end() == cost.END_SHARE * 1e5
    assert str(share) == "took 9.0 s, 0.009 % of training"


def test_without_a_limit_nothing_waits_for_a_gpu(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    for share, expected in ((None, 0), (0.05, 2)):
        with TimeShare(share).measured(torch.device("cuda")):
            pass
        assert len(waits) == expected


def test_work_within_work_counts_once(clock):
    share = TimeShare(0.05)
    with share.measured(CPU, repeats=False):
        clock.now += 1.0
        work(share, clock, 2.0)
        clock.now += 1.0
    assert (share.spent, share.done) == (4.0, 1)


@pytest.mark.parametrize("cost_of_all", [0.3, 3.0, 30.0, 1e9])
def test_work_of_unknown_cost_is_tried_within_the_share(clock, cost_of_all):
    """Each try is stopped when half of the share is used up; the next waits until there is twice that time."""
    share = TimeShare(0.01)
    tried = []
    for _ in range(5000):
        clock.now += 1.0
        if share.affordable():
            left = share.seconds_now()
            tried.append(left)
            work(share, clock, min(left, cost_of_all))
            if left < cost_of_all:
                share.stopped()
    left = share.seconds_at_end()
    work(share, clock, min(left, cost_of_all))
    assert share.spent <= 0.01 * share.training_seconds + 1e-9
    assert all(later > 1.99 * earlier for earlier, later in pairwise(tried) if later < 0.99 * cost_of_all)
    if cost_of_all < 5:
        assert share.done > 1


def test_at_the_end_nothing_is_begun_that_is_known_to_take_longer(clock):
    share = TimeShare(0.05)
    clock.now += 100.0
    work(share, clock, 6.0)  # more than was left
    assert share.seconds_at_end() == 0
    clock.now += 300.0
    assert share.seconds_at_end() == 14.0


def test_work_that_fails_counts(clock):
    share = TimeShare(0.5)
    with suppress(ZeroDivisionError), share.measured(CPU):
        clock.now += 4.0
        _ = 1 / 0
    assert share.spent == 4.0
