"""Points that are hard for certificates, and attacks on what is called a minimum that know nothing of certificates.

An attack looks for a move that lowers the loss inside the box where a local minimum keeps it from falling: no
pre-activation off its kink changes its sign, and no z_i its own. It computes in long double, and what it finds is said
by exact arithmetic of fractions. Shapes: N samples, d0 inputs, d1 hidden units, K moves.
"""

import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from lightning_mnn.landscape import planted_kink_minimum, planted_minimum
from tests.landscape.probes import train

SLOPES = (0.0, 0.0, 0.01, 0.3, -1.0, 2.0)
Wide = np.longdouble
_ON_KINK = 4e-15  # |w·x|/(‖w‖‖x‖) up to which a pre-activation counts as zero; regions can be as thin as ten times that
_OF_LOSS = 1e-9  # fall of the loss, relative to it, that rounding in float64 may leave
_OF_TERMS = 1e-13  # errors of predictions, relative to their terms, that it may leave


@dataclass(frozen=True)
class Case:
    """Weights and a training set: w (d1, d0), z (d1,), x (N, d0), y (N,), all float64, and the slope."""

    w: np.ndarray
    z: np.ndarray
    x: np.ndarray
    y: np.ndarray
    slope: float

    @property
    def tensors(self):
        return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in (self.w, self.z, self.x, self.y))

    def at(self, found):
        """The case at the weights of a certificate."""
        return Case(found.hidden_weights.numpy(), found.output_weights.numpy(), self.x, self.y, self.slope)


def loss(case):
    """‖e‖² in long double, and what rounding in float64 may leave of it."""
    w, z, x, y = (part.astype(Wide) for part in (case.w, case.z, case.x, case.y))
    e = y - _activate(x @ w.T, case.slope) @ z
    square = (e * e).sum()
    return square, _OF_LOSS * square + (_OF_TERMS * _terms(case)) ** 2


def _terms(case):
    """The norm of what the predictions are summed from."""
    u = case.x @ case.w.T
    sizes = np.linalg.norm(case.x, axis=1)[:, None] * np.linalg.norm(case.w, axis=1)
    reach = np.where(np.abs(u) <= _ON_KINK * sizes, 1.0, np.abs(_slopes(u, case.slope))) * sizes
    return float(np.linalg.norm(np.abs(case.y) + reach @ np.abs(case.z)))


def fall(case, rng, moves=60):
    """By how much a move inside the box lowers ‖e‖² beyond what rounding may leave: 0 at a minimum."""
    w, z = _balanced(case)
    case = Case(w, z, case.x, case.y, case.slope)
    square, allowed = loss(case)
    v, dz = _moves(case, rng, moves)
    share = _box(case, v, dz)
    v, dz = v * share[:, None, None], dz * share[:, None]
    return max(_falls(case, v, dz, float(square), float(allowed)), default=0.0)


def _falls(case, v, dz, square, allowed):
    """Falls of ‖e‖², said exactly, of the moves whose fall in long double is beyond what rounding may leave."""
    doubt = 1e-17 * (square**0.5 + allowed**0.5) * _terms(case)  # of long double
    for scale, changes in _changes(case, v, dz):
        for k in np.argsort(changes)[:2]:
            if changes[k] - doubt < -allowed:
                exact = _exact_change(case, v[k] * scale[k], dz[k] * scale[k])
                yield max(0.0, float(-exact) - allowed)


def _balanced(case):
    """Rows of length about 1 by powers of two, which change no prediction."""
    largest = np.abs(case.w).max(1)
    powers = np.where(largest > 0, 2.0 ** -np.frexp(np.where(largest > 0, largest, 1.0))[1].astype(float), 1.0)
    return case.w * powers[:, None], case.z / powers


def _moves(case, rng, count):
    """Moves v (K, d1, d0) of w and dz (K, d1) of z."""
    found = [*_random_moves(case, rng, count), *_pulled_moves(case, rng), *_joint_moves(case, rng)]
    v, dz = zip(*found, strict=True)
    return np.array(v), np.array(dz)


def _units(case):
    """Lengths of moves of each row, and of each z_i."""
    typical = np.abs(case.y).max() / max(np.abs(case.x).max(), 1e-300)
    return np.linalg.norm(case.w, axis=1) + (case.w == 0).all(1), np.where(
        case.z == 0, typical, np.abs(case.z)
    ) + 1e-300


