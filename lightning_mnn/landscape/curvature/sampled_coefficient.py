"""The local learning coefficient of any point of any loss, estimated by Langevin chains around it.

Shapes: C chains, S steps after burn-in, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.curvature.chain_diagnostics import drift, effective_samples, error_of_mean, split_r_hat
from lightning_mnn.landscape.curvature.langevin import Moves, Target, run_chains
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import ArgumentError, positive_integer, real_number
from lightning_mnn.verdicts import Reason, ReasonCode, Reasoned

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.curvature.langevin import Chains, Losses

_MAX_HALVINGS = 3  # of a step size that is adapted


@dataclass(frozen=True)
class SampledCoefficient(Reasoned):
    """An estimated local learning coefficient; see :func:`estimate_learning_coefficient`.

    Attributes:
        value: λ̂; None if it is unreliable.
        standard_error: of λ̂, such that ± 1.96 of it covers 95 %; None if it is unreliable.
        because: why it is reliable, or why not; ``reason_code`` is the code, and ``reason`` the sentence.
        mean: nβ (E[L] − L(w*)) of the chains, reliable or not.
        inverse_temperature: nβ.
        localisation: γ.
        r_hat: split R-hat of the losses.
        distance_r_hat: the same of the squared distances to w*, which may be larger.
        effective_samples: of the losses, of all chains together.
        acceptance: mean probability with which Metropolis' rule accepts the moves; of SGLD: would accept.
        step_size: ε.
        gradient_evaluations: number of gradients of single points, all runs together.
        traces: nβ (L − L(w*)) of the chains after burn-in, (C, S).
        burn_in_traces: the same of their burn-in, (C, B), of the last run.
    """

    value: float | None
    standard_error: float | None
    because: Reason
    mean: float
    inverse_temperature: float
    localisation: float
    r_hat: float
    distance_r_hat: float
    effective_samples: float
    acceptance: float
    step_size: float
    gradient_evaluations: int
    traces: Tensor
    burn_in_traces: Tensor

    @property
    def is_reliable(self) -> bool:
        """Whether there is a value."""
        return self.value is not None


def estimate_learning_coefficient(
    loss: Losses,
    point: Tensor,
    *,
    num_samples: int | None = None,
    inverse_temperature: float | None = None,
    localisation: float = 1.0,
    chains: int = 32,
    steps: int = 1000,
    burn_in: int | None = None,
    adjusted: bool = True,
    preconditioned: bool = True,
    leapfrog_steps: int | None = None,
    step_size: float | None = None,
    seed: int = 0,
) -> SampledCoefficient:
    """The estimate λ̂ = nβ (E[L(w)] − L(w*)), with w distributed as exp(−nβ (L(w) − L(w*)) − γ/2 ‖w − w*‖²).

    For nβ → ∞ it tends to the local learning coefficient of a minimum w*, more slowly the more singular it is: the
    distance is (m − 1)/log nβ for a multiplicity m. At a finite nβ directions count in full if their curvature is far
    above γ/nβ, and only kinks and minima farther away than 1/√γ do not matter. For the local value of a small network's
    minimum use a large nβ and γ, such as 1e8 and 1e4, in float64.

    All chains start at w* and move as one batch. A full-batch loss is deterministic, so by default each move is
    accepted or rejected by Metropolis' rule: the chains are then exact at any step size, and mix faster than SGLD,
    whose steps must be small. They stay in a ball around w* that has all but 1e-9 of the normal distribution of
    precision γ, beyond which a lower loss would draw them away. After each move successive coordinates of w − w* are
    scaled by a random factor, as a singular minimum has many scales. The step size and the preconditioner are adapted
    during burn-in. Without the rule
    (``adjusted=False``) it is localised SGLD (Lau et al. 2023), which is run again with half the step size: up to three
    times, if the step size is adapted.

    The result has no value but a reason where chains diverged, met a loss below L(w*), reject most moves, drift,
    disagree, have not mixed, or (SGLD) depend on the step size.

    Args:
        loss: L of points (C, P), (C,), differentiable almost everywhere; each depends on its own point only.
        point: w*, (P,).
        num_samples: n; then nβ = n/log n (Watanabe 2013).
        inverse_temperature: nβ, instead of ``num_samples``.
        localisation: γ.
        chains: number C of chains.
        steps: number S of moves of each chain after burn-in.
        burn_in: number of moves before; None: as many as ``steps``, and at most 1,000.
        adjusted: whether Metropolis' rule is used.
        preconditioned: adapt a preconditioner: the covariance of the chains (its diagonal, for more than 256
            parameters), for SGLD the gradients' root mean square (RMSprop).
        leapfrog_steps: gradients of each move; None: 4, or 1 for SGLD, which has no other.
        step_size: ε of the moves, in units of the preconditioner; None: it is adapted.
        seed: of everything that is drawn.

    Raises:
        ArgumentError: an argument is out of range, or not exactly one of ``num_samples`` and ``inverse_temperature`` is
            given.

    Lau, Furman, Wang, Murfet and Wei, The Local Learning Coefficient (2023); Neal, MCMC using Hamiltonian dynamics
    (2011).

    >>> found = estimate_learning_coefficient(
    ...     lambda w: w[:, :3].square().sum(1), torch.zeros(5, dtype=torch.float64), inverse_temperature=1e6, steps=300
    ... )
    >>> found.is_reliable, abs(found.value - 1.5) < 3 * found.standard_error, found.standard_error < 0.05
    (True, True, True)
    """
    beta = _inverse_temperature(num_samples, inverse_temperature)
    if leapfrog_steps is None:
        leapfrog_steps = 4 if adjusted else 1
    if not adjusted and leapfrog_steps != 1:
        raise ArgumentError("leapfrog_steps", leapfrog_steps, "must be 1 for SGLD", "leave it out, or adjusted=True")
    moves = Moves(
        adjusted,
        preconditioned,
        positive_integer("leapfrog_steps", leapfrog_steps),
        None if step_size is None else real_number("step_size", step_size, above=0),
        0.75 if adjusted else 0.99,
    )
    target = Target(loss, point.detach(), beta, real_number("localisation", localisation, at_least=0))
    sizes = positive_integer("chains", chains), positive_integer("steps", steps)
    burn_in = min(steps, 1000) if burn_in is None else positive_integer("burn_in", burn_in)
    found = run_chains(target, moves, *sizes, burn_in, generator(seed, "learning coefficient"))
    because = _reason_unreliable(found, target, adjusted=adjusted)
    if not adjusted and because is None:
        for halving in range(1 if moves.step_size else _MAX_HALVINGS):
            halved = replace(moves, step_size=found.step_size / 2)
            again = run_chains(target, halved, *sizes, burn_in << halving, generator(seed, "halved", halving))
            because = _reason_unreliable(again, target, adjusted=False) or _reason_biased(found, again)
            found = again
            if because is None or because.code is not ReasonCode.STEP_TOO_LARGE:
                break
    return _result(found, target, because)


def _inverse_temperature(num_samples: int | None, inverse_temperature: float | None) -> float:
    if (num_samples is None) == (inverse_temperature is None):
        problem = "must be given, or else inverse_temperature"
        raise ArgumentError("num_samples", num_samples, problem, "give one of them")
    if inverse_temperature is not None:
        return real_number("inverse_temperature", inverse_temperature, above=0)
    count = positive_integer("num_samples", num_samples)
    return count / math.log(max(count, 2))


def _reason_unreliable(found: Chains, target: Target, *, adjusted: bool) -> Reason | None:
    """Why the mean of the chains is no estimate; None if it is."""
    size, value = len(target.point), float(found.losses.mean())
    rounding = 16 * torch.finfo(target.point.dtype).eps * abs(target.lowest) * target.inverse_temperature
    if not bool(found.losses.isfinite().all()) or value > size:
        return Reason.of(ReasonCode.CHAINS_DIVERGED, value=value, size=size)
    if -found.lowest > tolerances.MAX_GAIN_SHARE * max(value, 0.5) + rounding:
        gain = -found.lowest / target.inverse_temperature
        return Reason.of(ReasonCode.LOWER_LOSS_FOUND, gain=gain, energy=-found.lowest)
    if adjusted and found.acceptance < tolerances.MIN_ACCEPTANCE:
        return Reason.of(ReasonCode.MOVES_REJECTED, acceptance=found.acceptance)
    return _reason_not_mixed(found)


def _reason_not_mixed(found: Chains) -> Reason | None:
    """Whether the chains drift, disagree or are too short, by their losses and their distances to w*."""
    both = found.losses, found.distances
    change, samples = max(map(drift, both)), min(map(effective_samples, both))
    least = tolerances.MIN_SAMPLES_PER_CHAIN * len(found.losses)
    if change > tolerances.MAX_DRIFT_ERRORS:
        return Reason.of(ReasonCode.CHAINS_DRIFT, drift=change)
    # The error is the spread of the chains' losses, so that it holds what slow distances do to them.
    for trace, limit in zip(both, (tolerances.MAX_R_HAT, tolerances.MAX_DISTANCE_R_HAT), strict=True):
        if (r_hat := split_r_hat(trace)) > limit:
            return Reason.of(ReasonCode.CHAINS_DISAGREE, r_hat=r_hat, limit=limit)
    return Reason.of(ReasonCode.TOO_FEW_SAMPLES, samples=samples, limit=least) if samples < least else None


def _reason_biased(found: Chains, halved: Chains) -> Reason | None:
    """Whether half the step size changes the estimate."""
    value, other = float(found.losses.mean()), float(halved.losses.mean())
    errors = math.hypot(*(error_of_mean(run.losses.mean(1)) for run in (found, halved)))
    if abs(value - other) > 2 * errors + tolerances.MAX_HALVING_CHANGE * abs(other):
        return Reason.of(ReasonCode.STEP_TOO_LARGE, value=value, halved=other)
    return None


def _result(found: Chains, target: Target, because: Reason | None) -> SampledCoefficient:
    mean = float(found.losses.mean())
    r_hat, samples = split_r_hat(found.losses), effective_samples(found.losses)
    agree = Reason.of(ReasonCode.CHAINS_AGREE, chains=len(found.losses), r_hat=r_hat, samples=samples)
    return SampledCoefficient(
        mean if because is None else None,
        error_of_mean(found.losses.mean(1).double()) if because is None else None,
        because or agree,
        mean,
        target.inverse_temperature,
        target.localisation,
        r_hat,
        split_r_hat(found.distances),
        samples,
        found.acceptance,
        found.step_size,
        target.gradient_evaluations,
        found.losses,
        found.burn_in,
    )
