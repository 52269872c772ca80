"""Polish a model: from any parameters to a certified local minimum, by Newton steps with an active set of kinks.

Shapes: N samples, P free parameters, κ active kinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_mnn.landscape.minima.models.classification import MAX_UNKNOWNS, Classified, classify_point, solve
from lightning_mnn.landscape.minima.models.equations.face import derivatives, hessian, kink_groups, on_kinks
from lightning_mnn.landscape.minima.models.equations.reading import Active, objective_at, read_face, true_loss
from lightning_mnn.landscape.minima.models.inactive_units import scaled_units, split_units
from lightning_mnn.landscape.minima.models.model_certificate import (
    ModelCertificate,
    as_certificate,
    certificate_at,
    prepare,
)
from lightning_mnn.landscape.minima.models.piecewise_step import Curvature, LocalModel, minimise
from lightning_mnn.utilities.interruption import safe_point
from lightning_mnn.utilities.validation import ArgumentError, whole_number
from lightning_mnn.verdicts import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lightning_mnn.landscape.minima.models.equations.face import Face, Model
    from lightning_mnn.landscape.minima.models.equations.layers import LossName
    from lightning_mnn.landscape.minima.models.equations.reading import Reading, Unit
    from lightning_mnn.landscape.minima.models.piecewise_step import ModelMinimum

_CHECK_STEP = 1e-3  # relative step from which Newton's method on the face may converge
_FINAL_STEP = 1e-6  # relative step from which it is tried again with the same kinks
_CHECK_DISTANCE = 1e-3  # relative distance that it may go
_MIN_DAMPING = 1e-9
_MAX_CANDIDATE_RATIO = 0.1  # |z − kink|, relative to its scale, of kinks that the local model knows
_MAX_CANDIDATES = 400
_WORK_PER_ROUND = 100  # of a change of the active set of m candidates, in m², in units of 0.1 ns
_WORK_PER_CUBE = 40  # of a factorisation of P rows, in P³
_MIN_ROUNDS = 20  # of a step, however little work is left
_FIRST_ACTIVE_RATIO = 1e-6  # |z − kink|, relative to its scale, of the kinks that are active at first
_FIRST_DAMPING = 1e-3  # added to the Hessian, relative to its largest eigenvalue
_MAX_DAMPING = 1e6
_DAMPING_FACTOR = 10.0
_MIN_GAIN = 0.25  # decrease of the loss, relative to the predicted one, with which damping falls
_MIN_DECREASE = 1e-15  # of the loss, relative to it, that is no rounding
_MAX_SMALL_NORM_RATIO = 1e-3  # norm of a unit's weights, relative to its layer's largest, that grows or goes to zero
_MAX_DOUBLINGS = 10
_CORRECTIONS = 2  # of active kinks after a move
_STALLS = 2  # steps without a decrease before the end


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
    max_work: float = math.inf,
) -> PolishedModel:
    """Go from a model's parameters to a certified local minimum of its training objective.

    Each step goes to the minimum of a local model: quadratic, with a positive Hessian, and piecewise linear across the
    kinks nearby, whose active set is found within the model. The Hessian is damped until the true loss falls. Where
    the active kinks stay the same, the stationary point of their face is certified; saddles are left along their
    direction.

    Args:
        module: see :func:`certify_model`, as for the other arguments; it is not changed.
        inputs: X.
        targets: y.
        loss: the loss.
        weight_decay: the penalty.
        frozen: names of parameters that are not trained.
        max_steps: largest number of steps.
        max_work: work after which no step begins, in units of about 0.1 ns of one core.

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
    search = _Search(model, start, max_work)
    found = search.run(max_steps)
    if found is not None:
        return PolishedModel(found, search.steps, tuple(search.losses))
    return PolishedModel(
        certificate_at(model, search.vector, start, _CHECK_DISTANCE), search.steps, tuple(search.losses)
    )


