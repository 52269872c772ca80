"""Local volume: how far can all parameters of a network move at random before its activation pattern changes?

If the region of a pattern is not a product of cones, the *keep probability* P(σ) describes its size near the parameters
θ: the probability that θ + Δ has the same pattern as θ on a probe set. Δ is isotropic in each parameter tensor and
relative to it: Δ_l = σ ‖θ_l‖/√n_l · N(0, I) for a tensor of n_l numbers, so that ‖Δ_l‖ ≈ σ ‖θ_l‖. A tensor of zeros
does not move.

Shapes: K values of σ.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.intervals import Proportion
from lightning_mnn.landscape.perturbation import RandomMoves, finest_sigma
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import ArgumentError, positive_integer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    Run: TypeAlias = Callable[[], Mapping[str, Tensor]]


SIGMAS = tuple(10.0 ** (k / 2) for k in range(-12, 1))

ALL_LAYERS = "all layers"

_DRAWS_PER_CHECK = 128  # draws for which a part of the probe is run before the host waits for a GPU


@dataclass(frozen=True)
class KeepCurve:
    """Keep probabilities of one layer, or of all together, over the sizes σ of the move.

    The crossing of ½ is bracketed by the 95 % intervals of the probabilities. With 95 % confidence, P > ½ at every σ of
    the curve up to ``half_sigma_low``, and P < ½ at every σ from ``half_sigma_high`` on. The curve need not be
    decreasing. (Each side is a sequence of one-sided tests of 2.5 % that stops at the first failed test.)

    Attributes:
        sigmas: σ, ascending, (K,).
        kept: the probability at each σ, from draws of Δ, with its exact 95 % interval. Draws at different σ share their
            directions; draws at one σ are independent.

    >>> kept = tuple(Proportion.of(hits, 100) for hits in (100, 90, 20, 0))
    >>> curve = KeepCurve((0.001, 0.01, 0.1, 1.0), kept)
    >>> curve.half_sigma_low, round(curve.half_sigma, 4), curve.half_sigma_high
    (0.01, 0.0373, 0.1)
    """

    sigmas: tuple[float, ...]
    kept: tuple[Proportion, ...]

    @property
    def half_sigma_low(self) -> float | None:
        """The last σ of the run at the start whose intervals lie above ½; None if there is no such run."""
        above = self._num_above
        return self.sigmas[above - 1] if above else None

    @property
    def half_sigma_high(self) -> float | None:
        """The first σ of the run at the end whose intervals lie below ½; None if there is no such run."""
        below = 0
        while below < len(self.kept) and self.kept[-1 - below].high < 0.5:
            below += 1
        return self.sigmas[-below] if below else None

    @property
    def half_sigma(self) -> float | None:
        """σ½, where the probability falls to ½, by linear interpolation over log σ.

        It is the first crossing after ``half_sigma_low``; None if there is none in the range of σ.
        """
        values = [proportion.value for proportion in self.kept]
        for k in range(max(0, self._num_above - 1), len(values) - 1):
            p, q = values[k : k + 2]
            if p >= 0.5 > q:
                return float(self.sigmas[k] * (self.sigmas[k + 1] / self.sigmas[k]) ** ((p - 0.5) / (p - q)))
        return None

    @property
    def _num_above(self) -> int:
        """Number of σ at the start whose intervals lie above ½."""
        above = 0
        while above < len(self.kept) and self.kept[above].low > 0.5:
            above += 1
        return above

    def plain(self) -> dict[str, Any]:
        """Plain values: lists ``sigma``, ``probability``, ``low`` and ``high``, and σ½ with its bracket."""
        return {
            "sigma": list(self.sigmas),
            "probability": [proportion.value for proportion in self.kept],
            "low": [proportion.low for proportion in self.kept],
            "high": [proportion.high for proportion in self.kept],
            "half_sigma": self.half_sigma,
            "half_sigma_low": self.half_sigma_low,
            "half_sigma_high": self.half_sigma_high,
        }


@dataclass(frozen=True)
class LocalVolume:
    """Keep probabilities of a network's pattern on a probe set.

    Attributes:
        total: of all layers together.
        layers: of each layer's own pattern, in the order of the forward pass; all parameters move for each of them.
    """

    total: KeepCurve
    layers: dict[str, KeepCurve]

    @classmethod
    def of_counts(cls, sigmas: Sequence[float], counts: Mapping[str, Tensor], num_draws: int) -> LocalVolume:
        """The curves from counts of :func:`count_kept`, or from sums of such counts over several sets of draws."""
        curves = {
            name: KeepCurve(tuple(sigmas), tuple(Proportion.of(int(hits), num_draws) for hits in kept))
            for name, kept in counts.items()
        }
        return cls(curves.pop(ALL_LAYERS), curves)


def local_volume(
    parameters: Iterable[Tensor],
    runs: Sequence[Run],
    *,
    sigmas: Sequence[float] = SIGMAS,
    num_draws: int = 100,
    seed: int = 0,
) -> LocalVolume:
    """Keep probabilities P(σ) of the pattern of a probe set, by draws of Δ around the parameters.

    Products of float32 use its full precision in the passes, because lower precision would hide a small move.

    Cost: at most ``len(sigmas) * num_draws`` passes over the probe, and one normal number per parameter for each draw.
    Memory: two more copies of the parameters.

    Args:
        parameters: the tensors θ_l, moved in place and restored bit for bit, also if a run fails.
        runs: each runs the network with the current parameters on a part of the probe, and returns by layer the piece
            of every unit. Equal parameters must give equal patterns. The later parts are skipped for draws for which
            every layer has already changed, so the first part should be small.
        sigmas: sizes σ of the moves, ascending.
        num_draws: number of draws of Δ at each σ.
        seed: seed of the draws; draw i depends only on it and on i.

    Raises:
        ValueError: the σ are not positive, finite and ascending, or below :func:`finest_sigma`; ``num_draws`` < 1;
            there is no parameter, part or layer; or patterns change between passes at the same parameters.

    >>> weight, x = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    >>> curve = local_volume([weight], [lambda: {"unit": weight * x > 0}], sigmas=[0.01, 3.0]).layers["unit"]
    >>> curve.kept[0].value, curve.kept[1].low < 0.6306 < curve.kept[1].high  # Φ(1/3)
    (1.0, True)
    """
    num_draws = positive_integer("num_draws", num_draws)
    counts = count_kept(parameters, runs, sigmas, range(num_draws), seed=seed)
    return LocalVolume.of_counts(sigmas, counts, num_draws)


def count_kept(
    parameters: Iterable[Tensor], runs: Sequence[Run], sigmas: Sequence[float], draws: Iterable[int], *, seed: int = 0
) -> dict[str, Tensor]:
    """Number of draws that keep each layer's pattern, and that of all layers, at each σ; additive over draws.

    Args:
        parameters: see :func:`local_volume`.
        runs: see :func:`local_volume`.
        sigmas: see :func:`local_volume`.
        draws: indices of the draws.
        seed: seed of the draws.

    Returns:
        By layer, and under ``ALL_LAYERS``, int64 (K,).

    Raises:
        ValueError: see :func:`local_volume`.
    """
    tensors, seeds = list(parameters), [generator(seed, "local volume", draw).initial_seed() for draw in draws]
    check_sigmas(sigmas, finest_sigma(tensors))
    if not runs:
        raise ValueError("runs must have at least one part of the probe, got none")
    with torch.no_grad(), full_precision():
        parts = [_Part(run) for run in runs]
        names = list(dict.fromkeys(name for part in parts for name in part.reference))
        if not names:
            raise ValueError("runs return no layer: there is no pattern that could change")
        if bool(torch.stack([part.changed(names) for part in parts]).any()):
            raise ValueError("runs return different patterns at the same parameters: they must be deterministic")
        counts = torch.zeros(len(sigmas), len(names) + 1, dtype=torch.int64)
        with RandomMoves(tensors) as moves:
            for start in range(0, len(seeds), _DRAWS_PER_CHECK):
                some = seeds[start : start + _DRAWS_PER_CHECK]
                kept = torch.ones(len(some), *counts.shape, dtype=torch.bool)
                for part in parts:
                    pending = kept.any(-1)
                    kept[pending] &= ~_changed(part, names, moves, some, sigmas, pending)
                counts += kept.sum(0)
    return dict(zip((*names, ALL_LAYERS), counts.unbind(1), strict=True))


def check_sigmas(sigmas: Any, finest: float = 0.0) -> None:
    """Check that sizes of moves are finite, positive, ascending, and not below the finest.

    Raises:
        ValueError: they are not.
    """
    values = [] if isinstance(sigmas, str) else list(sigmas)
    positive = all(isinstance(value, int | float) and 0 < value < math.inf for value in values)
    if not values or not positive or not all(a < b for a, b in itertools.pairwise(values)):
        raise ArgumentError("sigmas", sigmas, "must be positive, finite and ascending", "as [0.001, 0.01]")
    if values[0] < finest:
        raise ValueError(
            f"sigmas must be at least {finest:.1e}, {tolerances.MIN_MOVE_SPACINGS} spacings of the parameters' "
            f"floating-point numbers, got {values[0]:.1e}: leave out smaller ones, or use a finer dtype"
        )


class _Part:
    """A part of the probe, and its pattern at the original parameters.

    Args:
        run: see :func:`local_volume`.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.reference = dict(run())
        self._device = next((pieces.device for pieces in self.reference.values()), torch.device("cpu"))

    def changed(self, names: Sequence[str]) -> Tensor:
        """Which layers differ from the reference now, and whether any does, bool (names + 1,)."""
        now = self._run()
        flags = [self._changed_layer(name, now) for name in names]
        flags.append(torch.stack(flags).any() | self._flag(now.keys() != self.reference.keys()))
        return torch.stack(flags)

    def _changed_layer(self, name: str, now: Mapping[str, Tensor]) -> Tensor:
        if name not in self.reference:
            return self._flag(value=False)
        before, after = self.reference[name], now.get(name)
        if after is None or before.shape != after.shape:
            return self._flag(value=True)
        return (before != after).any().to(self._device)

    def _flag(self, value: bool) -> Tensor:  # noqa: FBT001 (its only argument)
        """A flag on the device, made without a copy from the host."""
        return torch.full((), value, dtype=torch.bool, device=self._device)


def _changed(
    part: _Part,
    names: Sequence[str],
    moves: RandomMoves,
    seeds: Sequence[int],
    sigmas: Sequence[float],
    pending: Tensor,
) -> Tensor:
    """Which layers change on a part of the probe for each pending move; the host waits once for a GPU.

    Args:
        part: the part.
        names: names of the layers.
        moves: moves of the parameters.
        seeds: D seeds of directions.
        sigmas: K sizes.
        pending: which moves to test, bool (D, K).

    Returns:
        The results of :meth:`_Part.changed` for these moves, direction by direction, on the CPU.
    """
    found = []
    for seed, wanted in zip(seeds, pending.tolist(), strict=True):
        if any(wanted):
            moves.turn(seed)
        for sigma, is_wanted in zip(sigmas, wanted, strict=True):
            if is_wanted:
                safe_point()
                moves.go(sigma)
                found.append(part.changed(names))
    return torch.stack(found).cpu() if found else torch.zeros(0, len(names) + 1, dtype=torch.bool)
