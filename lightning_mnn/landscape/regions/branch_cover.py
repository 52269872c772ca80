"""Do the closed branches of a search over signs cover all signs?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]


def covered(assigned: NDArray[np.int_], signs: NDArray[np.int_], strict: Bools, support: Bools) -> int:
    """Whether closed branches cover all signs that agree with the assigned ones.

    A strict branch also covers zeros in place of its signs. Other branches do so only if a row of their support is not
    zero.

    Args:
        assigned: the sign of each row, 1, −1 or 0; 2 where it is not decided, (d1,).
        signs: those of each branch, (B, d1).
        strict: whether a branch is strict, (B,).
        support: the rows of its support, (B, d1).

    Returns:
        2 if strict branches alone cover all, 1 if all branches together do, 0 if not.
    """
    known, free = np.abs(assigned) <= 1, np.abs(signs) > 1
    fits = free | (assigned == signs) | ((assigned == 0) & (signs != 0))
    nonzero = support & (assigned != 0)
    possible = (fits | ~known).all(1) & (strict | nonzero.any(1))
    certain = (fits & (known | free)).all(1) & (strict | (nonzero & known).any(1))
    if certain.any():
        return 2 if (certain & strict).any() else 1
    counts = (~free & ~known)[possible].sum(0)
    row = int(counts.argmax())
    if not counts[row]:
        return 0

    def child(sign: int) -> int:
        chosen = np.where(np.arange(len(assigned)) == row, sign, assigned)
        return covered(chosen, signs[possible], strict[possible], support[possible])

    plus = child(1)
    minus = child(-1) if plus else 0
    zero = 2 if max(plus, minus) == 2 else child(0) if minus else 0  # a strict cover of a sign covers zero
    return min(plus, minus, zero)
