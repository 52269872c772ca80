import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mnn.landscape import ActivationPattern, Region
from lightning_mnn.landscape.regions import least_squares
from lightning_mnn.landscape.regions.least_squares import solve
from lightning_mnn.landscape.regions.linear_map import FaceMap


def drawn_face(seed):
    """A random face: slopes, dead rows, kinks, a free column, repeated samples and units."""
    rng = np.random.default_rng(seed)
    n, d0, d1, free = (int(rng.integers(*ends)) for ends in ((1, 25), (1, 5), (1, 5), (0, 2)))
    x, a = rng.standard_normal((n, d0)), np.where(rng.random((n, d1)) < 0.5, 1.0, rng.choice([0.0, 0.1, -1.0]))
    if n > 2 and rng.random() < 0.3:
        x[1], a[1] = x[0], a[0]
    if d1 > 1 and rng.random() < 0.3:
        a[:, 1] = a[:, 0]
    live = torch.from_numpy(rng.random(d1) < 0.8) if rng.random() < 0.5 else None
    bases = {}
    for unit in range(d1):
        if rng.random() < 0.4:
            rank = int(rng.integers(1, d0 + 1))
            bases[unit] = torch.from_numpy(np.linalg.qr(rng.standard_normal((d0, rank)))[0])
    face = FaceMap(torch.from_numpy(x), torch.from_numpy(a), torch.ones(n, free).double(), live, bases)
    return face, torch.from_numpy(rng.standard_normal(n)), dense(x, a, free, live, bases)


def dense(x, a, free, live, bases):
    """The matrix of a face by loops over samples and units."""
    rows = []
    for n in range(len(x)):
        row = []
        for i in range(a.shape[1]):
            q = bases[i].numpy() if i in bases else np.zeros((x.shape[1], 0))
            part = a[n, i] * (x[n] - q @ (q.T @ x[n]))
            row.append(part if live is None or bool(live[i]) else 0 * part)
        rows.append(np.concatenate([*row, np.ones(free)]))
    return np.array(rows)


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_solutions_agree_with_numpy(seed, iterate):
    face, rhs, matrix = drawn_face(seed)
    np.testing.assert_allclose(face.dense(), matrix, atol=1e-13)
    np.testing.assert_allclose(face.gram(), matrix @ matrix.T, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        if iterate:
            patch.setattr(least_squares, "MAX_GRAM_ROWS", 0)
        solution = solve(face, rhs, max_iterations=2000)
    expected = np.linalg.lstsq(matrix, rhs.numpy(), rcond=1e-12)[0]
    values = np.linalg.svd(matrix, compute_uv=False)
    rank = int((values > 1e-12 * values[0]).sum()) if values[0] > 1e-12 else 0
    if rank == 0 or values[rank - 1] < 1e-3 * values[0]:
        return  # too ill-conditioned to compare to the last digits
    np.testing.assert_allclose(solution.theta, expected, atol=1e-8)
    residual = rhs - face.predict(solution.theta)
    assert float(face.project(face.correlate(residual)).norm()) <= 1e-9
    if solution.smallest is not None and rank and not iterate:
        assert solution.smallest <= values[rank - 1] * (1 + 1e-9)
        assert solution.smallest >= 0.1 * values[rank - 1]
    assert not (solution.onto and rank < len(matrix))


def test_an_iteration_stops_when_its_solution_is_too_long(monkeypatch):
    monkeypatch.setattr(least_squares, "MAX_GRAM_ROWS", 0)
    rng = np.random.default_rng(0)
    x, a = torch.from_numpy(rng.standard_normal((60, 10))), torch.from_numpy(rng.choice([0.0, 1.0], (60, 5)))
    face = FaceMap(x, a, torch.zeros(60, 0).double())
    rhs = torch.from_numpy(rng.standard_normal(60))
    full = solve(face, rhs, max_iterations=500)
    cut = solve(face, rhs, longest=0.1 * float(full.theta.norm()), max_iterations=500)
    assert cut.too_long
    assert not full.too_long
    assert float(cut.theta.norm()) <= float(full.theta.norm())  # lengths grow: what is too long stays so


def test_singular_values_that_a_gram_matrix_hides_are_found():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 3))
    x[:, 2] = x[:, 1] + 1e-9 * rng.standard_normal(20)
    a = torch.ones(20, 1).double()
    rhs = torch.from_numpy(x @ np.array([1.0, 2.0, -3.0]))
    solution = solve(FaceMap(torch.from_numpy(x), a, torch.zeros(20, 0).double()), rhs)
    assert solution.method == "singular values"
    residual = rhs - torch.from_numpy(x) @ solution.theta
    assert float(residual.norm()) < 1e-13


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_region_fits_its_linear_model(shape):
    rng = np.random.default_rng(1)
    x, y = torch.from_numpy(rng.standard_normal((*shape, 40, 4))), torch.from_numpy(rng.standard_normal((*shape, 40)))
    region = Region(x, ActivationPattern(torch.from_numpy(rng.random((*shape, 40, 3)) < 0.5)), 0.1)
    fit = region.least_squares(y)
    assert fit.flat.shape == (*shape, 3, 4)
    np.testing.assert_allclose(fit.residual, y - region.predict(fit.flat), atol=1e-12)
    assert float(region.correlate(fit.residual).abs().max()) < 1e-11
    assert float(fit.gradient.max()) < 1e-14
    np.testing.assert_allclose(region.residual(y), fit.residual, atol=1e-14)


def test_an_unfinished_fit_is_no_residual(monkeypatch):
    monkeypatch.setattr(least_squares, "MAX_GRAM_ROWS", 0)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((60, 10)) * np.logspace(0, -4, 10))
    region = Region(x, ActivationPattern(torch.from_numpy(rng.random((60, 5)) < 0.5)))
    y = torch.from_numpy(rng.standard_normal(60))
    assert float(region.least_squares(y, max_iterations=3).gradient) > 1e-9
    monkeypatch.setattr(Region.least_squares, "__kwdefaults__", {"max_iterations": 3})
    with pytest.raises(ArithmeticError, match="call least_squares with a larger max_iterations"):
        region.residual(y)
