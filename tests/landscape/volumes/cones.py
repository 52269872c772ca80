"""Cones whose Gaussian measure is known, and slow ways to measure and to enumerate cones."""

import itertools
import math

import numpy as np

from lightning_mnn.landscape.regions.gordan import alternatives


def rotation(dim, rng):
    return np.linalg.qr(rng.standard_normal((dim, dim)))[0]


def orthant(dim, rng):
    """Normals, an interior point and the log measure of a rotated orthant."""
    normals = rotation(dim, rng)
    return normals, normals.sum(0), -dim * math.log(2)


def equicorrelated(dim):
    """The cone of `dim` normals with pairwise correlation ½: 1/(dim + 1)."""
    normals = np.linalg.cholesky(0.5 * np.ones((dim, dim)) + 0.5 * np.eye(dim))
    return normals, np.linalg.solve(normals, np.ones(dim)), -math.log(dim + 1)


def random_cone(num, dim, rng):
    """Random constraints turned so that a random point satisfies them."""
    normals, point = rng.standard_normal((num, dim)), rng.standard_normal(dim)
    return normals * np.sign(normals @ point)[:, None], point


def arcs(angles, rng):
    """A rotated product of arcs of the given angles, each in a plane of its own."""
    dim = 2 * len(angles)
    normals, point = np.zeros((dim, dim)), np.zeros(dim)
    for i, angle in enumerate(angles):
        normals[2 * i, 2 * i : 2 * i + 2] = [math.sin(angle / 2), math.cos(angle / 2)]
        normals[2 * i + 1, 2 * i : 2 * i + 2] = [math.sin(angle / 2), -math.cos(angle / 2)]
        point[2 * i] = 1
    turned = rotation(dim, rng)
    return normals @ turned.T, turned @ point, sum(math.log(angle / (2 * math.pi)) for angle in angles)


def arc_measure(normals, point):
    """Of a cone in the plane: by how far each constraint lets the point turn to either side."""
    turns = np.arctan2(normals[:, 1], normals[:, 0]) - math.atan2(point[1], point[0])
    turns = (turns + math.pi) % (2 * math.pi) - math.pi
    return (turns.min() - turns.max() + math.pi) / (2 * math.pi)


def polygon_measure(normals):
    """Of a cone in space: Girard's excess over all corners that satisfy all constraints."""
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    excess, corners = 2 * math.pi, 0
    for i, j in itertools.combinations(range(len(normals)), 2):
        corner = np.cross(normals[i], normals[j])
        for side in (corner, -corner):
            products = normals @ side
            products[[i, j]] = 0
            if (products > -1e-12).all():
                excess -= math.acos(np.clip(normals[i] @ normals[j], -1, 1))
                corners += 1
    assert corners >= 3
    return excess / (4 * math.pi)


def cells(inputs):
    """Sign vectors of all cells that the hyperplanes x_n·w = 0 cut space into, one hyperplane after the other."""
    found = [()]
    for n in range(len(inputs)):
        grown = [(*signs, side) for signs in found for side in (1, -1)]
        found = [signs for signs in grown if _has_interior(np.array(signs)[:, None] * inputs[: n + 1])]
    return np.array(found)


def _has_interior(rows):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return any((rows @ point > 1e-12 * np.linalg.norm(point)).all() for point, _ in alternatives(rows))


def shares(inputs, signs, draws, rng):
    """How many of `draws` random points lie in each of the cells, by plain sampling."""
    index = {tuple(row): k for k, row in enumerate(signs)}
    counts = np.zeros(len(signs), dtype=int)
    for _ in range(draws // 50_000):
        sides = np.where(rng.standard_normal((50_000, inputs.shape[1])) @ inputs.T > 0, 1, -1)
        distinct, times = np.unique(sides, axis=0, return_counts=True)
        for row, number in zip(distinct, times, strict=True):
            counts[index[tuple(row)]] += number
    return counts
