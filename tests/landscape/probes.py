"""Slow, obvious checks that a certified point is what it is said to be, by evaluating the loss around it."""

import numpy as np


def activate(u, slope):
    """f(u), element by element."""
    return np.where(u > 0, u, slope * u)


def outputs(w, z, x, slope):
    """Predictions of one network, (N,)."""
    return activate(x @ w.T, slope) @ z


def lowest_change(w, z, x, y, slope, *, kinks, rng, count=2000):
    """The lowest change of ‖e‖² over moves of the weights inside the neighbourhood of a certificate, and its error.

    Moves are random (all rows, or one), and at kinks directed: ± the columns of pinv(X_B) for each row at 0.5, 0.1 and
    0.01 of the box |v_i·x_n| < |w_i·x_n|, |δz_i| < |z_i|, where samples on kinks do not count.
    """
    n, d1 = len(x), len(z)
    u = np.where(kinks, 0.0, x @ w.T)
    base = activate(u, slope)
    e = y - activate(x @ w.T, slope) @ z
    worst, error = np.inf, 0.0

    def box(i, v):
        moved = np.abs(x @ v)
        free = ~kinks[:, i] & (moved > 0)
        return (np.abs(u[free, i]) / moved[free]).min(initial=np.inf)

    moves = []
    for _ in range(count):
        dw, dz = np.zeros_like(w), np.zeros_like(z)
        rows = range(d1) if rng.random() < 0.5 else [rng.integers(d1)]
        for i in rows:
            v = rng.standard_normal(w.shape[1])
            reach = min(box(i, v), 10 * (np.linalg.norm(w[i]) + 1) / np.linalg.norm(v))
            dw[i] = v * reach * rng.choice([0.99, 0.5, 0.1, 0.01])
            dz[i] = (abs(z[i]) if z[i] else 1.0) * rng.uniform(-1, 1) * rng.choice([1.0, 0.1, 0.0])
        moves.append((dw, dz))
    for i in range(d1):
        if kinks[:, i].any():
            for v in np.linalg.pinv(x[kinks[:, i]]).T:
                reach = min(box(i, v), 10 * (np.linalg.norm(w[i]) + 1) / np.linalg.norm(v))
                for share in (0.5, 0.1, 0.01, -0.5, -0.1, -0.01):
                    dw = np.zeros_like(w)
                    dw[i] = share * reach * v
                    moves.append((dw, np.zeros_like(z)))
    for chunk in range(0, len(moves), 256):
        dw = np.stack([m[0] for m in moves[chunk : chunk + 256]])
        dz = np.stack([m[1] for m in moves[chunk : chunk + 256]])
        after = activate(u[None] + np.einsum("nd,kid->kni", x, dw), slope)
        change = np.einsum("kni,ki->kn", after, z + dz) - base @ z
        value = (change * (change - 2 * e)).sum(1)
        terms = (np.abs(change) * (np.abs(change) + 2 * np.abs(e))).sum(1)
        size = (np.abs(after) @ np.abs(z) + np.abs(base) @ np.abs(z)).max()
        uncertainty = 1e-15 * (n + d1 + 10) * (terms + 2 * np.abs(e).sum() * size)
        k = int((value + uncertainty).argmin())
        if value[k] + uncertainty[k] < worst:
            worst, error = float(value[k] + uncertainty[k]), float(uncertainty[k])
    return worst, error


def train(w, z, x, y, slope, *, steps, rate=0.03):
    """Adam on the MSE, full batch, at a constant rate and then an exponential tail to 1e-5 of it."""
    first, second = [np.zeros_like(w), np.zeros_like(z)], [np.zeros_like(w), np.zeros_like(z)]
    weights = [w.copy(), z.copy()]
    for step in range(1, steps + 1):
        w, z = weights
        u = x @ w.T
        h, a = activate(u, slope), np.where(u > 0, 1.0, slope)
        e = h @ z - y
        gradients = [2 / len(y) * z[:, None] * ((a * e[:, None]).T @ x), 2 / len(y) * h.T @ e]
        now = rate * min(1.0, 1e-5 ** (2 * step / steps - 1))
        for k, gradient in enumerate(gradients):
            first[k] = 0.9 * first[k] + 0.1 * gradient
            second[k] = 0.999 * second[k] + 0.001 * gradient**2
            move = first[k] / (1 - 0.9**step) / (np.sqrt(second[k] / (1 - 0.999**step)) + 1e-8)
            weights[k] = weights[k] - now * move
    return weights
