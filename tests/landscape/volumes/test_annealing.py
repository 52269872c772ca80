"""The parts of the cone sampler, each by itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_mnn.landscape.volumes import annealing
from lightning_mnn.landscape.volumes.annealing import analytic_centre, centre, log_measures, schedule
from tests.landscape.volumes.cones import equicorrelated, random_cone


def tensors(normals, point):
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    return torch.from_numpy(normals)[None], torch.from_numpy(point)[None]


def coordinates(normals, c, cones):
    """M of w = c + M y, from b_n·M = (b_n·c) a_n and c·M = h."""
    products = torch.cat([(normals @ c)[:, None] * cones.walls[0], cones.slopes])
    rows = torch.cat([normals, c[None]])
    return torch.linalg.lstsq(rows, products).solution


def test_centres_of_a_batch_are_those_of_its_cones():
    """Cones that converge early wait for the others and stay where they are."""
    rng = np.random.default_rng(0)
    pairs = [tensors(*random_cone(10, 4, rng)) for _ in range(400)]
    together = analytic_centre(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))
    alone = torch.cat([analytic_centre(*pair) for pair in pairs])
    assert torch.allclose(together, alone, rtol=1e-2)


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
    c = analytic_centre(normals, point)[0]
    m = coordinates(normals[0], c, cones)
    w = c + y @ m.T
    exponent = (y**2 * cones.curvatures[0]).sum(-1) / 2 + y @ cones.slopes[0] + cones.offset[0]
    assert torch.allclose(exponent, w.square().sum(-1) / 2, rtol=1e-8)
    assert torch.allclose(c + m @ cones.apex[0], torch.zeros(4, dtype=torch.float64), atol=1e-9)
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
    c = analytic_centre(*tensors(normals, point))[0]
    m = coordinates(tensors(normals, point)[0][0], c, cones)
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
            annealing.move_along_rays(y, distances, cones.apex.mT[..., None], precisions, forces, generator)
    assert float((y != before).double().mean()) > 0.99
    assert torch.allclose(distances, annealing._distances(cones, y), atol=1e-9)
    w = (c[:, None] + m @ y[:, 0]).T.numpy()
    assert (w @ normals.T > 0).all()
    fresh = rng.standard_normal((40_000, 3))
    fresh = fresh[(fresh @ normals.T > 0).all(1)]
    for statistic in (lambda v: np.linalg.norm(v, axis=1), lambda v: v[:, 0], lambda v: v @ normals[1]):
        assert stats.ks_2samp(statistic(w), statistic(fresh)).pvalue > 1e-4
