"""Random and directed moves around a point that should be a local minimum."""

from collections import Counter

import torch
from torch import nn

from lightning_mnn.landscape.minima.models.equations.reading import active_sets, read_face, true_loss
from lightning_mnn.landscape.minima.models.equations.stationarity import linearise
from lightning_mnn.landscape.minima.models.model_certificate import prepare

_BATCH = 256  # moves whose losses are computed together
_CANDIDATES = 3  # lowest moves that are looked at with their rounding errors


def model_of(planted):
    """The model of a planted point, and its parameters."""
    return prepare(
        planted.module,
        planted.inputs,
        planted.targets,
        loss=planted.loss,
        weight_decay=planted.weight_decay,
        frozen=(),
    )


def lowest_nearby(planted, found, *, draws=60, seed=0, sizes=(1e-3, 1e-5, 1e-7), tally=None):
    """The lowest loss found around a certificate's point minus its own, in units of the rounding of both.

    Moves: random ones, those off each kink in both directions, those of the tangential eigenvectors, of several sizes
    relative to the parameters.

    Args:
        planted: the problem.
        found: the certificate.
        draws: number of random moves.
        seed: seed of the random moves.
        sizes: lengths of the moves.
        tally: a Counter that gets the number of moves of each size, as ``("moves", size)``, and of those that lower
            the loss, as ``("lower", size)``.
    """
    model, _ = model_of(planted)
    vector = model.vector(found.state_dict)
    here, error = true_loss(model, vector)
    random = torch.Generator().manual_seed(seed)
    moves = list(torch.randn(draws, len(vector), generator=random, dtype=torch.float64))
    reading = read_face(model, vector)
    sets = [a for a in active_sets(reading, 1e-6, 50) if sum(int((t >= 0).sum()) for t in a.values()) == found.kinks]
    face = read_face(model, vector, sets[0] if sets else {}).face
    system = linearise(face, vector[face.free])
    directions = list(torch.linalg.pinv(system.first.jacobian).T) if face.num_kinks else []
    directions += list(system.tangential()[1].T)
    moves += [face.whole(system.theta + d) - vector for d in directions]
    moves += [
        face.whole(system.theta + sum(torch.randn(1, generator=random).double() * d for d in directions)) - vector
        for _ in range(draws // 3)
    ]
    units = torch.stack([move / move.norm() for move in moves if float(move.norm()) > 0])
    units = torch.cat([units, -units])
    slack = found.radius * (1 + found.radius) if found.radius else 0.0
    lowest, scale = 0.0, float(vector.norm())
    for size in sizes:
        points = vector + size * scale * units
        values = losses(planted, model, points)
        falls = []
        for place in values.argsort()[:_CANDIDATES]:
            there, error_there = true_loss(model, points[place])
            falls.append((there - here) / (error + error_there + slack))
        lowest = min(lowest, *falls)
        if tally is not None:
            tally.update(Counter({("moves", size): len(points), ("lower", size): sum(fall < -1 for fall in falls)}))
    return lowest


def losses(planted, model, points):
    """The objective at many points (M, P), by the module itself."""

    def objective(vector):
        parameters = model.parameters(vector)
        outputs = torch.func.functional_call(planted.module, parameters, (planted.inputs,))
        match planted.loss:
            case "squared_error":
                loss = (outputs - planted.targets).square().sum()
            case "cross_entropy":
                loss = nn.functional.cross_entropy(outputs, planted.targets, reduction="sum")
            case _:
                loss = nn.functional.binary_cross_entropy_with_logits(outputs, planted.targets, reduction="sum")
        return loss / len(planted.inputs) + 0.5 * planted.weight_decay * vector.square().sum()

    with torch.no_grad():
        return torch.cat([torch.func.vmap(objective)(part) for part in points.split(_BATCH)])
