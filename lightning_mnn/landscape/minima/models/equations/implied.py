"""Active kinks that are zero wherever the others are.

Pre-activations of a linear layer are z = v·h, with the row v of a unit (its bias included) and the inputs h of a sample
(one for the bias). Let T be some of the inputs, and S samples whose other inputs are zero on the face, where units on
active kinks are zero too. A sample m has its inputs in T, unit u is on its kinks for S, and units Q are on theirs for
S and m. Then the v of u and of Q, on T, are orthogonal to the inputs of S. If the inputs of S and the v of Q together
have rank |T|, the v of Q span all that is orthogonal to the inputs of S. So the v of u is a combination of those of Q,
and unit u is on its kink for m: this kink is *implied* by the others, and its gradient is a combination of theirs.

Trained networks have such kinks of samples that no unit of the layer before sees, whose pre-activations are biases (T
is the bias), and of units with proportional weights.

Shapes: N samples, P free parameters, κ active kinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.face import Pieces
from lightning_mnn.landscape.minima.models.equations.layers import Affine, Bends

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.face import Face


@dataclass(frozen=True)
class Reach:
    """What the numbers of a face may change in a ball.

    Attributes:
        radius: r.
        slopes: bounds on ‖∇z‖ of each sample in the ball, by the number of the activation.
    """

    radius: float
    slopes: dict[int, Tensor]


def implied_kinks(face: Face, theta: Tensor, reach: Reach | None = None) -> Tensor:
    """Which active kinks are implied by earlier ones, bool (κ,).

    Kinks are visited layer by layer, those of samples with few inputs first.

    Args:
        face: the face.
        theta: the free parameters.
        reach: None: as far as floats tell. Otherwise it is proved for every point of the ball on the face.
    """
    inputs: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}
    none = theta.new_zeros(face.num_kinks)
    face.evaluate(theta, none, visit=lambda number, h: inputs.update({number: h}))
    if reach is not None:
        at = face.whole(theta.abs(), absolute=True)[face.free]
        face.evaluate(at, none, absolute=True, visit=lambda number, h: sizes.update({number: h}))
    parameters, implied = face.model.parameters(face.whole(theta)), torch.zeros(face.num_kinks, dtype=torch.bool)
    first = 0
    for number, piece in enumerate(face.pieces):
        if not isinstance(piece, Pieces):
            continue
        own = slice(first, first + len(piece.heads))
        first = own.stop
        zero = _zeros(face, number, inputs)
        if zero is None or not len(piece.heads):
            continue
        affine = face.model.layers.operations[number - 1]
        assert isinstance(affine, Affine)  # noqa: S101 (what ``_zeros`` has seen)
        h, rows = inputs[number - 1].masked_fill(zero, 0.0), parameters[affine.weight]
        error = _errors(face, number, reach, sizes)
        if affine.bias is not None:
            h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
            zero = torch.cat([zero, torch.zeros_like(zero[:, :1])], dim=1)
            rows = torch.cat([rows, parameters[affine.bias][:, None]], dim=1)
        implied[own] = _Layer(h, ~zero, rows, error, 0.0 if reach is None else reach.radius).implied(piece)
    return implied


def _zeros(face: Face, number: int, inputs: dict[int, Tensor]) -> Tensor | None:
    """Which inputs of the linear layer before an activation are zero on the face; None if it is no such layer."""
    operations = face.model.layers.operations
    op, before = operations[number], operations[number - 1] if number else None
    if not (isinstance(op, Bends) and op.kinks == (0.0,) and isinstance(before, Affine) and not before.groups):
        return None
    if inputs[number - 1].ndim != 2:
        return None
    if number == 1:
        return inputs[0] == 0
    op, piece = operations[number - 2], face.pieces[number - 2]
    if not (isinstance(op, Bends) and op.kinks == (0.0,) and isinstance(piece, Pieces)):
        return None
    zero = (piece.slope == 0) & (piece.offset == 0)
    zero.view(-1)[piece.kinks] = True
    return zero


def _errors(face: Face, number: int, reach: Reach | None, sizes: dict[int, Tensor]) -> Tensor:
    """Bounds on the change of the inputs of each sample in the ball, with their rounding, (N,)."""
    if reach is None or number == 1:
        return torch.zeros(len(face.model.inputs), dtype=torch.float64)
    piece = face.pieces[number - 2]
    assert isinstance(piece, Pieces)  # noqa: S101 (what ``_zeros`` has seen)
    moved = reach.slopes[number - 2] * float(piece.slope.abs().max()) * reach.radius
    found: Tensor = moved + face.model.rounding * sizes[number - 1].norm(dim=1)
    return found


class _Layer:
    """The kinks of one activation after a linear layer.

    Attributes:
        h: inputs of each sample, with one for the bias, (N, d).
        present: which of them may not be zero, (N, d).
        rows: v of each unit, (units, d).
        error: bounds on the change of each sample's h, (N,).
        radius: bound on the change of all v.
        proved: pairs (sample, unit) on their kinks.
    """

    def __init__(self, h: Tensor, present: Tensor, rows: Tensor, error: Tensor, radius: float) -> None:
        self.h, self.present, self.rows, self.error, self.radius = h, present, rows, error, radius
        self.proved: set[tuple[int, int]] = set()

    def implied(self, piece: Pieces) -> Tensor:
        units = len(self.rows)
        pairs = [divmod(place, units) for place in piece.kinks.tolist()]
        members: list[list[tuple[int, int]]] = [[] for _ in piece.heads]
        for pair, variable in zip(pairs, piece.groups.tolist(), strict=True):
            members[variable].append(pair)
        found = torch.zeros(len(members), dtype=torch.bool)
        counts = self.present.sum(1)
        for variable in sorted(range(len(members)), key=lambda k: (int(counts[members[k][0][0]]), k)):
            found[variable] = self._follows(*members[variable][0])
            self.proved.update(members[variable])
        return found

    def _follows(self, sample: int, unit: int) -> bool:
        """Whether unit is on its kink for the sample because of the pairs that are proved."""
        others = sorted(n for n, u in self.proved if u == unit)
        for inputs in self._supports(sample, others):
            inside = [n for n in others if not bool((self.present[n] & ~inputs).any())]
            for samples, units in self._choices(sample, unit, inside):
                if self._spans(inputs, samples, units):
                    return True
        return False

    def _supports(self, sample: int, others: list[int]) -> Iterator[Tensor]:
        """Sets T: the inputs of the sample, also with those of one other sample, and of all."""
        own = self.present[sample]
        seen: set[bytes] = set()
        for inputs in (own, *(own | self.present[n] for n in others), own | self.present[others].any(0)):
            if (key := inputs.numpy().tobytes()) not in seen:
                seen.add(key)
                yield inputs

    def _choices(self, sample: int, unit: int, inside: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Samples S and units Q: all S without a unit, and for each unit the samples that it shares."""
        yield inside, []
        for one in range(len(self.rows)):
            if one == unit or (sample, one) not in self.proved:
                continue
            shared = [n for n in inside if (n, one) in self.proved]
            every = [q for q in range(len(self.rows)) if q != unit and self._has(q, [*shared, sample])]
            yield shared, every

    def _has(self, unit: int, samples: list[int]) -> bool:
        return all((n, unit) in self.proved for n in samples)

    def _spans(self, inputs: Tensor, samples: list[int], units: list[int]) -> bool:
        """Whether the inputs of samples and the v of units have rank |T|, everywhere in the ball."""
        size = int(inputs.sum())
        if size == 0:  # all inputs of the sample are zero on the face
            return True
        if len(samples) + len(units) < size:
            return False
        whole = torch.cat([self.h[samples], self.rows[units]])
        lengths = whole.norm(dim=1).clamp(min=1e-300)
        smallest = float(torch.linalg.svdvals((whole / lengths[:, None])[:, inputs])[-1])
        change = float((self.error[samples] / lengths[: len(samples)]).square().sum())
        if units:
            ratio = self.radius / float(lengths[len(samples) :].amin())
            change += ratio * ratio  # ratio**2 would be an error where it is infinite
        return bool(smallest > max(tolerances.MIN_LIKQ, 2 * change**0.5))
