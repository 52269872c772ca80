"""Units without a part in the outputs, and a point of the same objective where they have one.

Under a penalty the weights of a unit that is active for no sample go to zero, and with them all its pre-activations, on
as many kinks as there are samples. But a unit with weights (w, v) can be split into two, (w cos α, v cos α) and
(w sin α, v sin α), with the same function and the same penalty, since f is positively homogeneous. So next to a point
with such a unit lies a point of the same objective, with the unit a small copy of another one.

Shapes: N samples.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.face import Pieces
from lightning_mnn.landscape.minima.models.equations.layers import Affine, Bends
from lightning_mnn.landscape.minima.models.equations.reading import read_face

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.face import Model
    from lightning_mnn.landscape.minima.models.equations.reading import Reading

COPY_SINE = 1e-2  # sin α: small against the weights, large against rounding


def split_units(model: Model, vector: Tensor, largest: float | None = None) -> Tensor | None:
    """The point with each penalised unit that has no part in the outputs a copy of another; None if there is none.

    Args:
        model: the model.
        vector: the point.
        largest: norm of a unit's weights, relative to the largest of its layer, up to which it is as good as zero.
    """
    largest = tolerances.MAX_ZERO_NORM_RATIO if largest is None else largest
    reading, changed = read_face(model, vector), False
    parameters = {name: value.clone() for name, value in model.parameters(vector).items()}
    for number, first, second in _hidden_layers(model):
        weight, outgoing = parameters[first.weight], parameters[second.weight]
        bias = None if first.bias is None else parameters[first.bias]
        squares = weight.square().sum(1)
        squares = squares if bias is None else squares + bias.square()
        into, out = squares.sqrt(), outgoing.norm(dim=0)
        idle = _never_active(reading, number)
        idle |= (into <= largest * into.max()) & (out <= largest * out.max())
        if not bool(idle.any()) or bool(idle.all()):
            continue
        size = (into * out).masked_fill(idle, -1.0)
        for unit in idle.nonzero()[:, 0].tolist():
            source = int(size.argmax())
            for tensor in (weight, outgoing.T, *([] if bias is None else [bias])):
                tensor[unit] = COPY_SINE * tensor[source]
                tensor[source] *= math.sqrt(1 - COPY_SINE**2)
        changed = True
    return model.vector(parameters) if changed else None


def scaled_units(model: Model, vector: Tensor, largest: float, factor: float) -> Tensor:
    """The point with the weights of small penalised units, see ``split_units``, multiplied by a factor."""
    parameters = {name: value.clone() for name, value in model.parameters(vector).items()}
    for _, first, second in _hidden_layers(model):
        into, out = parameters[first.weight].norm(dim=1), parameters[second.weight].norm(dim=0)
        small = (into <= largest * into.max()) & (out <= largest * out.max())
        for tensor in (parameters[first.weight], parameters[second.weight].T):
            tensor[small] *= factor
        if first.bias is not None:
            parameters[first.bias][small] *= factor
    return model.vector(parameters)


def _hidden_layers(model: Model) -> Iterator[tuple[int, Affine, Affine]]:
    """Activations between linear layers all of whose numbers are trained, with a penalty."""
    operations = model.layers.operations
    for number in range(1, len(operations) - 1):
        first, bends, second = operations[number - 1 : number + 2]
        if not (isinstance(first, Affine) and isinstance(bends, Bends) and isinstance(second, Affine)):
            continue
        names = [name for name in (first.weight, first.bias, second.weight) if name is not None]
        is_covered = set(names) <= set(model.trained) and all(model.penalties[name] > 0 for name in names)
        if is_covered and not first.groups and not second.groups and bends.kinks == (0.0,):
            yield number, first, second


def _never_active(reading: Reading, number: int) -> Tensor:
    piece = reading.face.pieces[number]
    assert isinstance(piece, Pieces)  # noqa: S101 (what activations have)
    return (piece.slope == 0).all(0)
