"""Vital signs of layers against loops, formulas and dense algebra."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape import (
    ActivationPattern,
    PiecePattern,
    dormant_fraction,
    dormant_units,
    effective_rank,
    local_complexity,
    random_frame,
)
from lightning_mnn.landscape.vitals import signs
from lightning_mnn.landscape.vitals.signs import effective_rank_of_gram, sample_gram

seeds = st.integers(0, 2**31)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, st.integers(1, 7), st.integers(1, 7))
def test_a_frame_is_orthonormal_and_no_larger_than_the_space(seed, dim, directions):
    frame = random_frame(dim, directions, torch.Generator().manual_seed(seed))
    assert frame.shape == (min(dim, directions), dim)
    torch.testing.assert_close(frame @ frame.T, torch.eye(len(frame), dtype=torch.float64))


def test_frames_are_uniform():
    frames = torch.stack([random_frame(3, 3, torch.Generator().manual_seed(i)) for i in range(3000)])
    error = 5 * (1 / 3 / 3000) ** 0.5  # an entry has mean 0 and variance 1/3
    assert frames.mean(0).abs().max() < error
    assert (torch.linalg.det(frames).mean()).abs() < 5 / 3000**0.5  # both orientations


def counted(weights, bias, centres, points):
    """Mean number of rows of a layer with both signs among the points around a centre, by loops."""
    total = 0
    for x in centres.tolist():
        for row, b in zip(weights.tolist(), bias.tolist(), strict=True):
            signs_seen = {
                math.fsum(w * (c + s) for w, c, s in zip(row, x, shift, strict=True)) + b > 0 for shift in points
            }
            total += len(signs_seen) == 2
    return total / len(centres)


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.floats(0.01, 3.0))
def test_local_complexity_is_that_of_an_enumeration(seed, dim, directions, radius):
    weights, bias, centres = normal(6, dim, seed=seed), normal(6, seed=seed + 1), normal(4, dim, seed=seed + 2)
    frame = random_frame(dim, directions, torch.Generator().manual_seed(seed))
    shifts = [sign * radius * v for v in frame for sign in (1, -1)]
    vertices = ({"layer": ActivationPattern((centres + s) @ weights.T + bias > 0).pack()} for s in shifts)
    expected = counted(weights, bias, centres, [s.tolist() for s in shifts])
    assert float(local_complexity(vertices)["layer"]) == pytest.approx(expected)


def test_units_of_three_pieces_count_once_and_replicas_stay_apart():
    pieces = torch.tensor([[[0, 1, 2]], [[2, 1, 2]], [[1, 1, 2]]])  # three vertices of one sample
    found = local_complexity([{"six": PiecePattern(p, 3).pack()} for p in pieces])
    assert float(found["six"]) == 1.0
    active = torch.tensor([[[[True, False]], [[False, False]]], [[[False, True]], [[False, True]]]])
    found = local_complexity([{"1": ActivationPattern(a).pack()} for a in active])
    assert found["1"].tolist() == [2.0, 1.0]


def test_vertices_of_other_samples_and_none_are_refused():
    patterns = [{"1": ActivationPattern(torch.zeros(n, 3).bool()).pack()} for n in (2, 3)]
    with pytest.raises(ValueError, match="patterns of 1 have different shapes on two vertices"):
        local_complexity(patterns)
    with pytest.raises(ValueError, match="vertices must not be empty"):
        local_complexity([])


@given(seeds, st.integers(1, 6), st.integers(1, 9))
def test_dormant_units_are_those_of_the_definition(seed, samples, units):
    activations = normal(samples, units, seed=seed).relu() * normal(units, seed=seed + 1).exp() ** 4
    sizes = [math.fsum(abs(a) for a in column) / samples for column in activations.T.tolist()]
    mean = math.fsum(sizes) / units
    expected = [size <= 0.025 * mean for size in sizes]
    assert dormant_units(activations).tolist() == expected
    assert float(dormant_fraction(activations)) == pytest.approx(sum(expected) / units)


def test_all_units_of_a_silent_layer_are_dormant_in_their_replica_alone():
    assert dormant_fraction(torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])).tolist() == [1.0, 0.0]


def rank_by_singular_values(matrix):
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    p = values[values > 1e-12 * values[0]] / values.sum()
    return math.exp(-(p * np.log(p)).sum())


@given(seeds, st.integers(1, 8), st.integers(1, 12), st.integers(1, 5))
def test_effective_rank_is_that_of_the_singular_values(seed, samples, units, rank):
    matrix = normal(samples, rank, seed=seed) @ normal(rank, units, seed=seed + 1)
    expected = rank_by_singular_values(matrix)
    assert float(effective_rank(matrix)) == pytest.approx(expected, abs=1e-4)
    assert float(effective_rank(matrix)) <= min(samples, units, rank) + 1e-4


def test_effective_rank_of_nothing_and_of_layers_side_by_side(monkeypatch):
    monkeypatch.setattr(signs, "_BLOCK_NUMBERS", 10)  # several blocks of columns
    a, b = normal(5, 7), normal(5, 11, seed=1)
    both = effective_rank_of_gram(sample_gram(a) + sample_gram(b))
    assert float(both) == pytest.approx(rank_by_singular_values(torch.cat([a, b], 1)), rel=1e-9)
    assert effective_rank(torch.stack([torch.zeros(3, 2), torch.eye(3)[:, :2]])).tolist() == pytest.approx([0.0, 2.0])
