"""The parts of the cone sampler, each by itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_mnn.landscape import annealing
from lightning_mnn.landscape.annealing import analytic_centre, centre, log_measures, schedule
from tests.landscape.cones import equicorrelated, random_cone


def tensors(normals, point):
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    return torch.from_numpy(normals)[None], torch.from_numpy(point)[None]


@given(st.integers(0, 2**31 - 1), st.integers(2, 8), st.integers(0, 30))
def test_centre_balances_the_walls(seed, dim, more):
    normals, point = tensors(*random_cone(dim + more, dim, np.random.default_rng(seed)))
    found = analytic_centre(normals, point)[0]
    pull = (normals[0] / (normals[0] @ found)[:, None]).sum(0)
    assert (normals[0] @ found > 0).all()
    assert float((pull - (dim + more) / dim * found).norm() / pull.norm()) < 1e-2
    assert float(found @ found) == pytest.approx(dim, rel=1e-2)  # Σ b_n·c/(b_n·c) = N


@given(st.integers(0, 2**31 - 1))
def test_coordinates_describe_the_same_cone_and_density(seed):
    rng = np.random.default_rng(seed)
    normals, point = tensors(*random_cone(12, 4, rng))
    cones = centre(normals, point, torch.Generator().manual_seed(0))
    y = torch.from_numpy(rng.standard_normal((50, 4)))
    # w = c + M y with M Mᵀ = H⁻¹: found from the walls, since b_n·w = (b_n·c)(1 + a_n·y)
    c = analytic_centre(normals, point)[0]
    m = torch.linalg.lstsq(normals[0], (normals[0] @ c)[:, None] * cones.walls[0]).solution
    w = c + y @ m.T
    exponent = (y**2 * cones.curvatures[0]).sum(-1) / 2 + y @ cones.slopes[0] + cones.offset[0]
    assert torch.allclose(exponent, w.square().sum(-1) / 2, rtol=1e-8)
    assert torch.allclose(cones.log_scale[0], torch.linalg.slogdet(m).logabsdet, atol=1e-8)


def test_islands_are_unbiased():
    normals, point, truth = equicorrelated(6)
    cones = centre(*tensors(normals, point), torch.Generator().manual_seed(0))
    steps = schedule(cones, torch.Generator().manual_seed(1))
    # Two states a chain: they hardly mix, and the mean is right all the same.
    logs = log_measures(cones, steps, 4000, 4, 2, torch.Generator().manual_seed(2))[0]
    ratios = (logs - truth).exp()
    assert float(logs.std()) > 0.3
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / math.sqrt(4000)


def test_schedule_ends_at_the_measure():
    normals, point = random_cone(30, 6, np.random.default_rng(0))
    cones = centre(*tensors(normals, point), torch.Generator().manual_seed(0))
    steps = schedule(cones, torch.Generator().manual_seed(1))[:, 0]
    assert (steps.diff() > 0).all()
    assert float(steps[-1]) == 1


@pytest.mark.parametrize("move", ["coordinates", "rays"])
def test_moves_keep_the_distribution(move):
    """Exact samples of a normal law in a wide cone are still that after many moves."""
    rng = np.random.default_rng(0)
    normals, point = np.eye(3)[:2] + 0.3, np.ones(3)
    cones = centre(*tensors(normals, point), torch.Generator().manual_seed(0))
    exact = rng.standard_normal((40_000, 3))
    exact = exact[(exact @ normals.T > 0).all(1)][:8000]
    unit = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    c = analytic_centre(*tensors(normals, point))[0]
    # The cone has a direction that no wall sees: M from w(y) at the axes, by the density's own coefficients.
    m = _map(torch.from_numpy(unit), c, cones)
    y = torch.linalg.solve(m, (torch.from_numpy(exact) - c).T)[:, None, :].contiguous()
    distances = annealing._distances(cones, y)
    generator = torch.Generator().manual_seed(3)
    precisions, forces = cones.curvatures.mT[..., None], cones.slopes.mT[..., None]
    before = y.clone()
    for _ in range(5):
        if move == "coordinates":
            columns = cones.walls.mT.contiguous()
            annealing._move_coordinates(y, distances, columns, precisions, -forces / precisions, generator)
        else:
            annealing._move_along_rays(y, distances, annealing._apex(cones), precisions, forces, generator)
    assert float((y != before).double().mean()) > 0.99
    assert torch.allclose(distances, annealing._distances(cones, y), atol=1e-9)
    w = (c[:, None] + m @ y[:, 0]).T.numpy()
    assert (w @ normals.T > 0).all()
    fresh = rng.standard_normal((40_000, 3))
    fresh = fresh[(fresh @ normals.T > 0).all(1)]
    for statistic in (lambda v: np.linalg.norm(v, axis=1), lambda v: v[:, 0], lambda v: v @ normals[1]):
        assert stats.ks_2samp(statistic(w), statistic(fresh)).pvalue > 1e-3


def _map(normals, c, cones):
    """M of w = c + M y: R⁻ᵀ V, with the eigenvectors in the sign that the walls show."""
    scaled = normals / (normals @ c)[:, None]
    hessian = scaled.T @ scaled + len(normals) / 3 * torch.eye(3, dtype=torch.float64)
    factor = torch.linalg.cholesky(hessian)
    inverse = torch.linalg.inv(factor.T)
    _, basis = torch.linalg.eigh(inverse.T @ inverse)
    signs = torch.sign(((inverse @ basis).T @ c) * cones.slopes[0])
    return inverse @ basis * torch.where(signs == 0, 1.0, signs)
