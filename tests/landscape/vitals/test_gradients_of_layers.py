"""Sizes and noise of gradients against numpy and simulation; what is out of the ordinary in them and in patterns."""

import math

import numpy as np
import pytest
import torch

from lightning_mnn.landscape import Finding, FindingCode, gradient_noise_scale, gradient_sizes
from lightning_mnn.landscape.vitals.gradients import joined
from lightning_mnn.landscape.vitals.out_of_ordinary import gradient_findings, pattern_findings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sizes_are_those_of_numpy(dtype):
    g = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, 4, generator=g).to(dtype), torch.randn(3, generator=g).to(dtype) * 1e-4]
    gradients[0][2] = 0
    weights = [torch.randn(5, 4, generator=g).to(dtype), torch.zeros(3, dtype=dtype)]
    found = gradient_sizes(gradients, weights)
    flat, theta = (np.concatenate([t.double().numpy().ravel() for t in ts]) for ts in (gradients, weights))
    assert float(found.norm) == pytest.approx(np.linalg.norm(flat), rel=1e-6)
    assert float(found.relative_norm) == pytest.approx(np.linalg.norm(flat) / np.linalg.norm(theta), rel=1e-6)
    near = np.abs(flat) <= 1e-3 * np.sqrt(np.mean(flat**2))
    assert float(found.near_zero_fraction) == pytest.approx(near.mean())
    both = joined([found, gradient_sizes([torch.ones(2)], [torch.ones(2)])])
    assert float(both.norm) == pytest.approx(math.sqrt(np.linalg.norm(flat) ** 2 + 2), rel=1e-6)
    assert both.size == 25


def test_zero_and_sparse_gradients():
    assert float(gradient_sizes([torch.zeros(4)], [torch.ones(4)]).near_zero_fraction) == 1.0
    sparse = torch.sparse_coo_tensor([[1, 1]], [[3.0, 4.0], [0.0, 0.0]], (5, 2), check_invariants=True)
    found = gradient_sizes([sparse], [torch.ones(5, 2)])
    assert (float(found.norm), float(found.near_zero_fraction)) == pytest.approx((5.0, 0.8))
    with pytest.raises(ValueError, match="gradients must not be empty"):
        gradient_sizes([], [])


def test_the_noise_scale_is_unbiased_in_both_parts():
    """Batches of B samples with a known gradient G and covariance: the estimates average to ‖G‖² and tr Σ."""
    rng = np.random.default_rng(0)
    dim, batch, k, draws = 20, 16, 4, 4000
    mean, spread = rng.normal(size=dim), np.exp(rng.normal(size=dim))
    g = mean + spread / math.sqrt(batch) * rng.normal(size=(draws, k, dim))
    s, m = (g**2).sum(-1).mean(-1), (g.mean(1) ** 2).sum(-1)
    signal, noise = (k * m - s) / (k - 1), batch * (s - m) * k / (k - 1)
    for found, true in ((signal, (mean**2).sum()), (noise, (spread**2).sum())):
        assert abs(found.mean() - true) < 5 * found.std() / math.sqrt(draws)
    one = gradient_noise_scale(torch.tensor(s[0]), torch.tensor(m[0]), k, batch)
    assert float(one) == pytest.approx(noise[0] / signal[0])
    assert gradient_noise_scale(torch.tensor(4.0), torch.tensor(1.0), 2, 8).isinf()
    with pytest.raises(ValueError, match="num_batches must be at least 2, got 1"):
        gradient_noise_scale(torch.tensor(1.0), torch.tensor(1.0), 1, 8)


def codes(findings):
    return [(f.code, f.layer) for f in findings]


def test_gradient_findings():
    calm = [1.0, 2.0, 0.5, 3.0, 1.0]
    assert gradient_findings({"a": 1e-2, "b": 1e-5}, calm) == []
    assert codes(gradient_findings({"a": 1e-2, "b": 1e-7, "c": math.inf}, calm)) == [
        (FindingCode.VANISHING_GRADIENT, "b")
    ]
    assert codes(gradient_findings({}, [*calm, 500.0])) == [(FindingCode.EXPLODING_GRADIENT, None)]
    assert gradient_findings({}, [1.0, 500.0]) == []  # too few to say what is usual
    assert gradient_findings({}, [*calm[:3], math.nan]) == [Finding(FindingCode.NON_FINITE_GRADIENT, None, 0.25)]
    assert gradient_findings({"a": 0.0}, [0.0] * 9) == []


def test_pattern_findings():
    assert pattern_findings({"a": 0.05}, {"a": 0.2}, {"a": (9.0, 64)}, 3.0, 0.05) == []
    found = pattern_findings({"a": 0.41}, {"a": 0.5, "b": 0.6}, {"b": (1.3, 64), "c": (1.3, 3)}, 0.0, 0.05)
    assert codes(found) == [
        (FindingCode.DEAD_UNITS, "a"),
        (FindingCode.DORMANT_UNITS, "b"),  # of a, most are dead
        (FindingCode.FEW_DIRECTIONS, "b"),
        (FindingCode.LINEAR_AROUND_DATA, None),
    ]
    assert [Finding.from_plain(f.plain()) for f in found] == found
    assert str(found[0]).startswith("41 % of a's units are dead: they get no gradient")
    assert all(str(Finding(code, layer, 0.5)) for code in FindingCode for layer in ("a", None))
