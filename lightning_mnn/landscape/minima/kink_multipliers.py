"""Kinks of one unit: does the loss fall when samples leave the kink they are on?

For one unit with output weight z, let B be the samples on its kink, x_n their inputs, e the residual, and
g = Σ_{n∉B} e_n A_n x_n. To first order a step v of the unit's weights changes −N/2 times the loss by
z (g·v + Σ_{n∈B} e_n f(x_n·v)). At a local minimum this is not positive for any v.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linprog

from lightning_mnn.landscape import tolerances
from lightning_mnn.verdicts import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_MAX_UPWARD_KINKS = 8  # kinks that bend upwards whose sides are enumerated: at most 2^8 linear programs


@dataclass(frozen=True)
class KinkVerdict:
    """The outcome of the test of one unit's kinks.

    Attributes:
        holds: True: no step lowers the loss; False: some step does; None: undecided.
        reason_code: the fact that decided.
        stationary: whether multipliers exist in the hull of the slopes: 0 is in Clarke's subdifferential.
        step: a step v that lowers the loss, if one was found, (d0,).
        worst: position in B of the sample whose multiplier is furthest outside its interval, and the side it would
            leave to; None if all are inside.
        ends: degenerate kinks: samples whose multiplier is at an end of its interval up to rounding, and the side of
            that end. If it is at both ends (samples without an error), only one is given.
        upward: number of dependent kinks that bend upwards.
    """

    holds: bool | None
    reason_code: ReasonCode
    stationary: bool = True
    step: Array | None = None
    worst: tuple[int, int] | None = None
    ends: tuple[tuple[int, int], ...] = ()
    upward: int = 0


_HOLDS = KinkVerdict(holds=True, reason_code=ReasonCode.CERTIFIED_ON_KINKS)


@dataclass(frozen=True)
class _Forces:
    """Forces on one unit, of its kinks and of the other samples, for inputs of length 1 and z of size 1.

    Attributes:
        inputs: x_n/‖x_n‖, (b, d0).
        force: g, (d0,).
        ahead: multipliers of samples that leave to the positive side, z e_n ‖x_n‖, (b,).
        behind: multipliers of samples that leave to the negative side, ρ times those, (b,).
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
        """By how much steps (…, d0) change −N/2 times the loss, to first order."""
        moves = steps @ self.inputs.T
        return np.asarray(steps @ self.force + np.where(moves > 0, self.ahead * moves, self.behind * moves).sum(-1))

    @property
    def scale(self) -> float:
        """Size below which a result of a linear program counts as zero."""
        return float(tolerances.LINEAR_PROGRAM_ERROR_RATIO * (np.abs(self.force).max() + np.abs(self.ahead).max()))


def check_multipliers(
    inputs: Array, errors: Array, g: Array, z: float, slope: float, noise: float, *, uncertainty: Array | None = None
) -> KinkVerdict:
    """Test the kinks of one unit whose output weight is not zero.

    No step lowers the loss if multipliers μ exist with z g + Σ_B μ_n x_n = 0 and μ_n between z e_n and ρ z e_n, where
    z e_n (1 − ρ) ≤ 0. A kink with z e_n (1 − ρ) > 0 bends upwards, and its two sides are tried in turn, with
    μ_n ≥ z e_n on the positive one and μ_n ≤ ρ z e_n on the other. With independent inputs μ is unique; otherwise a
    linear program finds the μ that is furthest inside. The test passes if μ is inside its intervals by more than a
    bound on the rounding errors; where rounding may change the result, the test is undecided.

    Args:
        inputs: x_n of the samples on the kink, (b, d0).
        errors: e_n of those samples, (b,).
        g: Σ_{n∉B} e_n A_n x_n, (d0,).
        z: output weight, not 0.
        slope: ρ.
        noise: bound on the rounding error of ‖g‖, and without ``uncertainty`` also of the e_n ‖x_n‖.
        uncertainty: bounds on the rounding errors of the e_n, (b,); 0 where e_n is known exactly.
    """
    norms = np.linalg.norm(inputs, axis=1)
    ahead = np.sign(z) * errors * norms
    bounds = np.full(len(norms), noise) if uncertainty is None else uncertainty * norms
    kinks = _Forces(
        inputs / norms[:, None], np.sign(z) * g, ahead, slope * ahead, noise, max(1.0, abs(slope)) * bounds
    )  # fmt: skip
    values = np.linalg.svd(kinks.inputs, compute_uv=False)
    if len(norms) <= inputs.shape[1] and values[-1] > tolerances.MIN_INDEPENDENT_SINGULAR_RATIO * values[0]:
        return _independent(kinks, float(values[-1]), flatter=int(abs(slope) <= 1))
    return _dependent(kinks)


