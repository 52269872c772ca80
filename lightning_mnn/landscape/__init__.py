"""Mathematics of the loss surface on a fixed data set, in torch and scipy only."""

import warnings
from typing import Any

from lightning_mnn.findings import Finding, FindingCode, Freeze
from lightning_mnn.landscape import bounds
from lightning_mnn.landscape.curvature.lanczos import Spectrum, extreme_eigenvalues, products_needed
from lightning_mnn.landscape.curvature.loss_surface import LossSurface, NoDerivativeError
from lightning_mnn.landscape.curvature.sampled_coefficient import SampledCoefficient, estimate_learning_coefficient
from lightning_mnn.landscape.curvature.second_order import (
    SecondOrderVerdict,
    check_curvature,
    check_stationarity,
    second_order_verdict,
)
from lightning_mnn.landscape.intervals import LogEstimate, Proportion, Stop
from lightning_mnn.landscape.kinks.distance import KinkDistance, kink_distance
from lightning_mnn.landscape.kinks.tracing import Kink, KinkTrace
from lightning_mnn.landscape.labels import infer_threshold
from lightning_mnn.landscape.minima.certificate import Certificate, certify
from lightning_mnn.landscape.minima.first_order import FirstOrderVerdict, first_order_verdicts
from lightning_mnn.landscape.minima.learning_coefficient import ExactCoefficient, learning_coefficient
from lightning_mnn.landscape.minima.models.model_certificate import ModelCertificate, certify_model
from lightning_mnn.landscape.minima.models.model_polishing import PolishedModel, polish_model
from lightning_mnn.landscape.minima.models.planted_models import (
    PlantedModel,
    planted_model_kink_minimum,
    planted_model_minimum,
    planted_model_saddle,
)
from lightning_mnn.landscape.minima.optimality import Direction
from lightning_mnn.landscape.minima.planted import Planted, planted_kink_minimum, planted_minimum, planted_saddle
from lightning_mnn.landscape.minima.polishing import Polished, polish
from lightning_mnn.landscape.network import Network
from lightning_mnn.landscape.pattern import ActivationPattern, PackedPattern, PiecePattern
from lightning_mnn.landscape.regions.existence import ClosedBranch, Existence, check_proof, find_minimum
from lightning_mnn.landscape.regions.region import LeastSquares, Region
from lightning_mnn.landscape.regions.statistics import Layer, NetworkStatistics, merge_statistics, network_statistics
from lightning_mnn.landscape.slices.directions import curvature_directions, principal_directions, random_directions
from lightning_mnn.landscape.slices.input_regions import InputRegions, input_regions
from lightning_mnn.landscape.slices.kink_lines import SliceKinks
from lightning_mnn.landscape.slices.landscape_slice import LandscapeSlice, landscape_slice
from lightning_mnn.landscape.vitals.freezing import freeze_step, weights_freeze_step
from lightning_mnn.landscape.vitals.gradients import GradientSizes, gradient_noise_scale, gradient_sizes
from lightning_mnn.landscape.vitals.signs import (
    dormant_fraction,
    dormant_units,
    effective_rank,
    local_complexity,
    random_frame,
)
from lightning_mnn.landscape.volumes.cone import log_cone_measure
from lightning_mnn.landscape.volumes.loss_volume import (
    LogBounds,
    LossVolume,
    closed_form_log_volume,
    loss_volume,
    minimum_log_volume,
)
from lightning_mnn.landscape.volumes.random_moves import KeepCurve, LocalVolume, local_volume
from lightning_mnn.landscape.volumes.rare_events.interpolators import (
    Architecture,
    MeanError,
    RandomInterpolators,
    random_interpolators,
)
from lightning_mnn.landscape.volumes.rare_events.splitting import RareEvent, rare_event
from lightning_mnn.landscape.volumes.rare_events.suboptimal import RareCensus, rare_census
from lightning_mnn.landscape.volumes.region_census import Census, census, classify, ensemble_census
from lightning_mnn.landscape.volumes.region_volume import (
    RegionVolume,
    log_cap_measure,
    log_volume_lower_bound,
    region_log_volume,
)
from lightning_mnn.utilities.distributed import DistributedGroup, ProcessGroup
from lightning_mnn.verdicts import Kind, Reason, ReasonCode

__all__ = [
    "ActivationPattern",
    "Architecture",
    "Census",
    "Certificate",
    "ClosedBranch",
    "Direction",
    "DistributedGroup",
    "ExactCoefficient",
    "Existence",
    "Finding",
    "FindingCode",
    "FirstOrderVerdict",
    "Freeze",
    "GradientSizes",
    "InputRegions",
    "KeepCurve",
    "Kind",
    "Kink",
    "KinkDistance",
    "KinkTrace",
    "LandscapeSlice",
    "Layer",
    "LeastSquares",
    "LocalVolume",
    "LogBounds",
    "LogEstimate",
    "LossSurface",
    "LossVolume",
    "MeanError",
    "ModelCertificate",
    "Network",
    "NetworkStatistics",
    "NoDerivativeError",
    "PackedPattern",
    "PiecePattern",
    "Planted",
    "PlantedModel",
    "Polished",
    "PolishedModel",
    "ProcessGroup",
    "Proportion",
    "RandomInterpolators",
    "RareCensus",
    "RareEvent",
    "Reason",
    "ReasonCode",
    "Region",
    "RegionVolume",
    "SampledCoefficient",
    "SecondOrderVerdict",
    "SliceKinks",
    "Spectrum",
    "Stop",
    "bounds",
    "census",
    "certify",
    "certify_model",
    "check_curvature",
    "check_proof",
    "check_stationarity",
    "classify",
    "closed_form_log_volume",
    "curvature_directions",
    "dormant_fraction",
    "dormant_units",
    "effective_rank",
    "ensemble_census",
    "estimate_learning_coefficient",
    "extreme_eigenvalues",
    "find_minimum",
    "first_order_verdicts",
    "freeze_step",
    "gradient_noise_scale",
    "gradient_sizes",
    "infer_threshold",
    "input_regions",
    "kink_distance",
    "landscape_slice",
    "learning_coefficient",
    "local_complexity",
    "local_volume",
    "log_cap_measure",
    "log_cone_measure",
    "log_volume_lower_bound",
    "loss_volume",
    "merge_statistics",
    "minimum_log_volume",
    "network_statistics",
    "planted_kink_minimum",
    "planted_minimum",
    "planted_model_kink_minimum",
    "planted_model_minimum",
    "planted_model_saddle",
    "planted_saddle",
    "polish",
    "polish_model",
    "principal_directions",
    "products_needed",
    "random_directions",
    "random_frame",
    "random_interpolators",
    "rare_census",
    "rare_event",
    "region_log_volume",
    "second_order_verdict",
    "weights_freeze_step",
]

_RENAMED = {
    "ProcessTeam": "DistributedGroup",
    "SecondOrderKind": "Kind",
    "Survey": "NetworkStatistics",
    "Team": "ProcessGroup",
    "judge_curvature": "check_curvature",
    "judge_stationarity": "check_stationarity",
    "merge_surveys": "merge_statistics",
    "survey_network": "network_statistics",
}


def __getattr__(name: str) -> Any:
    """Objects under their names of version 0.1."""
    if name not in _RENAMED:
        raise AttributeError(f"module 'lightning_mnn.landscape' has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"lightning_mnn.landscape.{name} is now {new}", DeprecationWarning, stacklevel=2)
    return globals()[new]
