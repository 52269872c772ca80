"""First-order conditions of a minimum on kinks: is a point stationary along them, and does the loss rise off each?

This is evidence in floats, for any module. The theory is that of piecewise-smooth losses in abs-normal form (Griewank
and Walther, 2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError, gradient_of
from lightning_mnn.landscape.kinks.active import ActiveKinks
from lightning_mnn.landscape.kinks.distance import KinkMeter
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from lightning_mnn.landscape.curvature.loss_surface import LossSurface
    from lightning_mnn.landscape.curvature.second_order import SecondOrderVerdict
    from lightning_mnn.landscape.kinks.tracing import Kink

    Trace: TypeAlias = Callable[[Callable[[Kink], None]], None]
    KinkPasses: TypeAlias = Callable[[], Iterable[tuple[float, Trace, Callable[[ActiveKinks], Tensor]]]]

_MAX_KINKS = 512  # each costs a backward pass of its batch
_MAX_NUMBERS = 1 << 26  # of Z, in float64
_NAME_BYTES = 64  # of a layer's name that processes exchange


@dataclass(frozen=True)
class KinkConditions:
    """First-order conditions on κ active kinks, each measured by its distance: z_k is divided by ‖∇z_k‖.

    With the face's gradient a, Z = ∂z/∂θ, b = ∂L/∂|z| and L = ∂z/∂|z| the multipliers λ minimise ‖a + Zᵀλ‖. The loss
    rises at the rate r_k = (b + Lᵀλ)_k − |λ_k|, for the side on which it rises less, where only kink k is left.

    Attributes:
        kinks: κ.
        rank: the rank of Z: the number of singular values above 1e-7 of the largest, or above rounding.
        likq: σ_min/σ_max of Z.
        residual: ‖a + Zᵀλ‖, the norm of the gradient along the face.
        growth: the smallest r_k.
        error: of each r_k: the residual and rounding, divided by the smallest singular value that counts.
        layer: the layer of the kink with the smallest r_k.
        along: the direction (n,) along the face in which the loss falls fastest, of length 1.
        off: the direction (n,) off that kink alone, of length 1, in which the loss falls if its growth is negative.
        off_slope: the slope of the loss along ``off``.
        multipliers: λ, (κ,).
        growths: r, (κ,).
    """

    kinks: int
    rank: int
    likq: float
    residual: float
    growth: float
    error: float
    layer: str
    along: Tensor
    off: Tensor
    off_slope: float
    multipliers: Tensor
    growths: Tensor


def kink_conditions(
    surface: LossSurface, passes: KinkPasses, spacing: float = 0.0, reference: float = 0.0
) -> KinkConditions | Reason:
    """The first-order conditions on the kinks of θ.

    A kink is active if its unit is on it within rounding and not identically tied, as for
    :func:`~lightning_mnn.landscape.kinks.distance.kink_distance`: |z| is at most ``MAX_KINK_SPACINGS`` ε of the root
    mean square of its layer's input. Kinks of ReLU, LeakyReLU and |x| are tested, up to 512. Z is dense, so κ n is
    limited to 2^26 numbers. Each kink costs a backward pass of its batch, and each batch up to four forward passes.

    Args:
        surface: the loss at θ.
        passes: returns for each batch of this process its weight c_b; a function that runs a forward pass, and calls
            its argument with each kink call; and one that returns the loss of the batch, from a forward pass traced
            with its argument as ``replace``.
        spacing: ε of the floats that θ was found in, if the passes compute with a smaller one.
        reference: a typical norm of gradients, to which rounding is relative.

    Returns:
        The conditions, or why they were not tested.

    Raises:
        NoDerivativeError: the loss or a pre-activation cannot be differentiated, or the passes differ.
        FloatingPointError: a derivative is not finite.
    """
    face = _Face(surface)
    surface.on_all(lambda: face.read(passes(), spacing))
    group, device = surface.process_group, surface.device
    others, too_many = face.others, face.too_many
    others_anywhere, too_many_anywhere = group.any([bool(others), too_many], device)
    kinks = group.total(face.count, device)
    if too_many_anywhere or kinks > face.limit:
        return Reason.of(ReasonCode.KINKS_TOO_MANY, limit=face.limit)
    if others_anywhere:
        names = ", ".join(sorted(others)) or "another process"
        return Reason.of(ReasonCode.KINKS_OF_OTHER_FUNCTIONS, functions=names)
    if not kinks:
        return Reason.of(ReasonCode.KINKS_NOT_EVALUABLE, cause="none is active in this precision")
    return _solved(face, reference)


class _Face:
    """Collects a, and for each active kink its row of Z, b and L, batch by batch."""

    def __init__(self, surface: LossSurface) -> None:
        self.surface = surface
        self.limit = min(_MAX_KINKS, _MAX_NUMBERS // surface.size)
        self.gradient = torch.zeros(surface.size, dtype=torch.float64, device=surface.device)
        self.weight = torch.zeros((), dtype=torch.float64, device=surface.device)
        self.count = 0
        self.too_many = False
        self.others: set[str] = set()
        self.rows: list[Tensor] = []  # of Z, one tensor for each batch
        self.slopes: list[Tensor] = []  # b
        self.between: list[Tensor] = []  # L within a batch
        self.names: list[str] = []

    def read(self, passes: Iterable[tuple[float, Trace, Callable[[ActiveKinks], Tensor]]], spacing: float) -> None:
        """Read this process's batches."""
        meter = KinkMeter(self.surface.parameters, spacing=spacing)
        for weight, trace, loss_of in passes:
            units = meter.take(trace)
            counts = torch.stack([mask.sum().to("cpu") for mask in units.values()]).tolist() if units else []
            self.count += sum(counts)
            self.too_many |= self.count > self.limit
            if self.too_many:
                return
            active = ActiveKinks({name: mask for (name, mask), n in zip(units.items(), counts, strict=True) if n})
            loss = loss_of(active).reshape(())
            self.weight += weight
            self.others |= active.others
            if not self.others:
                if sum(map(len, active.values)) != sum(counts):
                    raise NoDerivativeError("the kinks of a batch differ between two passes")
                self._add(weight, loss, active)

    def _add(self, weight: float, loss: Tensor, active: ActiveKinks) -> None:
        """Add a batch."""
        gradients = self._flat(loss, active, "the loss cannot be differentiated on its kinks")
        self.gradient += weight * gradients[: self.surface.size]
        rows = [
            self._flat(value, active, "a pre-activation cannot be differentiated")
            for values in active.values
            for value in values
        ]
        self.names += [name for name, values in zip(active.layers, active.values, strict=True) for _ in values]
        if rows:
            found = torch.stack(rows)
            self.slopes.append(weight * gradients[self.surface.size :])
            self.rows.append(found[:, : self.surface.size])
            self.between.append(found[:, self.surface.size :])

    def _flat(self, output: Tensor, active: ActiveKinks, reason: str) -> Tensor:
        """The gradient by θ and by the |z| of the batch, float64."""
        inputs = [p for p in self.surface.parameters if p.requires_grad]
        found = iter(gradient_of(output, [*inputs, *active.sizes], reason, retain_graph=True))
        parts = [(p, next(found) if p.requires_grad else None) for p in self.surface.parameters]
        parts += list(zip(active.sizes, found, strict=True))
        return torch.cat(
            [
                (torch.zeros_like(tensor) if gradient is None else gradient).detach().flatten().double()
                for tensor, gradient in parts
            ]
        )

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
        """The sums and rows of all processes: a, Z, b, L and the names of the layers."""
        group, device = self.surface.process_group, self.surface.device
        total = group.sum(torch.cat([self.gradient, self.weight[None]]))
        scale = total[-1] if self.surface.normalise else torch.ones_like(total[-1])
        blocks = [len(block) for block in self.between]
        width = int(group.max(torch.tensor([max(blocks, default=0)], device=device))[0])
        own = torch.zeros(sum(blocks), self.surface.size + 2 + width, dtype=torch.float64, device=device)
        if blocks:
            own[:, : self.surface.size] = torch.cat(self.rows)
            own[:, self.surface.size] = torch.cat(self.slopes)
            own[:, self.surface.size + 1] = torch.tensor(blocks, device=device).repeat_interleave(
                torch.tensor(blocks, device=device)
            )
            padded = [torch.nn.functional.pad(block, (0, width - len(block))) for block in self.between]
            own[:, self.surface.size + 2 :] = torch.cat(padded)
        rows = group.join(own)
        between = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
        start, sizes = 0, [int(size) for size in rows[:, self.surface.size + 1].tolist()]
        while start < len(rows):
            stop = start + sizes[start]
            block = rows[start:stop, self.surface.size + 2 :]
            between[start:stop, start:stop] = block[:, : stop - start]
            start = stop
        labels = torch.zeros(len(self.names), _NAME_BYTES, dtype=torch.uint8)
        for row, name in zip(labels, self.names, strict=True):
            label = name.encode()[-_NAME_BYTES:]
            row[: len(label)] = torch.tensor(list(label), dtype=torch.uint8)
        names = [bytes(b for b in row if b).decode(errors="replace") for row in group.join(labels).tolist()]
        return (
            total[:-1] / scale,
            rows[:, : self.surface.size],
            rows[:, self.surface.size] / scale,
            between,
            names,
        )


