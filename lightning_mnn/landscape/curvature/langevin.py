"""Langevin chains, with or without Metropolis' rule, that sample exp(−nβ (L(w) − L(w*)) − γ/2 ‖w − w*‖²) around w*.

Shapes: C chains, P parameters; all chains move together, as points (C, P).

A move draws a momentum r ~ N(0, I) and makes a few leapfrog steps of size ε: w ← w + ε S r, r ← r − ε Sᵀ∇U(w), with
half a step of r at both ends. S Sᵀ is the preconditioner. With Metropolis' rule the chains are exact at any ε (MALA
for one leapfrog step, Hamiltonian Monte Carlo for several; Neal 2011). Without it, and with one leapfrog step, they are
those of stochastic gradient Langevin dynamics (Welling and Teh 2011), which are biased by an order of ε².
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.utilities.transfer import sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Losses = Callable[[Tensor], Tensor]

_MAX_DENSE = 256  # parameters up to which the preconditioner is a whole matrix
_CURVATURE_ROUNDS = 4  # passes that find the curvature at the start, each of two gradients for each parameter
_WINDOWS = 8  # times that the preconditioner is adapted
_FASTEST = 1.0  # change of log ε by a move that is always, or never, accepted; later moves change it less
_SCALES = 2.0  # decades of the factors' logarithms
_SETTLING = 10.0  # moves after which that change falls


@dataclass
class Places:
    """Where the chains are.

    Attributes:
        points: (C, P).
        losses: nβ (L − L(w*)), (C,).
        energies: U = nβ (L − L(w*)) + γ/2 ‖w − w*‖², (C,).
        gradients: ∇U, (C, P).
    """

    points: Tensor
    losses: Tensor
    energies: Tensor
    gradients: Tensor


class Target:
    """U(w) = nβ (L(w) − L(w*)) + γ/2 ‖w − w*‖².

    Args:
        loss: L of points (C, P), (C,); the loss of a point depends on this point only.
        point: w*, (P,).
        inverse_temperature: nβ.
        localisation: γ.

    Attributes:
        lowest: L(w*).
        max_distance: largest ‖w − w*‖² of chains under Metropolis' rule: so far a normal distribution of precision γ
            extends with a probability above 1e-9. A loss that is lower far away would draw them there.
        gradient_evaluations: how many gradients of single points were computed.
    """

    def __init__(self, loss: Losses, point: Tensor, inverse_temperature: float, localisation: float) -> None:
        self.point, self.inverse_temperature, self.localisation = point, inverse_temperature, localisation
        self.gradient_evaluations = 0
        size = len(point)
        self.max_distance = (size + 6 * math.sqrt(2 * size) + 20) / localisation if localisation else math.inf
        self._loss = loss
        with torch.no_grad():
            self.lowest = float(loss(point[None]))

    def __call__(self, points: Tensor) -> Places:
        """The energies and gradients at points (C, P), in one call of the loss."""
        points = points.detach().requires_grad_(True)  # noqa: FBT003 (torch's own)
        with torch.enable_grad():
            values = self._loss(points)
            (gradients,) = torch.autograd.grad(values.sum(), points)
        points = points.detach()
        self.gradient_evaluations += len(points)
        offsets = points - self.point
        losses = self.inverse_temperature * (values.detach() - self.lowest)
        energies = losses + self.localisation / 2 * offsets.square().sum(1)
        return Places(points, losses, energies, self.inverse_temperature * gradients + self.localisation * offsets)


class Window:
    """Vectors (C, P) of successive moves, to which the preconditioner adapts.

    Args:
        like: one of them, (P,).
        keeps_all: whether the vectors themselves are kept, and not only sums: C P numbers for each move.
    """

    def __init__(self, like: Tensor, *, keeps_all: bool) -> None:
        self.moves, self.count, self.keeps_all = 0, 0, keeps_all
        self.points: list[Tensor] = []
        self.sum, self.squares = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, vectors: Tensor) -> None:
        """Add those of one move."""
        self.moves, self.count = self.moves + 1, self.count + len(vectors)
        self.sum += vectors.sum(0)
        self.squares += vectors.square().sum(0)
        if self.keeps_all:
            self.points.append(vectors)


class Preconditioner:
    """S of the moves w ← w + ε S r: a matrix (P, P), or the diagonal of one (P,)."""

    def __init__(self, root: Tensor) -> None:
        self.root = root

    def forward(self, momenta: Tensor) -> Tensor:
        """S r, of (C, P)."""
        return momenta @ self.root.T if self.root.ndim > 1 else momenta * self.root

    def transposed(self, gradients: Tensor) -> Tensor:
        """Sᵀ g, of (C, P)."""
        return gradients @ self.root if self.root.ndim > 1 else gradients * self.root

    def adapted(self, seen: Window) -> Preconditioner:
        """The one whose S Sᵀ is the covariance of points (n, P), blended with this one as by P points of it."""
        share = seen.count / (seen.count + len(seen.sum))
        if self.root.ndim > 1:
            centred = torch.cat(seen.points) - seen.sum / seen.count
            # Not by Cholesky's factors of the covariance: beside flat directions of width 1/√γ, kinks are only 1/nβ
            # wide, and the ratio of the squares is below the rounding of float64.
            stacked = torch.cat([math.sqrt(share / seen.count) * centred, math.sqrt(1 - share) * self.root.T])
            return Preconditioner(torch.linalg.qr(stacked, mode="r").R.T)
        variances = (seen.squares / seen.count - (seen.sum / seen.count).square()).clamp(min=0)
        return Preconditioner((share * variances + (1 - share) * self.root.square()).sqrt())


def gradients_at_start(size: int) -> int:
    """Number of gradients of single points that :func:`curvature_preconditioner` needs for P parameters."""
    return 2 * _CURVATURE_ROUNDS * size if size <= _MAX_DENSE else 0


def curvature_preconditioner(target: Target, chains: int) -> Preconditioner:
    """S Sᵀ = |H|⁻¹, with the curvature H of U over the width of S itself; no wider than 1/√γ.

    H is found from differences of gradients along the columns of S, first over 1/√(nβ + γ), the width of a typical
    direction, and then over the widths just found: so that off a kink, where the loss rises by a ‖w − w*‖, they tend to
    1/(nβ a). Its singular vectors count: the differences across kinks are no symmetric matrix, but all of them are
    normal to the directions in which the loss is constant.

    For more than 256 parameters: the multiple 1/(nβ + γ) of the identity.
    """
    size, width = len(target.point), 1 / math.sqrt(target.inverse_temperature + target.localisation)
    if size > _MAX_DENSE:
        return Preconditioner(torch.full_like(target.point, width))
    root = width * torch.eye(size, dtype=target.point.dtype, device=target.point.device)
    for _ in range(_CURVATURE_ROUNDS):
        parts = torch.split(root.T, chains)
        rows = [target(target.point + part).gradients - target(target.point - part).gradients for part in parts]
        products = torch.cat(rows) @ root / 2
        if not bool(products.isfinite().all()):
            break
        _, values, right = torch.linalg.svd(products)
        wider = root @ right.T
        lowest = target.localisation * wider.square().sum(0) if target.localisation else 1e-8 * values.max()
        values = torch.maximum(values, lowest)
        root = wider / torch.where(values > 0, values, 1.0).sqrt()
    return Preconditioner(root)


@dataclass(frozen=True)
class Moves:
    """How chains move.

    Attributes:
        adjusted: whether Metropolis' rule accepts or rejects each move.
        preconditioned: adapt the preconditioner during burn-in: with Metropolis' rule to the covariance of the chains,
            without it to the root mean square of the gradients (RMSprop); False: the identity.
        leapfrog_steps: of each move.
        step_size: ε; None: adapted during burn-in until the target of acceptance is met.
        target_acceptance: of the moves; without Metropolis' rule, of what the rule would accept.
    """

    adjusted: bool
    preconditioned: bool
    leapfrog_steps: int
    step_size: float | None
    target_acceptance: float


@dataclass
class Chains:
    """What chains recorded after burn-in.

    Attributes:
        losses: nβ (L − L(w*)), (C, S).
        distances: ‖w − w*‖², (C, S).
        acceptance: mean probability with which Metropolis' rule accepted the moves, or would have.
        step_size: ε.
        preconditioner: S.
        lowest: the smallest nβ (L − L(w*)) that was met, in burn-in too.
        burn_in: nβ (L − L(w*)) before, (C, B).
    """

    losses: Tensor
    distances: Tensor
    acceptance: float
    step_size: float
    preconditioner: Preconditioner
    lowest: float
    burn_in: Tensor


def run_chains(target: Target, moves: Moves, chains: int, steps: int, burn_in: int, stream: torch.Generator) -> Chains:
    """Run all chains from w*."""
    sampler = _Sampler(target, moves, chains, stream)
    window, seen, before = max(1, burn_in // (_WINDOWS + 1)), sampler.new_window(), []
    for step in range(burn_in):
        sampler.move(adjusted=True)  # of SGLD too: a step that is still too large must not lead the chains away
        sampler.adapt_step(step)
        before.append(sampler.at.losses)
        if moves.preconditioned:
            seen.add(sampler.at.points - target.point if moves.adjusted else sampler.at.gradients)
            if seen.moves == window and step < burn_in - window:  # the last window is for ε alone
                sampler.adapt_preconditioner(seen)
                seen = sampler.new_window()
    losses, distances, acceptance = [], [], torch.zeros_like(target.point[0])
    for _ in range(steps):
        acceptance += sampler.move(adjusted=moves.adjusted)
        losses.append(sampler.at.losses)
        distances.append((sampler.at.points - target.point).square().sum(1))
    return Chains(
        torch.stack(losses, 1),
        torch.stack(distances, 1),
        float(acceptance) / steps,
        float(sampler.step_size),
        sampler.preconditioner,
        float(sampler.lowest),
        torch.stack(before, 1),
    )


class _Sampler:
    def __init__(self, target: Target, moves: Moves, chains: int, stream: torch.Generator) -> None:
        self.at = target(target.point.expand(chains, -1))
        step_size = 1.0 if moves.step_size is None else moves.step_size
        if moves.preconditioned:
            self.preconditioner = curvature_preconditioner(target, chains)
        else:
            self.preconditioner = Preconditioner(torch.ones_like(target.point))
            if moves.step_size is None:
                step_size = 1 / math.sqrt(target.inverse_temperature + target.localisation)
        # Numbers that every move changes stay on the device: nothing waits for it.
        self.step_size = torch.full_like(target.point[0], step_size)
        self.lowest = torch.zeros_like(self.step_size)
        self._target, self._moves, self._stream = target, moves, stream
        self._accepted = torch.zeros_like(self.step_size)

    def move(self, *, adjusted: bool) -> Tensor:
        """Move all chains once; return the mean acceptance."""
        before, like = self.at, self.at.points
        momenta = self._normal(like)
        sizes = self.step_size.expand_as(like[:, :1])
        if self._moves.adjusted:  # sizes within a decade, most of them near ε: distributions may have several scales
            sizes = sizes * 10 ** -self._uniform(like[:, :1]).square()
        moved, at = momenta - sizes / 2 * self.preconditioner.transposed(before.gradients), before
        for left in reversed(range(self._moves.leapfrog_steps)):
            at = self._target(at.points + sizes * self.preconditioner.forward(moved))
            moved = moved - (sizes if left else sizes / 2) * self.preconditioner.transposed(at.gradients)
        change = at.energies + moved.square().sum(1) / 2 - before.energies - momenta.square().sum(1) / 2
        finite = change.isfinite() & at.gradients.isfinite().all(1)
        probabilities = torch.where(finite, (-change).clamp(max=0).exp(), 0.0)
        self.at = self._chosen(at, before, probabilities) if adjusted else at
        if adjusted:
            self._scale()
        self.lowest = torch.minimum(self.lowest, self.at.losses.nan_to_num(nan=0.0).min())
        self._accepted = probabilities.mean()
        return self._accepted

    def _scale(self) -> None:
        """Scale successive coordinates of w − w* by a random factor, by Metropolis' rule.

        Near a singular minimum they have sizes of many orders of magnitude, between which no other move is likely.
        """
        before, offsets = self.at, self.at.points - self._target.point
        places = torch.arange(offsets.shape[1], device=offsets.device)
        first, last = ((self._uniform(offsets[:, :1]) * offsets.shape[1]).floor() for _ in range(2))
        within = (places >= first) & (places <= last)
        within = torch.where(first <= last, within, ~((places > last) & (places < first)))  # a ring of coordinates
        logs = self._normal(offsets[:, :1]) * 2 * 10 ** (-_SCALES * self._uniform(offsets[:, :1]))
        at = self._target(self._target.point + torch.where(within, logs.exp(), 1.0) * offsets)
        change = at.energies - before.energies - (within.sum(1, keepdim=True) * logs)[:, 0]
        finite = change.isfinite() & at.gradients.isfinite().all(1)
        self.at = self._chosen(at, before, torch.where(finite, (-change).clamp(max=0).exp(), 0.0))

    def _chosen(self, new: Places, old: Places, probabilities: Tensor) -> Places:
        near = (new.points - self._target.point).square().sum(1) <= self._target.max_distance
        accepted = (self._uniform(probabilities) < probabilities) & near
        return Places(*(_chosen(accepted, a, b) for a, b in zip(_parts(new), _parts(old), strict=True)))

    def adapt_step(self, step: int) -> None:
        """Make ε larger if the last move was accepted too often, and smaller otherwise."""
        if self._moves.step_size is None:
            rate = _FASTEST * min(1.0, (_SETTLING / (step % 100 + 1)) ** 0.6)
            self.step_size = self.step_size * (rate * (self._accepted - self._moves.target_acceptance)).exp()

    def new_window(self) -> Window:
        """One to fill with w − w*, or for SGLD with gradients."""
        return Window(self._target.point, keeps_all=self._moves.adjusted and self.preconditioner.root.ndim > 1)

    def adapt_preconditioner(self, seen: Window) -> None:
        """Adapt S to the points, or the gradients, of a window."""
        if not bool(seen.squares.isfinite().all()):
            return
        if self._moves.adjusted:
            self.preconditioner = self.preconditioner.adapted(seen)
        else:
            scale = (seen.squares / seen.count).sqrt()
            self.preconditioner = Preconditioner((scale + 1e-3 * scale.max() + 1e-30).rsqrt())

    def _normal(self, like: Tensor) -> Tensor:
        return sent(torch.randn(like.shape, dtype=like.dtype, generator=self._stream), like.device)

    def _uniform(self, like: Tensor) -> Tensor:
        return sent(torch.rand(like.shape, dtype=like.dtype, generator=self._stream), like.device)


def _parts(places: Places) -> tuple[Tensor, ...]:
    return places.points, places.losses, places.energies, places.gradients


def _chosen(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask if new.ndim == 1 else mask[:, None], new, old)
