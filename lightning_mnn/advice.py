"""What to do about a verdict that is not a minimum."""

from __future__ import annotations

from lightning_mnn.verdicts import Kind, ReasonCode

_TRAIN_ON = "train on, with a learning rate that is lower or decays"
_C = ReasonCode

# What to do about a verdict that is not a minimum, by the code of its reason.
ADVICE: dict[ReasonCode, str] = {
    code: advice
    for advice, codes in {
        _TRAIN_ON: (
            *(_C.STATIONARITY_ABOVE_TOLERANCE, _C.STEP_GRADIENT_ABOVE_TOLERANCE, _C.GRADIENT_ABOVE_TOLERANCE),
            *(_C.CURVATURE_EXPLAINED_BY_GRADIENT, _C.CURVATURE_NOT_CONFIRMED, _C.CURVATURE_VARIES, _C.ONE_SIDED),
            *(_C.NEWTON_STEP_GAINS, _C.NEWTON_STEP_FAR, _C.QUADRATIC_MODEL_WRONG, _C.GRADIENT_ALONG_FLAT_DIRECTION),
        ),
        f"{_TRAIN_ON}; or polish=True with a larger max_distance, which moves to the minimum ahead": (
            *(_C.NO_POINT_WITHIN_DISTANCE, _C.OUTSIDE_REGION, _C.TOO_FAR),
            *(_C.GRADIENT_NOT_ZERO, _C.STOPPED_BEFORE_MINIMUM, _C.HIGHER_LOSS),
        ),
        "raise max_distance above this distance, if the weights may move that far": (_C.POLISHED_TOO_FAR,),
        "train on: the loss falls from here; or polish=True with a larger max_distance, which follows the descent": (
            *(_C.FORCE_ALONG_KINKS, _C.MULTIPLIER_OUTSIDE_INTERVAL, _C.STEP_OFF_DEPENDENT_KINKS, _C.NEXT_TO_SADDLE),
            *(_C.DEPENDENT_KINKS_WITHOUT_MULTIPLIERS, _C.FORCE_ON_INACTIVE_UNIT, _C.GRADIENT_ON_INACTIVE_UNIT),
        ),
        "train on, or call polish_model: the loss falls from here": (
            *(_C.GROWTH_NEGATIVE, _C.NEGATIVE_TANGENTIAL_CURVATURE),
        ),
        "train on, or call polish_model with more steps": (_C.NO_STATIONARY_POINT,),
        "train on, with a lower learning rate: the loss falls from these kinks": (
            *(_C.LOSS_FALLS_ALONG_KINKS, _C.LOSS_FALLS_OFF_KINK, _C.FALL_FROM_KINKS_NOT_CONFIRMED),
        ),
        "for a proof, use a network and a loss that certify_model reads: this is a candidate for a minimum": (
            _C.STATIONARY_ON_KINKS,
        ),
        "train on, with smaller batches: the loss falls here": (_C.NEGATIVE_CURVATURE, _C.DEGENERATE_DESCENT),
        "train on, or from another seed: rounding of the certificate, in float64, hides the answer here": (
            *(_C.PREACTIVATIONS_WITHIN_ROUNDING, _C.ROUNDING_HIDES_KINK_FORCES, _C.MULTIPLIER_AT_END),
            *(_C.DEPENDENT_MULTIPLIERS_AT_END, _C.FALL_WITHIN_ROUNDING, _C.INACTIVE_UNIT_UNDECIDED),
            *(_C.ZERO_NOT_PROVED, _C.PIECES_WITHIN_RADIUS, _C.GROWTH_WITHIN_ROUNDING),
        ),
        "train on, or from another seed: the kinks here are degenerate": (
            *(_C.KINKS_DEPENDENT, _C.DEPENDENT_KINKS_UNDECIDED, _C.DEPENDENT_KINKS_TOO_MANY),
            _C.KINKS_NOT_INDEPENDENT,
        ),
        "keep the weights small: start from smaller ones, or lower the learning rate": (_C.ROUNDING_HIDES_GRADIENT,),
        "scale the inputs to similar sizes, as whitening does": (_C.UNEVEN_INPUTS,),
        "use fewer samples or a narrower network: at this size the certificate's solver is iterative": (
            *(_C.LEAST_SQUARES_UNSOLVED, _C.KINKS_NOT_TRIED),
        ),
        "use a smaller network or fewer samples: the proof needs dense matrices": (_C.MODEL_TOO_LARGE,),
        "change the inputs a little, so that no two maxima of a pooling are equal": (_C.POOLING_TIE,),
        "nothing is left to do: the given weights have no error": (_C.GIVEN_WEIGHTS_FIT,),
        "use one hidden layer, whose points on kinks have exact certificates": (_C.PREACTIVATION_BELOW_TOLERANCE,),
        "use weight decay that is part of an objective (of Adam or SGD), or none": (_C.NO_OBJECTIVE,),
        "use fewer replicas, or smaller networks": (_C.OBJECTIVE_OF_REPLICAS,),
        "train for at least one step": (_C.NO_STEP_YET, _C.NO_GRADIENT_SEEN),
        "give a loss_fn that can be evaluated": (_C.STEP_GRADIENT_SMALL, _C.STEP_GRADIENT_OF_MINI_BATCH),
        "let training reach the detector's check at its end": (_C.GRADIENT_SMALL, _C.NOT_CHECKED),
        "lower the learning rate, and check the data for values that are not finite": (_C.NOT_FINITE,),
        "check that the loss depends on the trained weights": (_C.HESSIAN_ZERO,),
        "train in float64, in which rounding is smaller": (_C.ROUNDING_HIDES_CURVATURE, _C.ROUNDING_HIDES_MINIMUM),
        "allow more Hessian–vector products: raise max_products": (
            *(_C.MORE_PRODUCTS_FOR_SIGN, _C.MORE_PRODUCTS_FOR_NEWTON, _C.MORE_PRODUCTS_FOR_FLAT_DIRECTIONS),
        ),
        "train with a little weight decay, against flat directions": (_C.FLAT_DIRECTIONS_UNEXPLAINED,),
        "use operations with a second derivative, or a loss_fn made of them": (_C.NO_SECOND_DERIVATIVE,),
        "train in float64, or with smaller weights: derivatives are not finite": (_C.PRODUCT_NOT_FINITE,),
        "give the detector a loss_fn(module, batch) that can be evaluated": (_C.LOSS_NOT_EVALUABLE,),
        "use smaller batches in the training set's loader": (_C.OUT_OF_MEMORY,),
        "raise max_seconds or end_seconds, or use tier=full": (_C.TIME_LIMIT,),
        "use strict=True, to see where the error arises": (_C.ERROR,),
        "lower the learning rate": (_C.DIVERGED,),
        "continue the run with resume=true": (_C.INTERRUPTED, _C.PROCESS_LOST),
    }.items()
    for code in codes
}


def advice_on(kind: Kind, code: ReasonCode) -> str | None:
    """What to do about a verdict; None for a minimum.

    >>> advice_on(Kind.UNDECIDED, ReasonCode.TIME_LIMIT), advice_on(Kind.KINK_MINIMUM, ReasonCode.CERTIFIED_ON_KINKS)
    ('raise max_seconds or end_seconds, or use tier=full', None)
    """
    return None if kind.is_minimum else ADVICE.get(code)
