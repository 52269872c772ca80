"""Certificates of minima of any piecewise-linear network, with penalties, frozen parameters and several losses.

Shapes: N samples, K outputs.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.certificate import certify
from lightning_mnn.landscape.minima.models.classification import (
    MAX_UNKNOWNS,
    Classified,
    classify_point,
    fit_exactly,
    solve,
)
from lightning_mnn.landscape.minima.models.equations.face import Model
from lightning_mnn.landscape.minima.models.equations.layers import (
    Affine,
    Bends,
    Loss,
    LossName,
    prepare_loss,
    read_layers,
)
from lightning_mnn.landscape.minima.models.equations.reading import active_sets, read_face, true_loss, true_outputs
from lightning_mnn.landscape.minima.models.inactive_units import split_units
from lightning_mnn.utilities.validation import ArgumentError
from lightning_mnn.verdicts import Kind, Reason, ReasonCode, Reasoned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from lightning_mnn.landscape.minima.certificate import Certificate

_KINK_SETS = 6  # sets of kinks that are tried


@dataclass(frozen=True)
class ModelCertificate(Reasoned):
    """The classification of a point of a model's parameters; see :func:`certify_model`.

    Attributes:
        kind: kind of the point that was found, ``not_stationary`` or ``undecided``.
        because: the fact that decided: ``reason_code`` is its code, ``reason`` its sentence.
        zero_error: whether every output is its target, at the exact point.
        loss: the objective at ``state_dict``, penalty included.
        rounding_bound: a bound on the rounding error of ``loss``.
        radius: the exact point lies within this Euclidean distance of ``state_dict``; None if no point was proved, and
            where the exact test of two-layer networks decided, which states no radius.
        distance: ‖θ* − θ‖/‖θ‖ of the trained parameters, from the given ones to ``state_dict``.
        kinks: number of active kinks.
        implied_kinks: number of these that are active wherever the others are, and not independent of them.
        growth: the smallest of b + Lᵀλ − |λ|; None without kinks.
        likq: σ_min/σ_max of Z, of the kinks that are not implied; None without kinks.
        smallest_eigenvalue: the smallest tangential eigenvalue off the symmetries; None if it was not computed.
        positive_directions: number of positive tangential eigenvalues; None if they were not computed.
        flat_directions: number of tangential directions without curvature, symmetries included, of the parameters on
            which the loss depends.
        symmetries: number of these that are symmetries; None for a minimum of zero error, which needs none.
        inert: number of trained numbers on which nothing depends nearby (weights of units that are never active).
        inert_units: units all of whose incoming weights are such numbers, by the row of the weight, "0.weight[3]".
        state_dict: the point: all parameters by name, float64; the given ones if no point was found.
        direction: a move of the trained parameters that lowers the loss: of a saddle, or off a kink; else None.
    """

    kind: Kind
    because: Reason
    zero_error: bool
    loss: float
    rounding_bound: float
    radius: float | None
    distance: float
    kinks: int
    implied_kinks: int
    growth: float | None
    likq: float | None
    smallest_eigenvalue: float | None
    positive_directions: int | None
    flat_directions: int | None
    symmetries: int | None
    inert: int
    inert_units: tuple[str, ...]
    state_dict: dict[str, Tensor]
    direction: dict[str, Tensor] | None = None

    @property
    def is_minimum(self) -> bool:
        """Whether the certificate is of a local minimum."""
        return self.kind.is_minimum

    @property
    def kink_directions(self) -> int | None:
        """Number of directions off the kinks, in which the loss rises linearly; None if that is not known."""
        rises = self.is_minimum and not (self.zero_error and self.kinks) and self.positive_directions is not None
        return self.kinks - self.implied_kinks if rises else None


def certify_model(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: LossName = "squared_error",
    weight_decay: float | Mapping[str, float] = 0.0,
    frozen: Iterable[str] = (),
    max_distance: float = 1e-2,
) -> ModelCertificate:
    """Certify a local minimum of a model's training objective at its parameters, or near them.

    The objective is the mean loss over the samples plus ½ Σ wd θ². On each face of its pieces it is smooth. Newton's
    method finds the stationary point of the face, and the theorem of Newton and Kantorovich proves that one exists
    within ``radius``, with bounds on all rounding errors. It is a local minimum if the loss grows strictly off each
    active kink (normal growth), and the Hessian of the Lagrangian on the face is positive definite off the model's
    symmetries (Griewank and Walther 2016). The kinks must be independent (LIKQ), but for those that are proved to be
    active wherever the others are. All this is checked for the whole ball of that radius. A point of zero error is
    proved by a Jacobian of full row rank and is a global minimum.

    Whatever is not proved is ``undecided``, with the reason. ``not_stationary``: Newton's method found no stationary
    point within ``max_distance``, or the loss falls off a kink at first order, along ``direction``. Two-layer
    networks with one output and the squared error without a penalty are classified by :func:`certify` first.
    Everything is computed in float64 on the CPU.

    Args:
        module: an ``nn.Sequential`` (also nested) of Linear, Conv1d, Conv2d, Flatten, average and max-pooling,
            BatchNorm and Dropout in eval mode, ReLU, LeakyReLU, ReLU6, Hardtanh, Identity, and PReLU with one slope
            that is frozen.
        inputs: X, (N, …).
        targets: y, (N, K) or (N,): numbers; for ``cross_entropy`` classes (N,) or probabilities; for ``logistic``
            labels 0 and 1, or ±1, or probabilities.
        loss: the mean over samples of ``squared_error`` (summed over outputs), ``cross_entropy``, or ``logistic``
            (summed over outputs).
        weight_decay: wd of ½ wd ‖θ‖²: a number for all trained parameters, or numbers by parameter name (others: 0).
        frozen: names of parameters that are not trained.
        max_distance: largest relative distance to the minimum or saddle.

    Raises:
        ArgumentError: a layer, a name, a shape or a value cannot be used.

    >>> from lightning_mnn.landscape import planted_model_kink_minimum
    >>> planted = planted_model_kink_minimum(60, (3, 4, 2), kinks=2, weight_decay=1e-3)
    >>> found = certify_model(planted.module, planted.inputs, planted.targets, weight_decay=1e-3)
    >>> found.kind, found.kinks, found.radius < 1e-6
    (<Kind.KINK_MINIMUM: 'kink_minimum'>, 2, True)
    """
    model, vector = prepare(module, inputs, targets, loss=loss, weight_decay=weight_decay, frozen=frozen)
    if not max_distance >= 0:
        raise ArgumentError("max_distance", max_distance, "must be at least 0")
    return certificate_at(model, vector, vector, max_distance)


def certificate_at(model: Model, vector: Tensor, start: Tensor, max_distance: float) -> ModelCertificate:
    """The certificate of a point; its distance is from the start."""
    exact = _two_layers(model, vector, max_distance)
    if exact is not None:
        return exact
    return as_certificate(model, classify_near(model, vector, max_distance), start)


def prepare(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: LossName,
    weight_decay: float | Mapping[str, float],
    frozen: Iterable[str],
) -> tuple[Model, Tensor]:
    """The checked model and the vector of its trained parameters; see :func:`certify_model`."""
    layers = read_layers(module)
    names, still = set(layers.parameters), {frozen} if isinstance(frozen, str) else set(frozen)
    if unknown := still - names:
        raise ArgumentError("frozen", sorted(unknown), "must be names of parameters", f"choose from {sorted(names)}")
    if slopes := layers.fixed_slopes - still:
        raise ArgumentError("frozen", sorted(still), f"must contain the slopes {sorted(slopes)}: they are not covered")
    trained = tuple(name for name in layers.parameters if name not in still)
    if not trained:
        raise ArgumentError("frozen", sorted(still), "must leave a parameter that is trained")
    if isinstance(weight_decay, numbers.Real):
        penalties = dict.fromkeys(trained, float(weight_decay))
    else:
        if unknown := set(weight_decay) - names:  # type: ignore[arg-type]
            raise ArgumentError("weight_decay", sorted(unknown), "must have names of parameters", str(sorted(names)))
        penalties = {name: float(weight_decay.get(name, 0.0)) for name in trained}  # type: ignore[union-attr]
    if not all(math.isfinite(value) and value >= 0 for value in penalties.values()):
        raise ArgumentError("weight_decay", weight_decay, "must be at least 0 and finite")
    x = inputs.detach().to("cpu", torch.float64)
    if x.ndim < 2 or not len(x) or not bool(x.isfinite().all()):
        raise ArgumentError("inputs", tuple(x.shape), "must have samples, finite, on the first of two or more axes")
    blank = Model(layers, x, Loss(loss, x.new_zeros(0, 0)), penalties, trained)
    vector = blank.vector(layers.parameters)
    try:
        outputs = true_outputs(blank, vector)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ArgumentError("inputs", tuple(x.shape), f"do not fit the module: {error}") from error
    if outputs.ndim != 2:
        raise ArgumentError("module", tuple(outputs.shape), "must give outputs of shape (N, K)", "end it with Flatten")
    return Model(layers, x, prepare_loss(loss, targets, *outputs.shape), penalties, trained), vector


def classify_near(model: Model, vector: Tensor, max_distance: float) -> Classified:
    """The best kind that is proved of the faces next to a point: a minimum, else a saddle, else the first reason.

    Where penalised units have no part in the outputs, also next to the point where they are split off other units.
    """
    found = _classify_faces(model, vector, max_distance)
    if found.kind.is_minimum:
        return found
    split = split_units(model, vector)
    scale = max(float(vector.norm()), 1e-300)
    if split is None or not float((split - vector).norm()) <= max_distance * scale:
        return found
    again = _classify_faces(model, split, max_distance)
    if again.kind.is_minimum and float((again.vector - vector).norm()) <= max_distance * scale:
        return again
    return found


def _classify_faces(model: Model, vector: Tensor, max_distance: float) -> Classified:
    reading = read_face(model, vector)
    sets, found = active_sets(reading, tolerances.MAX_KINK_RATIO, _KINK_SETS), []
    if _may_fit(model, vector):
        for active in sets:
            fitted = fit_exactly(model, vector, active, max_distance)
            if fitted is not None:
                return fitted
    if len(reading.face.free) > MAX_UNKNOWNS:
        reason = Reason.of(ReasonCode.MODEL_TOO_LARGE, unknowns=len(reading.face.free), limit=MAX_UNKNOWNS)
        return Classified(Kind.UNDECIDED, reason, vector, reading)
    scale = max(float(vector.norm()), 1e-300)
    for active in sets:
        solved = solve(model, vector, active, max_distance)
        if isinstance(solved, Reason):
            kind = Kind.NOT_STATIONARY if solved.code is ReasonCode.NO_STATIONARY_POINT else Kind.UNDECIDED
            found.append(Classified(kind, solved, vector, reading))
            continue
        distance = float((solved[2] - vector).norm()) / scale
        if not distance <= max_distance:
            reason = Reason.of(ReasonCode.NO_STATIONARY_POINT, distance=distance)
            found.append(Classified(Kind.NOT_STATIONARY, reason, vector, reading))
            continue
        classified = classify_point(model, *solved)
        if classified.kind.is_minimum:
            return classified
        found.append(classified)
    order = (Kind.SADDLE, Kind.UNDECIDED, Kind.NOT_STATIONARY)
    return min(found, key=lambda one: (one.direction is None, order.index(one.kind)))


def _may_fit(model: Model, vector: Tensor) -> bool:
    """Whether zero error may be near, where it can be a stationary point."""
    y = model.loss.targets
    if model.loss.name != "squared_error" or bool(model.weights_of_penalty.any()) or y.numel() > len(vector):
        return False
    return float((true_outputs(model, vector) - y).norm()) <= tolerances.MAX_FIT_RATIO * float(y.norm())


def as_certificate(model: Model, found: Classified, start: Tensor) -> ModelCertificate:
    """The certificate of a classified point."""
    value, error = true_loss(model, found.vector)
    direction = None if found.direction is None else model.parameters(found.direction)
    return ModelCertificate(
        kind=found.kind,
        because=found.because,
        zero_error=found.zero_error,
        loss=value,
        rounding_bound=error,
        radius=found.radius,
        distance=float((found.vector - start).norm()) / max(float(start.norm()), 1e-300),
        kinks=found.kinks,
        implied_kinks=found.implied_kinks,
        growth=found.growth,
        likq=found.likq,
        smallest_eigenvalue=found.smallest_eigenvalue,
        positive_directions=found.positive_directions,
        flat_directions=found.flat_directions,
        symmetries=found.symmetries,
        inert=found.reading.inert,
        inert_units=found.reading.inert_units,
        state_dict={name: value.clone() for name, value in model.parameters(found.vector).items()},
        direction=None if direction is None else {name: direction[name].clone() for name in model.trained},
    )


def _two_layers(model: Model, vector: Tensor, max_distance: float) -> ModelCertificate | None:
    """The certificate of the exact test where it applies and decides."""
    match model.layers.operations:
        case (Affine(groups=0) as first, Bends(kinks=(0.0,), slopes=(slope, 1.0)), Affine(groups=0) as second):
            pass
        case _:
            return None
    names = {name for name in (first.weight, first.bias, second.weight, second.bias) if name is not None}
    plain = model.loss.name == "squared_error" and not bool(model.weights_of_penalty.any())
    if not plain or model.inputs.ndim != 2 or model.loss.targets.shape[1] != 1 or names != set(model.trained):
        return None
    parameters = model.parameters(vector)
    z = parameters[second.weight][0]
    found: Certificate = certify(  # type: ignore[assignment]  # one network
        parameters[first.weight],
        z,
        model.inputs,
        model.loss.targets[:, 0],
        slope,
        max_distance=max_distance,
        threshold=0.0,
        hidden_bias=None if first.bias is None else parameters[first.bias],
        output_bias=None if second.bias is None else parameters[second.bias][0],
    )
    if not (found.kind.is_minimum or found.kind is Kind.SADDLE):
        return None
    at = dict(parameters)
    at[first.weight], at[second.weight] = found.hidden_weights, found.output_weights[None]
    if first.bias is not None and found.hidden_bias is not None:
        at[first.bias] = found.hidden_bias
    if second.bias is not None and found.output_bias is not None:
        at[second.bias] = found.output_bias.reshape(1)
    direction = None
    if found.direction is not None:
        move = found.direction
        direction = {name: torch.zeros_like(parameters[name]) for name in model.trained}
        columns = parameters[first.weight].shape[1]
        direction[first.weight] = move.hidden_weights[:, :columns]
        direction[second.weight] = move.output_weights[None]
        if first.bias is not None:  # the weight of an input of ones
            direction[first.bias] = move.hidden_weights[:, columns]
    end = model.vector(at)
    value, error = true_loss(model, end)
    return ModelCertificate(
        kind=found.kind,
        because=found.because,
        zero_error=found.zero_error,
        loss=value,
        rounding_bound=error,
        radius=None,
        distance=float((end - vector).norm()) / max(float(vector.norm()), 1e-300),
        kinks=found.kinks,
        implied_kinks=0,
        growth=None,
        likq=None,
        smallest_eigenvalue=None,
        positive_directions=found.positive_directions if found.kink_directions == found.kinks else None,
        flat_directions=None,
        symmetries=None,
        inert=0,
        inert_units=(),
        state_dict=at,
        direction=direction,
    )