def _solved(face: _Face, reference: float) -> KinkConditions:
    """The conditions, from the equations of all processes."""
    gradient, rows, slopes, between, names = face.joined()
    if not bool(torch.cat([gradient, slopes, rows.flatten()]).isfinite().all()):
        raise FloatingPointError("a derivative on the kinks is not finite")
    lengths = rows.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    rows, slopes, between = rows / lengths[:, None], slopes * lengths, between * lengths / lengths[:, None]
    left, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    eps = torch.finfo(face.surface.dtype).eps
    smallest = max(tolerances.MIN_INDEPENDENT_SINGULAR_RATIO, tolerances.MAX_KINK_SPACINGS * eps)
    counted = sigma > smallest * sigma[0]
    rank = int(counted.sum())
    inverse = torch.where(counted, 1 / torch.where(counted, sigma, 1.0), 0.0)
    right = right * counted[:, None]
    multipliers = -(left @ (inverse * (right @ gradient)))
    residual = gradient - right.T @ (right @ gradient)
    residual = residual - right.T @ (right @ residual)  # twice is enough
    growths = slopes + between.T @ multipliers - multipliers.abs()
    worst = int(growths.argmin())
    target = -between[:, worst]  # z_k = ±1 and the others 0, where |z_k| moves those that it feeds
    target[worst] += torch.where(multipliers[worst] < 0, -1.0, 1.0)
    off = right.T @ (inverse * (left.T @ target))
    off_length = float(off.norm()) or 1.0
    norm = float(residual.norm())
    likq = float(sigma[-1] / sigma[0]) if sigma[0] > 0 and len(sigma) == len(rows) else 0.0
    rounding = tolerances.MAX_KINK_SPACINGS * eps * max(float(gradient.norm()), reference)
    least = float(sigma[rank - 1]) if rank else 0.0
    return KinkConditions(
        kinks=len(rows),
        rank=rank,
        likq=likq,
        residual=norm,
        growth=float(growths[worst]),
        error=tolerances.GROWTH_ERROR_FACTOR * (norm + rounding) / least if least else math.inf,
        layer=names[worst],
        along=-residual / (norm or 1.0),
        off=off / off_length,
        off_slope=float(growths[worst]) / off_length,
        multipliers=multipliers,
        growths=growths,
    )


