"""Slow estimates of learning coefficients by Metropolis chains, which know nothing about directions or ranks."""

import torch


def sampled_coefficient(loss, point, beta, *, radius=0.02, chains=400, steps=6000, seed=0):
    """β E[L − L*] under exp(−β (L − L*)) in a cube around a minimum, and its standard error over the chains.

    Args:
        loss: L of points (C, p), (C,).
        point: the minimum, (p,).
        beta: inverse temperature; the coefficient is the limit of large β.
        radius: half the side of the cube; no better point may be in it.
        chains: number C of independent chains.
        steps: of each chain; the first third is burn-in.
        seed: of everything that is drawn.
    """
    stream = torch.Generator().manual_seed(seed)
    at, lowest = point.expand(chains, -1).clone(), loss(point[None])
    energy, total, burn_in = torch.zeros(chains, dtype=point.dtype), torch.zeros(chains, dtype=point.dtype), steps // 3
    for step in range(steps):
        # Off kinks the density is 1/β wide, elsewhere 1/√β: the sizes of moves are spread between both.
        exponent = 0.5 + 0.6 * torch.rand(chains, 1, dtype=point.dtype, generator=stream)
        some = torch.rand(at.shape, generator=stream) < torch.rand(chains, 1, generator=stream)
        there = at + some * beta**-exponent * torch.randn(at.shape, dtype=point.dtype, generator=stream)
        proposed = beta * (loss(there) - lowest)
        accepted = torch.rand(chains, dtype=point.dtype, generator=stream).log() < energy - proposed
        accepted &= ((there - point).abs() < radius).all(-1)
        at = torch.where(accepted[:, None], there, at)
        energy = torch.where(accepted, proposed, energy)
        if step >= burn_in:
            total += energy
    means = total / (steps - burn_in)
    return float(means.mean()), float(means.std() / chains**0.5)
