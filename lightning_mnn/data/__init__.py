"""DataModules whose training set can be passed over exactly, sample by sample, on any number of processes."""

from lightning_mnn.data.gaussian import GaussianData
from lightning_mnn.data.image_folder import ImageFolderData
from lightning_mnn.data.images import ImageData
from lightning_mnn.data.loader import ExactData, ExactLoader
from lightning_mnn.data.resident import ResidentData, ResidentLoader, TensorData
from lightning_mnn.data.shards import exact_shard
from lightning_mnn.data.store import LabelledImages
from lightning_mnn.data.streaming import StreamedLoader
from lightning_mnn.data.vision import CIFAR10Data, MNISTData

__all__ = [
    "CIFAR10Data",
    "ExactData",
    "ExactLoader",
    "GaussianData",
    "ImageData",
    "ImageFolderData",
    "LabelledImages",
    "MNISTData",
    "ResidentData",
    "ResidentLoader",
    "StreamedLoader",
    "TensorData",
    "exact_shard",
]
