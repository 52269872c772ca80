"""The theorems of Soudry & Hoffer (2017), arXiv 1702.05777, as functions of a run's sizes, and Cover's count of cells.

The theorems are statements to leading order in the number of samples N, for Gaussian inputs of dimension d0 and a
two-layer network of width d1. Volumes are natural logarithms of V(R) = P(W ∈ R), the entries of W i.i.d. N(0, 1).
Arguments broadcast as in numpy; results are float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_RATE_OF_THEOREM_6 = 0.23  # the constant of Theorem 6


def decay_rate(
    num_samples: ArrayLike,
    input_dim: ArrayLike,
    width: ArrayLike,
    epsilon: ArrayLike = 0.1,
    negative_slope: float = 0.0,
) -> NDArray[np.float64]:
    """γ_ε of Theorem 6: 0.23 · max(d0/N, ε)^(3/4), and for the ReLU 0.23 · ε^(3/4).

    The theorem uses the limit of d0/N; here it is the d0/N of the run. The result does not depend on the width.

    Args:
        num_samples: N.
        input_dim: d0.
        width: d1.
        epsilon: smallest classification error (a fraction) of the counted minima.
        negative_slope: ρ.

    Raises:
        ValueError: a size is below 1, ε is outside [0, 1], or ρ = 1.

    >>> round(float(decay_rate(320, 40, 40, epsilon=0.1)), 5)
    0.0409
    """
    num_samples, input_dim, _ = _sizes(num_samples, input_dim, width)
    epsilon = np.asarray(epsilon, dtype=np.float64)
    if not np.all((epsilon >= 0) & (epsilon <= 1)):
        raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
    if negative_slope == 1:
        raise ValueError("negative_slope must not be 1: the network would be linear")
    base = epsilon if negative_slope == 0 else np.maximum(input_dim / num_samples, epsilon)
    return np.asarray(_RATE_OF_THEOREM_6 * base**0.75)


def suboptimal_log_volume(
    num_samples: ArrayLike,
    input_dim: ArrayLike,
    width: ArrayLike,
    epsilon: ArrayLike = 0.1,
    negative_slope: float = 0.0,
) -> NDArray[np.float64]:
    """Theorem 6: upper bound −γ_ε N^(3/4) (d1 d0)^(1/4) on log E V(L_ε).

    L_ε is the union of the regions that contain a differentiable local minimum with classification error above ε.

    >>> round(float(suboptimal_log_volume(320, 40, 40)), 3)
    -19.571
    """
    rate = decay_rate(num_samples, input_dim, width, epsilon, negative_slope)
    num_samples, input_dim, width = _sizes(num_samples, input_dim, width)
    return np.asarray(-rate * num_samples**0.75 * (width * input_dim) ** 0.25)


def sufficient_width(num_samples: ArrayLike, input_dim: ArrayLike) -> NDArray[np.int64]:
    """Theorem 8: the width 4⌈N/(2 d0 − 2)⌉ is enough for a zero-error point off every kink, for almost every X.

    Raises:
        ValueError: ``input_dim`` < 2.

    >>> int(sufficient_width(320, 40))
    20
    """
    num_samples, input_dim, _ = _sizes(num_samples, input_dim, 1)
    if np.any(input_dim < 2):
        raise ValueError(f"input_dim must be at least 2, got {input_dim}")
    return np.asarray(4 * np.ceil(num_samples / (2 * input_dim - 2)), dtype=np.int64)


def global_log_volume(
    num_samples: ArrayLike, input_dim: ArrayLike, width: ArrayLike, teacher_width: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Theorem 9: lower bound −d1* d0 log N on log V(G), with d1* = 2N/d0 or the width of a teacher that made y.

    G is the union of the regions that contain a global minimum with zero error. The bound is valid with probability
    1 − :func:`global_failure_probability`. It depends on the width d1 only by the condition d1 ≥ d1*.

    >>> round(float(global_log_volume(320, 40, 40)), 3)
    -3691.725
    """
    num_samples, input_dim, _ = _sizes(num_samples, input_dim, width)
    needed = 2 * num_samples / input_dim if teacher_width is None else _sizes(1, 1, teacher_width)[2]
    return np.asarray(-needed * input_dim * np.log(num_samples))


def global_failure_probability(num_samples: ArrayLike, input_dim: ArrayLike) -> NDArray[np.float64]:
    """δ of Theorem 9: √(8/π) d0^(−1/2) + 2 d0^(1/2) √(log d0) / N (above 1 it gives no information).

    >>> round(float(global_failure_probability(320, 40)), 4)
    0.3282
    """
    num_samples, input_dim, _ = _sizes(num_samples, input_dim, 1)
    first = math.sqrt(8 / math.pi) / np.sqrt(input_dim)
    return np.asarray(first + 2 * np.sqrt(input_dim) * np.sqrt(np.log(input_dim)) / num_samples)


def log_volume_ratio(
    num_samples: ArrayLike,
    input_dim: ArrayLike,
    width: ArrayLike,
    epsilon: ArrayLike = 0.1,
    negative_slope: float = 0.0,
) -> NDArray[np.float64]:
    """Theorem 10: upper bound −γ_ε N^(3/4) (d1 d0)^(1/4) on log(V(L_ε) / V(G)).

    To leading order V(G) does not change the bound: with the width that Theorem 10 assumes, d1 ≻ N log⁴N / d0, the
    exponent of Theorem 6 dominates that of Theorem 9, so the bound is that of Theorem 6.

    >>> float(log_volume_ratio(320, 40, 40)) == float(suboptimal_log_volume(320, 40, 40))
    True
    """
    return suboptimal_log_volume(num_samples, input_dim, width, epsilon, negative_slope)


def log_num_cells(num_samples: ArrayLike, input_dim: ArrayLike) -> NDArray[np.float64]:
    """Log of the number of cells into which N samples divide the space of one unit's weights: 2 Σ_{k<d0} C(N−1, k).

    Each sample x_n is a hyperplane w·x_n = 0. The count (T. M. Cover 1965, "Geometrical and statistical properties of
    systems of linear inequalities") is for samples in general position: any d0 of them are linearly independent.
    Samples x_n = 0 and multiples of others are not in general position, and give fewer cells. The average Gaussian
    measure of a cell is the inverse of the count.

    Args:
        num_samples: N.
        input_dim: d0; one more with a hidden bias.

    >>> np.exp(log_num_cells([8, 12, 20], [3, 4, 4])).round(6).tolist()
    [58.0, 464.0, 2320.0]
    """
    num_samples, input_dim, _ = _sizes(num_samples, input_dim, 1)
    others = num_samples[..., None] - 1
    k = np.arange(input_dim.max())
    counted = (k < input_dim[..., None]) & (k <= others)
    chosen = np.where(counted, k, 0)
    logs = special.gammaln(others + 1) - special.gammaln(chosen + 1) - special.gammaln(others - chosen + 1)
    return np.asarray(math.log(2) + special.logsumexp(np.where(counted, logs, -np.inf), axis=-1))


def _sizes(
    num_samples: ArrayLike, input_dim: ArrayLike, width: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    sizes = {"num_samples": num_samples, "input_dim": input_dim, "width": width}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in sizes.items()}
    for name, value in arrays.items():
        if not np.all(value >= 1):  # a comparison that NaN fails
            raise ValueError(f"{name} must be at least 1, got {value}")
    return arrays["num_samples"], arrays["input_dim"], arrays["width"]
