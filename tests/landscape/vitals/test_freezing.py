"""Planted trajectories of patterns and weights settle where they were made to."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape import ActivationPattern, Freeze, freeze_step, weights_freeze_step


def snapshots(patterns, steps):
    """The last first, as ``freeze_step`` reads them."""
    layers = [
        {"a": ActivationPattern(p[..., :40]).pack(), "b": ActivationPattern(p[..., 40:]).pack()} for p in patterns
    ]
    return reversed(list(zip(steps, layers, strict=True)))


def by_definition(patterns, steps):
    for k, step in enumerate(steps):
        later = patterns[k:]
        changes = torch.stack([(now != then) for then, now in pairwise(later)]) if len(later) > 1 else torch.zeros(1, 1)
        if float(changes.any(0).double().mean()) < 0.01:
            return step
    return None


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0.0, 0.2))
def test_the_step_is_that_of_the_definition(seed, count, rate):
    g = torch.Generator().manual_seed(seed)
    patterns, steps = [torch.rand(10, 60, generator=g) < 0.5], [3 * k for k in range(count)]
    for k in range(1, count):
        flips = torch.rand(10, 60, generator=g) < rate * 2.0 ** (-k)
        patterns.append(patterns[-1] ^ flips)
    assert int(freeze_step(snapshots(patterns, steps))) == by_definition(patterns, steps)


def test_a_pair_that_flips_to_and_fro_counts_once():
    calm = torch.zeros(10, 60).bool()
    busy = calm.clone()
    busy[0, :5] = True  # 5 of 600 pairs, fewer than 1 %, at every snapshot
    assert int(freeze_step(snapshots([~calm, *([busy, calm] * 10)], range(21)))) == 1
    busy[0, :6] = True  # 1 %
    assert int(freeze_step(snapshots([~calm, *([busy, calm] * 10)], range(21)))) == 20


def test_snapshots_are_read_no_further_back_than_needed():
    read = []

    def one_by_one():
        for step in (40, 30, 20, 10, 0):
            read.append(step)
            yield step, {"a": ActivationPattern(torch.full((2, 3), step >= 30)).pack()}

    assert int(freeze_step(one_by_one())) == 30
    assert read == [40, 30, 20]


def test_replicas_freeze_by_themselves_and_other_layers_are_refused():
    first = torch.stack([torch.zeros(4, 60), torch.ones(4, 60)]).bool()
    second = torch.ones(2, 4, 60).bool()
    assert freeze_step(snapshots([first, second, second], (0, 5, 9))).tolist() == [5, 0]
    with pytest.raises(ValueError, match="step 0 has other layers, units or samples"):
        freeze_step([(5, {"a": ActivationPattern(second).pack()}), (0, {"b": ActivationPattern(second).pack()})])
    with pytest.raises(ValueError, match="snapshots must not be empty"):
        freeze_step([])


def test_weights_settle_where_the_rest_of_their_path_is_short():
    steps = torch.tensor([0, 10, 20, 30, 40])
    lengths = torch.tensor([[50.0, 49.5, 0.4, 0.1], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    assert weights_freeze_step(steps, lengths).tolist() == [20, 40, 0, 40]
    assert int(weights_freeze_step(torch.tensor([7]), torch.zeros(0))) == 7


def test_the_ratio_and_its_sentence():
    assert Freeze(1200, 4680, 10_000).ratio == pytest.approx(3.9)
    assert (
        str(Freeze(0, 300, 1000))
        == "patterns froze at step 0 of 1,000: hardly any ever changed; the weights moved until step 300"
    )
    assert str(Freeze(500, 300, 1000)).endswith("the weights had settled by step 300")