def check_kinks(
    surface: LossSurface,
    stationary: SecondOrderVerdict,
    passes: KinkPasses,
    spacing: float,
    *,
    reference: float,
    gradient_tolerance: float = 1e-3,
) -> SecondOrderVerdict:
    """Test a point that is ``on_kink`` by the first-order conditions on its kinks; others are returned as they are.

    ``not_stationary``: along the kinks, or off one of them while the others stay, the loss has a negative slope, and
    was measured to fall with it. Along the kinks the slope must exceed the tolerance times the reference, off a kink
    the error of its growth.

    ``on_kink`` otherwise. Its reason is ``stationary_on_kinks`` where the gradient along the kinks is within the
    tolerance and the loss rises off each of them by more than the error. Such a point is a candidate for a local
    minimum, and no more: curvature along the kinks is not tested.

    Args:
        surface: the loss at θ.
        stationary: the result of :func:`~lightning_mnn.landscape.curvature.second_order.check_stationarity`.
        passes: as for :func:`kink_conditions`.
        spacing: likewise.
        reference: a norm of gradients to compare with.
        gradient_tolerance: largest norm of the gradient along the kinks, relative to the reference.

    Raises:
        NoDerivativeError: as for :func:`kink_conditions`.
        FloatingPointError: likewise.
    """
    if stationary.kind is not Kind.ON_KINK:
        return stationary
    found = kink_conditions(surface, passes, spacing, reference)
    if isinstance(found, Reason):
        because = stationary.because
        return replace(stationary, because=replace(because, facts=(*because.facts, found)))
    numbers = Reason.of(
        ReasonCode.KINK_CONDITIONS,
        kinks=found.kinks,
        rank=found.rank,
        likq=found.likq,
        residual=found.residual / reference,
        growth=found.growth / reference,
        error=found.error / reference,
        layer=found.layer,
    )
    kind, because = _classified(surface, found, gradient_tolerance * reference)
    facts = (*because.facts, numbers, *stationary.because.facts, Reason.of(ReasonCode.NOT_A_PROOF))
    return replace(stationary, kind=kind, because=replace(because, facts=facts))


