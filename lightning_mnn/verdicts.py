"""The words of all verdicts: kinds of points, codes of the reasons, and the sentences of these codes.

Programs compare kinds and codes. Sentences are for people: they are made here, from a code and its numbers. This module
imports neither torch nor the rest of the package, so that tables and figures of saved results can use it quickly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Kind(StrEnum):
    """Kind of a point of weight space.

    Attributes:
        DIFFERENTIABLE_MINIMUM: a local minimum inside a region.
        KINK_MINIMUM: a local minimum with pre-activations that are zero.
        SADDLE: stationary, with a direction in which the loss falls.
        NOT_STATIONARY: not a stationary point, or (certificates) nothing was proved.
        ON_KINK: (second-order evidence) on kinks between whose sides the gradient changes.
        UNDECIDED: nothing could be decided.
    """

    DIFFERENTIABLE_MINIMUM = "differentiable_minimum"
    KINK_MINIMUM = "kink_minimum"
    SADDLE = "saddle"
    NOT_STATIONARY = "not_stationary"
    ON_KINK = "on_kink"
    UNDECIDED = "undecided"
    MINIMUM = DIFFERENTIABLE_MINIMUM  # the name of this member in the former SecondOrderKind

    @property
    def is_minimum(self) -> bool:
        """Whether it is a local minimum."""
        return self in MINIMA


MINIMA = (Kind.DIFFERENTIABLE_MINIMUM, Kind.KINK_MINIMUM)
STATIONARY = (*MINIMA, Kind.SADDLE)  # kinds of a certificate with a point of its own


class Class(StrEnum):
    """What a network ended in, by the certificate of a minimum.

    Attributes:
        GLOBAL: a certified minimum with zero error.
        SUBOPTIMAL: a certified differentiable minimum with error.
        KINK: a certified minimum on kinks with error.
        NOT_TOLD: no certified minimum.
    """

    GLOBAL = "global"
    SUBOPTIMAL = "suboptimal"
    KINK = "kink"
    NOT_TOLD = "not_told"

    @classmethod
    def of(cls, kind: Any, zero_error: Any) -> Class:
        """The class of a certificate, from its kind and whether its error is zero."""
        if kind not in MINIMA or zero_error is None:
            return cls.NOT_TOLD
        if zero_error:
            return cls.GLOBAL
        return cls.KINK if kind == Kind.KINK_MINIMUM else cls.SUBOPTIMAL


class Ended(NamedTuple):
    """The class of a network, and whether its minimum lies ahead: it is the one that descent leads to."""

    known: Class
    ahead: bool = False

    @property
    def key(self) -> str:
        """A name for programs."""
        return "_".join([self.known, *["ahead"] * self.ahead])


AT_GLOBAL = Ended(Class.GLOBAL)


def class_of(results: Mapping[str, Any]) -> Ended:
    """What a network ended in, from its summary or its row in the table of a sweep; only certificates count.

    A network that is at no certified minimum has the class of the minimum that descent leads to, which lies ahead.

    >>> class_of({"kind": "kink_minimum", "zero_error": False})
    Ended(known=<Class.KINK: 'kink'>, ahead=False)
    >>> class_of({"kind": "not_stationary", "descends_to": "differentiable_minimum", "descends_to_zero_error": True})
    Ended(known=<Class.GLOBAL: 'global'>, ahead=True)
    >>> class_of({"kind": "saddle"}).known
    <Class.NOT_TOLD: 'not_told'>
    """
    here = Class.of(results.get("kind"), results.get("zero_error"))
    if results.get("evidence") in (None, "certificate") and here is not Class.NOT_TOLD:
        return Ended(here)
    ahead = Class.of(results.get("descends_to"), results.get("descends_to_zero_error"))
    return Ended(ahead, ahead is not Class.NOT_TOLD)


class ReasonCode(StrEnum):
    """Why a verdict is what it is; ``SENTENCES`` has a sentence for each."""

    # Certificates of minima
    CERTIFIED = auto()
    CERTIFIED_ON_KINKS = auto()
    ZERO_ERROR = auto()

    # Certificates: the loss falls
    FORCE_ALONG_KINKS = auto()
    MULTIPLIER_OUTSIDE_INTERVAL = auto()
    STEP_OFF_DEPENDENT_KINKS = auto()
    DEPENDENT_KINKS_WITHOUT_MULTIPLIERS = auto()
    FORCE_ON_INACTIVE_UNIT = auto()

    # Certificates: nothing was proved
    NO_POINT_WITHIN_DISTANCE = auto()
    LEAST_SQUARES_UNSOLVED = auto()
    OUTSIDE_REGION = auto()
    PREACTIVATIONS_WITHIN_ROUNDING = auto()
    KINKS_DEPENDENT = auto()
    ROUNDING_HIDES_GRADIENT = auto()
    GRADIENT_NOT_ZERO = auto()
    UNEVEN_INPUTS = auto()
    MULTIPLIER_AT_END = auto()
    DEPENDENT_MULTIPLIERS_AT_END = auto()
    DEPENDENT_KINKS_UNDECIDED = auto()
    DEPENDENT_KINKS_TOO_MANY = auto()
    ROUNDING_HIDES_KINK_FORCES = auto()
    INACTIVE_UNIT_UNDECIDED = auto()
    GRADIENT_ON_INACTIVE_UNIT = auto()
    FALL_WITHIN_ROUNDING = auto()
    TOO_FAR = auto()
    HIGHER_LOSS = auto()
    GIVEN_WEIGHTS_FIT = auto()
    KINKS_NOT_TRIED = auto()

    # Certificates of general models
    MODEL_CERTIFIED = auto()
    MODEL_FITS = auto()
    GROWTH_NEGATIVE = auto()
    NEGATIVE_TANGENTIAL_CURVATURE = auto()
    NO_STATIONARY_POINT = auto()
    KINKS_NOT_INDEPENDENT = auto()
    ZERO_NOT_PROVED = auto()
    PIECES_WITHIN_RADIUS = auto()
    GROWTH_WITHIN_ROUNDING = auto()
    POOLING_TIE = auto()
    MODEL_TOO_LARGE = auto()

    # Polishing
    STOPPED_BEFORE_MINIMUM = auto()
    NEXT_TO_SADDLE = auto()
    POLISHED_TOO_FAR = auto()

    # First-order tests of a network
    FIRST_ORDER_TESTS_PASSED = auto()
    NECESSARY_CONDITIONS_ONLY = auto()
    STATIONARITY_ABOVE_TOLERANCE = auto()
    PREACTIVATION_BELOW_TOLERANCE = auto()

    # Another objective than the squared error with all weights free
    NO_OBJECTIVE = auto()
    OBJECTIVE_OF_REPLICAS = auto()

    # The gradient that training's last step followed
    NO_STEP_YET = auto()
    NO_GRADIENT_SEEN = auto()
    STEP_GRADIENT_ABOVE_TOLERANCE = auto()
    STEP_GRADIENT_SMALL = auto()
    STEP_GRADIENT_OF_MINI_BATCH = auto()

    # Second-order evidence: stationarity
    GRADIENT_SMALL = auto()
    GRADIENT_ABOVE_TOLERANCE = auto()
    NOT_FINITE = auto()
    ONE_SIDED = auto()
    STATIONARY_ON_KINKS = auto()
    LOSS_FALLS_ALONG_KINKS = auto()
    LOSS_FALLS_OFF_KINK = auto()
    FALL_FROM_KINKS_NOT_CONFIRMED = auto()
    # Second-order evidence: curvature
    HESSIAN_ZERO = auto()
    NEGATIVE_CURVATURE = auto()
    CURVATURE_EXPLAINED_BY_GRADIENT = auto()
    CURVATURE_NOT_CONFIRMED = auto()
    ROUNDING_HIDES_CURVATURE = auto()
    MORE_PRODUCTS_FOR_SIGN = auto()
    STRICT_MINIMUM = auto()
    FLAT_MINIMUM = auto()
    ZERO_LOSS = auto()
    DEGENERATE_DESCENT = auto()
    GRADIENT_ALONG_FLAT_DIRECTION = auto()
    MORE_PRODUCTS_FOR_NEWTON = auto()
    QUADRATIC_MODEL_WRONG = auto()
    NEWTON_STEP_GAINS = auto()
    NEWTON_STEP_FAR = auto()
    ROUNDING_HIDES_MINIMUM = auto()
    CURVATURE_VARIES = auto()
    MORE_PRODUCTS_FOR_FLAT_DIRECTIONS = auto()
    FLAT_DIRECTIONS_UNEXPLAINED = auto()
    # Second-order evidence: no eigenvalue was computed
    NO_SECOND_DERIVATIVE = auto()
    PRODUCT_NOT_FINITE = auto()
    LOSS_NOT_EVALUABLE = auto()
    OUT_OF_MEMORY = auto()
    TIME_LIMIT = auto()
    # Second-order evidence: facts beside the one that decided
    NO_KINK = auto()
    NEAREST_KINK = auto()
    UNITS_ON_KINKS = auto()
    COARSE_PREACTIVATIONS = auto()
    SIDES_COMPARED = auto()
    SIDES_NOT_COMPARED = auto()
    KINK_CONDITIONS = auto()
    KINKS_TOO_MANY = auto()
    KINKS_OF_OTHER_FUNCTIONS = auto()
    KINKS_NOT_EVALUABLE = auto()
    EIGENVALUES = auto()
    NEWTON_DISTANCE = auto()
    NOT_A_PROOF = auto()

    # Existence of a minimum in a region
    MINIMUM_FOUND = auto()
    NO_MINIMUM = auto()
    REGION_EMPTY = auto()
    REGION_TOO_LARGE = auto()
    INPUT_TOO_SHORT = auto()
    RANK_IN_DOUBT = auto()
    FIT_IN_DOUBT = auto()
    PATTERN_IN_DOUBT = auto()
    TOO_MANY_BRANCHES = auto()
    BRANCHES_IN_DOUBT = auto()

    # Sampled learning coefficients
    CHAINS_AGREE = auto()
    CHAINS_DIVERGED = auto()
    LOWER_LOSS_FOUND = auto()
    MOVES_REJECTED = auto()
    CHAINS_DRIFT = auto()
    CHAINS_DISAGREE = auto()
    TOO_FEW_SAMPLES = auto()
    STEP_TOO_LARGE = auto()

    # The run
    NOT_CHECKED = auto()
    ERROR = auto()
    DIVERGED = auto()
    INTERRUPTED = auto()
    PROCESS_LOST = auto()


@dataclass(frozen=True)
class Reason:
    """Why a verdict is what it is; ``str`` gives the sentence.

    Attributes:
        code: the fact that decided.
        values: the numbers and names in its sentence.
        facts: further facts, whose sentences follow.

    >>> reason = Reason.of(ReasonCode.OUTSIDE_REGION, Reason.of(ReasonCode.KINKS_NOT_TRIED), flips=3)
    >>> reason.code, reason.values
    (<ReasonCode.OUTSIDE_REGION: 'outside_region'>, {'flips': 3})
    >>> print(reason)
    the nearest stationary point lies outside the region: 3 activations differ there; kinks were not tried at this size
    """

    code: ReasonCode
    values: dict[str, Any] = field(default_factory=dict, hash=False)
    facts: tuple[Reason, ...] = ()

    @classmethod
    def of(cls, code: ReasonCode, *facts: Reason, **values: Any) -> Reason:
        """A reason from a code, the values in its sentence, and further facts."""
        return cls(code, values, facts)

    def __str__(self) -> str:
        """The sentence of the code, and those of the further facts."""
        return "; ".join([SENTENCES[self.code].format(**self.values), *map(str, self.facts)])


class Reasoned:
    """A result with the reason for it in ``because``."""

    because: Reason

    @property
    def reason(self) -> str:
        """The reason in words, for people."""
        return str(self.because)

    @property
    def reason_code(self) -> ReasonCode:
        """The code of the fact that decided."""
        return self.because.code


_LEAVES = "unit {unit} would leave a kink: "
_KINKS_UNDECIDED = "kinks of unit {unit} undecided: "
_FORCE = "unit {unit} has z = 0 and a force on it: G e is not zero"
_STATIONARITY = "‖G e‖/(‖G‖‖y‖) = {stationarity:.1e}"
_SINE = "smallest |w·x|/(‖w‖‖x‖) = {sine:.1e}"
_STEP_GRADIENT = "the norm of the last step's gradient, of a {batch}, is {relative:.1e} times that of the first"
_GAIN = "a Newton step would gain {gain:.1e} of the loss of {loss:.1e}"
_UNRELIABLE = "unreliable: "
_NO_EIGENVALUE = "no eigenvalue of the Hessian: "

SENTENCES = {
    ReasonCode.CERTIFIED: "G e = 0 up to rounding, by {method}; no sample on a kink",
    ReasonCode.CERTIFIED_ON_KINKS: (
        "G e = 0 up to rounding, by {method}; the multipliers of all kinks are inside their intervals"
    ),
    ReasonCode.ZERO_ERROR: "every error is zero up to rounding",
    ReasonCode.FORCE_ALONG_KINKS: _LEAVES + "a force along the kinks",
    ReasonCode.MULTIPLIER_OUTSIDE_INTERVAL: _LEAVES + "a multiplier is outside its interval",
    ReasonCode.STEP_OFF_DEPENDENT_KINKS: _LEAVES + "a step off dependent kinks was found",
    ReasonCode.DEPENDENT_KINKS_WITHOUT_MULTIPLIERS: _LEAVES + "dependent kinks without multipliers",
    ReasonCode.FORCE_ON_INACTIVE_UNIT: _FORCE,
    ReasonCode.NO_POINT_WITHIN_DISTANCE: (
        "no stationary point of the region within max_distance: the nearest is at a relative distance of at least "
        "{distance:.1e}, by {method}"
    ),
    ReasonCode.LEAST_SQUARES_UNSOLVED: "least squares not solved by {method}: ‖G e‖ = {left:.1e} is left",
    ReasonCode.OUTSIDE_REGION: (
        "the nearest stationary point lies outside the region: {flips} activations differ there"
    ),
    ReasonCode.PREACTIVATIONS_WITHIN_ROUNDING: (
        "{count} pre-activations of the nearest stationary point are within rounding of a kink"
    ),
    ReasonCode.KINKS_DEPENDENT: (
        "{count} samples could not be kept on their kinks, as inputs there are nearly dependent"
    ),
    ReasonCode.ROUNDING_HIDES_GRADIENT: (
        "weights so large, or equations so ill-conditioned, that rounding hides whether G e = 0"
    ),
    ReasonCode.GRADIENT_NOT_ZERO: "G e = 0 could not be reached: {method}",
    ReasonCode.UNEVEN_INPUTS: "inputs so uneven that rounding hides whether each number of G e is zero",
    ReasonCode.MULTIPLIER_AT_END: (_KINKS_UNDECIDED + "a multiplier is within rounding of the end of its interval"),
    ReasonCode.DEPENDENT_MULTIPLIERS_AT_END: (
        _KINKS_UNDECIDED + "multipliers of dependent kinks within rounding of their intervals' ends"
    ),
    ReasonCode.DEPENDENT_KINKS_UNDECIDED: (
        _KINKS_UNDECIDED + "dependent kinks without multipliers, yet no step was found"
    ),
    ReasonCode.DEPENDENT_KINKS_TOO_MANY: (
        _KINKS_UNDECIDED + "{upward} dependent kinks that bend upwards, too many to try all their sides"
    ),
    ReasonCode.ROUNDING_HIDES_KINK_FORCES: _KINKS_UNDECIDED + "rounding hides the forces of the kinks",
    ReasonCode.INACTIVE_UNIT_UNDECIDED: (
        "unit {unit} with z = 0: the forces of its kinks are within rounding, or cancel"
    ),
    ReasonCode.GRADIENT_ON_INACTIVE_UNIT: _FORCE + ", nor is its gradient",
    ReasonCode.FALL_WITHIN_ROUNDING: "the loss falls by less than rounding",
    ReasonCode.TOO_FAR: (
        "the nearest {kind} found lies at a relative distance of {distance:.1e}, beyond max_distance = {limit:g}"
    ),
    ReasonCode.HIGHER_LOSS: "the nearest {kind} found has a higher loss than the weights before",
    ReasonCode.GIVEN_WEIGHTS_FIT: "the given weights have no error",
    ReasonCode.KINKS_NOT_TRIED: "kinks were not tried at this size",
    ReasonCode.MODEL_CERTIFIED: (
        "a stationary point within {radius:.1e}, with strict growth off all active kinks and tangential eigenvalues of "
        "at least {value:.1e} off the symmetries"
    ),
    ReasonCode.MODEL_FITS: "a point within {radius:.1e} where every output is its target",
    ReasonCode.GROWTH_NEGATIVE: "the loss falls off an active kink: its growth is {value:.1e}",
    ReasonCode.NEGATIVE_TANGENTIAL_CURVATURE: (
        "the loss falls along the face: the smallest tangential eigenvalue is {value:.1e}"
    ),
    ReasonCode.NO_STATIONARY_POINT: (
        "Newton's method found no stationary point within max_distance: it reached a relative distance of "
        "{distance:.1e}"
    ),
    ReasonCode.KINKS_NOT_INDEPENDENT: (
        "undecided: the {kinks} active kinks are not independent (LIKQ): σ_min/σ_max of Z is {likq:.1e}"
    ),
    ReasonCode.ZERO_NOT_PROVED: (
        "undecided: a stationary point could not be proved in a ball: rounding or the change of the Hessian is too "
        "large"
    ),
    ReasonCode.PIECES_WITHIN_RADIUS: (
        "undecided: {count} units or windows may change their piece within the radius of {radius:.1e}"
    ),
    ReasonCode.GROWTH_WITHIN_ROUNDING: ("undecided: the growth off a kink, {value:.1e}, is within its error"),
    ReasonCode.POOLING_TIE: "undecided: in {count} windows of max-pooling two numbers are equal within rounding",
    ReasonCode.MODEL_TOO_LARGE: "undecided: {unknowns} unknowns, more than the {limit} of dense linear algebra",
    ReasonCode.STOPPED_BEFORE_MINIMUM: "stopped before the step to the minimum of its region",
    ReasonCode.NEXT_TO_SADDLE: "next to a saddle",
    ReasonCode.POLISHED_TOO_FAR: (
        "moved: polishing led a relative distance of {distance:.1e} away, to {to}; max_distance = {limit:g}"
    ),
    ReasonCode.FIRST_ORDER_TESTS_PASSED: f"{_STATIONARITY}; {_SINE}",
    ReasonCode.NECESSARY_CONDITIONS_ONLY: (
        f"{_STATIONARITY}; {_SINE}; necessary conditions only, with more than one hidden layer"
    ),
    ReasonCode.STATIONARITY_ABOVE_TOLERANCE: _STATIONARITY + ", above {tolerance:.1e}",
    ReasonCode.PREACTIVATION_BELOW_TOLERANCE: (
        f"G e = 0, but {_SINE}, below {{tolerance:.1e}}: at a kink, which first-order tests cannot classify"
    ),
    ReasonCode.NO_OBJECTIVE: (
        "decoupled weight decay, as AdamW's, is the gradient of no function: training lowers no objective that could "
        "have a minimum here"
    ),
    ReasonCode.OBJECTIVE_OF_REPLICAS: (
        "certificates of {replicas} replicas that are deep, or have weight decay or frozen weights, would take more "
        "than about a minute"
    ),
    ReasonCode.NO_STEP_YET: "there was no optimiser step yet",
    ReasonCode.NO_GRADIENT_SEEN: "no gradient was seen",
    ReasonCode.STEP_GRADIENT_ABOVE_TOLERANCE: _STEP_GRADIENT.replace("{batch}", "full batch"),
    ReasonCode.STEP_GRADIENT_SMALL: _STEP_GRADIENT.replace("{batch}", "full batch"),
    ReasonCode.STEP_GRADIENT_OF_MINI_BATCH: _STEP_GRADIENT.replace("{batch}", "mini-batch"),
    ReasonCode.GRADIENT_SMALL: "the gradient's norm is {relative:.1e} of the reference",
    ReasonCode.GRADIENT_ABOVE_TOLERANCE: (
        "the gradient's norm is {relative:.1e} of the reference: above the tolerance of {tolerance:.0e}"
    ),
    ReasonCode.NOT_FINITE: "the loss ({loss}) or the norm of its gradient ({norm}) is not finite",
    ReasonCode.ONE_SIDED: "the gradient and the Hessian are those of one side of kinks only",
    ReasonCode.STATIONARY_ON_KINKS: "stationary on its kinks, to first order: a candidate for a minimum on kinks",
    ReasonCode.LOSS_FALLS_ALONG_KINKS: "the loss falls along its kinks, by {fall:.1e} at {length:.1e}",
    ReasonCode.LOSS_FALLS_OFF_KINK: "the loss falls off a kink in {layer}, by {fall:.1e} at {length:.1e}",
    ReasonCode.FALL_FROM_KINKS_NOT_CONFIRMED: "the loss seems to fall from its kinks, but no fall was measured",
    ReasonCode.HESSIAN_ZERO: "the Hessian is zero up to rounding",
    ReasonCode.NEGATIVE_CURVATURE: "negative curvature: the loss falls by {fall:.1e} at {length:.1e} along v",
    ReasonCode.CURVATURE_EXPLAINED_BY_GRADIENT: (
        "negative curvature, but the remaining gradient can explain it (up to {explained:.1e}): train on"
    ),
    ReasonCode.CURVATURE_NOT_CONFIRMED: (
        "negative curvature, but along its direction the loss does not fall as predicted, beyond rounding and before "
        "a kink"
    ),
    ReasonCode.ROUNDING_HIDES_CURVATURE: "rounding hides the sign of λ_min; float64 may show it",
    ReasonCode.MORE_PRODUCTS_FOR_SIGN: (
        "more products are needed for the sign of λ_min (max_products, and memory_budget; {needed} are enough for most)"
    ),
    ReasonCode.STRICT_MINIMUM: "strict",
    ReasonCode.FLAT_MINIMUM: "flat, but the loss is constant in its flat directions",
    ReasonCode.ZERO_LOSS: "a loss of zero",
    ReasonCode.DEGENERATE_DESCENT: (
        "degenerate: along a direction without curvature the loss falls as the step to the power {order:.1f}, by "
        "{fall:.1e} at {length:.1e}"
    ),
    ReasonCode.GRADIENT_ALONG_FLAT_DIRECTION: (
        "the gradient has a part along directions without curvature, where the loss may fall further"
    ),
    ReasonCode.MORE_PRODUCTS_FOR_NEWTON: "more products are needed for Newton's method (max_products); " + _GAIN,
    ReasonCode.QUADRATIC_MODEL_WRONG: (
        _GAIN + ", but along it the quadratic model is wrong: the gradient is off by {misfit:.0%}"
    ),
    ReasonCode.NEWTON_STEP_GAINS: _GAIN + ": train on",
    ReasonCode.NEWTON_STEP_FAR: _GAIN + ", at a distance of {distance:.1e} of the weights: train on",
    ReasonCode.ROUNDING_HIDES_MINIMUM: "rounding hides where the minimum is, up to {distance:.1e} of the weights",
    ReasonCode.CURVATURE_VARIES: "the smallest curvature differs {length:.1e} along its direction",
    ReasonCode.MORE_PRODUCTS_FOR_FLAT_DIRECTIONS: "more products are needed for flat directions (max_products)",
    ReasonCode.FLAT_DIRECTIONS_UNEXPLAINED: "there are flat directions that no symmetry explains",
    ReasonCode.NO_SECOND_DERIVATIVE: _NO_EIGENVALUE + "{cause}",
    ReasonCode.PRODUCT_NOT_FINITE: _NO_EIGENVALUE + "{cause}",
    ReasonCode.LOSS_NOT_EVALUABLE: _NO_EIGENVALUE + "{cause}",
    ReasonCode.OUT_OF_MEMORY: _NO_EIGENVALUE + "its products do not fit into memory; use smaller batches",
    ReasonCode.TIME_LIMIT: _NO_EIGENVALUE + "{cause}",
    ReasonCode.NO_KINK: "no kink depends on the weights",
    ReasonCode.NEAREST_KINK: "the nearest kink at {relative:.1e} of its scale",
    ReasonCode.UNITS_ON_KINKS: (
        "{count} of {units} units are on a kink within rounding ({by_chance:.1g} would be by chance; nearest in "
        "{layer})"
    ),
    ReasonCode.COARSE_PREACTIVATIONS: (
        "this is in the rounding of {dtype}, in which the module's own step computes (autocast within it)"
    ),
    ReasonCode.SIDES_COMPARED: "between the sides of these kinks the gradient changes by {jump:.1e} of the reference",
    ReasonCode.SIDES_NOT_COMPARED: "the sides of these kinks were not compared",
    ReasonCode.KINK_CONDITIONS: (
        "{kinks} active kinks, whose gradients have rank {rank} (σ_min/σ_max = {likq:.1e}); of the reference, the "
        "gradient along them is {residual:.1e}, and the slowest rise off one {growth:.1e} ±{error:.0e}, in {layer}"
    ),
    ReasonCode.KINKS_TOO_MANY: "the conditions on kinks were not tested: there are more than {limit}",
    ReasonCode.KINKS_OF_OTHER_FUNCTIONS: "the conditions on kinks were not tested: some are kinks of {functions}",
    ReasonCode.KINKS_NOT_EVALUABLE: "the conditions on kinks could not be tested: {cause}",
    ReasonCode.EIGENVALUES: (
        "λ_min = {smallest:.2e} (at least {bound:.2e}) and λ_max = {largest:.2e}, by {products} products"
    ),
    ReasonCode.NEWTON_DISTANCE: "{distance:.1e} of the weights away by Newton's method, which gains {gain:.1e}",
    ReasonCode.NOT_A_PROOF: "second-order evidence, not a proof",
    ReasonCode.MINIMUM_FOUND: "a minimum with margin {margin:.1e}",
    ReasonCode.NO_MINIMUM: (
        "no minimum with {signs} signs and a margin above {margin:.0e}, by a proof of {branches} branches"
    ),
    ReasonCode.REGION_EMPTY: "the region is empty: no weights of unit {unit} have its pattern",
    ReasonCode.REGION_TOO_LARGE: "undecided: too large, N·d0·d1² = {size} is above {limit}",
    ReasonCode.INPUT_TOO_SHORT: "undecided: an input is {relative:.1e} times as long as the longest",
    ReasonCode.RANK_IN_DOUBT: "undecided: the rank is in doubt: a singular value is {relative:.1e} of the largest",
    ReasonCode.FIT_IN_DOUBT: "undecided: G y = 0 is in doubt: its size is {relative:.1e} of ‖y‖",
    ReasonCode.PATTERN_IN_DOUBT: "undecided: whether unit {unit} can have its pattern is in doubt",
    ReasonCode.TOO_MANY_BRANCHES: "undecided: more than {limit} branches",
    ReasonCode.BRANCHES_IN_DOUBT: "undecided: t* = 0 is in doubt in {branches} branches",
    ReasonCode.CHAINS_AGREE: "{chains} chains agree: R-hat is {r_hat:.3f}, with {samples:.0f} effective samples",
    ReasonCode.CHAINS_DIVERGED: _UNRELIABLE + "the chains diverged: the mean is {value:.3g}, with {size} parameters",
    ReasonCode.LOWER_LOSS_FOUND: _UNRELIABLE + "no minimum: a loss {gain:.1e} below L(w*), by {energy:.2g}/(nβ)",
    ReasonCode.MOVES_REJECTED: _UNRELIABLE + "Metropolis' rule accepts {acceptance:.1%} of the moves: too large a step",
    ReasonCode.CHAINS_DRIFT: _UNRELIABLE + "the chains drift by {drift:.1f} standard errors: too few steps of burn-in",
    ReasonCode.CHAINS_DISAGREE: _UNRELIABLE + "the chains disagree: R-hat is {r_hat:.3f}, above {limit:g}",
    ReasonCode.TOO_FEW_SAMPLES: _UNRELIABLE + "{samples:.0f} effective samples, fewer than {limit}: too few steps",
    ReasonCode.STEP_TOO_LARGE: _UNRELIABLE + "half the step changes the mean from {value:.4g} to {halved:.4g}",
    ReasonCode.NOT_CHECKED: "not checked yet",
    ReasonCode.ERROR: "{cause}",
    ReasonCode.DIVERGED: "{cause}",
    ReasonCode.INTERRUPTED: "interrupted after {steps} steps",
    ReasonCode.PROCESS_LOST: "interrupted after {steps} steps by the loss of process {rank}",
}
