"""The local learning coefficient of certified minima: in how many directions the loss rises from them, and how fast.

Shapes: N samples (of this process), d0 inputs, d1 hidden units, f free columns; one network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.minima.stationary_point import bases_of_kinks
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_mnn.landscape.minima.problem import Outputs, Point, Problem
    from lightning_mnn.verdicts import Kind

_MAX_ENTRIES = 1_000_000  # of the matrix whose singular values are counted: less than a second


class CountedDirections(Protocol):
    """What a certificate tells of the directions in which the loss rises."""

    @property
    def kind(self) -> Kind: ...  # noqa: D102

    @property
    def is_minimum(self) -> bool: ...  # noqa: D102

    @property
    def kink_directions(self) -> int | None: ...  # noqa: D102

    @property
    def positive_directions(self) -> int | None: ...  # noqa: D102


@dataclass(frozen=True)
class ExactCoefficient:
    """The local learning coefficient of a minimum, and what it consists of; see :func:`learning_coefficient`.

    Attributes:
        value: λ = κ + r/2.
        kink_directions: κ, the number of independent directions off the active kinks.
        positive_directions: r, the number of positive tangential directions.
    """

    value: float
    kink_directions: int
    positive_directions: int


def learning_coefficient(certificate: CountedDirections) -> ExactCoefficient:
    """The λ in V(L ≤ L* + ε) ~ c ε^λ, the volume of the points near a certified minimum with a loss up to ε above it.

    The smaller λ is, the more singular the minimum, and the larger its share of the volume. Off its κ active kinks the
    loss rises linearly, and each of these directions counts 1. In r directions of the kinks' face it rises
    quadratically, and each counts ½. Symmetries and other directions along which the loss is constant count 0. For a
    differentiable minimum of a two-layer network with the squared error, λ is half the rank of A∘X.

    Raises:
        ArgumentError: the certificate is not of a minimum, or its directions were not counted: a hidden unit with
            z_i = 0 that is active, kinks at zero error, or too large a matrix.

    Watanabe, Algebraic Geometry and Statistical Learning Theory (2009), chapter 4.

    >>> from lightning_mnn.landscape import certify, planted_minimum
    >>> planted = planted_minimum(12, 2, 2)
    >>> found = certify(planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
    >>> learning_coefficient(found)
    ExactCoefficient(value=1.0, kink_directions=0, positive_directions=2)
    """
    if not certificate.is_minimum:
        raise ArgumentError("certificate", certificate.kind, "is not of a minimum", "train on, or polish the weights")
    kinks, positive, value = (
        certificate.kink_directions,
        certificate.positive_directions,
        known_coefficient(certificate),
    )
    if kinks is None or positive is None or value is None:
        raise ArgumentError(
            "certificate",
            certificate.kind,
            "does not tell in how many directions the loss rises",
            "this needs active units with z_i ≠ 0, an error on each kink, and samples times weights up to a million",
        )
    return ExactCoefficient(value, kinks, positive)


def known_coefficient(certificate: CountedDirections) -> float | None:
    """The value of :func:`learning_coefficient`, or None where that raises an error."""
    kinks, positive = certificate.kink_directions, certificate.positive_directions
    if not certificate.is_minimum or kinks is None or positive is None:
        return None
    return kinks + positive / 2


class Directions(NamedTuple):
    """Numbers of independent directions.

    Attributes:
        linear: off the kinks, where the loss rises in proportion to the distance.
        quadratic: on the face of the kinks, where it rises with its square.
    """

    linear: int
    quadratic: int


def rising_directions(
    problem: Problem, point: Point, outputs: Outputs, on_kink: Tensor, *, zero_error: bool, rank: int | None
) -> Directions | None:
    """The directions in which the loss rises from a certified minimum.

    The kinks of unit i span the directions span{x_n : (n, i) on its kink} of w_i. On the face the outputs are linear in
    w̃_i = z_i w_i and the free coefficients: with P_i the projection off that span, the matrix with rows
    (A_n1 P_1 x_n, …, A_nd1 P_d1 x_n, c_n) maps their moves to those of the outputs. Its rank is the number of quadratic
    directions.

    Args:
        problem: the training set.
        point: the minimum.
        outputs: its outputs and errors.
        on_kink: pairs on their kink, bool (N, d1).
        zero_error: whether e = 0.
        rank: rank of A∘X, if it is known.

    Returns:
        None where the count does not follow, or is too costly: z_i = 0 for a unit that is active on some sample; kinks
        of samples without an error, off which the loss rises quadratically; samples times weights above a million.
    """
    group = problem.process_group
    active = (outputs.preactivations > 0) & ~on_kink
    has_effect = (
        group.max((on_kink | active).any(0).long()).bool()
        if problem.slope == 0
        else torch.ones_like(point.output, dtype=torch.bool)
    )
    unclear = (point.output == 0) & has_effect
    weightless = on_kink & (outputs.errors.abs() <= outputs.bounds)[:, None]
    kinked = bool(group.max(on_kink.any().long()))
    if bool(unclear.any()) or (kinked and zero_error) or bool(group.max(weightless.any().long())):
        return None
    if not kinked and not problem.free.shape[1]:
        return None if rank is None else Directions(0, rank)
    width, dim = point.hidden.shape
    if problem.num_samples * (width * dim + problem.free.shape[1]) > _MAX_ENTRIES:
        return None
    bases = bases_of_kinks(problem, on_kink) if kinked else {}
    slopes = torch.where(on_kink, 0.0, problem.slopes(active))
    blocks = [problem.free]
    for unit in range(width):
        inputs = problem.inputs
        if unit in bases:
            inputs = inputs - inputs @ bases[unit] @ bases[unit].T
        blocks.append(slopes[:, unit, None] * inputs)
    values = torch.linalg.svdvals(group.join(torch.cat(blocks, dim=1)))
    quadratic = int((values > tolerances.MAX_ZERO_SINGULAR_RATIO * values[0]).sum()) if len(values) else 0
    return Directions(sum(basis.shape[1] for basis in bases.values()), quadratic)