def _independent(kinks: _Forces, smallest: float, flatter: int) -> KinkVerdict:
    """The verdict where μ is unique.

    Args:
        kinks: the forces on the unit.
        smallest: the smallest singular value of the inputs on kinks.
        flatter: the side with the smaller slope, 0 ahead or 1 behind; of two open ends the one that is reported.
    """
    force, ahead, behind = kinks.force, kinks.ahead, kinks.behind
    inverse = np.linalg.pinv(kinks.inputs)  # (d0, b); its columns leave one kink at a time
    multipliers = -inverse.T @ force
    multipliers = multipliers - inverse.T @ (force + kinks.inputs.T @ multipliers)
    left = force + kinks.inputs.T @ multipliers  # the part of the force that no multipliers balance
    if np.linalg.norm(left) > 2 * kinks.noise + tolerances.MAX_UNBALANCED_FORCE_RATIO * np.linalg.norm(force):
        return KinkVerdict(holds=False, reason_code=ReasonCode.FORCE_ALONG_KINKS, stationary=False, step=left)
    summing = sum(kinks.inputs.shape) * tolerances.FLOAT64_EPS * (np.linalg.norm(force) + np.abs(multipliers).sum())
    uncertainty = kinks.uncertainty + (kinks.noise + summing) / smallest + np.linalg.norm(inverse.T @ left)
    gains = np.stack([ahead - multipliers, multipliers - behind])  # of leaving to either side
    hull = np.minimum(ahead, behind) - uncertainty <= multipliers
    stationary = bool((hull & (multipliers <= np.maximum(ahead, behind) + uncertainty)).all())
    inert = (ahead == 0) & (behind == 0) & (multipliers == 0) & (kinks.uncertainty == 0) & (kinks.noise == 0)
    # Gains less their uncertainty: a gain that may be rounding changes its sign.
    certain = np.where(inert, -1.0, gains - np.sign(gains) * uncertainty)
    open_ends = ~inert & (np.abs(gains) <= uncertainty)
    side, sample = np.unravel_index(int(np.where(open_ends, -np.inf, certain).argmax()), gains.shape)
    if not open_ends[side, sample] and certain[side, sample] > 0:
        sign = 1 if side == 0 else -1
        return KinkVerdict(
            holds=False,
            reason_code=ReasonCode.MULTIPLIER_OUTSIDE_INTERVAL,
            stationary=stationary,
            step=np.asarray(sign * inverse[:, sample]),
            worst=(int(sample), sign),
        )
    if open_ends.any():
        open_ends[1 - flatter] &= ~open_ends[flatter]
        ends = tuple((int(position), 1 if row == 0 else -1) for row, position in np.argwhere(open_ends))
        return KinkVerdict(holds=None, reason_code=ReasonCode.MULTIPLIER_AT_END, ends=ends)
    return _HOLDS


def _dependent(kinks: _Forces) -> KinkVerdict:
    """The verdict where the inputs are linearly dependent.

    If the multipliers are inside their intervals by a margin t on the kinks S, a step v gains at most −t Σ_S |x_n·v|
    plus rounding errors. On the span of the inputs of S this is at most −t times their smallest singular value times
    ‖v‖. Kinks whose two sides differ by less than rounding are not in S: the mean of their sides is part of the force,
    half of their difference is part of its noise.
    """
    resolved = np.abs(kinks.ahead - kinks.behind) > 4 * kinks.uncertainty
    upward = resolved & (kinks.ahead > kinks.behind)
    step = _tried_step(kinks)
    if upward.sum() > _MAX_UPWARD_KINKS:
        if step is not None:
            return KinkVerdict(
                holds=False, reason_code=ReasonCode.STEP_OFF_DEPENDENT_KINKS, stationary=False, step=step
            )
        return KinkVerdict(holds=None, reason_code=ReasonCode.DEPENDENT_KINKS_TOO_MANY, upward=int(upward.sum()))
    return _by_multipliers(kinks, resolved, upward, step) if resolved.any() else _unresolved(kinks, step)


def _by_multipliers(
    kinks: _Forces, resolved: NDArray[np.bool_], upward: NDArray[np.bool_], step: Array | None
) -> KinkVerdict:
    """The verdict of the multipliers that are furthest inside, for all sides of the kinks that bend upwards."""
    reduced, smallest = _resolved_only(kinks, resolved)
    for lower, upper in _intervals(reduced.ahead, reduced.behind, upward[resolved]):
        margin, left = _largest_margin(reduced, lower, upper)
        if margin is None or margin < -kinks.scale - kinks.noise:
            step = _best_in_cells(kinks, upward) if step is None else step
            if step is None:
                return KinkVerdict(holds=None, reason_code=ReasonCode.DEPENDENT_KINKS_UNDECIDED)
            stationary = margin is not None and not upward.any()
            code = ReasonCode.DEPENDENT_KINKS_WITHOUT_MULTIPLIERS
            return KinkVerdict(holds=False, reason_code=code, stationary=stationary, step=step)
        if not margin * smallest > reduced.noise + left:
            return KinkVerdict(holds=None, reason_code=ReasonCode.DEPENDENT_MULTIPLIERS_AT_END)
    return _HOLDS


