"""The learning coefficient of certified minima against ranks of autograd's Jacobian, and against Metropolis chains."""

import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from lightning_mnn.landscape import certify, learning_coefficient, planted_kink_minimum, planted_minimum, planted_saddle
from lightning_mnn.utilities.validation import ArgumentError
from tests.landscape.minima.metropolis import sampled_coefficient

SIZES = st.tuples(st.integers(10, 24), st.integers(2, 4), st.integers(1, 4))


def certificate_of(planted, **options):
    given = (planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
    return certify(*given, planted.negative_slope, **options)


def ranks(found, planted):
    """Rank of the kinks' inputs, summed over units; rank of the outputs' derivative in W and z on the face."""
    x, slope = planted.inputs, planted.negative_slope
    u = x @ found.hidden_weights.T
    kinks = u.abs() <= 1e-12 * x.norm(dim=1)[:, None] * found.hidden_weights.norm(dim=1)
    gates = torch.where(u > 0, 1.0, slope).double() * ~kinks

    def outputs(weights, z):
        return (gates * (x @ weights.T)) @ z

    at = (found.hidden_weights, found.output_weights)
    by_weights, by_z = torch.autograd.functional.jacobian(outputs, at)
    jacobian = torch.cat([by_weights.flatten(1), by_z], dim=1)
    normals = torch.zeros(int(kinks.sum()), jacobian.shape[1], dtype=torch.float64)
    for row, (sample, unit) in enumerate(kinks.nonzero().tolist()):
        normals[row, unit * x.shape[1] : (unit + 1) * x.shape[1]] = x[sample]
    _, sizes, right = torch.linalg.svd(normals)
    rank = int((sizes > 1e-9 * sizes.max()).sum()) if len(sizes) else 0
    return rank, int(torch.linalg.matrix_rank(jacobian @ right[rank:].T, rtol=1e-9))


@given(sizes=SIZES, slope=st.sampled_from((0.0, 0.1, -1.0)), seed=st.integers(0, 10**6), kinks=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_it_counts_the_kinks_and_the_rank_on_their_face(sizes, slope, seed, kinks):
    num, dim, width = sizes
    try:
        if kinks and kinks < dim:
            planted = planted_kink_minimum(num + 3 * dim, dim, width, slope, kinks_per_unit=kinks, seed=seed)
        else:
            planted = planted_minimum(num + 4 * dim, dim, width + 1, slope, seed=seed)
    except ValueError:  # several draws gave none
        reject()
    found = certificate_of(planted)
    assume(found.is_minimum)
    linear, quadratic = ranks(found, planted)
    if bool((found.output_weights == 0).any()):
        with pytest.raises(ArgumentError, match="does not tell in how many directions"):
            learning_coefficient(found)
        return
    coefficient = learning_coefficient(found)
    assert (coefficient.kink_directions, coefficient.positive_directions) == (linear, quadratic)
    assert coefficient.value == linear + quadratic / 2


@pytest.mark.slow
@pytest.mark.parametrize(("kinks", "expected"), [(0, 1.0), (1, 3.0)])
def test_metropolis_chains_find_it(kinks, expected):
    planted = planted_kink_minimum(12, 2, 2) if kinks else planted_minimum(12, 2, 2)
    found = certificate_of(planted)
    assert learning_coefficient(found).value == expected
    x, y = planted.inputs, planted.targets

    def loss(points):
        weights, z = points[:, :4].reshape(-1, 2, 2), points[:, 4:]
        return (((weights @ x.T).relu() * z[..., None]).sum(1) - y).square().mean(-1)

    at = torch.cat([found.hidden_weights.flatten(), found.output_weights])
    value, error = sampled_coefficient(loss, at, 1e6, steps=12_000)
    assert abs(value - expected) < 0.1 * expected + 4 * error


def test_an_output_bias_is_one_more_direction():
    x = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights, z = torch.eye(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    y = (x @ weights.T).relu() @ z + 0.5
    plain = certify(weights, z, x, y - 0.5)
    biased = certify(weights, z, x, y, output_bias=torch.tensor(0.5, dtype=torch.float64))
    assert plain.zero_error
    assert biased.zero_error
    assert learning_coefficient(biased).value == learning_coefficient(plain).value + 0.5


def test_it_is_of_minima_whose_directions_were_counted():
    saddle = certificate_of(planted_saddle(20, 2, 3))
    with pytest.raises(ArgumentError, match="certificate is not of a minimum"):
        learning_coefficient(saddle)
