"""Multilevel splitting along paths that bounce off the boundary of an event; for scores that have gradients.

A particle has weights w and a velocity v, both N(0, I). A step turns them by an angle s: w cos s + v sin s and
v cos s − w sin s. If that lies below the level, the velocity is reflected at the surface of equal scores there, and
both turn by s once more; if that too lies below, the particle stays and its velocity changes its sign. All of it
leaves N(0, I), restricted to scores at or above the level, invariant (Galilean Monte Carlo: Skilling 2012, AIP Conf.
Proc. 1443), and a particle goes on in one direction where a random walk would go to and fro.

The states of all steps are the particles of a level (waste-free: Dau and Chopin 2022, arXiv 2011.02328).

Shapes: R runs, P states, M = P/steps paths, D weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mnn.landscape.volumes.rare_events.splitting import Population
from lightning_mnn.utilities.transfer import sent, widest_dtype

_LEFT_FRACTION = 0.4  # target fraction of steps of the pilot that leave the event, before they are reflected

_GAIN = 0.2  # of the size's logarithm at each step of the pilot

_MIN_SIZE = 1e-3  # radians; so small steps do not spread the particles anyway

_MAX_SIZE = 0.5  # radians; at π/2 a reflected step would always return to the score where it started

_STEPS_PER_VELOCITY = 10  # before a velocity is drawn again


class PathPopulation(Population):
    """Paths of several runs, at or above a level that rises; the score maps (B, D) to (B,), and autograd knows it.

    There are as many states as particles were asked for, in the order of the paths.
    """

    def climb(self, level: float) -> Tensor:
        """Start paths from states that reach a level, evenly spaced among them; see :meth:`Population.climb`.

        Each state that reaches the level is as likely to start a path as any other.
        """
        self.check()
        reached = self.scores >= level
        counts, states = reached.sum(1), reached.shape[1]
        number = math.ceil(states / self.steps)
        alive = counts > 0
        shift = torch.rand((len(counts), 1), generator=self.random, dtype=torch.float64)
        places = (torch.arange(number, dtype=torch.float64) + shift) / number
        places = (sent(places.to(widest_dtype(self.device)), self.device) * counts[:, None]).long()
        # Those that reach it first, in the order of their paths, whose neighbours are alike.
        order = (~reached).to(torch.uint8).argsort(dim=1, stable=True)
        parents = order.gather(1, places.minimum((counts[:, None] - 1).clamp(min=0)))[alive]
        rows = torch.arange(len(parents), device=self.device)[:, None]
        self.weights, self.scores = self.weights[alive][rows, parents], self.scores[alive][rows, parents]
        self._states = states
        return counts.cpu() / states

    def spread(self, level: float, size: float) -> None:
        """Follow the paths; their states are the particles."""
        self._follow(level, size, gain=0.0)

    def tune(self, level: float, size: float) -> float:
        """Follow the paths, and return a size of the steps that suits the level."""
        return self._follow(level, size, gain=_GAIN)

    def _follow(self, level: float, size: float, gain: float) -> float:
        weights, scores = [], []
        velocity = self.weights
        for step in range(self.steps):
            if step % _STEPS_PER_VELOCITY == 0:
                velocity = self._normal(self.weights.shape)
            velocity, left = self._step(velocity, level, size)
            if gain:
                size = min(_MAX_SIZE, max(_MIN_SIZE, size * math.exp(gain * (_LEFT_FRACTION - float(left)))))
            weights.append(self.weights)
            scores.append(self.scores)
        self.weights = torch.stack(weights, 2).flatten(1, 2)[:, : self._states]
        self.scores = torch.stack(scores, 2).flatten(1, 2)[:, : self._states]
        return size

    def _step(self, velocity: Tensor, level: float, size: float) -> tuple[Tensor, Tensor]:
        """Move all particles once, and return their velocities and the fraction of those that left the event."""
        start, speed, scores = self.weights.flatten(0, 1), velocity.flatten(0, 1), self.scores.flatten()
        turned, moving = _turned(start, speed, size)
        found = self._scored(turned[None])[0]
        outside = found < level
        left = self._reflected(outside)
        normals = self._normals(turned[left])
        reflected = moving[left] - 2 * (normals * moving[left]).sum(1, keepdim=True) * normals
        back, returning = _turned(turned[left], reflected, size)
        found_back = self._scored(back[None])[0]
        returns = found_back >= level
        for target, if_returns, if_not in (
            (turned, back, start),
            (moving, returning, -speed),
            (found, found_back, scores),
        ):
            shape = (-1, *(1 for _ in target.shape[1:]))
            bounced = torch.where(returns.reshape(shape), if_returns, if_not[left])
            target[left] = torch.where(outside[left].reshape(shape), bounced, target[left])
        self.weights, self.scores = turned.reshape(self.weights.shape), found.reshape(self.scores.shape)
        return moving.reshape(velocity.shape), outside.to(found.dtype).mean()

    def _reflected(self, below: Tensor) -> Tensor:
        """Which particles to reflect: those below the level, or all where one would wait for a device to count them."""
        return below.nonzero()[:, 0] if below.device.type == "cpu" else torch.arange(len(below), device=below.device)

    def _normals(self, weights: Tensor) -> Tensor:
        """Unit normals (B, D) of the surfaces of equal scores; 0 where the score has no gradient."""
        self.evaluations += len(weights)
        weights = weights.detach().requires_grad_()
        with torch.enable_grad():
            total = self.score(weights).sum()
        gradient = torch.autograd.grad(total, weights)[0].nan_to_num(0.0, 0.0, 0.0)
        return torch.nn.functional.normalize(gradient, dim=1, eps=torch.finfo(gradient.dtype).tiny)


def _turned(weights: Tensor, velocity: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * weights + sine * velocity, cosine * velocity - sine * weights
