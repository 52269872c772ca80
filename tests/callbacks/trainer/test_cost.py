"""What a callback costs is measured, and kept within its share."""

from contextlib import suppress

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
    assert share.spent > 0.9 * tier.share * 5000
    assert share.left_out == 5000 - done
    assert f"{share.left_out} of {share.left_out + done + 2} times were left out" in str(share)
    share.begin()
    assert (share.spent, share.left_out) == (0.0, 0)


def test_without_a_limit_nothing_is_measured(clock):
    share = TimeShare(CostTier.FULL.share)
    work(share, clock, 9.0)
    assert share.affordable()
    assert share.spent == 0


def test_work_that_fails_counts(clock):
    share = TimeShare(0.5)
    with suppress(ZeroDivisionError), share.measured(CPU):
        clock.now += 4.0
        _ = 1 / 0
    assert share.spent == 4.0
