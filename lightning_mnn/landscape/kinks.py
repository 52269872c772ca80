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
            holds them to the kink, nor pulls them off.
    """

    holds: bool | None
    reason: str
    stationary: bool = True
    step: Array | None = None
    worst: tuple[int, int] | None = None
    ends: tuple[tuple[int, int], ...] = ()


def judge_kinks(inputs: Array, errors: Array, g: Array, z: float, slope: float, noise: float) -> KinkVerdict:
    """Test the kinks of one unit whose output weight is not zero.

    No step lowers the loss if multipliers μ exist with z g + Σ_B μ_n x_n = 0 and μ_n between z e_n and ρ z e_n, where
    z e_n (1 − ρ) ≤ 0. A kink with z e_n (1 − ρ) > 0 bends upwards, and its two sides are tried in turn, with
    μ_n ≥ z e_n on the positive one and μ_n ≤ ρ z e_n on the other. With independent inputs μ is unique; otherwise a
    linear program finds the μ that is furthest inside.

    Args:
        inputs: x_n of the samples on the kink, (b, d0).
        errors: e_n of those samples, (b,).
        g: Σ_{n∉B} e_n A_n x_n, (d0,).
        z: output weight, not 0.
        slope: ρ.
        noise: bound on the rounding error of ‖g‖ and of the e_n ‖x_n‖.
    """
    norms = np.linalg.norm(inputs, axis=1)
    unit_inputs, pull = inputs / norms[:, None], np.sign(z) * errors * norms
    ahead, behind = pull, slope * pull  # multipliers of a sample that leaves to the positive, negative side
    values = np.linalg.svd(unit_inputs, compute_uv=False)
    independent = len(unit_inputs) <= unit_inputs.shape[1] and values[-1] > _INDEPENDENT * values[0]
    force = np.sign(z) * g
    if independent:
        return _independent(unit_inputs, force, ahead, behind, noise / values[-1] + noise)
    return _dependent(unit_inputs, force, ahead, behind, noise * len(norms) ** 0.5)


def _independent(inputs: Array, force: Array, ahead: Array, behind: Array, noise: float) -> KinkVerdict:
    inverse = np.linalg.pinv(inputs)  # (d0, b); its columns leave one kink at a time
    multipliers = -inverse.T @ force
    left = force + inputs.T @ multipliers  # no kink holds this
    if np.linalg.norm(left) > 2 * noise + 1e-12 * np.linalg.norm(force):
        return KinkVerdict(holds=False, reason="a force along the kinks", stationary=False, step=left)
    gain_ahead, gain_behind = ahead - multipliers, multipliers - behind  # what leaving to either side wins
    gains = np.stack([gain_ahead, gain_behind])
    inert = (np.abs(ahead) <= noise) & (np.abs(behind) <= noise) & (np.abs(multipliers) <= noise)
    hull = np.minimum(ahead, behind) - noise <= multipliers
    stationary = bool((hull & (multipliers <= np.maximum(ahead, behind) + noise)).all())
    gains[:, inert] = -np.inf
    side, sample = np.unravel_index(int(gains.argmax()), gains.shape)
    largest = float(gains[side, sample])
    if largest < -noise:
        return KinkVerdict(holds=True, reason="every multiplier is inside its interval")
    if largest <= noise:
        at_end = np.argwhere(np.abs(gains) <= noise)
        ends = tuple((int(position), 1 if row == 0 else -1) for row, position in at_end)
        return KinkVerdict(holds=None, reason="a multiplier is within rounding of the end of its interval", ends=ends)
    sign = 1 if side == 0 else -1
    return KinkVerdict(
        holds=False,
        reason="a multiplier is outside its interval",
        stationary=stationary,
        step=np.asarray(sign * inverse[:, sample]),
        worst=(int(sample), sign),
    )


def _dependent(inputs: Array, force: Array, ahead: Array, behind: Array, noise: float) -> KinkVerdict:
    upward = ahead > behind + noise
    step = _tried_step(inputs, force, ahead, behind)
    if step is None and upward.sum() > _CELLS:
        reason = f"{int(upward.sum())} dependent kinks that bend upwards, more than {_CELLS}"
        return KinkVerdict(holds=None, reason=reason)
    if upward.sum() > _CELLS:
        return KinkVerdict(holds=False, reason="a step off dependent kinks was found", stationary=False, step=step)
    for lower, upper in _intervals(ahead, behind, upward):
        margin, multipliers = _widest(inputs, force, lower, upper, noise)
        scale = 1e-9 * (np.abs(force).max() + np.abs(ahead).max()) + noise
        if multipliers is None or margin < -scale:
            step = _best_in_cells(inputs, force, ahead, behind) if step is None else step
            if step is None:
                return KinkVerdict(holds=None, reason="dependent kinks without multipliers, yet no step was found")
            stationary = multipliers is not None and not upward.any()
            return KinkVerdict(
                holds=False, reason="dependent kinks without multipliers", stationary=stationary, step=step
            )
        if margin <= scale:
            return KinkVerdict(
                holds=None, reason="multipliers of dependent kinks within rounding of their intervals' ends"
            )
    return KinkVerdict(holds=True, reason="multipliers of dependent kinks exist inside their intervals")


def _intervals(ahead: Array, behind: Array, upward: NDArray[np.bool_]) -> Iterator[tuple[Array, Array]]:
    """Intervals of the multipliers, for each choice of sides of the kinks that bend upwards."""
    for sides in itertools.product((True, False), repeat=int(upward.sum())):
        lower, upper = ahead.copy(), behind.copy()
        positive = np.zeros(len(ahead), dtype=bool)
        positive[upward] = sides
        upper[upward & positive] = np.inf
        lower[upward & ~positive] = -np.inf
        yield lower, upper


def _widest(inputs: Array, force: Array, lower: Array, upper: Array, noise: float) -> tuple[float, Array | None]:
    """Multipliers that are furthest inside their intervals, and how far; inert samples have none."""
    inert = upper - lower <= 2 * noise
    count, scale = len(lower), max(float(np.abs(force).max()), float(np.abs(lower[np.isfinite(lower)]).max(initial=0)))
    if scale == 0:
        return 0.0, np.zeros(count)
    margin = np.where(inert, 0.0, 1.0)
    bounded_below, bounded_above = np.isfinite(lower), np.isfinite(upper)
    eye = np.eye(count)
    found = linprog(
        c=np.r_[np.zeros(count), -1.0],
        A_eq=np.c_[inputs.T, np.zeros(inputs.shape[1])],
        b_eq=-force / scale,
        A_ub=np.r_[np.c_[-eye, margin][bounded_below], np.c_[eye, margin][bounded_above]],
        b_ub=np.r_[
            -lower[bounded_below] + noise * inert[bounded_below], upper[bounded_above] + noise * inert[bounded_above]
        ]
        / scale,
        bounds=[(None, None)] * count + [(None, 1.0)],
        method="highs",
    )
    return (-np.inf, None) if found.x is None else (float(found.x[-1] * scale), found.x[:-1] * scale)


def _tried_step(inputs: Array, force: Array, ahead: Array, behind: Array) -> Array | None:
    """A step that lowers the loss, among ± the columns of pinv(X_B), ± the inputs and the force; None if none does."""
    inverse = np.linalg.pinv(inputs)
    steps = np.concatenate([inverse.T, -inverse.T, inputs, -inputs, force[None]])
    steps = steps / np.linalg.norm(steps, axis=1, keepdims=True).clip(min=1e-300)
    moves = steps @ inputs.T
    gains = steps @ force + np.where(moves > 0, ahead * moves, behind * moves).sum(axis=1)
    best = int(gains.argmax())
    scale = 1e-9 * (np.abs(force).max() + np.abs(ahead).max())
    return np.asarray(steps[best]) if gains[best] > scale else None


def _gain(step: Array, inputs: Array, force: Array, ahead: Array, behind: Array) -> float:
    """What a step wins, to first order."""
    moves = inputs @ step
    return float(force @ step + np.where(moves > 0, ahead * moves, behind * moves).sum())


def _best_in_cells(inputs: Array, force: Array, ahead: Array, behind: Array) -> Array | None:
    """Maximise the gain over each cell of the kinks that bend upwards, with |v| ≤ 1: one linear program a cell."""
    upward = ahead > behind
    dim = inputs.shape[1]
    for sides in itertools.product((1.0, -1.0), repeat=int(upward.sum())):
        signs = np.array(sides)
        pulls = np.where(signs > 0, ahead[upward], behind[upward])
        linear = force + pulls @ inputs[upward]
        concave = inputs[~upward]
        m = len(concave)
        found = linprog(
            c=np.r_[-linear, -np.ones(m)],
            A_ub=np.r_[
                np.c_[-ahead[~upward, None] * concave, np.eye(m)],
                np.c_[-behind[~upward, None] * concave, np.eye(m)],
                np.c_[-signs[:, None] * inputs[upward], np.zeros((len(signs), m))],
            ],
            b_ub=np.zeros(2 * m + len(signs)),
            bounds=[(-1, 1)] * dim + [(None, None)] * m,
            method="highs",
        )
        if found.x is not None and _gain(found.x[:dim], inputs, force, ahead, behind) > 1e-9 * np.abs(ahead).max():
            return np.asarray(found.x[:dim])
    return None
