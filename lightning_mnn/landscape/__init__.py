"""Mathematics of the loss surface on a fixed data set, in torch and scipy only."""

from lightning_mnn.landscape import bounds
from lightning_mnn.landscape.minimum import FirstOrderVerdict, Kind, first_order_verdicts
from lightning_mnn.landscape.pattern import ActivationPattern, PackedPattern
from lightning_mnn.landscape.region import Region
from lightning_mnn.landscape.survey import Layer, Network, Survey, infer_threshold, merge_surveys, survey_network
from lightning_mnn.landscape.volume import log_cap_measure, log_volume_lower_bound

__all__ = [
    "ActivationPattern",
    "FirstOrderVerdict",
    "Kind",
    "Layer",
    "Network",
    "PackedPattern",
    "Region",
    "Survey",
    "bounds",
    "first_order_verdicts",
    "infer_threshold",
    "log_cap_measure",
    "log_volume_lower_bound",
    "merge_surveys",
    "survey_network",
]
