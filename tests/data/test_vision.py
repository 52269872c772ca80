import shutil
from pathlib import Path

import pytest
import torch

from lightning_mnn.data import MNISTData


@pytest.mark.parametrize(("part", "count"), [("train", 60000), ("test", 10000)])
def test_real_parts_in_two_groups(mnist_root, part, count):
    before = sorted(p.name for p in (mnist_root / "MNIST" / "raw").iterdir())
    data = MNISTData(mnist_root, part=part)
    data.setup()
    assert data.inputs.shape == (count, 784)
    assert data.inputs.dtype == torch.float32
    assert set(data.targets.tolist()) == {0.0, 1.0}
    assert data.inputs.mean(0).abs().max() < 1e-4
    assert float(data.inputs.square().mean()) == pytest.approx(1, abs=1e-4)
    assert sorted(p.name for p in (mnist_root / "MNIST" / "raw").iterdir()) == before  # the folder is only read


def test_all_70000_and_known_class_counts(mnist_root):
    inputs, targets = MNISTData(mnist_root, groups=[[0], [1]], labels="plus_minus").tensors()
    assert len(inputs) == 6903 + 7877  # zeros and ones in MNIST's 70,000
    assert int((targets == -1).sum()) == 6903
    assert len(MNISTData(mnist_root).tensors()[0]) == 70000


def test_whitening_evens_out_the_variances(mnist_root):
    inputs, _ = MNISTData(mnist_root, part="test", whiten=0.1).tensors()
    values = torch.linalg.eigvalsh(inputs.double().T @ inputs.double() / len(inputs))
    plain, _ = MNISTData(mnist_root, part="test").tensors()
    plain_values = torch.linalg.eigvalsh(plain.double().T @ plain.double() / len(plain))
    assert values[-1] / values.mean() < 0.25 * plain_values[-1] / plain_values.mean()


def copy_of(mnist_root, tmp_path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (mnist_root / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(archive, raw)
        (raw / archive.name).chmod(0o644)
    return raw


def test_truncated_archive_is_named(mnist_root, tmp_path):
    raw = copy_of(mnist_root, tmp_path)
    archive = raw / "t10k-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(OSError, match=r"t10k-images-idx3-ubyte\.gz is corrupt or truncated"):
        MNISTData(tmp_path).setup()


def test_unpacked_files_are_read_too(mnist_root, tmp_path):
    from torchvision.datasets import MNIST

    raw = copy_of(mnist_root, tmp_path)
    MNIST(str(tmp_path), download=True)
    for archive in raw.glob("*.gz"):
        archive.unlink()
    expected, _ = MNISTData(mnist_root, part="test").tensors()
    assert torch.equal(MNISTData(tmp_path, part="test").tensors()[0], expected)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no MNIST in .*MNIST/raw: put the archives train-images"):
        MNISTData(tmp_path / "nowhere").setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "half"}, "part must be one of"),
        ({"labels": "words"}, "labels must be zero_one or plus_minus"),
        ({"groups": [[0, 1], [1, 2]]}, "share none"),
        ({"groups": [[0], []]}, "share none"),
        ({"groups": [[0], [1], [2]]}, "two lists"),
        ({"groups": [[0], [10]]}, "classes 0 to 9"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MNISTData(**options)