class _Search:
    """The state of the search."""

    def __init__(self, model: Model, start: Tensor, max_work: float) -> None:
        self.model, self.start, self.vector = model, start, start
        self._left = max_work
        self.active: Active = {}
        self.losses = [true_loss(model, start)[0]]
        self.steps = 0
        self._damping = _FIRST_DAMPING
        self._multipliers: dict[tuple[int, int, int], float] = {}
        self._is_first = True

    def run(self, max_steps: int) -> ModelCertificate | None:
        """Steps until a minimum is certified; None where it is not."""
        found = certificate_at(self.model, self.vector, self.start, _CHECK_DISTANCE)
        if found.is_minimum:
            return found
        stalls, checked = 0, None
        while self.steps < max_steps and stalls < _STALLS and self._left > 0:
            safe_point()
            self.steps += 1
            before = frozenset(self._multipliers)
            size = self._step()
            now = frozenset(self._multipliers)
            stalls = 0 if size else stalls + 1
            if (size > _CHECK_STEP and before != now) or (now == checked and size > _FINAL_STEP):
                continue
            checked = now
            classified = self._classify()
            if classified is not None and classified.kind.is_minimum:
                return as_certificate(self.model, classified, self.start)
            if classified is not None and self._leave(classified):
                stalls = 0
        found = certificate_at(self.model, self.vector, self.start, _CHECK_DISTANCE)
        return found if found.is_minimum else None

    def _move(self, vector: Tensor, loss: float) -> None:
        self.vector = vector
        self.losses.append(loss)

    def _step(self) -> float:
        """One step; its length relative to the parameters, 0 if the loss does not fall."""
        self._split()
        reading = read_face(self.model, self.vector)
        candidates = _candidates(self.model, self.vector, reading, _MAX_CANDIDATE_RATIO, _MAX_CANDIDATES)
        face = on_kinks(reading.face, candidates.masks, candidates.classes)
        theta = self.vector[face.free]
        first = derivatives(face, theta, candidates.values.abs())
        values = candidates.values.numpy()
        local = LocalModel(
            first.gradient.numpy(), first.normal.numpy(), values, first.jacobian.numpy(), first.coupling.numpy()
        )
        active = self._first_active(candidates)
        curvature = Curvature(
            self._curvature(reading, theta, candidates, active, local).numpy(), first.jacobian.numpy()[active]
        )
        here = self.losses[-1]
        while self._damping <= _MAX_DAMPING:
            safe_point()
            root = curvature.root(self._damping)
            found = minimise(local, root, active, self._rounds(len(active)))
            self._left -= _WORK_PER_ROUND * len(active) ** 2 * found.rounds + _WORK_PER_CUBE * len(theta) ** 3
            moved, loss = self._corrected(face, theta, found, candidates)
            if loss < here - _MIN_DECREASE * abs(here):
                predicted = -found.value
                if here - loss > _MIN_GAIN * predicted:
                    self._damping /= _DAMPING_FACTOR**2
                    self._damping = self._damping if self._damping > _MIN_DAMPING else 0.0
                elif self._damping == 0:
                    self._damping = _MIN_DAMPING
                self._remember(candidates, found)
                length = float((moved - self.vector).norm()) / max(float(self.vector.norm()), 1e-300)
                self._move(moved, loss)
                return length
            if float(np.linalg.norm(found.move)) <= 1e-15 * float(theta.norm()):
                break
            self._damping = max(self._damping * _DAMPING_FACTOR, _MIN_DAMPING)
        self._damping = 0.0
        self._remember(candidates, minimise(local, curvature.root(0.0), active, self._rounds(len(active))))
        return 0.0

    def _rounds(self, candidates: int) -> int | None:
        """How many changes of an active set of so many candidates what is left of the work allows; None: any number."""
        if math.isinf(self._left):
            return None
        return max(_MIN_ROUNDS, int(self._left / (_WORK_PER_ROUND * max(1, candidates) ** 2)))

    def _split(self) -> None:
        """Make units without a part in the outputs copies of others, where the loss does not rise."""
        split = split_units(self.model, self.vector)
        if split is None:
            split = split_units(self.model, self.vector, _MAX_SMALL_NORM_RATIO)
            if split is None or self._grow():
                return
        loss, (here, error) = self._loss(split), true_loss(self.model, self.vector)
        if loss < self.losses[-1]:
            self._move(split, loss)
        elif loss <= here + error:
            self.vector = split

    def _grow(self) -> bool:
        """Scale units with small weights up as far as the loss falls; whether it does."""
        moved, best = False, self.losses[-1]
        for power in range(1, _MAX_DOUBLINGS):
            vector = scaled_units(self.model, self.vector, _MAX_SMALL_NORM_RATIO, 2.0**power)
            loss = self._loss(vector)
            if not loss < best:
                break
            moved, best, chosen = True, loss, vector
        if moved:
            self._move(chosen, best)
        return moved

    def _first_active(self, candidates: _Candidates) -> NDArray[np.bool_]:
        """The first guess of the active candidates: those of the last step."""
        if self._is_first:
            self._is_first = False
            return candidates.ratios.numpy() <= _FIRST_ACTIVE_RATIO
        return np.array([key in self._multipliers for key in candidates.keys], dtype=bool)

    def _curvature(
        self, reading: Reading, theta: Tensor, candidates: _Candidates, active: NDArray[np.bool_], local: LocalModel
    ) -> Tensor:
        """The Hessian on the face of the active candidates, with the multipliers of the last step."""
        masks = candidates.chosen(active)
        weights = [self._multipliers.get(key, 0.0) for key, on in zip(candidates.keys, active, strict=True) if on]
        multipliers = theta.new_tensor(weights)
        if weights and not multipliers.any():
            signs = np.where(active, 0.0, np.sign(local.switching))
            force = local.gradient + local.jacobian.T @ (signs * local.normal)
            found = np.linalg.lstsq(local.jacobian[active].T, -force, rcond=1e-10)[0]
            multipliers = torch.from_numpy(found)
        self.active = masks
        return hessian(on_kinks(reading.face, masks, candidates.classes), theta, multipliers)

    def _corrected(
        self, face: Face, theta: Tensor, found: ModelMinimum, candidates: _Candidates
    ) -> tuple[Tensor, float]:
        """The end of a move, with its active kinks brought back to zero where this is lower."""
        move = torch.from_numpy(found.move)
        best = face.whole(theta + move)
        lowest = self._loss(best)
        vector, on = best, torch.from_numpy(np.flatnonzero(found.signs == 0))
        for _ in range(_CORRECTIONS if len(on) else 0):
            z = candidates.at(read_face(self.model, vector).units)[on]
            if not bool(z.isfinite().all()):
                break
            vector = face.whole(vector[face.free] - torch.from_numpy(found.to_kinks @ z.numpy()))
            loss = self._loss(vector)
            if loss < lowest:
                best, lowest = vector, loss
        return best, lowest

    def _remember(self, candidates: _Candidates, found: ModelMinimum) -> None:
        self._multipliers = {
            key: float(value)
            for key, value, sign in zip(candidates.keys, found.multipliers, found.signs, strict=True)
            if sign == 0
        }
        self.active = candidates.chosen(found.signs == 0)

    def _loss(self, vector: Tensor) -> float:
        value = objective_at(self.model, vector)
        return value if math.isfinite(value) else math.inf

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
        return True


