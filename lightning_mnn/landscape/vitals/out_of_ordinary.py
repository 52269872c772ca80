"""Which vital signs are out of the ordinary, by the tolerances of this package."""

from __future__ import annotations

import math
from bisect import insort
from typing import TYPE_CHECKING

from lightning_mnn.findings import Finding, FindingCode
from lightning_mnn.landscape import tolerances

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MIN_MEDIAN = 4  # measurements from which a median says what is usual


def pattern_findings(
    dead: Mapping[str, float],
    dormant: Mapping[str, float],
    ranks: Mapping[str, tuple[float, int]],
    complexity: float | None,
    radius: float,
) -> list[Finding]:
    """What is out of the ordinary in the units of the layers.

    Args:
        dead: share of dead channels by layer.
        dormant: share of dormant units by layer; those that are dead are counted, too.
        ranks: effective rank by layer, and the largest that is possible.
        complexity: local complexity of the network; None: it was not measured.
        radius: relative radius of the latter.

    >>> [str(f.code) for f in pattern_findings({"1": 0.4, "2": 0.0}, {}, {"2": (1.2, 64)}, 0.0, 0.05)]
    ['dead_units', 'few_directions', 'linear_around_data']
    """
    found = []
    for layer, share in dead.items():
        if share > tolerances.MAX_ORDINARY_DEAD_SHARE:
            found.append(Finding(FindingCode.DEAD_UNITS, layer, share))
    for layer, share in dormant.items():
        alive = share - dead.get(layer, 0.0)
        if alive > tolerances.MAX_ORDINARY_DORMANT_SHARE:
            found.append(Finding(FindingCode.DORMANT_UNITS, layer, alive))
    for layer, (rank, largest) in ranks.items():
        if rank < tolerances.MIN_ORDINARY_RANK < largest / 2:
            found.append(Finding(FindingCode.FEW_DIRECTIONS, layer, rank))
    if complexity == 0:
        found.append(Finding(FindingCode.LINEAR_AROUND_DATA, None, radius))
    return found


def gradient_findings(relative_norms: Mapping[str, float], norms: Sequence[float]) -> list[Finding]:
    """What is out of the ordinary in the gradients.

    Args:
        relative_norms: ‖g‖/‖θ‖ by layer, at the last measurement; layers without a number for it may be NaN.
        norms: norm of all gradients together at each measurement, in their order.

    >>> gradient_findings({"1": 0.0, "2": 1e-2}, [1.0] * 5)
    [Finding(code=<FindingCode.VANISHING_GRADIENT: 'vanishing_gradient'>, layer='1', value=0.0)]
    """
    found = []
    known = {layer: norm for layer, norm in relative_norms.items() if math.isfinite(norm)}
    largest = max(known.values(), default=0.0)
    for layer, norm in known.items():
        if norm < tolerances.MIN_GRADIENT_BALANCE * largest:
            found.append(Finding(FindingCode.VANISHING_GRADIENT, layer, norm / largest))
    finite = [norm for norm in norms if math.isfinite(norm)]
    if len(finite) < len(norms):
        found.append(Finding(FindingCode.NON_FINITE_GRADIENT, None, 1 - len(finite) / len(norms)))
    growth = _growth(finite)
    if growth > tolerances.MAX_GRADIENT_GROWTH:
        found.append(Finding(FindingCode.EXPLODING_GRADIENT, None, growth))
    return found


def _growth(norms: Sequence[float]) -> float:
    """The largest ratio of a number to the median of those before it; 0 if there are too few."""
    before: list[float] = []
    growth = 0.0
    for norm in norms:
        usual = before[len(before) // 2] if len(before) >= _MIN_MEDIAN else 0.0
        growth = max(growth, norm / usual if usual > 0 else 0.0)
        insort(before, norm)
    return growth
