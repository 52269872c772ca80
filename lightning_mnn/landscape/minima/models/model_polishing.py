"""Polish a model: from any parameters to a certified local minimum, by Newton steps with an active set of kinks.

Shapes: N samples, P free parameters, κ active kinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape.minima.models.classification import MAX_UNKNOWNS, Classified, classify_point, solve
from lightning_mnn.landscape.minima.models.face import derivatives, hessian
from lightning_mnn.landscape.minima.models.model_certificate import (
    ModelCertificate,
    as_certificate,
    certificate_at,
    prepare,
)
from lightning_mnn.landscape.minima.models.reading import Active, Reading, objective_at, read_face, true_loss
from lightning_mnn.landscape.minima.models.stationarity import multipliers_at
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.validation import ArgumentError, whole_number
from lightning_mnn.verdicts import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from lightning_mnn.landscape.minima.models.face import Model
    from lightning_mnn.landscape.minima.models.layers import LossName

_CHECK_STEP = 1e-5  # relative step from which Newton's method on the face may converge
_DROP_STEP = 1e-3  # relative step from which multipliers are known well enough to drop kinks
_CHECK_DISTANCE = 1e-3  # relative distance that it may go
_MIN_CURVATURE_RATIO = 1e-9  # of the regularised Hessian's smallest eigenvalue to its largest
_CROSSINGS = 24  # kinks on a ray whose losses are tried
_HALVINGS = 30


@dataclass(frozen=True)
class PolishedModel:
    """The result of polishing a model.

    Attributes:
        certificate: of the minimum that was reached; otherwise of the last parameters. Its distance is from the start.
        steps: number of steps.
        losses: the objective at the start and after each step; it never rises.
    """

    certificate: ModelCertificate
    steps: int
    losses: tuple[float, ...]


def polish_model(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: LossName = "squared_error",
    weight_decay: float | Mapping[str, float] = 0.0,
    frozen: Iterable[str] = (),
    max_steps: int = 300,
) -> PolishedModel:
    """Go from a model's parameters to a certified local minimum of its training objective.

    Each step is one of Newton's method on the face of the active kinks, with the Hessian's tangential eigenvalues made
    positive, up to the lowest true loss on the ray, at a fraction of the step or at a kink on the way. A kink at which
    the loss is lowest becomes active. Where the steps become small, the stationary point of the face is certified;
    kinks with a negative growth are dropped, and saddles are left along their direction.

    Args:
        module: see :func:`certify_model`, as for the other arguments; it is not changed.
        inputs: X.
        targets: y.
        loss: the loss.
        weight_decay: the penalty.
        frozen: names of parameters that are not trained.
        max_steps: largest number of steps.

    Raises:
        ArgumentError: a layer, a name, a shape or a value cannot be used.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False))
    >>> _ = nn.init.ones_(net[0].weight), nn.init.ones_(net[2].weight)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.ones(3, 2)
    >>> polished = polish_model(net, x, y, weight_decay=0.1)
    >>> polished.certificate.is_minimum, polished.losses[-1] <= polished.losses[0]
    (True, True)
    """
    model, start = prepare(module, inputs, targets, loss=loss, weight_decay=weight_decay, frozen=frozen)
    max_steps = whole_number("max_steps", max_steps, at_least=0)
    if len(start) > MAX_UNKNOWNS:
        raise ArgumentError("module", f"{len(start)} parameters", f"must have at most {MAX_UNKNOWNS} trained numbers")
    search = _Search(model, start)
    found = search.run(max_steps)
    if found is not None:
        return PolishedModel(found, search.steps, tuple(search.losses))
    return PolishedModel(
        certificate_at(model, search.vector, start, _CHECK_DISTANCE), search.steps, tuple(search.losses)
    )


class _Search:
    """The state of the search."""

    def __init__(self, model: Model, start: Tensor) -> None:
        self.model, self.start, self.vector = model, start, start
        self.active: Active = {}
        self.losses = [true_loss(model, start)[0]]
        self.steps = 0

    def run(self, max_steps: int) -> ModelCertificate | None:
        """Steps until a minimum is certified; None where it is not."""
        found = certificate_at(self.model, self.vector, self.start, _CHECK_DISTANCE)
        if found.is_minimum:
            return found
        stalls = 0
        while self.steps < max_steps and stalls < 3:
            safe_point()
            self.steps += 1
            size = self._step()
            if size > _CHECK_STEP:
                stalls = 0
                continue
            classified = self._classify()
            if classified is not None and classified.kind.is_minimum:
                return as_certificate(self.model, classified, self.start)
            moved = classified is not None and self._leave(classified)
            if size == 0 and not moved:
                stalls += 1
                if not self._repair():
                    break
        found = certificate_at(self.model, self.vector, self.start, _CHECK_DISTANCE)
        return found if found.is_minimum else None

    def _move(self, vector: Tensor, loss: float) -> None:
        self.vector = vector
        self.losses.append(loss)

    def _step(self) -> float:
        """One step; its length relative to the parameters, 0 if the loss does not fall."""
        reading = read_face(self.model, self.vector, self.active)
        face, theta = reading.face, self.vector[reading.face.free]
        first = derivatives(face, theta)
        multipliers = multipliers_at(first)
        move = _newton_move(hessian(face, theta, multipliers), first.gradient, first.switching, first.jacobian)
        growth = first.normal + first.coupling.T @ multipliers - multipliers.abs()
        near = float(move.norm()) <= _DROP_STEP * float(theta.norm())
        if near and face.num_kinks and float(growth.min()) < 0:  # the loss falls off this kink
            self._drop(reading, [int(growth.argmin())])
            reading = read_face(self.model, self.vector, self.active)
            face, theta = reading.face, self.vector[reading.face.free]
            first = derivatives(face, theta)
            multipliers = multipliers_at(first)
            move = _newton_move(hessian(face, theta, multipliers), first.gradient, first.switching, first.jacobian)
        return self._along(reading, face.whole(theta + move) - self.vector)

    def _along(self, reading: Reading, move: Tensor) -> float:
        """Go to the lowest loss found on the ray."""
        crossings = self._crossings(reading, move)
        trials = [(2.0**-k, None) for k in range(4)] + [(t, kink) for t, kink in crossings[:_CROSSINGS]]
        here, error = true_loss(self.model, self.vector)
        best, lowest, at = 0.0, here, None
        for t, kink in trials:
            loss = self._loss(self.vector + t * move)
            if loss < lowest:
                best, lowest, at = t, loss, kink
        power = 4
        while not best and power < _HALVINGS:
            loss = self._loss(self.vector + 2.0**-power * move)
            if loss < lowest:
                best, lowest = 2.0**-power, loss
            power += 1
        if not best or lowest > here - 1e-3 * error:
            return 0.0
        self._move(self.vector + best * move, lowest)
        if at is not None:
            self._add(at)
        return best * float(move.norm()) / max(float(self.vector.norm()), 1e-300)

    def _loss(self, vector: Tensor) -> float:
        value = objective_at(self.model, vector)
        return value if math.isfinite(value) else math.inf

    def _crossings(self, reading: Reading, move: Tensor) -> list[tuple[float, tuple[int, int, int]]]:
        """Fractions of a move at which inactive units meet a kink, with (activation, place, kink), in order."""
        after = read_face(self.model, self.vector + move, self.active)
        found: list[tuple[float, tuple[int, int, int]]] = []
        for number, unit in reading.units.items():
            op = self.model.layers.operations[number]
            z0, z1 = unit.values.flatten(), after.units[number].values.flatten()
            on = self.active.get(number)
            for kink, place in enumerate(op.kinks):  # type: ignore[union-attr]
                a, b = z0 - place, z1 - place
                crossed = (a * b < 0) & unit.varies.flatten()
                if on is not None:
                    crossed &= on.flatten() < 0
                places = crossed.nonzero()[:, 0].tolist()
                found += [(float(a[p] / (a[p] - b[p])), (number, p, kink)) for p in places]
        return sorted(found)

    def _add(self, kink: tuple[int, int, int]) -> None:
        number, place, which = kink
        shape = read_face(self.model, self.vector, self.active).units[number].values.shape
        active = self.active.get(number)
        active = torch.full(shape, -1) if active is None else active.clone()
        active.view(-1)[place] = which
        self.active = {**self.active, number: active}

    def _drop(self, reading: Reading, kinks: list[int]) -> None:
        """Make active kinks inactive."""
        first = 0
        for number, active in sorted(self.active.items()):
            places = reading.face.pieces[number].kinks  # type: ignore[union-attr]
            own = [k - first for k in kinks if first <= k < first + len(places)]
            first += len(places)
            if own:
                changed = active.clone()
                changed.view(-1)[places[own]] = -1
                self.active = {**self.active, number: changed}

    def _classify(self) -> Classified | None:
        solved = solve(self.model, self.vector, self.active, _CHECK_DISTANCE)
        return None if isinstance(solved, Reason) else classify_point(self.model, *solved)

    def _leave(self, found: Classified) -> bool:
        """Leave a saddle along its direction; whether the loss is lower there."""
        if found.direction is None:
            return False
        moved = found.vector + found.direction
        loss = self._loss(moved)
        if not loss < self.losses[-1]:
            return False
        self._move(moved, loss)
        self.active = {}
        return True

    def _repair(self) -> bool:
        """Make the unit nearest to a kink active, where the loss falls on no ray; whether there is one."""
        reading = read_face(self.model, self.vector, self.active)
        nearest, chosen = 1e-4, None
        for number, unit in reading.units.items():
            ratio, kink = (unit.distances / unit.scale[..., None].clamp(min=1e-300)).min(-1)
            blocked = ~unit.varies
            if number in self.active:
                blocked = blocked | (self.active[number] >= 0)
            ratio = ratio.masked_fill(blocked, torch.inf).flatten()
            place = int(ratio.argmin())
            if float(ratio[place]) < nearest:
                nearest, chosen = float(ratio[place]), (number, place, int(kink.flatten()[place]))
        if chosen is None:
            return False
        self._add(chosen)
        return True


def _newton_move(curvature: Tensor, gradient: Tensor, switching: Tensor, jacobian: Tensor) -> Tensor:
    """A step to z = 0 and, across it, to the minimum of a model with positive eigenvalues."""
    kinks = len(switching)
    if not kinks:
        normal, kernel = torch.zeros_like(gradient), torch.eye(len(gradient), dtype=gradient.dtype)
    else:
        normal = -torch.linalg.pinv(jacobian, rtol=1e-10) @ switching
        kernel = torch.linalg.qr(jacobian.T, mode="complete")[0][:, kinks:]
    values, vectors = torch.linalg.eigh(kernel.T @ curvature @ kernel)
    if not len(values):
        return normal
    slope = vectors.T @ (kernel.T @ (gradient + curvature @ normal))
    size = values.abs()
    # A direction without curvature is left alone where the gradient in it is rounding.
    scale = float(size.max())
    step = torch.where(
        size > _MIN_CURVATURE_RATIO * scale, slope / size.clamp(min=_MIN_CURVATURE_RATIO * scale), slope / scale
    )
    move: Tensor = normal - kernel @ (vectors @ step)
    return move
