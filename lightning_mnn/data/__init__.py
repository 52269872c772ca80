"""DataModules whose training set can be passed over exactly, sample by sample, on any number of processes."""

from lightning_mnn.data.gaussian import GaussianData
from lightning_mnn.data.loader import ExactData, ExactLoader
from lightning_mnn.data.resident import ResidentData, ResidentLoader, TensorData
from lightning_mnn.data.shards import exact_shard
from lightning_mnn.data.vision import MNISTData

__all__ = [
    "ExactData",
    "ExactLoader",
    "GaussianData",
    "MNISTData",
    "ResidentData",
    "ResidentLoader",
    "TensorData",
    "exact_shard",
]
