"""Points that were once called minima and are none, and points whose answer must not depend on units of measure."""

import pytest
import torch

from lightning_mnn.landscape import certify, planted_kink_minimum, planted_minimum, planted_saddle, polish

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
