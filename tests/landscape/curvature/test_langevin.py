"""The preconditioner of Langevin chains: kinks, curvatures and flat directions, eight orders of magnitude apart."""

import pytest
import torch

from lightning_mnn.landscape.curvature.langevin import (
    Moves,
    Preconditioner,
    Target,
    Window,
    curvature_preconditioner,
    gradients_at_start,
    run_chains,
)

BETA, GAMMA = 1e12, 1e6


def rotation(size, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=stream, dtype=torch.float64)).Q


def kinked(size=6, seed=0):
    """The target of a loss with two kinks, two curvatures and two flat directions, and these directions as rows."""
    rows = rotation(size, seed)
    slopes, curvatures = double([1.0, 0.1]), double([3.0, 0.5])

    def loss(points):
        along = points @ rows.T
        return along[:, :2].abs() @ slopes + along[:, 2:4].square() @ curvatures / 2

    widths = torch.cat([1 / (BETA * slopes), (BETA * curvatures + GAMMA).rsqrt(), double([GAMMA**-0.5] * 2)])
    return Target(loss, torch.zeros(size, dtype=torch.float64), BETA, GAMMA), rows, widths


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_kinks_curvatures_and_flat_directions_have_their_widths_at_the_start(seed):
    target, rows, widths = kinked(seed=seed)
    root = curvature_preconditioner(target, 4).root
    precision = torch.linalg.inv(root).T @ torch.linalg.inv(root)
    found = torch.stack([row @ precision @ row for row in rows]).rsqrt()
    ratios = found / widths
    assert 0.05 < float(ratios[:2].min()) <= float(ratios[:2].max()) < 20  # orders of magnitude: the chains adapt them
    assert 0.5 < float(ratios[2:4].min()) <= float(ratios[2:4].max()) < 2
    spread = (rows[4:] @ root).norm(dim=1)  # what a move of flat directions makes of them
    torch.testing.assert_close(spread, widths[4:], rtol=0.2, atol=0)
    assert target.gradient_evaluations == gradients_at_start(6)


def test_an_adapted_preconditioner_resolves_what_the_covariance_does_not():
    stream = torch.Generator().manual_seed(0)
    rows, widths = rotation(3), double([1.0, 1e-4, 1e-10])
    points = torch.randn(4000, 3, generator=stream, dtype=torch.float64) * widths @ rows
    window = Window(points[0], keeps_all=True)
    for part in points.split(100):
        window.add(part)
    root = Preconditioner(torch.eye(3, dtype=torch.float64) * 1e-12).adapted(window).root
    whitened = torch.linalg.solve(root, points.T)
    covariance = whitened @ whitened.T / len(points)
    torch.testing.assert_close(covariance, torch.eye(3, dtype=torch.float64), rtol=0.01, atol=0.01)


def test_sums_of_a_window_give_the_diagonal_of_its_covariance():
    stream = torch.Generator().manual_seed(0)
    points = 3 + torch.randn(40, 7, 5, generator=stream, dtype=torch.float64) * double([1, 2, 3, 4, 5])
    window = Window(points[0, 0], keeps_all=False)
    for part in points:
        window.add(part)
    assert (window.points, window.moves, window.count) == ([], 40, 280)
    root = Preconditioner(torch.full((5,), 0.1, dtype=torch.float64)).adapted(window).root
    variances, share = points.reshape(-1, 5).var(0, correction=0), 280 / 285
    torch.testing.assert_close(root, (share * variances + (1 - share) * 0.01).sqrt())


def test_chains_off_kinks_spread_over_flat_directions():
    """In a short run: kinks do not hold them at w*, so that their squares, in units of 1/γ, add up to 2."""
    target, _, _ = kinked()
    moves = Moves(adjusted=True, preconditioned=True, leapfrog_steps=4, step_size=None, target_acceptance=0.75)
    found = run_chains(target, moves, 32, 200, 150, torch.Generator().manual_seed(0))
    assert abs(float(found.distances.mean()) * GAMMA - 2) < 0.4
    assert abs(float(found.losses.mean()) - 3) < 0.3  # λ = 2 + 2/2
