"""DataModules whose training set can be read exactly once, sample by sample, on any number of processes."""

from lightning_mnn.data.arrays import ArrayData, ArrayFileData
from lightning_mnn.data.gaussian import GaussianData
from lightning_mnn.data.images.image_data import ImageData
from lightning_mnn.data.images.image_folder import ImageFolderData
from lightning_mnn.data.images.store import LabelledImages
from lightning_mnn.data.images.vision import CIFAR10Data, MNISTData
from lightning_mnn.data.loaders.exact import ExactData, ExactLoader
from lightning_mnn.data.loaders.resident import ResidentData, ResidentLoader, TensorData
from lightning_mnn.data.loaders.shards import exact_shard
from lightning_mnn.data.loaders.streaming import StreamedLoader

__all__ = [
    "ArrayData",
    "ArrayFileData",
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
