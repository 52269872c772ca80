"""Points that were once called minima and are none, and points whose answer must not depend on units of measure."""

import numpy as np
import pytest
import torch

from lightning_mnn.landscape import certify, planted_kink_minimum, planted_minimum, planted_saddle, polish
from tests.landscape.minima.attacks import FAMILIES, Case, fall, loss

MINIMA = ("differentiable_minimum", "kink_minimum")


def test_a_dead_unit_of_huge_weights_hides_nothing():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, 1.0, 0.0])
    found = certify(torch.tensor([[-1e15, -1e15], [0.0, 0.0]]), torch.tensor([1.0, 0.0]), x, y)
    assert found.kind == "saddle"  # w_2 = (.3, .3), z_2 = .3 has a lower loss


def test_polish_does_not_grow_where_no_sample_looks():
    torch.manual_seed(0)
    x, y = torch.randn(3, 5), torch.tensor([1.0, 1.0, -1.0])
    polished = polish(torch.zeros(1, 5), -torch.ones(1), x, y, 0.01)
    assert polished.certificate.mse <= 1
    assert polished.certificate.kind not in MINIMA or polished.certificate.mse < 1e-20
    assert polished.certificate.hidden_weights.abs().max() < 1e4


def test_an_input_that_active_samples_hardly_have_counts():
    """A move along it lowers the loss all the way, which is within rounding beside the length of G e."""
    x = [[1.923, 2.3e-17], [-1.7e-16, -2.27], [-1.7, -2.2e-16], [-0.09, -0.04], [0.592, -8.8e-17], [-0.837, -5e-18]]
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    w = torch.tensor([[2.616423e14, 0.9587841]], dtype=torch.float64)
    z = torch.tensor([2.374092e-15], dtype=torch.float64)
    best = torch.linalg.lstsq(x[[0, 4], :1], y[[0, 4]], driver="gelsd").solution  # as if the second input were none
    found = certify(torch.tensor([[float(best[0]) / float(z), float(w[0, 1])]], dtype=torch.float64), z, x, y)
    assert found.kind not in MINIMA
    start = torch.stack([best[0] / z[0], w[0, 1]])
    lower = torch.stack([start[0], -1 / (2.27 * z[0])])  # which fits the second sample
    way = start + torch.linspace(0, 1, 101, dtype=torch.float64)[:, None] * (lower - start)
    losses = (y - (way @ x.T).relu() * z).square().sum(1)
    assert (losses.diff() <= 0).all()
    assert losses[-1] < losses[0] - 0.9


@pytest.mark.parametrize("plant", [planted_minimum, planted_kink_minimum, planted_saddle])
@pytest.mark.parametrize(("of_inputs", "of_targets", "of_rows"), [(1e15, 1, 1), (1, 1e-15, 1), (1e-15, 1e15, 1e15)])
def test_units_of_measure_change_nothing(plant, of_inputs, of_targets, of_rows):
    for seed in range(5):
        planted = plant(30, 4, 3, 0.1, seed=seed)
        found = certify(planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets, 0.1)
        told = certify(
            planted.hidden_weights * of_rows,
            planted.output_weights * (of_targets / of_inputs / of_rows),
            planted.inputs * of_inputs,
            planted.targets * of_targets,
            0.1,
        )
        assert told.kind == found.kind
        assert told.mse == pytest.approx(found.mse * of_targets**2, rel=1e-9)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where 1e15 meets 1e-300
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_called_a_minimum_resists_every_attack(family):
    """A few points of the campaign in tests/benchmarks, which attacks tens of thousands."""
    minima = 0
    for k in range(12):
        rng = np.random.default_rng((1, *family.encode(), k))
        case = FAMILIES[family](rng)
        polished = polish(*case.tensors, case.slope, threshold=0.5, max_steps=20)
        assert (np.diff(polished.losses) <= 0).all()
        for found in (certify(*case.tensors, case.slope, threshold=0.5), polished.certificate):
            there = case.at(found)
            (before, slack), (after, _) = loss(case), loss(there)
            assert after <= before + slack
            if found.is_minimum:
                minima += 1
                assert fall(there, rng, moves=20) == 0
                assert certify(*there.tensors, there.slope, threshold=0.5).is_minimum
    assert minima > 2


def test_attacks_find_what_is_no_minimum():
    """The same attacks on points that are none: a saddle, a violated kink, a dead unit of huge weights, a zero row."""
    rng = np.random.default_rng(0)
    for planted in (planted_saddle(20, 3, 3, 0.1), planted_kink_minimum(30, 3, 2, violated=True)):
        parts = (planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
        assert fall(Case(*(part.numpy() for part in parts), planted.negative_slope), rng) > 0
    x, y = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([1.0, 1.0, 0.0])
    dead = Case(np.array([[-1e15, -1e15], [0.0, 0.0]]), np.array([1.0, 0.0]), x, y, 0.0)
    assert fall(dead, rng) > 0
    assert fall(Case(np.zeros((1, 2)), np.ones(1), x, y, 0.0), rng) > 0
