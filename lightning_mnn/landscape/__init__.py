"""Mathematics of the loss surface on a fixed data set, in torch and scipy only."""

from lightning_mnn.landscape import bounds
from lightning_mnn.landscape.census import Census, Proportion, census, classify, ensemble_census
from lightning_mnn.landscape.cone import LogEstimate, log_cone_measure
from lightning_mnn.landscape.existence import ClosedBranch, Existence, check_proof, find_minimum
from lightning_mnn.landscape.judgement import Direction, Kind
from lightning_mnn.landscape.kink_trace import Kink, KinkTrace
from lightning_mnn.landscape.minimum import Certificate, FirstOrderVerdict, certify, first_order_verdicts
from lightning_mnn.landscape.pattern import ActivationPattern, PackedPattern
from lightning_mnn.landscape.planted import Planted, planted_kink_minimum, planted_minimum, planted_saddle
from lightning_mnn.landscape.polishing import Polished, polish
from lightning_mnn.landscape.region import LeastSquares, Region
from lightning_mnn.landscape.splitting import RareCensus, RareEvent, rare_census, rare_event
from lightning_mnn.landscape.survey import Layer, Network, Survey, infer_threshold, merge_surveys, survey_network
from lightning_mnn.landscape.team import ProcessTeam, Team
from lightning_mnn.landscape.volume import RegionVolume, log_cap_measure, log_volume_lower_bound, region_log_volume

__all__ = [
    "ActivationPattern",
    "Census",
    "Certificate",
    "ClosedBranch",
    "Direction",
    "Existence",
    "FirstOrderVerdict",
    "Kind",
    "Kink",
    "KinkTrace",
    "Layer",
    "LeastSquares",
    "LogEstimate",
    "Network",
    "PackedPattern",
    "Planted",
    "Polished",
    "ProcessTeam",
    "Proportion",
    "RareCensus",
    "RareEvent",
    "Region",
    "RegionVolume",
    "Survey",
    "Team",
    "bounds",
    "census",
    "certify",
    "check_proof",
    "classify",
    "ensemble_census",
    "find_minimum",
    "first_order_verdicts",
    "infer_threshold",
    "log_cap_measure",
    "log_cone_measure",
    "log_volume_lower_bound",
    "merge_surveys",
    "planted_kink_minimum",
    "planted_minimum",
    "planted_saddle",
    "polish",
    "rare_census",
    "rare_event",
    "region_log_volume",
    "survey_network",
]