def _classified(surface: LossSurface, found: KinkConditions, largest: float) -> tuple[Kind, Reason]:
    """The kind of the point, and the fact that decided."""
    independent = found.rank == found.kinks
    moves, rises, falls = surface.process_group.any(
        [
            found.residual > largest,
            found.growth > found.error,
            independent and found.growth < -found.error,
        ],
        surface.device,
    )
    if moves:
        fall = _measured_fall(surface, found.along, found.residual)
        code = ReasonCode.LOSS_FALLS_ALONG_KINKS
    elif rises:  # this is sufficient for first order whether or not the kinks are independent
        return Kind.ON_KINK, Reason.of(ReasonCode.STATIONARY_ON_KINKS)
    elif not independent:
        return Kind.ON_KINK, Reason.of(ReasonCode.KINKS_NOT_INDEPENDENT, kinks=found.kinks, likq=found.likq)
    elif falls:
        fall = _measured_fall(surface, found.off, -found.off_slope)
        code = ReasonCode.LOSS_FALLS_OFF_KINK
    else:
        return Kind.ON_KINK, Reason.of(ReasonCode.GROWTH_WITHIN_ROUNDING, value=found.growth)
    if fall is None:
        return Kind.ON_KINK, Reason.of(ReasonCode.FALL_FROM_KINKS_NOT_CONFIRMED)
    length, lower = fall
    return Kind.NOT_STATIONARY, Reason(code, {"fall": lower, "length": length, "layer": found.layer})


def _measured_fall(surface: LossSurface, direction: Tensor, slope: float) -> tuple[float, float] | None:
    """Length of a step at which the loss is lower as the slope predicts, and the decrease; None if none is."""
    here = surface.loss()
    eps = torch.finfo(surface.dtype).eps
    noise = tolerances.LOSS_ROUNDINGS * eps * abs(here)
    shortest = max(tolerances.MIN_LOSS_CHANGE_ERRORS * noise / slope, _shortest_move(surface.parameters, eps))
    for factor in tolerances.TRIAL_STEP_FACTORS:
        length = factor * shortest
        with surface.moved(length * direction.to(surface.dtype)):
            fall = here - surface.loss()
        if 0.5 * length * slope <= fall <= 2 * length * slope and fall > noise:
            return length, fall
    return None


def _shortest_move(parameters: Sequence[Tensor], eps: float) -> float:
    """Length of a step whose rounding in θ is a small part of it."""
    size = math.sqrt(sum(float(parameter.detach().double().square().sum()) for parameter in parameters))
    return math.sqrt(eps) * (size or 1.0) / 4
