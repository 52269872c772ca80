"""Losses whose learning coefficient is known, batched over points (C, P), with their minimum and the coefficient."""

import numpy as np
import torch


def reduced_rank(inputs, hidden, outputs):
    """‖B A‖² for matrices of a linear network whose true map is 0 (Aoyagi and Watanabe 2005)."""
    m, h, n = inputs, hidden, outputs
    if m + h < n:
        truth = m * h / 2
    elif n + h < m:
        truth = h * n / 2
    elif m + n < h:
        truth = m * n / 2
    else:
        truth = (2 * m * n + 2 * h * n + 2 * m * h - m * m - n * n - h * h + (m + h + n) % 2) / 8

    def loss(points):
        first, second = points[:, : m * h].reshape(-1, h, m), points[:, m * h :].reshape(-1, n, h)
        return (second @ first).square().sum((1, 2))

    return loss, torch.zeros(h * (m + n), dtype=torch.float64), truth


def crossing(first, second):
    """(w1^a w2^b)², with the coefficient 1/(2 max(a, b))."""

    def loss(points):
        return (points[:, 0] ** first * points[:, 1] ** second).square()

    return loss, torch.zeros(2, dtype=torch.float64), 1 / (2 * max(first, second))


def expected_crossing(first, second, beta):
    """The mean of nβ L itself under exp(−nβ L − ‖w‖²/2), by quadrature in log w, for nβ up to 1e40."""
    logs = np.linspace(-80, 3, 6000)
    prior = logs - np.exp(2 * logs) / 2
    energies = np.exp(np.minimum(np.log(beta) + 2 * (first * logs[:, None] + second * logs), np.log(700)))
    density = np.exp(prior[:, None] + prior - energies)
    return float((density * energies).sum() / density.sum())
