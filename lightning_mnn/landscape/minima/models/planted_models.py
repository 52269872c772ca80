"""Planted points of multilayer networks: training sets constructed around parameters, so that their kind is known.

The parameters, the active kinks, their multipliers λ and their growth are chosen. The derivatives g of the loss in the
outputs follow from the equations of stationarity, which are linear: (1/N) Jᵀg + Zᵀλ + wd θ = 0 and (1/N) J_sᵀg + Lᵀλ =
|λ| + growth; the targets follow from g. The Hessian on the face decides between a minimum and a saddle.

Shapes: N samples, K outputs, P parameters, κ kinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from lightning_mnn.landscape.minima.models.equations.face import Model, derivatives
from lightning_mnn.landscape.minima.models.equations.layers import Loss, LossName, read_layers
from lightning_mnn.landscape.minima.models.equations.reading import read_face
from lightning_mnn.landscape.minima.models.equations.stationarity import linearise
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

_DRAWS = 60  # draws of a problem before the sizes are reported as unsuitable
_ROW_DRAWS = 32  # draws of a row, of which that farthest from other kinks is used
_MIN_SINE = 1e-4  # |z|/(‖w‖‖h‖) of a pre-activation off its kink
_MAX_SHARE_OFF_HALF = 0.3  # of samples on which a unit is active
_BALANCING_ROUNDS = 2000
_MULTIPLIER_SIZES = (1.0, 0.1, 0.01)  # factors of them that are tried
_MINIMUM_NOISE = (0.3, 0.03)  # sizes of the arbitrary part of g: small for a definite Hessian
_SADDLE_NOISE = (1.0, 3.0, 10.0)
_MULTIPLIER_SIZE = 0.3  # largest |λ| and growth, times N: then g, of which they are means, is of this size
_MIN_EIGENVALUE_RATIO = 1e-6  # tangential eigenvalue, relative to the largest, of a clear minimum
_MAX_EQUATION_ERROR = 1e-11  # error of the equations relative to their size


@dataclass(frozen=True)
class PlantedModel:
    """A network, a training set and an objective, at a point of a known kind.

    Attributes:
        module: an ``nn.Sequential`` of linear layers and LeakyReLU (ReLU for a slope of 0), float64.
        inputs: X, (N, d0).
        targets: y, (N, K).
        loss: name of the loss.
        weight_decay: wd.
        kinks: (hidden layer, sample, unit) of each active kink, where the pre-activation is zero up to rounding.
        multipliers: λ, (κ,).
        growth: b + Lᵀλ − |λ| of each, (κ,).
        tangential_eigenvalue: the smallest off the symmetries.
        wrong_kink: place in ``kinks`` of the one whose growth is negative; None if there is none.
    """

    module: nn.Sequential
    inputs: Tensor
    targets: Tensor
    loss: LossName
    weight_decay: float
    kinks: tuple[tuple[int, int, int], ...]
    multipliers: Tensor
    growth: Tensor
    tangential_eigenvalue: float
    wrong_kink: int | None = None


def planted_model_minimum(
    num_samples: int,
    widths: Sequence[int],
    negative_slope: float = 0.0,
    *,
    loss: LossName = "squared_error",
    weight_decay: float = 0.0,
    bias: bool = True,
    seed: int = 0,
) -> PlantedModel:
    """A differentiable local minimum of a network, with an error.

    Args:
        num_samples: N; N·K must exceed the number of parameters.
        widths: d0, d1, …, K.
        negative_slope: ρ, any real but 1.
        loss: ``squared_error``, ``cross_entropy`` (targets are probabilities) or ``logistic``.
        weight_decay: wd of ½ wd ‖θ‖².
        bias: whether layers have biases.
        seed: seed of everything that is drawn.

    Raises:
        ArgumentError: sizes are unsuitable, or several draws gave no such point.

    >>> planted = planted_model_minimum(60, (3, 4, 2), weight_decay=1e-2)
    >>> len(planted.kinks), planted.tangential_eigenvalue > 0
    (0, True)
    """
    return _planted(num_samples, widths, negative_slope, 0, loss, weight_decay, seed, bias=bias)


def planted_model_kink_minimum(
    num_samples: int,
    widths: Sequence[int],
    negative_slope: float = 0.0,
    *,
    kinks: int = 3,
    loss: LossName = "squared_error",
    weight_decay: float = 0.0,
    bias: bool = True,
    violated: bool = False,
    seed: int = 0,
) -> PlantedModel:
    """A local minimum of a network on kinks of all its hidden layers.

    Args:
        num_samples: N; N·K must exceed the number of parameters and kinks.
        widths: d0, d1, …, K.
        negative_slope: ρ, any real but 1.
        kinks: κ.
        loss: ``squared_error``, ``cross_entropy`` (targets are probabilities) or ``logistic``.
        weight_decay: wd of ½ wd ‖θ‖².
        bias: whether layers have biases.
        violated: give one kink a negative growth: the point is then a minimum on the face, and not a local minimum.
        seed: seed of everything that is drawn.

    Raises:
        ArgumentError: sizes are unsuitable, or several draws gave no such point.

    >>> planted = planted_model_kink_minimum(60, (3, 4, 3, 1), kinks=3)
    >>> len(planted.kinks), bool((planted.growth > 0).all())
    (3, True)
    """
    if kinks < 1:
        raise ArgumentError("kinks", kinks, "must be at least 1")
    return _planted(num_samples, widths, negative_slope, kinks, loss, weight_decay, seed, bias=bias, violated=violated)


def planted_model_saddle(
    num_samples: int,
    widths: Sequence[int],
    negative_slope: float = 0.0,
    *,
    kinks: int = 0,
    weight_decay: float = 0.0,
    bias: bool = True,
    seed: int = 0,
) -> PlantedModel:
    """A stationary point of the squared error with a negative tangential eigenvalue and none of 0, also on kinks.

    Args:
        num_samples: N; N·K must exceed the number of parameters and kinks.
        widths: d0, d1, …, K; two hidden layers, or one with several units.
        negative_slope: ρ, any real but 1.
        kinks: κ.
        weight_decay: wd of ½ wd ‖θ‖².
        bias: whether layers have biases.
        seed: seed of everything that is drawn.

    Raises:
        ArgumentError: sizes are unsuitable, or several draws gave no such point.

    >>> planted_model_saddle(60, (3, 4, 3, 1)).tangential_eigenvalue < 0
    True
    """
    return _planted(
        num_samples, widths, negative_slope, kinks, "squared_error", weight_decay, seed, bias=bias, saddle=True
    )


def _planted(  # noqa: PLR0917 (the parts of a problem)
    num_samples: int,
    widths: Sequence[int],
    slope: float,
    kinks: int,
    loss: LossName,
    weight_decay: float,
    seed: int,
    *,
    bias: bool,
    violated: bool = False,
    saddle: bool = False,
) -> PlantedModel:
    if len(widths) < 3 or min(widths) < 1:
        raise ArgumentError("widths", tuple(widths), "must have an input, hidden layers and an output, of at least 1")
    if slope == 1 or not math.isfinite(slope):
        raise ArgumentError("negative_slope", slope, "must be a real number other than 1")
    numbers = sum((a + bias) * b for a, b in pairwise(widths))
    outputs = widths[-1] - (loss == "cross_entropy")
    if num_samples * outputs <= numbers + kinks:
        raise ArgumentError(
            "num_samples", num_samples, f"times the outputs must exceed the {numbers + kinks} equations"
        )
    for start in np.random.SeedSequence(seed).generate_state(_DRAWS):
        rng = np.random.default_rng(start)
        module, inputs, places = _draw_network(
            rng, num_samples, widths, slope, kinks, loss, balanced=weight_decay > 0, bias=bias
        )
        if module is None:
            continue
        found = _targets(rng, module, inputs, places, loss, weight_decay, violated=violated, saddle=saddle)
        if found is not None:
            return found
    raise ArgumentError(
        "num_samples",
        num_samples,
        f"gave no such point in {_DRAWS} draws at widths={tuple(widths)}, kinks={kinks}, weight_decay={weight_decay}",
        "give more samples, fewer kinks or a smaller weight_decay",
    )


def _draw_network(  # noqa: C901 (one loop for each layer)
    rng: np.random.Generator,
    num_samples: int,
    widths: Sequence[int],
    slope: float,
    kinks: int,
    loss: LossName,
    *,
    balanced: bool,
    bias: bool,
) -> tuple[nn.Sequential | None, Tensor, list[tuple[int, int, int]]]:
    """A network with pre-activations that are zero on random kinks, and clearly not elsewhere."""
    hidden = len(widths) - 2
    gain = 2.0 if loss == "squared_error" else 1.0  # a curvature larger than that of the penalty
    h = inputs = rng.standard_normal((num_samples, widths[0]))
    chosen: list[tuple[int, int, int]] = []
    while len(chosen) < kinks:
        layer = len(chosen) % hidden
        kink = (layer, int(rng.integers(num_samples)), int(rng.integers(widths[layer + 1])))
        of_unit = [one for one in chosen if one[0] == layer and one[2] == kink[2]]
        if kink not in chosen and len(of_unit) < max(1, widths[layer] - 1):
            chosen.append(kink)
        elif rng.random() < 0.01:  # the sizes do not allow so many
            return None, torch.from_numpy(inputs), []
    layers: list[Array] = []
    for layer in range(hidden):
        ones = np.ones((num_samples, int(bias)))
        features = np.concatenate([h, ones], axis=1)
        rows, z = [], np.zeros((num_samples, widths[layer + 1]))
        for unit in range(widths[layer + 1]):
            on = [n for place, n, i in chosen if place == layer and i == unit]
            row, values, sine = _row(rng, features, on)
            if sine < _MIN_SINE:
                return None, torch.from_numpy(inputs), []
            rows.append(gain * row)
            z[:, unit] = gain * values
        layers.append(np.stack(rows))
        h = np.where(z > 0, z, slope * z)
    last = rng.standard_normal((widths[-1], widths[-2] + bias)) / math.sqrt(widths[-2])
    if loss == "cross_entropy":
        last -= last.mean(axis=0)
    layers.append(last)
    if balanced:
        _balance(layers)
    modules: list[nn.Module] = []
    for number, rows_of in enumerate(layers):
        linear = nn.Linear(widths[number], widths[number + 1], bias=bias, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(rows_of[:, : widths[number]]))
            if bias:
                linear.bias.copy_(torch.from_numpy(rows_of[:, -1]))
        modules.append(linear)
        if number < hidden:
            modules.append(nn.LeakyReLU(slope) if slope else nn.ReLU())
    return nn.Sequential(*modules), torch.from_numpy(inputs), sorted(chosen, key=lambda k: (k[0], k[1], k[2]))


def _row(rng: np.random.Generator, features: Array, on: list[int]) -> tuple[Array, Array, float]:
    """A row orthogonal to some samples, of several the farthest from the kinks of others."""
    drawn = rng.standard_normal((_ROW_DRAWS, features.shape[1]))
    if on:
        basis = np.linalg.qr(features[on].T)[0]
        for _ in range(2):
            drawn = drawn - (drawn @ basis) @ basis.T
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    values = features @ drawn.T
    values[on] = 0.0
    sines = np.abs(values) / np.maximum(np.linalg.norm(features, axis=1)[:, None], 1e-300)
    sines[on] = np.inf
    sines[np.linalg.norm(features, axis=1) == 0] = np.inf
    share = (values > 0).mean(axis=0)
    sines[:, np.abs(share - 0.5) > _MAX_SHARE_OFF_HALF] = 0.0  # units that are seldom active make ill-posed problems
    best = int(sines.min(axis=0).argmax())
    return drawn[best], values[:, best], float(sines[:, best].min())


def _balance(layers: list[Array]) -> None:
    """Rescale hidden units until incoming and outgoing norms agree, as they do wherever a penalty is stationary."""
    for _ in range(_BALANCING_ROUNDS):
        worst = 0.0
        for first, second in pairwise(layers):
            columns = slice(0, len(first))
            into, out = np.linalg.norm(first, axis=1), np.linalg.norm(second[:, columns], axis=0)
            factor = np.sqrt(out / into)
            np.multiply(first, factor[:, None], out=first)
            second[:, columns] /= factor
            worst = max(worst, float(np.abs(np.log(factor)).max()))
        if worst < 1e-15:
            return


def _targets(
    rng: np.random.Generator,
    module: nn.Sequential,
    inputs: Tensor,
    kinks: list[tuple[int, int, int]],
    loss: LossName,
    weight_decay: float,
    *,
    violated: bool,
    saddle: bool,
) -> PlantedModel | None:
    """The problem with targets for which the network is stationary, or None."""
    layers = read_layers(module)
    names, count = tuple(layers.parameters), len(inputs)
    outputs = module(inputs).detach()
    blank = Model(layers, inputs, Loss(loss, torch.zeros_like(outputs)), dict.fromkeys(names, weight_decay), names)
    vector = blank.vector(layers.parameters)
    active = {
        1 + 2 * layer: torch.full((count, module[2 * layer].out_features), -1)  # type: ignore[arg-type]
        for layer in range(len(module) // 2)
    }
    for layer, sample, unit in kinks:
        active[1 + 2 * layer][sample, unit] = 0
    face = read_face(blank, vector, active).face
    if face.num_kinks != len(kinks):
        return None
    theta, s = vector[face.free], vector.new_zeros(len(kinks))
    first = derivatives(face, theta)
    f = face.evaluate(theta, s)[0].detach()
    by_theta, by_s = torch.func.jacrev(lambda t, u: face.evaluate(t, u)[0].flatten(), argnums=(0, 1))(theta, s)
    equations = torch.cat([by_theta, by_s], dim=1).T / count  # of g, as a flat vector
    if loss == "cross_entropy":  # the numbers of a sample sum to zero
        equations = torch.cat([equations, torch.eye(count, dtype=torch.float64).repeat_interleave(f.shape[1], 1)])
    draw = rng.uniform(0.1, 1.0, (2, len(kinks))) * _MULTIPLIER_SIZE / count
    multipliers = torch.from_numpy(draw[0] * rng.choice([-1.0, 1.0], len(kinks)))
    growth = torch.from_numpy(draw[1])
    wrong = int(rng.integers(len(kinks))) if violated else None
    if wrong is not None:
        growth[wrong] *= -1
    inverse = torch.linalg.pinv(equations, rtol=1e-10)
    noise = torch.from_numpy(rng.standard_normal(f.numel()))
    for size, amount in product((1.0,) if saddle else _MULTIPLIER_SIZES, _SADDLE_NOISE if saddle else _MINIMUM_NOISE):
        of_theta = -weight_decay * theta - size * (first.jacobian.T @ multipliers)
        of_s = size * (multipliers.abs() + growth - first.coupling.T @ multipliers)
        right = torch.cat([of_theta, of_s, theta.new_zeros(len(equations) - len(theta) - len(kinks))])
        g = amount * size * noise
        for _ in range(2):  # the second pass removes the rounding of the first
            g = g - inverse @ (equations @ g - right)
        error = float((equations @ g - right).norm()) / max(float(right.norm()), float(g.norm()) / count)
        targets = _of_slopes(loss, f, g.reshape(f.shape))
        if targets is None or error > _MAX_EQUATION_ERROR:
            continue
        model = Model(layers, inputs, Loss(loss, targets), blank.penalties, names)
        system = linearise(read_face(model, vector, active).face, theta, size * multipliers)
        values = system.tangential()[0]
        smallest, largest = float(values[0]), float(values.abs().max())
        clear = float(values.abs().min()) > _MIN_EIGENVALUE_RATIO * largest  # no flat direction off the symmetries
        if clear and (smallest < -1e-3 * largest if saddle else smallest > 0):
            return PlantedModel(
                module,
                inputs,
                targets,
                loss,
                weight_decay,
                tuple(kinks),
                size * multipliers,
                size * growth,
                smallest,
                wrong,
            )
    return None


def _of_slopes(loss: LossName, f: Tensor, g: Tensor) -> Tensor | None:
    """The targets for which the loss has the derivatives g; None if they are no probabilities."""
    match loss:
        case "squared_error":
            return f - g / 2
        case "cross_entropy":
            targets = f.softmax(1) - g
        case _:
            targets = f.sigmoid() - g
    return targets if bool(((targets > 0.01) & (targets < 0.99)).all()) else None
