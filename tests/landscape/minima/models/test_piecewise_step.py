"""The local model's minimum against an enumeration of all signs, and its parts against the objective."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mnn.landscape.minima.models.equations.face import derivatives, kink_groups, on_kinks
from lightning_mnn.landscape.minima.models.equations.reading import objective_at, read_face
from lightning_mnn.landscape.minima.models.model_certificate import prepare
from lightning_mnn.landscape.minima.models.model_polishing import _candidates
from lightning_mnn.landscape.minima.models.piecewise_step import Curvature, LocalModel, minimise


def convex_model(seed, p=4, m=3, *, coupled=False):
    """A model with b > 0, and a positive definite H."""
    random = np.random.default_rng(seed)
    coupling = np.tril(random.standard_normal((m, m)), -1) * 0.1 if coupled else np.zeros((m, m))
    model = LocalModel(
        random.standard_normal(p),
        random.uniform(0.5, 2, m),
        random.standard_normal(m),
        random.standard_normal((m, p)),
        coupling,
    )
    root = random.standard_normal((p, p))
    return model, root @ root.T + 0.1 * np.eye(p)


def by_enumeration(model, curvature):
    """The lowest value over all signs of a quadratic program with equations, where its signs are right."""
    best, inverse = np.inf, np.linalg.inv(curvature)
    for signs in map(np.array, itertools.product((-1, 0, 1), repeat=len(model.normal))):
        on = signs == 0
        gradient = model.gradient + model.jacobian.T @ (signs * model.normal)
        rows = model.jacobian[on]
        weights = np.linalg.pinv(rows @ inverse @ rows.T) @ (model.switching[on] - rows @ inverse @ gradient)
        move = -inverse @ (gradient + rows.T @ weights)
        z = model.switching + model.jacobian @ move
        if (z[~on] * signs[~on] >= -1e-9).all() and np.abs(z[on]).max(initial=0.0) < 1e-9:
            best = min(best, model.value(curvature, move))
    return best


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.booleans())
def test_the_minimum_of_a_convex_model_is_that_of_all_signs(seed, begins_on_kinks):
    model, curvature = convex_model(seed)
    root = np.linalg.inv(np.linalg.cholesky(curvature)).T
    found = minimise(model, root, np.full(3, begins_on_kinks))
    assert found.is_complete
    assert found.value == pytest.approx(model.value(curvature, found.move), rel=1e-9, abs=1e-9)
    assert found.value == pytest.approx(by_enumeration(model, curvature), rel=1e-8, abs=1e-8)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_no_small_move_is_lower_than_the_minimum_of_a_coupled_model(seed):
    model, curvature = convex_model(seed, coupled=True)
    root = np.linalg.inv(np.linalg.cholesky(curvature)).T
    found = minimise(model, root, np.zeros(3, dtype=bool))
    assert found.is_complete
    here = model.value(curvature, found.move)
    random = np.random.default_rng(seed)
    for size in (1e-2, 1e-4):
        for _ in range(40):
            assert model.value(curvature, found.move + size * random.standard_normal(4)) >= here - 1e-12
    z = model.switching + model.jacobian @ found.move
    if not model.coupling.any():
        assert np.abs(z[found.signs == 0]).max(initial=0.0) < 1e-9


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_a_curvature_is_positive_and_exact_on_the_face(seed, kinks):
    random = np.random.default_rng(seed)
    half = random.standard_normal((6, 6))
    rows = random.standard_normal((kinks, 6))
    definite = half @ half.T + 0.1 * np.eye(6)
    root = Curvature(definite, rows).root(0.0)
    np.testing.assert_allclose(root @ root.T @ definite, np.eye(6), atol=1e-7)
    indefinite = definite - 50 * rows.T @ rows  # negative across the face only
    root = Curvature(indefinite, rows).root(0.0)
    changed = np.linalg.inv(root @ root.T)
    assert np.linalg.eigvalsh(changed)[0] > 0
    kernel = np.linalg.qr(rows.T, mode="complete")[0][:, kinks:]
    np.testing.assert_allclose(kernel.T @ changed @ kernel, kernel.T @ indefinite @ kernel, rtol=1e-6, atol=1e-6)


def test_the_model_is_the_objective_to_first_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Hardtanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3).double(), torch.randn(12, 2).double()
    x[1] = x[0]  # kinks of equal samples are one
    model, vector = prepare(net, x, y, loss="squared_error", weight_decay=0.01, frozen=())
    reading = read_face(model, vector)
    candidates = _candidates(model, vector, reading, 0.1, 100)
    face = on_kinks(reading.face, candidates.masks, candidates.classes)
    first = derivatives(face, vector[face.free], candidates.values.abs())
    local = LocalModel(
        first.gradient.numpy(),
        first.normal.numpy(),
        candidates.values.numpy(),
        first.jacobian.numpy(),
        first.coupling.numpy(),
    )
    assert len(candidates.keys) > 3
    for seed in range(5):
        move = 1e-6 * torch.randn(len(face.free), generator=torch.Generator().manual_seed(seed)).double()
        change = objective_at(model, face.whole(vector[face.free] + move)) - objective_at(model, vector)
        assert change == pytest.approx(local.value(np.zeros((len(move),) * 2), move.numpy()), abs=1e-9)


def test_candidates_are_limited_in_number():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    model, vector = prepare(net, torch.randn(40, 3), torch.randn(40), loss="squared_error", weight_decay=0.0, frozen=())
    assert len(_candidates(model, vector, read_face(model, vector), 10.0, 7).keys) == 7


def test_kinks_of_one_class_have_one_variable():
    groups, heads = kink_groups(torch.tensor([1, 3, 5, 6]), torch.tensor([4, 2, 4, 9]), 2)
    assert groups.tolist() == [1, 0, 1, 2]
    assert heads.tolist() == [1, 0, 3]