@dataclass(frozen=True)
class _Candidates:
    """Kinks nearby, in the order of activations and places.

    Attributes:
        masks: by the number of the activation, the kink of each unit, or −1, (N, …).
        keys: (activation, place, kink) of each.
        values: z of each, (m,).
        ratios: |z| relative to its scale, (m,).
        places: of each, in the tensor of its activation, by the number of the activation.
        kinks: where its kink is, by the number of the activation.
        members: by the number of the activation, places of all kinks nearby, and for each the number of its variable.
        classes: of samples, by the number of the activation.
    """

    masks: Active
    keys: list[tuple[int, int, int]]
    values: Tensor
    ratios: Tensor
    places: dict[int, Tensor]
    kinks: dict[int, Tensor]
    members: dict[int, tuple[Tensor, Tensor]]
    classes: dict[int, Tensor]

    def chosen(self, mask: NDArray[np.bool_]) -> Active:
        """The masks of some of them."""
        result, first = {}, 0
        for number, places in self.places.items():
            own = torch.from_numpy(mask[first : first + len(places)])
            first += len(places)
            members, groups = self.members[number]
            members = members[own[groups]]
            changed = torch.full_like(self.masks[number], -1)
            changed.view(-1)[members] = self.masks[number].flatten()[members]
            result[number] = changed
        return result

    def at(self, units: dict[int, Unit]) -> Tensor:
        """Their z in other values."""
        parts = [units[n].values.flatten()[places] - self.kinks[n] for n, places in self.places.items()]
        return torch.cat([*parts, torch.zeros(0, dtype=torch.float64)])


def _candidates(model: Model, vector: Tensor, reading: Reading, largest: float, count: int) -> _Candidates:
    """The nearest kinks, up to a relative distance and a number."""
    nearest = {number: unit.nearest() for number, unit in reading.units.items()}
    every = torch.cat([ratio.flatten() for ratio, _ in nearest.values()]) if nearest else torch.zeros(0).double()
    if len(every) > count:
        largest = min(largest, float(every.kthvalue(count).values))
    masks = {number: torch.where(ratio <= largest, kink, -1) for number, (ratio, kink) in nearest.items()}
    # Values behind a candidate are no constants.
    classes = {number: unit.classes for number, unit in read_face(model, vector, masks).units.items()}
    keys, values, ratios, all_places, all_kinks, members = [], [], [], {}, {}, {}
    for number, (ratio, kink) in nearest.items():
        op = reading.face.model.layers.operations[number]
        near = (masks[number].flatten() >= 0).nonzero()[:, 0]
        groups, heads = kink_groups(near, classes[number], ratio[0].numel())
        members[number], places = (near, groups), near[heads]
        which = kink.flatten()[places]
        at = torch.tensor(op.kinks, dtype=torch.float64)[which]  # type: ignore[union-attr]
        keys += [(number, p, k) for p, k in zip(places.tolist(), which.tolist(), strict=True)]
        values.append(reading.units[number].values.flatten()[places] - at)
        ratios.append(ratio.flatten()[places])
        all_places[number], all_kinks[number] = places, at
    none = torch.zeros(0, dtype=torch.float64)
    z, distances = torch.cat([*values, none]), torch.cat([*ratios, none])
    return _Candidates(masks, keys, z, distances, all_places, all_kinks, members, classes)
