"""Directions in which a face is constant because of a symmetry of the model.

Units of one layer that are on the same piece of slope · z for every sample (and on the same active kinks at zero) are
one linear block: an invertible matrix M on their incoming weights and M⁻¹ on their outgoing ones leave the outputs as
they are, and zero switching values zero. Without a penalty on these weights all of gl(k) is free; with penalties that
are equal within each tensor the rotations so(k) are. With the cross-entropy and without a penalty on the last layer,
one number may be added to a column of it.

A generator is the derivative of such a change at M = 1: a vector that is linear in θ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.face import Pieces
from lightning_mnn.landscape.minima.models.equations.layers import Affine, Largest, Scale

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.face import Face


@dataclass(frozen=True)
class Gauge:
    """Generators that are independent, in an orthonormal basis.

    Attributes:
        basis: G, rows that span them, (q, P).
        smallest: the smallest singular value of the generators that span G.
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
    found = [vector for vector in found if bool(vector.any())]
    if not found:
        return Gauge(theta.new_zeros(0, len(theta)), 1.0, 0.0, 0)
    generators = torch.stack(found)
    _, values, rows = torch.linalg.svd(generators, full_matrices=False)
    rank = int((values > tolerances.MIN_GENERATOR_RATIO * values[0]).sum())
    return Gauge(rows[:rank], float(values[rank - 1]), 4.0 * len(found) ** 0.5, len(found))


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
    if not set(names) <= set(model.trained) or any(isinstance(model.layers.operations[n], Scale) for n in between):
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

    for block in _blocks(face, len(weight), between):
        if free:
            yield from (mixed(i, i) for i in block)
        if not single:
            for i, j in permutations(block, 2):
                if free:
                    yield mixed(i, j)
                elif i < j:
                    ahead, back = mixed(i, j), mixed(j, i)
                    yield {name: ahead[name] - back[name] for name in ahead}


def _blocks(face: Face, channels: int, between: range) -> list[list[int]]:
    """Channels with equal, linear states in all activations between two layers."""
    states: list[list[object]] = [[] for _ in range(channels)]
    linear = [True] * channels
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
            linear[c] &= not (offset[:, c].any() or at[:, c].any())
    groups: dict[object, list[int]] = {}
    for c in range(channels):
        if linear[c]:
            groups.setdefault(tuple(states[c]), []).append(c)
    return list(groups.values())


def _shifts(face: Face, parameters: dict[str, Tensor], last: Affine) -> Iterator[dict[str, Tensor]]:
    """A column of the last layer, or its bias, moved by one number for all outputs."""
    for name in (last.weight, last.bias):
        if name in face.model.trained and face.model.penalties[name] == 0:
            like = parameters[name].reshape(len(parameters[name]), -1)
            for column in range(like.shape[1]):
                change = torch.zeros_like(like)
                change[:, column] = 1.0
                yield {name: change.reshape(parameters[name].shape)}
