"""Growth off dependent kinks, cell by cell.

For every λ with a + Zᵀλ = 0 the objective changes to first order by Σ_k (b + Lᵀλ)_k |ζ_k| − λ_k ζ_k, where ζ are the
changes of the kinks' z. So it grows strictly off the kinks if, for each choice of signs of some ζ_k, there is a λ with
(b + Lᵀλ)_k > λ_k on the side of that sign, and > |λ_k| of the other kinks. With independent kinks λ is unique and all
choices give the same. Of dependent ones λ is free by as many numbers as kinks are implied, and a linear program finds
that of the largest growth in each cell. Kinks whose λ is free have their signs chosen: the test is then exact.

Second derivatives on the face are the same for all these λ, since implied kinks are zero on it.

Shapes: P free parameters, κ active kinks, q implied kinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linprog

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.models.equations.lipschitz import bounds_on_ball

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.minima.models.equations.stationarity import Ball, System

_MAX_CELLS = 512  # linear programs


@dataclass(frozen=True)
class CellGrowth:
    """The growth off dependent kinks.

    Attributes:
        smallest: the smallest growth of all cells, at the point.
        uncertainty: a bound on its error, and on its difference from that of the exact point.
        move: a direction in which the objective falls to first order, where the growth of a cell is negative.
    """

    smallest: float
    uncertainty: float
    move: Tensor | None


def growth_in_cells(system: System, ball: Ball) -> CellGrowth | None:
    """The growth off dependent kinks; None where there are too many cells."""
    first, implied = system.first, system.implied
    rows, others = first.jacobian[~implied], first.jacobian[implied]
    inverse = torch.linalg.pinv(rows)
    combination = others @ inverse  # Z_J = C Z_I
    null = torch.zeros(len(implied), len(others), dtype=torch.float64)  # λ + null μ are as good as λ
    null[implied] = torch.eye(len(others), dtype=torch.float64)
    null[~implied] = -combination.T
    cells = _Cells(system, null)
    smallest, largest, move = np.inf, system.multipliers.abs(), None
    left, count = [torch.zeros(len(implied), dtype=torch.float64)], 0
    while left:
        sides, count = left.pop(), count + 1
        if count > _MAX_CELLS:
            return None
        growth, multipliers, kink, change = cells.best(sides)
        if not growth > 0 and kink is not None:
            left += [sides.index_fill(0, torch.tensor([kink]), side) for side in (1.0, -1.0)]
            continue
        largest = torch.maximum(largest, multipliers.abs())
        smallest = min(smallest, growth)
        if not growth > 0:
            move = torch.linalg.pinv(first.jacobian) @ (change - first.coupling @ change.abs())
            break
    return CellGrowth(smallest, _uncertainty(system, ball, inverse, combination, largest), move)


def _uncertainty(system: System, ball: Ball, inverse: Tensor, combination: Tensor, largest: Tensor) -> float:
    """A bound on the error of growths with multipliers up to a size.

    At the exact point C differs by at most (‖Z_J − C Z_I‖ + the errors of both) ‖Z_I⁺‖, and with it the multipliers of
    kinks that are not implied.
    """
    face, absolute, implied = system.face, system.absolute, system.implied
    jacobian, count = system.first.jacobian, float((~implied).sum())
    change = ball.radius * float(ball.bounds.switching[1].norm())
    change += face.model.rounding * float(absolute.jacobian.norm())
    left = float((jacobian[implied] - combination @ jacobian[~implied]).norm())
    size, norm = float(combination.norm()), count**0.5 * float(torch.linalg.matrix_norm(inverse, 2))
    if not norm * change < 0.5:
        return np.inf
    of_combination = (left + change * (1 + size)) * 2 * norm
    moved = ball.radius + of_combination * float((largest + system.multipliers.abs()).norm())
    bounds = bounds_on_ball(face, system.theta, largest, moved)
    rounding = 2 * face.model.rounding * (absolute.normal + absolute.coupling.T @ largest + largest)
    return float((rounding + moved * bounds.growth_change).max())


class _Cells:
    """The linear program of a cell: the λ + null μ whose smallest growth t on the chosen sides is largest."""

    def __init__(self, system: System, null: Tensor) -> None:
        self.system, self.null = system, null
        self.scale = max(float(system.first.normal.abs().max()), 1e-300)

    def best(self, sides: Tensor) -> tuple[float, Tensor, int | None, Tensor]:
        """The growth, λ, a kink with weights on both sides, and the change of z of the dual.

        Where t is negative and there is no such kink, the objective falls along that change.

        Args:
            sides: the sign of ζ of each kink, 0 for both.
        """
        first, own = self.system.first, self.system.multipliers
        base = first.normal + first.coupling.T @ own
        coupled = first.coupling.T @ self.null
        kinks = torch.arange(len(own))
        place = torch.cat([kinks[sides != side] for side in (-1.0, 1.0)])
        sign = torch.cat([torch.full((int((sides != -side).sum()),), side) for side in (1.0, -1.0)]).double()
        matrix = sign[:, None] * self.null[place] - coupled[place]  # t ≤ b + Lᵀλ − sign λ
        bound = base[place] - sign * own[place]
        found = linprog(
            c=np.r_[np.zeros(matrix.shape[1]), -1.0],
            A_ub=np.c_[matrix.numpy(), np.ones(len(place))],
            b_ub=bound.numpy() / self.scale,
            bounds=[(None, None)] * matrix.shape[1] + [(None, 1.0)],
            method="highs",
            options={"primal_feasibility_tolerance": tolerances.MAX_INFEASIBILITY},
        )
        if found.x is None:
            return -np.inf, own, None, torch.zeros_like(own)
        move = self.scale * torch.from_numpy(found.x[:-1])
        weights = -torch.from_numpy(found.ineqlin.marginals)
        zero = torch.zeros_like(own)
        ahead, behind = (zero.index_add(0, place, weights.clamp(min=0) * (sign == side)) for side in (1.0, -1.0))
        both = torch.minimum(ahead, behind)
        kink = int(both.argmax()) if float(both.max()) > tolerances.LINEAR_PROGRAM_ERROR_RATIO else None
        multipliers = own + self.null @ move
        growth = first.normal + first.coupling.T @ multipliers
        smallest = float((growth[place] - sign * multipliers[place]).min())
        return smallest, multipliers, kink, ahead - behind
