"""Undocumented parts of torchvision: the files of its data sets and their md5 checksums."""

from __future__ import annotations

from torchvision.datasets import CIFAR10, MNIST

from lightning_mnn.utilities.compat.missing import attribute

_LIBRARY = "torchvision"


def mnist_archives() -> dict[str, str]:
    """The archives of MNIST in the folder ``MNIST/raw``, with their checksums: ``MNIST.resources``."""
    return dict(attribute(MNIST, "resources", _LIBRARY))


def cifar10_archive() -> tuple[str, str]:
    """The archive of CIFAR-10 and its checksum: ``CIFAR10.filename`` and ``CIFAR10.tgz_md5``."""
    return str(attribute(CIFAR10, "filename", _LIBRARY)), str(attribute(CIFAR10, "tgz_md5", _LIBRARY))


def cifar10_folder() -> tuple[str, dict[str, str]]:
    """The folder in that archive, and its files with their checksums.

    They are ``CIFAR10.base_folder``, ``train_list``, ``test_list`` and ``meta``.
    """
    names = attribute(CIFAR10, "meta", _LIBRARY)
    batches = [*attribute(CIFAR10, "train_list", _LIBRARY), *attribute(CIFAR10, "test_list", _LIBRARY)]
    return str(attribute(CIFAR10, "base_folder", _LIBRARY)), {**dict(batches), names["filename"]: names["md5"]}
