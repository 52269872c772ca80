"""First-order tests of a point of weight space, for a network of any depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_mnn.verdicts import Kind, Reason, ReasonCode, Reasoned

if TYPE_CHECKING:
    from lightning_mnn.landscape.regions.statistics import NetworkStatistics


@dataclass(frozen=True)
class FirstOrderVerdict(Reasoned):
    """The outcome of the first-order tests at one point.

    Attributes:
        kind: ``differentiable_minimum`` where both tests pass, else ``not_stationary``.
        because: the test that decided: ``reason_code`` is its code, ``reason`` its sentence.
        stationarity: ‖G e‖ / (‖G‖_F ‖y‖).
        relative_preactivation: smallest |w·x| / (‖w‖‖x‖).
    """

    kind: Kind
    because: Reason
    stationarity: float
    relative_preactivation: float


def first_order_verdicts(
    statistics: NetworkStatistics, stationarity_tolerance: float, preactivation_tolerance: float
) -> list[FirstOrderVerdict]:
    """Test each network of training-set statistics: G e = 0, and no sample on a kink, both within tolerances.

    With one hidden layer, a point off every kink is a local minimum if and only if G e = 0 exactly. In floats this is
    evidence, not a certificate: the tests also pass near a minimum of the region. With two hidden layers the tests
    (G e = 0 in the last layer and no gradient in the first) are only necessary, and the reason states it.

    Args:
        statistics: the result of an exact pass over the training set, for one network or R.
        stationarity_tolerance: largest ‖G e‖ / (‖G‖_F ‖y‖) that counts as zero.
        preactivation_tolerance: smallest |w·x| / (‖w‖‖x‖) that counts as off the kink.

    Returns:
        A list of R verdicts (of one verdict without a replica axis).
    """
    return [
        _verdict(
            float(stationarity), float(sine), stationarity_tolerance, preactivation_tolerance, len(statistics.layers)
        )
        for stationarity, sine in zip(
            statistics.stationarity.reshape(-1), statistics.smallest_sine.reshape(-1), strict=True
        )
    ]


def _verdict(
    stationarity: float, sine: float, stationarity_tolerance: float, sine_tolerance: float, depth: int
) -> FirstOrderVerdict:
    moving = not stationarity <= stationarity_tolerance  # NaN counts as moving
    on_kink = not sine >= sine_tolerance
    if moving:
        code, tolerance = ReasonCode.STATIONARITY_ABOVE_TOLERANCE, stationarity_tolerance
    elif on_kink:
        code, tolerance = ReasonCode.PREACTIVATION_BELOW_TOLERANCE, sine_tolerance
    else:
        code = ReasonCode.NECESSARY_CONDITIONS_ONLY if depth > 1 else ReasonCode.FIRST_ORDER_TESTS_PASSED
        tolerance = stationarity_tolerance
    because = Reason.of(code, stationarity=stationarity, sine=sine, tolerance=tolerance)
    kind = Kind.NOT_STATIONARY if moving or on_kink else Kind.DIFFERENTIABLE_MINIMUM
    return FirstOrderVerdict(kind, because, stationarity, sine)
