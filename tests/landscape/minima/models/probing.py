"""Random and directed moves around a point that should be a local minimum."""

import torch

from lightning_mnn.landscape.minima.models.equations.reading import active_sets, read_face, true_loss
from lightning_mnn.landscape.minima.models.equations.stationarity import linearise
from lightning_mnn.landscape.minima.models.model_certificate import prepare


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


def lowest_nearby(planted, found, *, draws=60, seed=0, sizes=(1e-3, 1e-5, 1e-7)):
    """The lowest loss found around a certificate's point minus its own, in units of the rounding of both.

    Moves: random ones, those off each kink in both directions, those of the tangential eigenvectors, of several sizes
    relative to the parameters.
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
    lowest, scale = 0.0, float(vector.norm())
    for move in moves:
        if not float(move.norm()) > 0:
            continue
        for size in sizes:
            for sign in (1, -1):
                there, error_there = true_loss(model, vector + sign * size * scale * move / move.norm())
                slack = found.radius * (1 + found.radius) if found.radius else 0.0
                lowest = min(lowest, (there - here) / (error + error_there + slack))
    return lowest
