"""Directions of weight space that make a line or a plane through a point.

Shapes: P numbers in θ, the parameters of a module in the order of ``named_parameters()``; T points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lightning_mnn.landscape.curvature.lanczos import extreme_eigenvalues
from lightning_mnn.utilities.seeding import generator as seeded
from lightning_mnn.utilities.validation import ArgumentError, positive_integer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from lightning_mnn.landscape.curvature.loss_surface import LossSurface

    Point: TypeAlias = "Tensor | Mapping[str, Tensor]"


def flat_point(module: nn.Module, point: Point | None = None, name: str = "point") -> Tensor:
    """The parameters θ of a point, flat (P,), in the dtype and on the device of the module's first parameter.

    Args:
        module: gives the names, shapes and order of the parameters.
        point: a flat vector, or parameters by name, such as a state dict (other entries are ignored); None: the
            module's own.
        name: of the argument, for the error.

    Raises:
        ArgumentError: the module has no parameters, or the point has other ones.

    >>> flat_point(torch.nn.Linear(2, 1), {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    tensor([1., 2., 3.])
    """
    own = dict(module.named_parameters())
    if not own:
        raise ArgumentError("module", type(module).__name__, "must have parameters", "give a network with weights")
    first = next(iter(own.values()))
    if point is None:
        point = own
    if isinstance(point, Tensor):
        size = sum(parameter.numel() for parameter in own.values())
        if point.shape != (size,):
            raise ArgumentError(name, tuple(point.shape), f"must have the shape ({size},) of all parameters")
        return point.detach().to(first)
    for key, parameter in own.items():
        if key not in point or point[key].shape != parameter.shape:
            found = tuple(point[key].shape) if key in point else "nothing"
            problem = f"must have {key} of shape {tuple(parameter.shape)}"
            raise ArgumentError(name, found, problem, "give a state dict of the same network")
    return torch.cat([point[key].detach().to(first).flatten() for key in own])


def principal_directions(
    module: nn.Module, points: Sequence[Point], center: Point | None = None, *, count: int = 2
) -> Tensor:
    """The main components of a trajectory: the orthonormal directions (count, P) in which points lie furthest off.

    They maximise the sum of squares of the points' distances from the centre along them, so that the plane through the
    centre is the one nearest to all points (H. Li et al., Visualizing the loss landscape of neural nets, 2018, § 7).
    Each points to the side of the first point.

    Args:
        module: the network.
        points: T ≥ count points, such as checkpoints, in the order of training.
        center: the point that the plane goes through; None: the module's own parameters.
        count: 1 or 2.

    Raises:
        ArgumentError: a point has other parameters, or the points lie in fewer directions than ``count``.

    >>> line = torch.nn.Linear(2, 1, bias=False)
    >>> found = principal_directions(line, [torch.tensor([3.0, 4.0])], torch.zeros(2), count=1)
    >>> [round(number, 4) for number in found[0].tolist()]
    [0.6, 0.8]
    """
    positive_integer("count", count)
    origin = flat_point(module, center, "center")
    moves = torch.stack([flat_point(module, point, f"points[{i}]") for i, point in enumerate(points)]) - origin
    left, sizes, right = torch.linalg.svd(moves, full_matrices=False)
    rank = int((sizes > sizes[0] * len(origin) * torch.finfo(sizes.dtype).eps).sum()) if len(sizes) else 0
    if rank < count:
        problem = f"must lie in at least {count} directions from the centre"
        raise ArgumentError("points", f"{len(moves)} in {rank}", problem, "give more points, or a smaller count")
    signs = torch.where(left[0, :count] < 0, -1.0, 1.0).to(right)
    found: Tensor = right[:count] * signs[:, None]
    return found


def random_directions(module: nn.Module, center: Point | None = None, *, count: int = 2, seed: int = 0) -> Tensor:
    """Random directions (count, P), each filter as long as that of the network (filter normalisation).

    A direction d is drawn from a normal distribution; then each filter d_i (a row of a matrix, or the weights of a
    channel) gets the length of the filter w_i of the point. Biases and other vectors, which have no filters, do not
    move (H. Li et al., Visualizing the loss landscape of neural nets, 2018, § 4). So a coordinate of 1 is a move by the
    length of the weights, whatever the rescaling of the units.

    A vector is moved as one filter if the module has nothing but vectors.

    >>> layer = torch.nn.Linear(4, 3)
    >>> (move,) = random_directions(layer, count=1)
    >>> torch.allclose(move[:12].view(3, 4).norm(dim=1), layer.weight.norm(dim=1)), float(move[12:].norm())
    (True, 0.0)
    """
    positive_integer("count", count)
    origin = flat_point(module, center, "center")
    shapes = [parameter.shape for parameter in module.parameters()]
    only_vectors = all(len(shape) < 2 for shape in shapes)
    random = seeded(seed, "slice")
    found = []
    for _ in range(count):
        parts = []
        for shape, weights in zip(shapes, torch.split(origin, [shape.numel() for shape in shapes]), strict=True):
            drawn = torch.randn(shape, generator=random, dtype=torch.float64).to(origin)
            if len(shape) < 2 and not only_vectors:
                parts.append(torch.zeros_like(weights))
                continue
            rows = drawn.flatten(1) if len(shape) > 1 else drawn[None]
            filters = weights.view_as(rows)
            parts.append((rows * (filters.norm(dim=1) / rows.norm(dim=1))[:, None]).flatten())
        found.append(torch.cat(parts))
    return torch.stack(found)


def curvature_directions(surface: LossSurface, *, max_products: int = 128, seed: int = 0) -> Tensor:
    """Orthonormal directions (2, P) of the largest and the smallest eigenvalue of the Hessian, by Lanczos' method.

    Args:
        surface: the loss at the point, over all parameters of the network.
        max_products: largest number of products with the Hessian for each.
        seed: of the random start.

    >>> from lightning_mnn.landscape import LossSurface
    >>> theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    >>> bowl = LossSurface([theta], lambda: [(1.0, lambda: theta[0] ** 2 + 3 * theta[1] ** 2 - theta[2] ** 2)])
    >>> curvature_directions(bowl).abs().round(decimals=6)
    tensor([[0., 1., 0.],
            [0., 0., 1.]], dtype=torch.float64)
    """
    options: dict[str, Any] = {
        "dtype": surface.dtype,
        "device": surface.device,
        "max_products": max_products,
        "seed": seed,
    }
    smallest = extreme_eigenvalues(surface.product, surface.size, **options).vector
    largest = extreme_eigenvalues(lambda vector: -surface.product(vector), surface.size, **options).vector
    smallest = smallest - (smallest @ largest) * largest  # orthogonal up to the errors of Lanczos
    return torch.stack([largest, smallest / smallest.norm()])