def _resolved_only(kinks: _Forces, resolved: NDArray[np.bool_]) -> tuple[_Forces, float]:
    """The resolved kinks, with the others moved into the force and its noise, and their smallest singular value.

    The noise is infinite if one of the others is outside their span, where no multiplier can outweigh it.
    """
    half = np.abs(kinks.ahead - kinks.behind) / 2
    others = np.where((kinks.ahead == 0) & (kinks.uncertainty == 0), 0.0, half + kinks.uncertainty)
    _, values, right = np.linalg.svd(kinks.inputs[resolved], full_matrices=False)
    span = right[values > tolerances.MIN_INDEPENDENT_SINGULAR_RATIO * values[0]]
    unresolved = kinks.inputs[~resolved & (others > 0)]
    beyond = np.linalg.norm(unresolved - unresolved @ span.T @ span, axis=1)
    outside = bool((beyond > tolerances.MIN_INDEPENDENT_SINGULAR_RATIO).any())
    reduced = _Forces(
        inputs=kinks.inputs[resolved],
        force=kinks.force + (kinks.ahead + kinks.behind)[~resolved] / 2 @ kinks.inputs[~resolved],
        ahead=kinks.ahead[resolved],
        behind=kinks.behind[resolved],
        uncertainty=kinks.uncertainty[resolved],
        noise=np.inf if outside else kinks.noise + float(others[~resolved].sum()),
    )
    return reduced, float(values[len(span) - 1])


def _unresolved(kinks: _Forces, step: Array | None) -> KinkVerdict:
    """The verdict where rounding hides the difference of the sides of every kink; it passes if all forces are zero."""
    if (
        not (kinks.ahead.any() or kinks.behind.any() or kinks.force.any() or kinks.uncertainty.any())
        and kinks.noise == 0
    ):
        return _HOLDS
    if step is not None:
        return KinkVerdict(holds=False, reason_code=ReasonCode.STEP_OFF_DEPENDENT_KINKS, stationary=False, step=step)
    return KinkVerdict(holds=None, reason_code=ReasonCode.ROUNDING_HIDES_KINK_FORCES)


def _intervals(ahead: Array, behind: Array, upward: NDArray[np.bool_]) -> Iterator[tuple[Array, Array]]:
    """Intervals of the multipliers, for each choice of sides of the kinks that bend upwards."""
    for sides in itertools.product((True, False), repeat=int(upward.sum())):
        lower, upper = ahead.copy(), behind.copy()
        positive = np.zeros(len(ahead), dtype=bool)
        positive[upward] = sides
        upper[upward & positive] = np.inf
        lower[upward & ~positive] = -np.inf
        yield lower, upper


def _largest_margin(kinks: _Forces, lower: Array, upper: Array) -> tuple[float | None, float]:
    """The largest margin of multipliers inside their intervals, less rounding, and the size of the force they leave."""
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
    terms = np.linalg.norm(kinks.force) + np.abs(multipliers).sum()
    summing = sum(kinks.inputs.shape) * tolerances.FLOAT64_EPS * terms
    inside = np.minimum(multipliers - lower, upper - multipliers) - kinks.uncertainty
    return float(inside.min()), left + float(summing)


def _tried_step(kinks: _Forces) -> Array | None:
    """A step that lowers the loss, among ± the columns of pinv(X_B), ± the inputs and the force; None if none does."""
    inverse = np.linalg.pinv(kinks.inputs)
    steps = np.concatenate([inverse.T, -inverse.T, kinks.inputs, -kinks.inputs, kinks.force[None]])
    steps = steps / np.linalg.norm(steps, axis=1, keepdims=True).clip(min=1e-300)
    gains = kinks.gain(steps)
    best = int(gains.argmax())
    return np.asarray(steps[best]) if gains[best] > kinks.scale + kinks.noise + kinks.uncertainty.sum() else None


def _best_in_cells(kinks: _Forces, upward: NDArray[np.bool_]) -> Array | None:
    """Maximise the gain over each cell of the kinks that bend upwards, with |v| ≤ 1: one linear program per cell."""
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
    """The part of a step in the span of the rows: the rest changes no pre-activation, and could be of any size."""
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    span = right[values > tolerances.MIN_INDEPENDENT_SINGULAR_RATIO * values[0]]
    return np.asarray(span.T @ (span @ step))