def _random_moves(case, rng, count):
    """Of one row, or of all, and of z."""
    of_rows, of_z = _units(case)
    for _ in range(count):
        chosen = (np.arange(len(case.z)) == rng.integers(len(case.z))) | (rng.random() < 0.5)
        v, dz = rng.standard_normal(case.w.shape) * of_rows[:, None], rng.standard_normal(case.z.shape) * of_z
        yield v * chosen[:, None], dz * chosen * rng.choice([0.0, 1.0, 1e-3])


def _pulled_moves(case, rng):
    """Of one row: off one kink at a time, along an input, or up the pull of the residual where it leads to."""
    (of_rows, of_z), kinks = _units(case), _kinks(case)
    e = _residual(case)
    for i in range(len(case.z)):
        on = kinks[:, i] & (np.abs(case.x).max(1) > 0)
        columns = np.linalg.pinv(case.x[on] / np.linalg.norm(case.x[on], axis=1, keepdims=True)).T
        starts = [*rng.standard_normal((6, case.x.shape[1])), *case.x[:6], *-case.x[:6], *columns, *-columns]
        for start, sign in itertools.product(starts, (np.sign(case.z[i]),) if case.z[i] else (1.0, -1.0)):
            step = start
            for _ in range(4):
                length = np.linalg.norm(step)
                if length > 0 and np.isfinite(length):
                    v, dz = np.zeros_like(case.w), np.zeros_like(case.z)
                    v[i], dz[i] = step / length * of_rows[i], 0.0 if case.z[i] else sign * of_z[i]
                    yield v, dz
                side = np.where(kinks[:, i], case.x @ step, case.x @ case.w[i])
                step = sign * ((_slopes(side, case.slope) * e) @ case.x)


def _joint_moves(case, rng):
    """Of all rows at once, on random sides of their kinks: towards the least-squares solution, or up its gradient."""
    kinks, e, live = _kinks(case), _residual(case), case.z != 0
    for _ in range(10):
        sides = np.where(kinks, rng.standard_normal(kinks.shape), case.x @ case.w.T)
        features = (_slopes(sides, case.slope)[:, :, None] * case.x[:, None, :])[:, live].reshape(len(e), -1)
        if features.size and np.isfinite(features).all():
            flat = np.linalg.lstsq(features, e, rcond=1e-10)[0] if rng.random() < 0.5 else features.T @ e
            v = np.zeros_like(case.w)
            v[live] = flat.reshape(-1, case.x.shape[1]) / case.z[live][:, None]
            yield v, np.zeros_like(case.z)


