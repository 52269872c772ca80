"""Kinks of one unit: does the loss fall when samples leave the kink they are on?

For one unit with output weight z, let B be the samples on its kink, x_n their inputs, e the residual, and
g = Σ_{n∉B} e_n A_n x_n. To first order a step v of the unit's weights changes −N/2 times the loss by
z (g·v + Σ_{n∈B} e_n f(x_n·v)), which a local minimum keeps from being positive for any v.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linprog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_CELLS = 8  # kinks that bend upwards, whose sides are enumerated: 2^8 linear programs at most
_EPS = float(np.finfo(np.float64).eps)
_INDEPENDENT = 1e-7  # smallest singular value, relative to the largest, of inputs that count as independent


@dataclass(frozen=True)
class KinkVerdict:
    """The outcome of the test of one unit's kinks.

    Attributes:
        holds: True: no step lowers the loss; False: some step does; None: undecided.
        reason: what decided, in words.
        stationary: whether multipliers exist in the hull of the slopes: 0 is in Clarke's subdifferential.
        step: a step v that lowers the loss where one was found, (d0,).
        worst: sample of B (its position) whose multiplier is furthest out, and the side it would leave to; None where
            all are within.
        ends: samples whose multiplier is at an end of its interval up to rounding, and the side of that end: nothing
            holds them to the kink, nor pulls them off. Of two ends, as of samples without an error, it is one.
    """

    holds: bool | None
    reason: str
    stationary: bool = True
    step: Array | None = None
    worst: tuple[int, int] | None = None
    ends: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Pull:
    """What a unit's kinks do to it, for inputs of length 1 and z of size 1.

    Attributes:
        inputs: x_n/‖x_n‖, (b, d0).
        force: g, (d0,).
        ahead: multipliers of samples that leave to the positive side, z e_n ‖x_n‖, (b,).
        behind: of samples that leave to the negative side, ρ times as much, (b,).
        noise: bound on the rounding error of ‖force‖.
        uncertainty: bounds on the rounding errors of both multipliers, (b,); 0 where they are known exactly.
    """

    inputs: Array
    force: Array
    ahead: Array
    behind: Array
    noise: float
    uncertainty: Array

    def gain(self, steps: Array) -> Array:
        """What steps (…, d0) win, to first order."""
        moves = steps @ self.inputs.T
        return np.asarray(steps @ self.force + np.where(moves > 0, self.ahead * moves, self.behind * moves).sum(-1))

    @property
    def scale(self) -> float:
        """Sizes below which what linear programs say is not told from zero."""
        return float(1e-9 * (np.abs(self.force).max() + np.abs(self.ahead).max()))


def check_multipliers(
    inputs: Array, errors: Array, g: Array, z: float, slope: float, noise: float, *, uncertainty: Array | None = None
) -> KinkVerdict:
    """Test the kinks of one unit whose output weight is not zero.

    No step lowers the loss if multipliers μ exist with z g + Σ_B μ_n x_n = 0 and μ_n between z e_n and ρ z e_n, where
    z e_n (1 − ρ) ≤ 0. A kink with z e_n (1 − ρ) > 0 bends upwards, and its two sides are tried in turn, with
    μ_n ≥ z e_n on the positive one and μ_n ≤ ρ z e_n on the other. With independent inputs μ is unique; otherwise a
    linear program finds the μ that is furthest inside. How far inside it is decides, beside what rounding may do to all
    that enters: where rounding may matter the test is undecided.

    Args:
        inputs: x_n of the samples on the kink, (b, d0).
        errors: e_n of those samples, (b,).
        g: Σ_{n∉B} e_n A_n x_n, (d0,).
        z: output weight, not 0.
        slope: ρ.
        noise: bound on the rounding error of ‖g‖; without ``uncertainty`` also of the e_n ‖x_n‖.
        uncertainty: bounds on the rounding errors of the e_n, (b,); 0 where e_n is known exactly.
    """
    norms = np.linalg.norm(inputs, axis=1)
    pull = np.sign(z) * errors * norms
    blurs = np.full(len(norms), noise) if uncertainty is None else uncertainty * norms
    kinks = _Pull(
        inputs / norms[:, None], np.sign(z) * g, pull, slope * pull, noise, max(1.0, abs(slope)) * blurs
    )  # fmt: skip
    values = np.linalg.svd(kinks.inputs, compute_uv=False)
    if len(norms) <= inputs.shape[1] and values[-1] > _INDEPENDENT * values[0]:
        return _independent(kinks, float(values[-1]), flatter=int(abs(slope) <= 1))
    return _dependent(kinks)


def _independent(kinks: _Pull, smallest: float, flatter: int) -> KinkVerdict:
    """The verdict where μ is unique.

    Args:
        kinks: what the kinks do.
        smallest: the smallest singular value of their inputs.
        flatter: the side, 0 ahead or 1 behind, on which a sample matters less: of two open ends the one that is told.
    """
    force, ahead, behind = kinks.force, kinks.ahead, kinks.behind
    inverse = np.linalg.pinv(kinks.inputs)  # (d0, b); its columns leave one kink at a time
    multipliers = -inverse.T @ force
    multipliers = multipliers - inverse.T @ (force + kinks.inputs.T @ multipliers)
    left = force + kinks.inputs.T @ multipliers  # no kink holds this
    if np.linalg.norm(left) > 2 * kinks.noise + 1e-12 * np.linalg.norm(force):
        return KinkVerdict(holds=False, reason="a force along the kinks", stationary=False, step=left)
    summing = sum(kinks.inputs.shape) * _EPS * (np.linalg.norm(force) + np.abs(multipliers).sum())
    uncertainty = kinks.uncertainty + (kinks.noise + summing) / smallest + np.linalg.norm(inverse.T @ left)
    gains = np.stack([ahead - multipliers, multipliers - behind])  # what leaving to either side wins
    hull = np.minimum(ahead, behind) - uncertainty <= multipliers
    stationary = bool((hull & (multipliers <= np.maximum(ahead, behind) + uncertainty)).all())
    inert = (ahead == 0) & (behind == 0) & (multipliers == 0) & (kinks.uncertainty == 0) & (kinks.noise == 0)
    clear = np.where(inert, -1.0, gains - np.sign(gains) * uncertainty)  # beyond rounding, or of the other sign
    open_ends = ~inert & (np.abs(gains) <= uncertainty)
    side, sample = np.unravel_index(int(np.where(open_ends, -np.inf, clear).argmax()), gains.shape)
    if not open_ends[side, sample] and clear[side, sample] > 0:
        sign = 1 if side == 0 else -1
        return KinkVerdict(
            holds=False,
            reason="a multiplier is outside its interval",
            stationary=stationary,
            step=np.asarray(sign * inverse[:, sample]),
            worst=(int(sample), sign),
        )
    if open_ends.any():
        open_ends[1 - flatter] &= ~open_ends[flatter]
        ends = tuple((int(position), 1 if row == 0 else -1) for row, position in np.argwhere(open_ends))
        return KinkVerdict(holds=None, reason="a multiplier is within rounding of the end of its interval", ends=ends)
    return KinkVerdict(holds=True, reason="every multiplier is inside its interval")


def _dependent(kinks: _Pull) -> KinkVerdict:
    """The verdict where inputs depend on one another.

    With multipliers that are inside by a margin t on the kinks S, a step v wins at most −t Σ_S |x_n·v|, which is −t
    times the smallest singular value of the inputs of S times ‖v‖ on their span, and what rounding adds. Kinks whose
    two sides rounding does not tell apart are no part of S: as far as they are told, they are a part of the force.
    """
    told = np.abs(kinks.ahead - kinks.behind) > 4 * kinks.uncertainty
    upward = told & (kinks.ahead > kinks.behind)
    step = _tried_step(kinks)
    if upward.sum() > _CELLS:
        if step is not None:
            return KinkVerdict(holds=False, reason="a step off dependent kinks was found", stationary=False, step=step)
        reason = f"{int(upward.sum())} dependent kinks that bend upwards, more than {_CELLS}"
        return KinkVerdict(holds=None, reason=reason)
    return _by_multipliers(kinks, told, upward, step) if told.any() else _untold(kinks, step)


def _by_multipliers(
    kinks: _Pull, told: NDArray[np.bool_], upward: NDArray[np.bool_], step: Array | None
) -> KinkVerdict:
    """The verdict of the multipliers that are furthest inside, for all sides of the kinks that bend upwards."""
    held, smallest = _held(kinks, told)
    for lower, upper in _intervals(held.ahead, held.behind, upward[told]):
        margin, left = _widest(held, lower, upper)
        if margin is None or margin < -kinks.scale - kinks.noise:
            step = _best_in_cells(kinks, upward) if step is None else step
            reason = "dependent kinks without multipliers"
            if step is None:
                return KinkVerdict(holds=None, reason=f"{reason}, yet no step was found")
            stationary = margin is not None and not upward.any()
            return KinkVerdict(holds=False, reason=reason, stationary=stationary, step=step)
        if not margin * smallest > held.noise + left:
            reason = "multipliers of dependent kinks within rounding of their intervals' ends"
            return KinkVerdict(holds=None, reason=reason)
    return KinkVerdict(holds=True, reason="multipliers of dependent kinks exist inside their intervals")


def _held(kinks: _Pull, told: NDArray[np.bool_]) -> tuple[_Pull, float]:
    """The kinks that are told, with the others in the force and its noise, and their smallest singular value.

    The noise is infinite where one of the others is not in their span, as nothing outweighs it there.
    """
    half = np.abs(kinks.ahead - kinks.behind) / 2
    others = np.where((kinks.ahead == 0) & (kinks.uncertainty == 0), 0.0, half + kinks.uncertainty)
    _, values, right = np.linalg.svd(kinks.inputs[told], full_matrices=False)
    span = right[values > _INDEPENDENT * values[0]]
    loose = kinks.inputs[~told & (others > 0)]
    beyond = np.linalg.norm(loose - loose @ span.T @ span, axis=1).max(initial=0.0) > _INDEPENDENT
    held = _Pull(
        inputs=kinks.inputs[told],
        force=kinks.force + (kinks.ahead + kinks.behind)[~told] / 2 @ kinks.inputs[~told],
        ahead=kinks.ahead[told],
        behind=kinks.behind[told],
        uncertainty=kinks.uncertainty[told],
        noise=np.inf if beyond else kinks.noise + float(others[~told].sum()),
    )
    return held, float(values[len(span) - 1])


def _untold(kinks: _Pull, step: Array | None) -> KinkVerdict:
    """The verdict where rounding hides what each kink does, unless it is known that none does anything."""
    if (
        not (kinks.ahead.any() or kinks.behind.any() or kinks.force.any() or kinks.uncertainty.any())
        and kinks.noise == 0
    ):
        return KinkVerdict(holds=True, reason="the kinks are of samples without an error")
    if step is not None:
        return KinkVerdict(holds=False, reason="a step off dependent kinks was found", stationary=False, step=step)
    return KinkVerdict(holds=None, reason="rounding hides what the kinks do")


def _intervals(ahead: Array, behind: Array, upward: NDArray[np.bool_]) -> Iterator[tuple[Array, Array]]:
    """Intervals of the multipliers, for each choice of sides of the kinks that bend upwards."""
    for sides in itertools.product((True, False), repeat=int(upward.sum())):
        lower, upper = ahead.copy(), behind.copy()
        positive = np.zeros(len(ahead), dtype=bool)
        positive[upward] = sides
        upper[upward & positive] = np.inf
        lower[upward & ~positive] = -np.inf
        yield lower, upper


def _widest(kinks: _Pull, lower: Array, upper: Array) -> tuple[float | None, float]:
    """How far inside their intervals multipliers can be, beyond rounding, and what of the force they leave."""
    scale = max(float(np.abs(kinks.force).max()), float(np.abs(lower[np.isfinite(lower)]).max(initial=0)))
    scale = max(scale, float(np.abs(upper[np.isfinite(upper)]).max(initial=0)))
    count, eye, ones = len(lower), np.eye(len(lower)), np.ones((len(lower), 1))
    below, above = np.isfinite(lower), np.isfinite(upper)
    found = linprog(
        c=np.r_[np.zeros(count), -1.0],
        A_eq=np.c_[kinks.inputs.T, np.zeros(kinks.inputs.shape[1])],
        b_eq=-kinks.force / scale,
        A_ub=np.r_[np.c_[-eye, ones][below], np.c_[eye, ones][above]],
        b_ub=np.r_[-lower[below], upper[above]] / scale,
        bounds=[(None, None)] * count + [(None, 1.0)],
        method="highs",
    )
    if found.x is None:
        return None, 0.0
    multipliers = found.x[:-1] * scale
    multipliers = multipliers - np.linalg.pinv(kinks.inputs.T) @ (kinks.force + kinks.inputs.T @ multipliers)
    left = float(np.linalg.norm(kinks.force + kinks.inputs.T @ multipliers))
    summing = sum(kinks.inputs.shape) * _EPS * (np.linalg.norm(kinks.force) + np.abs(multipliers).sum())
    inside = np.minimum(multipliers - lower, upper - multipliers) - kinks.uncertainty
    return float(inside.min()), left + float(summing)


def _tried_step(kinks: _Pull) -> Array | None:
    """A step that lowers the loss, among ± the columns of pinv(X_B), ± the inputs and the force; None if none does."""
    inverse = np.linalg.pinv(kinks.inputs)
    steps = np.concatenate([inverse.T, -inverse.T, kinks.inputs, -kinks.inputs, kinks.force[None]])
    steps = steps / np.linalg.norm(steps, axis=1, keepdims=True).clip(min=1e-300)
    gains = kinks.gain(steps)
    best = int(gains.argmax())
    return np.asarray(steps[best]) if gains[best] > kinks.scale + kinks.noise + kinks.uncertainty.sum() else None


def _best_in_cells(kinks: _Pull, upward: NDArray[np.bool_]) -> Array | None:
    """Maximise the gain over each cell of the kinks that bend upwards, with |v| ≤ 1: one linear program a cell."""
    ahead, behind, concave = kinks.ahead, kinks.behind, kinks.inputs[~upward]
    m = len(concave)
    for sides in itertools.product((1.0, -1.0), repeat=int(upward.sum())):
        signs = np.array(sides)
        pulls = np.where(signs > 0, ahead[upward], behind[upward])
        linear = kinks.force + pulls @ kinks.inputs[upward]
        found = linprog(
            c=np.r_[-linear, -np.ones(m)],
            A_ub=np.r_[
                np.c_[-ahead[~upward, None] * concave, np.eye(m)],
                np.c_[-behind[~upward, None] * concave, np.eye(m)],
                np.c_[-signs[:, None] * kinks.inputs[upward], np.zeros((len(signs), m))],
            ],
            b_ub=np.zeros(2 * m + len(signs)),
            bounds=[(-1, 1)] * kinks.inputs.shape[1] + [(None, None)] * m,
            method="highs",
        )
        if found.x is None:
            continue
        step = _in_span(found.x[: kinks.inputs.shape[1]], np.vstack([kinks.inputs, kinks.force]))
        if kinks.gain(step) > kinks.scale + (kinks.noise + kinks.uncertainty.sum()) * np.linalg.norm(step):
            return step
    return None


def _in_span(step: Array, rows: Array) -> Array:
    """The part of a step that the rows see: the rest moves nothing, and would grow without bound."""
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    seen = right[values > _INDEPENDENT * values[0]]
    return np.asarray(seen.T @ (seen @ step))
