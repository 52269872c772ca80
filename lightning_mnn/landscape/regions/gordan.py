"""Gordan's alternative: either some w has rows·w > 0, or some λ ≥ 0, λ ≠ 0, has λᵀ rows = 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linprog, nnls

from lightning_mnn.landscape import tolerances

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def alternatives(rows: Array) -> Iterator[tuple[Array, Array]]:
    """Candidates (w, λ): either rows·w > 0, or λᵀ rows = 0 with λ ≥ 0, λ ≠ 0. The caller checks which one is true.

    The first candidate minimises ‖λᵀ rows‖² + (Σ λ − 1)² over λ ≥ 0. If its w = λᵀ rows is not zero, it is the point
    with the largest margin (rows·w)/‖w‖. It costs a tenth of the time of a linear program. The linear program gives the
    second candidate, for the case that the first fails the caller's check.

    Args:
        rows: (N, d).

    >>> point, multipliers = next(alternatives(np.eye(2)))
    >>> bool((point > 0).all())
    True
    """
    system = np.vstack([rows.T, np.ones(len(rows))])
    try:
        multipliers = nnls(system, np.eye(len(system))[-1])[0]
    except RuntimeError:  # no convergence
        multipliers = np.zeros(len(rows))
    yield multipliers @ rows, multipliers
    result = linprog(  # maximise t with rows·w ≥ t, in the box |w_j| ≤ 1
        -np.eye(rows.shape[1] + 1)[-1],
        A_ub=np.column_stack([-rows, np.ones(len(rows))]),
        b_ub=np.zeros(len(rows)),
        bounds=[(-1, 1)] * (rows.shape[1] + 1),
        options={
            "primal_feasibility_tolerance": tolerances.MAX_INFEASIBILITY,
            "dual_feasibility_tolerance": tolerances.MAX_INFEASIBILITY,
        },
    )
    if result.success:
        yield np.asarray(result.x)[:-1], np.maximum(-result.ineqlin.marginals, 0)
