import pytest
import torch

from lightning_mnn.landscape import Kind, Network, first_order_verdicts, network_statistics


def planted(seed, scale=1.0, num_samples=30, dim=4):
    """A sub-optimal differentiable minimum: rows w + u/t and w, with the error of a linear model."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, dim, dtype=torch.float64, generator=rng)
    y = torch.randint(0, 2, (num_samples,), generator=rng).double()
    w = torch.randn(dim, dtype=torch.float64, generator=rng)
    active = (x @ w > 0).double()[:, None]
    u = torch.linalg.lstsq(active * x, y[:, None]).solution[:, 0]
    t = scale * 1e3
    weights = torch.stack([w + u / t, w, w])
    return Network((weights,), torch.tensor([t, -t, 0.0], dtype=torch.float64), 0.0), x, y


@pytest.mark.parametrize("seed", range(5))
def test_planted_minimum_passes_and_its_neighbours_do_not(seed):
    network, x, y = planted(seed)
    found = network_statistics(network, x, y, 0.5)
    (verdict,) = first_order_verdicts(found, 1e-11, 1e-9)
    assert verdict.kind is Kind.DIFFERENTIABLE_MINIMUM
    assert not bool(found.zero_error)
    assert float(found.mse) > 0.01
    moved = Network((network.hidden_weights[0] * 1.001,), network.output_weights, 0.0)
    (verdict,) = first_order_verdicts(network_statistics(moved, x, y, 0.5), 1e-11, 1e-9)
    assert verdict.kind is Kind.NOT_STATIONARY
    assert "above" in verdict.reason


def test_a_kink_is_not_called_differentiable():
    network, x, y = planted(0)
    x = torch.cat([x, torch.zeros(1, 4, dtype=torch.float64)])
    w = network.hidden_weights[0][1]
    x[-1] = torch.tensor([w[1], -w[0], 0, 0])  # on the kink of units 2 and 3, where the planted model predicts about 0
    found = network_statistics(network, x, torch.cat([y, torch.zeros(1, dtype=torch.float64)]), 0.5)
    (verdict,) = first_order_verdicts(found, 1.0, 1e-9)
    assert verdict.kind is Kind.NOT_STATIONARY
    assert "kink" in verdict.reason
    assert int(found.kinks) == 2


def test_nan_counts_as_moving():
    network, x, y = planted(0)
    found = network_statistics(network, x, y * float("nan"), None)
    assert first_order_verdicts(found, 1e-11, 1e-9)[0].kind is Kind.NOT_STATIONARY


def test_without_targets_a_point_with_an_error_is_not_stationary():
    network, x, y = planted(0)
    moved = Network((network.hidden_weights[0] * 1.1,), network.output_weights, 0.0)
    found = network_statistics(moved, x, torch.zeros_like(y))
    assert first_order_verdicts(found, 1e-11, 1e-9)[0].kind is Kind.NOT_STATIONARY


def test_two_hidden_layers_are_judged_by_necessary_conditions_and_it_is_said():
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second, z = torch.eye(8).double(), torch.eye(8).double(), torch.linspace(-1, 1, 8).double()
    network = Network((first, second), z, -1.0)
    y = (x.abs() @ second.T).abs() @ z
    (verdict,) = first_order_verdicts(network_statistics(network, x, y), 1e-11, 1e-9)
    assert verdict.kind is Kind.DIFFERENTIABLE_MINIMUM
    assert "necessary conditions only" in verdict.reason


def test_one_verdict_a_replica():
    networks = [planted(seed) for seed in range(3)]
    hidden = torch.stack([n.hidden_weights[0] for n, _, _ in networks])
    hidden[1] *= 1.01
    both = Network((hidden,), torch.stack([n.output_weights for n, _, _ in networks]), 0.0)
    found = network_statistics(both, torch.stack([x for _, x, _ in networks]), torch.stack([y for _, _, y in networks]))
    kinds = [verdict.kind for verdict in first_order_verdicts(found, 1e-11, 1e-9)]
    assert kinds == [Kind.DIFFERENTIABLE_MINIMUM, Kind.NOT_STATIONARY, Kind.DIFFERENTIABLE_MINIMUM]
