"""Planted points: problems constructed around a point of weight space whose kind is known.

They are the ground truth for tests of minima. Shapes: N samples, d0 inputs, d1 hidden units; A is the matrix of slopes,
G e has the rows g_i = Σ_n e_n A_ni x_n, and f(u) = u where u > 0 and ρ u elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.network import Network

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

_MAX_PROBLEM_DRAWS = 40  # draws of a whole problem before the sizes are reported as unsuitable
_DRAWS_PER_DIRECTION = 64  # directions drawn for each one that is used
_MAX_ROUNDINGS_WITHOUT_REDRAW = 1e3  # unit roundoffs of a planted minimum, relative to the residual


@dataclass(frozen=True)
class Planted:
    """A data set and a two-layer network without biases, ŷ = z · f(W x), at a point of a known kind.

    Attributes:
        inputs: X, float64 (N, d0).
        targets: y, float64 (N,).
        hidden_weights: W, float64 (d1, d0).
        output_weights: z, float64 (d1,).
        negative_slope: ρ.
        kinks: where w_i·x_n = 0 by construction (in floats a few roundings of ‖w_i‖‖x_n‖), bool (N, d1).
        wrong_kink: the sample and the first unit whose multiplier is wrong; None except in a planted non-minimum.
    """

    inputs: Tensor
    targets: Tensor
    hidden_weights: Tensor
    output_weights: Tensor
    negative_slope: float
    kinks: Tensor
    wrong_kink: tuple[int, int] | None = None

    def to(self, device: torch.device | str) -> Planted:
        """The same problem on a device."""
        tensors = ("inputs", "targets", "hidden_weights", "output_weights", "kinks")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    @property
    def network(self) -> Network:
        """The weights as a :class:`Network`."""
        return Network((self.hidden_weights,), self.output_weights, self.negative_slope)

    @property
    def residual(self) -> Tensor:
        """The residual e = y − ŷ, (N,), with exactly zero pre-activations on kinks."""
        preactivations = torch.where(self.kinks, 0.0, self.inputs @ self.hidden_weights.mT)
        outputs = torch.where(preactivations > 0, preactivations, self.negative_slope * preactivations)
        return self.targets - outputs @ self.output_weights

    @property
    def mse(self) -> float:
        """‖e‖²/N."""
        return float(self.residual.square().mean())


def planted_minimum(
    num_samples: int,
    input_dim: int,
    width: int,
    negative_slope: float = 0.0,
    *,
    labels: tuple[float, float] = (0.0, 1.0),
    inputs: Tensor | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
) -> Planted:
    """A sub-optimal differentiable local minimum: rows w + u/t, w, …, w and z = (t, −t, 0, …, 0).

    Here u = argmin ‖y − diag(a) X u‖ and a are the slopes of w, so that G e = 0 and the error is that of the linear
    model on diag(a) X, at any width. t is a power of two, large enough that each pre-activation of the first row is at
    least half of that of w. Predictions lose about log10(t) digits, so of several w the one farthest from its kinks is
    used.

    Args:
        num_samples: N, at least d0 + 2.
        input_dim: d0.
        width: d1, at least 2.
        negative_slope: ρ, any real but 1.
        labels: the two values of random targets, both of which occur.
        inputs: X (N, d0); None: standard normal.
        targets: y (N,); None: random among the labels.
        seed: seed of everything that is drawn.

    Returns:
        The problem, on the device of the given inputs, else on that of the given targets, else on the CPU.

    Raises:
        ValueError: sizes are too small, ρ = 1, inputs or targets have another shape, or every pattern that was tried
            fits the targets.

    >>> planted = planted_minimum(30, 4, 3)
    >>> a = planted.inputs @ planted.hidden_weights[0] > 0  # every unit has this pattern
    >>> bool(((a * planted.residual) @ planted.inputs).abs().max() < 1e-11), planted.mse > 0.01
    (True, True)
    """
    _check_sizes(num_samples, input_dim, width, negative_slope, smallest_width=2)
    given_inputs = _given("inputs", inputs, (num_samples, input_dim))
    given_targets = _given("targets", targets, (num_samples,))
    rng = np.random.default_rng(seed)
    best, smallest_cost = None, tolerances.MAX_PLANTED_ROUNDINGS
    for _ in range(_MAX_PROBLEM_DRAWS):
        x = rng.standard_normal((num_samples, input_dim)) if given_inputs is None else given_inputs
        y = _random_labels(rng, num_samples, labels) if given_targets is None else given_targets
        w = _clear_direction(rng, x)
        features = _slopes(x @ w, negative_slope)[:, None] * x
        if not features.any():  # no unit is active on any sample
            continue
        u = np.linalg.lstsq(features, y)[0]
        residual = y - features @ u
        t = 2.0 ** math.ceil(math.log2(max(2 * _largest_ratio(x @ u, x @ w), 1.0)))
        cost = t * float(np.linalg.norm(x @ w)) / max(float(np.linalg.norm(residual)), 1e-300)
        if cost < smallest_cost:
            best, smallest_cost = (x, y, w, u, t), cost
        if cost <= _MAX_ROUNDINGS_WITHOUT_REDRAW:
            break
    if best is None:
        raise ValueError(
            f"the linear model fits the targets without error at num_samples={num_samples}, input_dim={input_dim}: "
            "give more samples, or targets that are no linear function of the inputs"
        )
    x, y, w, u, t = best
    rows = np.repeat(w[None], width, axis=0)
    rows[0] += u / t
    outputs = np.zeros(width)
    outputs[:2] = t, -t
    given = inputs if inputs is not None else targets
    return _planted((x, y), (rows, outputs), negative_slope).to("cpu" if given is None else given.device)


def planted_kink_minimum(
    num_samples: int,
    input_dim: int,
    width: int,
    negative_slope: float = 0.0,
    *,
    kinks_per_unit: int = 1,
    margin: float = 0.05,
    violated: bool = False,
    seed: int = 0,
) -> Planted:
    """A sub-optimal local minimum on kinks, with real-valued targets.

    For the samples B_i on the kink of unit i, w_i·x_n = 0, there are multipliers c_in with s_i (c_in + ρ e_n) > 0 >
    s_i (c_in + e_n), s_i the sign of z_i, and Σ_{n∉B_i} e_n A_ni x_n = Σ_{n∈B_i} c_in x_n. The multipliers, and e_n on
    the kinks, are drawn at random; elsewhere e is the solution of these equations nearest to standard normal numbers;
    then y = ŷ + e.

    The units form groups that share B_i, pattern, multipliers and s_i. There are at most about N / 3 d0 groups, so that
    such a residual exists at any width; s_i alternates between groups.

    Args:
        num_samples: N, at least d0 + 2.
        input_dim: d0, at least 2.
        width: d1.
        negative_slope: ρ, any real but 1.
        kinks_per_unit: |B_i|, less than d0.
        margin: the multipliers s_i (c_in + ρ e_n) and −s_i (c_in + e_n) are uniform between it and 1.
        violated: give one of the multipliers, of one sample and the units of one group, the wrong sign. The point is
            then not a minimum, although it minimises the loss on the face of points with these kinks.
        seed: seed of everything that is drawn.

    Raises:
        ValueError: sizes are too small, ρ = 1, the margin is outside (0, 1), or several draws gave no such residual.

    >>> planted = planted_kink_minimum(40, 3, 4, kinks_per_unit=2)
    >>> int(planted.kinks.sum()), planted.mse > 0.1
    (8, True)
    """
    _check_sizes(num_samples, input_dim, width, negative_slope, smallest_width=1)
    if not 1 <= kinks_per_unit < input_dim:
        raise ValueError(f"kinks_per_unit must be at least 1 and less than input_dim={input_dim}, got {kinks_per_unit}")
    if not 0 < margin < 1:
        raise ValueError(f"margin must lie between 0 and 1, got {margin}")
    rng = np.random.default_rng(seed)
    max_groups = min(width, num_samples // (3 * input_dim))
    for attempt in range(_MAX_PROBLEM_DRAWS):
        num_groups = max(1, max_groups >> (attempt // 8))  # fewer equations after several failed draws
        x = rng.standard_normal((num_samples, input_dim))
        kinks = rng.permutation(num_samples)[: num_groups * kinks_per_unit].reshape(num_groups, kinks_per_unit)
        directions = np.stack([_clear_direction(rng, x, on_kink) for on_kink in kinks])
        signs = np.where((np.arange(num_groups) + rng.integers(2)) % 2 == 0, 1.0, -1.0)
        multipliers = rng.uniform(margin, 1.0, (2, *kinks.shape))
        wrong = (int(rng.integers(num_groups)), int(rng.integers(kinks_per_unit))) if violated else None
        if wrong is not None:
            multipliers[rng.integers(2)][wrong] *= -1
        slopes = _slopes(x @ directions.T, negative_slope)
        residual = _residual_on_face(rng, x, slopes, kinks, signs[:, None] * multipliers, negative_slope)
        smallest_sine = min(_smallest_sine(x, w, on_kink) for w, on_kink in zip(directions, kinks, strict=True))
        if residual is not None and smallest_sine >= tolerances.MIN_PLANTED_SINE:
            break
    else:
        raise ValueError(
            f"no residual found at num_samples={num_samples}, input_dim={input_dim}, kinks_per_unit={kinks_per_unit}: "
            "give more samples or fewer kinks"
        )
    group = np.arange(width) % num_groups
    rows = np.stack([_neighbour(rng, x, directions[g], kinks[g]) for g in group])
    outputs = signs[group] * rng.uniform(0.5, 1.5, width)
    on_kink = np.zeros((num_samples, width), dtype=bool)
    on_kink[kinks[group].T, np.arange(width)] = True
    preactivations = np.where(on_kink, 0.0, x @ rows.T)
    targets = (_slopes(preactivations, negative_slope) * preactivations) @ outputs + residual
    wrong_kink = None if wrong is None else (int(kinks[wrong]), wrong[0])
    return _planted((x, targets), (rows, outputs), negative_slope, on_kink, wrong_kink)


def planted_saddle(
    num_samples: int, input_dim: int, width: int, negative_slope: float = 0.0, *, seed: int = 0
) -> Planted:
    """A strict saddle off the kinks where the gradient vanishes: z_i = 0, w_i·g_i = 0 and g_i ≠ 0 for the third unit.

    It is a planted minimum with labels ±1, in which w_3 is rotated until Σ_n e_n f(w_3·x_n) = 0 in another pattern. A
    move of w_3 by s g_3 and of z_3 by c s lowers the MSE by (2/N) c s² ‖g_3‖² + O(c² s²).

    Args:
        num_samples: N, at least d0 + 2.
        input_dim: d0, at least 2.
        width: d1, at least 3.
        negative_slope: ρ, any real but 1.
        seed: seed of everything that is drawn.

    Raises:
        ValueError: sizes are too small, ρ = 1, or several draws gave no saddle.

    >>> planted = planted_saddle(30, 4, 3)
    >>> active = (planted.inputs @ planted.hidden_weights[2] > 0).double()
    >>> force = (active * planted.residual) @ planted.inputs  # g_3
    >>> bool(force.norm() > 0.1), bool((planted.hidden_weights[2] @ force).abs() < 1e-11)
    (True, True)
    """
    _check_sizes(num_samples, input_dim, width, negative_slope, smallest_width=3)
    if input_dim < 2:
        raise ValueError(f"input_dim must be at least 2, got {input_dim}: a row of one number cannot be rotated")
    for start in np.random.SeedSequence(seed).generate_state(_MAX_PROBLEM_DRAWS):
        planted = planted_minimum(num_samples, input_dim, width, negative_slope, labels=(-1.0, 1.0), seed=int(start))
        x, residual = planted.inputs.numpy(), planted.residual.numpy()
        row = _turned_row(np.random.default_rng(start), x, residual, negative_slope)
        if row is not None:
            rows = planted.hidden_weights.numpy().copy()
            rows[2] = row
            return replace(planted, hidden_weights=torch.from_numpy(rows))
    raise ValueError(f"no saddle found at num_samples={num_samples}, input_dim={input_dim}: give more samples")


def _check_sizes(num_samples: int, input_dim: int, width: int, negative_slope: float, *, smallest_width: int) -> None:
    if input_dim < 1 or num_samples < input_dim + 2:
        raise ValueError(
            f"num_samples must be at least input_dim + 2 so that an error remains, and input_dim at least 1: "
            f"got num_samples={num_samples}, input_dim={input_dim}"
        )
    if width < smallest_width:
        raise ValueError(f"width must be at least {smallest_width}, got {width}")
    if not math.isfinite(negative_slope) or negative_slope == 1:
        raise ValueError(f"negative_slope must be a real number other than 1, got {negative_slope}")


def _given(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Array | None:
    if tensor is None:
        return None
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape} of the given sizes, got {tuple(tensor.shape)}")
    array: Array = tensor.detach().cpu().double().numpy()
    return array


def _random_labels(rng: np.random.Generator, count: int, labels: tuple[float, float]) -> Array:
    chosen = rng.integers(0, 2, count)
    if chosen.min() == chosen.max():
        chosen[0] = 1 - chosen[0]
    return np.asarray(labels, dtype=np.float64)[chosen]


def _slopes(preactivations: Array, negative_slope: float) -> Array:
    return np.where(preactivations > 0, 1.0, negative_slope)


def _clear_direction(rng: np.random.Generator, inputs: Array, on_kink: NDArray[np.int64] | None = None) -> Array:
    """A random unit vector w with w·x_n = 0 on the given kinks: of several draws, the farthest from all other kinks."""
    drawn = rng.standard_normal((_DRAWS_PER_DIRECTION, inputs.shape[1]))
    if on_kink is not None:
        drawn = _orthogonal(drawn, inputs[on_kink])
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    chosen: Array = drawn[np.argmax(_smallest_sine(inputs, drawn.T, on_kink))]
    return chosen


def _smallest_sine(inputs: Array, directions: Array, on_kink: NDArray[np.int64] | None = None) -> Array:
    """The smallest |w·x_n|/‖x_n‖ off the given kinks, for each column w of the directions; 1 without samples."""
    norms = np.linalg.norm(inputs, axis=1)
    off = norms > 0
    if on_kink is not None:
        off[on_kink] = False
    products = np.abs((inputs[off] / norms[off, None]) @ directions)
    return np.asarray(products.min(axis=0, initial=1.0))


def _orthogonal(vectors: Array, normals: Array) -> Array:
    """Rows without their components along the normals.

    Two passes, so that only the rounding error of the result itself remains.
    """
    basis = np.linalg.qr(normals.T)[0]
    for _ in range(2):
        vectors = np.asarray(vectors - (vectors @ basis) @ basis.T)
    return vectors


def _largest_ratio(numerators: Array, denominators: Array) -> float:
    """The largest |a_n / b_n|, where 0/0 (a sample at the origin) counts as 0."""
    safe = np.where(denominators == 0, 1.0, denominators)
    return float(np.abs(numerators / safe).max())


def _neighbour(rng: np.random.Generator, inputs: Array, direction: Array, on_kink: NDArray[np.int64]) -> Array:
    """A random row with the kinks and the pattern of a direction; other products keep at least half of their size."""
    step = _orthogonal(rng.standard_normal((1, len(direction))), inputs[on_kink])[0]
    off = np.ones(len(inputs), dtype=bool)
    off[on_kink] = False
    reach = 0.5 / _largest_ratio(inputs[off] @ step, inputs[off] @ direction)
    row = rng.uniform(0.5, 1.5) * (direction + rng.uniform(0, reach) * step)
    found: Array = _orthogonal(row[None], inputs[on_kink])[0]
    return found


def _residual_on_face(
    rng: np.random.Generator,
    inputs: Array,
    slopes: Array,
    kinks: NDArray[np.int64],
    multipliers: Array,
    negative_slope: float,
) -> Array | None:
    """A residual e with given multipliers on the kinks; None if e would be large.

    Args:
        rng: random generator for the residual off the kinks, before it is corrected.
        inputs: X, (N, d0).
        slopes: A of each group, (N, groups).
        kinks: samples on the kink of each group, (groups, k), no sample twice.
        multipliers: c_in + ρ e_n and −(c_in + e_n), (2, groups, k).
        negative_slope: ρ.
    """
    (num_samples, dim), num_groups = inputs.shape, len(kinks)
    residual: Array = rng.standard_normal((num_samples,))
    residual[kinks] = -multipliers.sum(0) / (1 - negative_slope)
    free = np.ones(num_samples, dtype=bool)
    free[kinks] = False
    sums = np.empty((num_groups, dim, num_samples))  # e ↦ Σ_{n∉B_i} e_n A_ni x_n
    wanted = np.empty((num_groups, dim))
    for i, on_kink in enumerate(kinks):
        sums[i] = (slopes[:, i, None] * inputs).T
        sums[i][:, on_kink] = 0.0
        wanted[i] = (-multipliers[1, i] - residual[on_kink]) @ inputs[on_kink]
    equations = sums.reshape(-1, num_samples)
    for _ in range(2):  # the second pass removes the rounding error of the first
        missing = wanted.reshape(-1) - equations @ residual
        residual[free] += np.linalg.lstsq(equations[:, free], missing)[0]
    missing = wanted.reshape(-1) - equations @ residual
    size = np.linalg.norm(equations) * np.linalg.norm(residual)
    exact = np.linalg.norm(missing) <= tolerances.MAX_PLANTED_EQUATION_ERROR * size
    moderate = np.linalg.norm(residual[free]) <= tolerances.MAX_PLANTED_RESIDUAL * math.sqrt(num_samples)
    return residual if exact and moderate else None


def _turned_row(rng: np.random.Generator, inputs: Array, residual: Array, negative_slope: float) -> Array | None:
    """A unit vector w off the kinks with h(w) = Σ_n e_n f(w·x_n) = 0 and gradient g ≠ 0; None if none was found.

    Bisection between directions with h < 0 and h > 0 finds the pattern; inside it h = w·g is linear.
    """

    def gradient(rows: Array) -> Array:
        return np.asarray((_slopes(rows @ inputs.T, negative_slope) * residual) @ inputs)

    def height(rows: Array) -> Array:
        return np.asarray((rows * gradient(rows)).sum(axis=1))

    drawn = rng.standard_normal((2 * _DRAWS_PER_DIRECTION, inputs.shape[1]))
    heights = height(drawn)
    below, above = drawn[heights < 0], drawn[heights > 0]
    count = min(len(below), len(above))
    if count == 0:
        return None
    below, above = below[:count], above[:count]
    for _ in range(60):
        middle = (below + above) / 2
        high = height(middle)[:, None] > 0
        below, above = np.where(high, below, middle), np.where(high, middle, above)
    rows = above
    for _ in range(3):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        force = gradient(rows)
        squared = np.maximum((force**2).sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        rows = rows - force * ((rows * force).sum(axis=1, keepdims=True) / squared)
    scale = float(np.linalg.norm(residual[:, None] * inputs))
    force = gradient(rows)
    fits = (np.linalg.norm(force, axis=1) >= tolerances.MIN_PLANTED_FORCE_RATIO * scale) & (
        np.abs(height(rows)) <= tolerances.MAX_PLANTED_SLOPE_RATIO * scale
    )
    sines = np.where(fits, _smallest_sine(inputs, rows.T), 0.0)
    chosen = int(sines.argmax())
    return rows[chosen] if sines[chosen] >= tolerances.MIN_PLANTED_SINE else None


def _planted(
    data: tuple[Array, Array],
    weights: tuple[Array, Array],
    negative_slope: float,
    kinks: NDArray[np.bool_] | None = None,
    wrong_kink: tuple[int, int] | None = None,
) -> Planted:
    (inputs, targets), (hidden, output) = (tuple(torch.tensor(array) for array in pair) for pair in (data, weights))
    on_kink = np.zeros((len(inputs), len(hidden)), dtype=bool) if kinks is None else kinks
    return Planted(inputs, targets, hidden, output, negative_slope, torch.tensor(on_kink), wrong_kink)