def _box(case, v, dz):
    """The largest share of each move that stays in the box and is of the size of the weights."""
    kinks, u = _kinks(case), np.abs(case.x @ case.w.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        rooms = np.where(kinks, np.inf, u) / np.abs(np.einsum("nd,kid->kni", case.x, v))
        rooms = np.where(np.isnan(rooms), np.inf, rooms).min((1, 2))
        turns = np.where((case.z != 0) & (dz != 0), np.abs(case.z) / np.abs(dz), np.inf).min(1)
        lengths = np.linalg.norm(v, axis=2)
        longest = (10 * (np.linalg.norm(case.w, axis=1) + (case.w == 0).all(1)) / lengths).min(1)
    return 0.99 * np.minimum(np.minimum(rooms, turns), np.minimum(longest, 1e3))


def _changes(case, v, dz):
    """Changes of ‖e‖² (K,) in long double at shares of each move: where a parabola is least, and several fixed ones."""
    w, z, x, y = (part.astype(Wide) for part in (case.w, case.z, case.x, case.y))
    u, moved = x @ w.T, np.einsum("nd,kid->kni", x, v.astype(Wide))
    base = _activate(u, Wide(case.slope)) @ z
    e = y - base

    def change(scale):
        shifted = _activate(u + moved * scale[:, None, None], Wide(case.slope))
        return (shifted * (z + dz * scale[:, None])[:, None, :]).sum(-1) - base

    tiny = 1e-3
    first = change(np.full(len(v), tiny))
    with np.errstate(divide="ignore", invalid="ignore"):
        best = (tiny * (first @ e) / (first * first).sum(1)).astype(float)
    for scale in (np.clip(np.nan_to_num(best, posinf=1.0), 0.0, 1.0), *(np.full(len(v), s) for s in (1.0, 0.1, 1e-3))):
        step = change(scale)
        yield scale, (step * (step - 2 * e)).sum(1)


def _exact_change(case, v, dz):
    """The same of one move, in fractions."""

    def square(w, z):
        total = Fraction(0)
        for sample, target in zip(case.x.tolist(), case.y.tolist(), strict=True):
            error = Fraction(target)
            for row, out in zip(w, z, strict=True):
                u = sum((a * Fraction(b) for a, b in zip(row, sample, strict=True)), Fraction(0))
                error -= out * (u if u > 0 else Fraction(case.slope) * u)
            total += error * error
        return total

    w, z = ([[Fraction(a) for a in row] for row in case.w.tolist()], [Fraction(a) for a in case.z.tolist()])
    after = [[a + Fraction(b) for a, b in zip(row, move, strict=True)] for row, move in zip(w, v.tolist(), strict=True)]
    return square(after, [a + Fraction(b) for a, b in zip(z, dz.tolist(), strict=True)]) - square(w, z)


def _residual(case):
    u = np.where(_kinks(case), 0.0, case.x @ case.w.T)
    return case.y - _activate(u, case.slope) @ case.z


def _kinks(case):
    sizes = np.linalg.norm(case.x, axis=1)[:, None] * np.linalg.norm(case.w, axis=1)
    return np.abs(case.x @ case.w.T) <= _ON_KINK * sizes


def _activate(u, slope):
    return np.where(u > 0, u, slope * u)


def _slopes(u, slope):
    return np.where(u > 0, 1.0, slope)


def _plain(rng, samples=(1, 13), inputs=(1, 6)):
    n, d0, d1 = int(rng.integers(*samples)), int(rng.integers(*inputs)), int(rng.integers(1, 5))
    y = rng.choice([rng.integers(0, 2, n).astype(float), rng.choice([-1.0, 1.0], n), rng.standard_normal(n)])
    return Case(
        rng.standard_normal((d1, d0)), rng.standard_normal(d1), rng.standard_normal((n, d0)), y,
        float(rng.choice(SLOPES)),
    )  # fmt: skip


def _with(case, **parts):
    return Case(**{name: parts.get(name, getattr(case, name)) for name in ("w", "z", "x", "y", "slope")})


def _trained(case, rng):
    w, z = train(case.w, case.z, case.x, case.y, case.slope, steps=int(rng.choice([30, 300])))
    return _with(case, w=w, z=z) if np.isfinite(w).all() and np.isfinite(z).all() else case


def few_samples(rng):
    case = _plain(rng, samples=(1, 5), inputs=(5, 9))
    size = rng.choice([0.0, 1.0, 1e-16, 1e-300, 1e15], len(case.z))
    z, slope = rng.choice([-1.0, 1.0, case.z[0]], len(case.z)), float(rng.choice([0.01, case.slope]))
    return _with(case, w=case.w * size[:, None], z=z, slope=slope)


def zero_rows(rng):
    case = _plain(rng)
    w, z = case.w.copy(), case.z.copy()
    w[rng.random(len(w)) < 0.6] = 0
    z[rng.random(len(z)) < 0.3] = 0
    return _with(case, w=w, z=z)


def dead_giants(rng):
    case = _plain(rng)
    x = np.abs(case.x) if rng.random() < 0.6 else case.x
    w, z = case.w.copy(), case.z.copy()
    giant = rng.random(len(z)) < 0.6
    w[giant] = -np.abs(w[giant]) * 10.0 ** rng.uniform(3, 17)
    z[giant] *= 10.0 ** rng.choice([0.0, -8.0, 8.0])
    w[~giant] *= rng.choice([0.0, 1.0])
    z[~giant] *= rng.choice([0.0, 1.0])
    return _with(case, x=x, w=w, z=z, slope=float(rng.choice([0.0, case.slope])))


def units_of_measure(rng):
    case = _trained(_plain(rng), rng) if rng.random() < 0.5 else _kinked(rng)
    a, b, c = 10.0 ** rng.choice([-15.0, 0.0, 15.0], 3)
    return _with(case, x=case.x * a, y=case.y * b, w=case.w * c, z=case.z * (b / a / c))


def whole_numbers(rng):
    case = _plain(rng)
    most = int(rng.integers(1, 4))
    return Case(
        *(rng.integers(-most, most + 1, part.shape).astype(float) for part in (case.w, case.z, case.x, case.y)),
        case.slope,
    )


def deficient(rng):
    case = _plain(rng, samples=(3, 13), inputs=(3, 7))
    rank = int(rng.integers(1, 3))
    x = rng.standard_normal((len(case.x), rank)) @ rng.standard_normal((rank, case.x.shape[1]))
    x = np.round(x) if rng.random() < 0.3 else x
    x = x + 10.0 ** rng.uniform(-17, -5) * rng.standard_normal(x.shape) if rng.random() < 0.4 else x
    case = _with(case, x=x)
    return _trained(case, rng) if rng.random() < 0.5 else case


def _kinked(rng):
    d0, d1 = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    planted = planted_kink_minimum(
        int(rng.integers(3, 5)) * d0 + 2, d0, d1, float(rng.choice(SLOPES)), margin=float(rng.choice([0.05, 1e-3])),
        kinks_per_unit=int(rng.integers(1, d0)), violated=bool(rng.random() < 0.4), seed=int(rng.integers(2**31)),
    )  # fmt: skip
    parts = (planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
    return Case(*(part.numpy() for part in parts), planted.negative_slope)


def kinks(rng):
    case = _kinked(rng)
    return _with(case, w=case.w * (1 + rng.choice([0.0, 1e-16, 1e-12, 1e-8, 1e-4]) * rng.standard_normal(case.w.shape)))


def near_ties(rng):
    """Planted kinks with a multiplier that is within 10^-4 … 10^-17 of an end of its interval."""
    case = _kinked(rng)
    sizes = np.linalg.norm(case.x, axis=1)[:, None] * np.linalg.norm(case.w, axis=1)
    on = np.abs(case.x @ case.w.T) <= 1e-14 * sizes
    i = int(rng.integers(len(case.z)))
    if not on[:, i].any():
        return case
    u = np.where(on, 0.0, case.x @ case.w.T)
    e = case.y - _activate(u, case.slope) @ case.z
    g = (_slopes(u[:, i], case.slope) * e * ~on[:, i]) @ case.x
    multipliers = np.linalg.lstsq(case.x[on[:, i]].T, g, rcond=None)[0]
    k = int(rng.integers(len(multipliers)))
    n = np.flatnonzero(on[:, i])[k]
    end = -multipliers[k] if case.slope == 0 or rng.random() < 0.5 else -multipliers[k] / case.slope
    y = case.y.copy()
    y[n] += end + rng.choice([0.0, 1.0, -1.0]) * 10.0 ** rng.uniform(-17, -4) - e[n]
    return _with(case, y=y)


def cancelling(rng):
    """Rows that are nearly the same, with large output weights of opposite signs."""
    if rng.random() < 0.5:
        d0 = int(rng.integers(1, 4))
        planted = planted_minimum(
            d0 + int(rng.integers(3, 8)), d0, 3, float(rng.choice(SLOPES)), seed=rng.integers(2**31)
        )
        case = Case(
            *(
                part.numpy()
                for part in (planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
            ),
            planted.negative_slope,
        )
        size = 10.0 ** rng.uniform(0, 9)
        w = case.w.copy()
        w[0] = w[1] + (w[0] - w[1]) / size
        return _with(case, w=w, z=case.z * size)
    case, size = _plain(rng), 10.0 ** rng.uniform(0, 12)
    w = np.repeat(case.w[:1], len(case.z), axis=0) * size ** rng.choice([0.0, 1.0])
    return _with(case, w=w, z=case.z * size)


def trained(rng):
    return _trained(_plain(rng), rng)


def noise(rng):
    """Weights and inputs that are what rounding leaves of zero."""
    case = _plain(rng)
    mask = rng.random(case.w.shape) < 0.5
    w = np.where(mask, case.w, case.w * 10.0 ** -rng.choice([15.0, 17.0, 60.0, 300.0]))
    z = case.z * rng.choice([1.0, 1e-15, 1e-17, 1e15], len(case.z))
    x = np.where(rng.random(case.x.shape) < 0.2, 1e-16, 1.0) * case.x
    return _with(case, w=w, z=z, x=x)


FAMILIES = {
    family.__name__: family
    for family in (
        few_samples, zero_rows, dead_giants, units_of_measure, whole_numbers, deficient, kinks, near_ties, cancelling,
        trained, noise,
    )
}  # fmt: skip
