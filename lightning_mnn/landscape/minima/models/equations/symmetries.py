"""Directions in which a face is constant because of a symmetry of the model.

Units of one layer that are on the same piece of slope · z for every sample (and on the same active kinks at zero) are
one linear block: an invertible matrix M on their incoming weights and M⁻¹ on their outgoing ones leave the outputs as
they are, and zero switching values zero. Without a penalty on these weights all of gl(k) is free; with penalties that
are equal within each tensor the rotations so(k) are. With the cross-entropy and without a penalty on the last layer,
one number may be added to a column of it.

A generator is the derivative of such a change at M = 1: a vector that is linear in θ.

Without a penalty more than gl(k) may be free. The face depends on the incoming weights W and the outgoing weights V of
a block through V W alone. Where V has full row rank, or W full column rank, the map (W, V) → V W is a submersion: the
points of equal V W are a manifold, whose tangent space is the kernel of dV W + V dW. With one output each block with an
output weight that is not zero is such a one. That kernel contains the generators of gl(k). It holds for blocks without
active kinks: an equal V W does not keep zero switching values zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.face import Pieces
from lightning_mnn.landscape.minima.models.equations.layers import Affine, Average, Bends, Flatten, Largest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.face import Face


@dataclass(frozen=True)
class Gauge:
    """Generators that are independent, in an orthonormal basis.

    Attributes:
        basis: G, rows that span them, (q, P).
        smallest: at most the smallest singular value of the generators that span G, and the shortest generator.
        change: by how much the generators change for a step of length 1, as an operator norm.
        count: number of generators, with dependent ones.
    """

    basis: Tensor
    smallest: float
    change: float
    count: int


def gauge_of(face: Face, theta: Tensor) -> Gauge:
    """The symmetries of a face at a point."""
    parameters = face.model.parameters(face.whole(theta))
    found = [_vector(face, changes) for changes in _generators(face, parameters)]
    lengths = torch.tensor([float(vector.norm()) for vector in found], dtype=torch.float64)
    large = lengths > tolerances.MIN_GENERATOR_RATIO * lengths.max() if found else lengths > 0
    if not bool(large.any()):
        return Gauge(theta.new_zeros(0, len(theta)), 1.0, 0.0, 0)
    generators = torch.stack(found)[large]
    _, values, rows = torch.linalg.svd(generators, full_matrices=False)
    rank = int((values > tolerances.MIN_GENERATOR_RATIO * values[0]).sum())
    # Rows of a kernel are an orthonormal basis times σ, the smallest singular value of dV W + V dW. Projected onto the
    # kernel at a distance r < σ/2 they change by at most 2 r together, which is less than 4 r a row. No row is longer
    # than σ, so that r is small enough where it is small against the shortest row.
    smallest = min(float(values[rank - 1]), float(lengths[large].min()))
    return Gauge(rows[:rank], smallest, 4.0 * len(generators) ** 0.5, len(generators))


def _vector(face: Face, changes: dict[str, Tensor]) -> Tensor:
    like = face.model.layers.parameters
    whole = torch.cat([changes.get(name, torch.zeros_like(like[name])).flatten() for name in face.model.trained])
    return whole[face.free]


def _generators(face: Face, parameters: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    operations = face.model.layers.operations
    affine = [number for number, op in enumerate(operations) if isinstance(op, Affine)]
    for first, second in pairwise(affine):
        yield from _of_pair(face, parameters, first, second)
    last = operations[-1]
    if face.model.loss.name == "cross_entropy" and isinstance(last, Affine) and not last.groups:
        yield from _shifts(face, parameters, last)


def _of_pair(  # noqa: C901 (conditions of one pair)
    face: Face, parameters: dict[str, Tensor], first: int, second: int
) -> Iterator[dict[str, Tensor]]:
    a, b, model = face.model.layers.operations[first], face.model.layers.operations[second], face.model
    if not (isinstance(a, Affine) and isinstance(b, Affine)) or a.groups > 1 or b.groups > 1:
        return
    names = [name for name in (a.weight, a.bias, b.weight) if name is not None]
    between = range(first + 1, second)
    if not set(names) <= set(model.trained) or not _keeps_channels(face, a, b, between):
        return
    weight, outgoing = parameters[a.weight], parameters[b.weight]
    columns = outgoing.shape[1] // len(weight)  # of one channel, after flattening
    free = all(model.penalties[name] == 0 for name in names)
    single = any(isinstance(model.layers.operations[n], Largest) for n in between)

    def mixed(i: int, j: int) -> dict[str, Tensor]:
        """Row i of the first grows by row j, and column j of the second falls by column i."""
        change, result = torch.zeros_like(weight), {}
        change[i] = weight[j]
        result[a.weight] = change
        if a.bias is not None:
            result[a.bias] = torch.zeros_like(parameters[a.bias])
            result[a.bias][i] = parameters[a.bias][j]
        change = torch.zeros_like(outgoing)
        change[:, j * columns : (j + 1) * columns] = -outgoing[:, i * columns : (i + 1) * columns]
        result[b.weight] = change
        return result

    def placed(block: list[int], ahead: Tensor, back: Tensor) -> dict[str, Tensor]:
        """A move of the weights of a block."""
        inputs, result = weight.shape[1], {}
        result[a.weight], result[b.weight] = torch.zeros_like(weight), torch.zeros_like(outgoing)
        result[a.weight][block], result[b.weight][:, block] = ahead[:, :inputs], back
        if a.bias is not None:
            result[a.bias] = torch.zeros_like(parameters[a.bias])
            result[a.bias][block] = ahead[:, inputs]
        return result

    is_linear = not a.groups and not b.groups and columns == 1 and not single
    for block, has_kinks in _blocks(face, len(weight), between):
        if free and is_linear and not has_kinks:
            rows = weight if a.bias is None else torch.cat([weight, parameters[a.bias][:, None]], dim=1)
            kernel = _kernel_of_product(rows[block], outgoing[:, block])
            if kernel is not None:
                yield from (placed(block, *move) for move in zip(*kernel, strict=True))
                continue
        if free:
            yield from (mixed(i, i) for i in block)
        if not single:
            for i, j in permutations(block, 2):
                if free:
                    yield mixed(i, j)
                elif i < j:
                    ahead, back = mixed(i, j), mixed(j, i)
                    yield {name: ahead[name] - back[name] for name in ahead}


def _keeps_channels(face: Face, a: Affine, b: Affine, between: range) -> bool:
    """Whether the inputs of the second layer that come from a channel of the first are a block of columns of its own.

    Pooling after a linear layer, or after flattening, mixes channels, and a linear layer may act on another axis.
    """
    steps = [face.model.layers.operations[n] for n in between]
    if not all(isinstance(op, Bends | Average | Largest | Flatten) for op in steps):
        return False
    if not a.groups:
        flat = all(isinstance(p, Pieces) and p.slope.ndim == 2 for p in (face.pieces[n] for n in between))
        return not b.groups and flat and (bool(steps) or face.model.inputs.ndim == 2)
    places = [place for place, op in enumerate(steps) if isinstance(op, Flatten)]
    if b.groups:
        return not places
    return len(places) == 1 and all(isinstance(op, Bends) for op in steps[places[0] + 1 :])


def _kernel_of_product(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor] | None:
    """An orthonormal basis of the moves with dV W + V dW = 0, times the smallest singular value of this map.

    None where the map is not onto up to ``MIN_SUBMERSION_RATIO``. It is onto if V has full row rank or W full column
    rank, and its smallest singular value is then at least the smallest of theirs.

    Args:
        rows: W, (k, inputs).
        columns: V, (outputs, k).

    Returns:
        dW (q, k, inputs) and dV (q, outputs, k).
    """
    (units, inputs), outputs = rows.shape, len(columns)
    sizes = [torch.linalg.svdvals(t)[-1] if len(t) <= t.shape[1] else t.new_zeros(()) for t in (columns, rows.T)]
    smallest = float(torch.stack(sizes).max())
    if not smallest > tolerances.MIN_SUBMERSION_RATIO * max(float(rows.norm()), float(columns.norm())):
        return None
    of_rows = torch.kron(columns.contiguous(), torch.eye(inputs, dtype=torch.float64))  # of dW, row by row
    of_columns = torch.kron(torch.eye(outputs, dtype=torch.float64), rows.T.contiguous())  # of dV, row by row
    product = torch.cat([of_rows, of_columns], dim=1)
    basis = smallest * torch.linalg.svd(product)[2][outputs * inputs :]
    ahead, back = basis[:, : units * inputs], basis[:, units * inputs :]
    return ahead.reshape(-1, units, inputs), back.reshape(-1, outputs, units)


def _blocks(face: Face, channels: int, between: range) -> list[tuple[list[int], bool]]:
    """Channels with equal, linear states in all activations between two layers, and whether they have active kinks."""
    states: list[list[object]] = [[] for _ in range(channels)]
    linear, kinked = [True] * channels, [False] * channels
    for number in between:
        piece = face.pieces[number]
        if not isinstance(piece, Pieces):
            continue
        on = torch.zeros(piece.slope.numel(), dtype=torch.bool)
        on[piece.kinks] = True
        at = torch.zeros(piece.slope.numel(), dtype=torch.float64)
        at[piece.kinks] = piece.place
        # Flattening before an activation keeps the places of a channel together.
        slope, offset, on, at = (t.reshape(len(piece.slope), channels, -1) for t in (piece.slope, piece.offset, on, at))
        for c in range(channels):
            states[c] += [tuple(t[:, c].flatten().tolist()) for t in (slope, on)]
            kinked[c] |= bool(on[:, c].any())
            linear[c] &= not (offset[:, c].any() or at[:, c].any())
    groups: dict[object, list[int]] = {}
    for c in range(channels):
        if linear[c]:
            groups.setdefault(tuple(states[c]), []).append(c)
    return [(group, kinked[group[0]]) for group in groups.values()]


def _shifts(face: Face, parameters: dict[str, Tensor], last: Affine) -> Iterator[dict[str, Tensor]]:
    """A column of the last layer, or its bias, moved by one number for all outputs."""
    for name in (last.weight, last.bias):
        if name in face.model.trained and face.model.penalties[name] == 0:
            like = parameters[name].reshape(len(parameters[name]), -1)
            for column in range(like.shape[1]):
                change = torch.zeros_like(like)
                change[:, column] = 1.0
                yield {name: change.reshape(parameters[name].shape)}
