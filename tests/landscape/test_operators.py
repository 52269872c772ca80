"""Every linear operator agrees with its dense matrix, and its adjoint is one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh, lsqr

from lightning_mnn.landscape import ActivationPattern, LossSurface, Region
from tests.landscape.regions.test_least_squares import drawn_face


def drawn_face_map(seed):
    face, _, matrix = drawn_face(seed)
    return face, torch.from_numpy(matrix)


def drawn_region(seed):
    random = torch.Generator().manual_seed(seed)
    inputs, slopes = torch.randn(7, 3, dtype=torch.float64, generator=random), torch.rand(7, 2, generator=random)
    region = Region(inputs, ActivationPattern(slopes < 0.5), 0.1)
    (operator,) = region.operators()
    return operator, (region.slopes[:, :, None] * inputs[:, None, :]).flatten(1)


def drawn_hessian(seed):
    random = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, dtype=torch.float64, generator=random, requires_grad=True)
    factors = torch.randn(5, 5, dtype=torch.float64, generator=random)

    def loss(vector):
        return (factors @ vector).tanh().square().sum()

    hessian = torch.autograd.functional.hessian(loss, theta.detach())
    return LossSurface([theta], lambda: [(1.0, lambda: loss(theta))]).hessian, hessian


DRAWN = pytest.mark.parametrize("draw", [drawn_face_map, drawn_region, drawn_hessian])


@DRAWN
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_products_agree_with_the_dense_matrix(draw, seed):
    operator, matrix = draw(seed)
    m, n = operator.shape
    random = np.random.default_rng(seed)
    x, y = torch.from_numpy(random.standard_normal(n)), torch.from_numpy(random.standard_normal(m))
    assert (operator.dtype, operator.device) == (matrix.dtype, matrix.device)
    assert torch.allclose(operator.dense(), matrix, atol=1e-11)
    assert torch.allclose(operator.apply(x), matrix @ x, atol=1e-11)
    assert torch.allclose(operator.adjoint(y), matrix.T @ y, atol=1e-11)
    assert torch.allclose(operator @ x, matrix @ x, atol=1e-11)
    columns = torch.stack([x, x.flip(0)], 1)
    assert torch.allclose(operator @ columns, matrix @ columns, atol=1e-11)
    assert torch.allclose(operator.apply(x) @ y, x @ operator.adjoint(y), atol=1e-11)
    for_scipy = operator.to_scipy()
    assert (for_scipy.shape, for_scipy.dtype) == ((m, n), np.float64)
    np.testing.assert_allclose(for_scipy @ x.numpy(), matrix @ x, atol=1e-11)
    np.testing.assert_allclose(for_scipy.T @ y.numpy(), matrix.T @ y, atol=1e-11)


def test_solvers_of_scipy_take_operators():
    operator, matrix = drawn_region(0)
    targets = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = lsqr(operator.to_scipy(), targets.numpy(), atol=1e-14, btol=1e-14)[0]
    np.testing.assert_allclose(found, torch.linalg.lstsq(matrix, targets, driver="gelsd").solution, atol=1e-9)
    hessian, matrix = drawn_hessian(0)
    largest = eigsh(hessian.to_scipy(), k=1, which="LA", return_eigenvectors=False)
    assert largest == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-9)


def test_a_hessian_follows_its_parameters():
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    surface = LossSurface([theta], lambda: [(1.0, lambda: theta[0] ** 3 + theta[1] ** 3)])
    hessian = surface.hessian
    with surface.moved(torch.tensor([1.0, 0.0], dtype=torch.float64)):
        assert torch.equal(hessian.dense(), torch.tensor([12.0, 6.0], dtype=torch.float64).diag())
    assert torch.equal(hessian.dense(), 6 * torch.eye(2, dtype=torch.float64))


def test_curvlinops_takes_the_hessian_of_a_loss():
    curvlinops = pytest.importorskip("curvlinops", reason="pip install curvlinops-for-pytorch")
    operator, matrix = drawn_hessian(0)
    torch.manual_seed(0)
    draws = torch.stack([curvlinops.hutchinson_trace(operator, 4) for _ in range(200)])
    assert abs(float(draws.mean() - matrix.trace())) < 5 * float(draws.std()) / 200**0.5
    values, densities = curvlinops.lanczos_approximate_spectrum(operator, ncv=4, num_repeats=20)
    ends = torch.linalg.eigvalsh(matrix)
    assert float(ends[0]) - 1 < float(values[densities.argmax()]) < float(ends[-1]) + 1
