import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, MNIST

from lightning_mnn import MNN
from lightning_mnn.data import CIFAR10Data, MNISTData


def ready(data):
    data.setup()
    return data


@pytest.mark.parametrize(("part", "count"), [("train", 60000), ("test", 10000)])
def test_real_parts_in_two_groups(mnist_root, part, count):
    before = sorted(p.name for p in (mnist_root / "MNIST" / "raw").iterdir())
    data = ready(MNISTData(mnist_root, part=part))
    assert data.inputs.shape == (count, 784)
    assert data.inputs.dtype == torch.float32
    assert set(data.targets.tolist()) == {0.0, 1.0}
    assert data.inputs.mean(0).abs().max() < 1e-4
    assert float(data.inputs.square().mean()) == pytest.approx(1, abs=1e-4)
    assert sorted(p.name for p in (mnist_root / "MNIST" / "raw").iterdir()) == before  # the folder is only read


def test_the_other_part_is_the_test_set(mnist_root, make_trainer):
    data = ready(MNISTData(mnist_root, part="train", groups=[[0], [1]], num_samples=500, batch_size=100))
    assert data.inputs.shape == (500, 784)
    assert data.test_inputs.shape == (980 + 1135, 784)  # zeros and ones in the 10,000
    assert int(data.test_targets.sum()) == 1135
    model = MNN(784, (20,), dtype="float32", optimizer={"name": "adam", "lr": 1e-2}, default_callbacks=False)
    trainer = make_trainer(max_epochs=10, limit_val_batches=0)
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    outputs = model(data.test_inputs).detach()
    assert found["test/mce"] == pytest.approx(float(((outputs > 0.5) != (data.test_targets > 0.5)).double().mean()))
    assert found["test/mce"] < 0.2
    assert ready(MNISTData(mnist_root, part="test")).test_targets is None


def test_all_70000_and_known_class_counts(mnist_root):
    data = ready(MNISTData(mnist_root, groups=[[0], [1]], labels="plus_minus"))
    assert len(data.inputs) == 6903 + 7877  # zeros and ones in MNIST's 70,000
    assert int((data.targets == -1).sum()) == 6903
    assert len(ready(MNISTData(mnist_root)).inputs) == 70000


@pytest.mark.parametrize("whiten", [None, 0.1])
def test_the_obvious_way_gives_the_same_numbers(mnist_root, whiten):
    data = ready(MNISTData(mnist_root, part="test", whiten=whiten, groups=[[1, 7], [8]]))
    raw = ready(MNISTData(mnist_root, part="test")).source()
    x = raw.images[np.isin(raw.classes, [1, 7, 8])] / 255
    x -= x.mean(0)
    if whiten is not None:
        values, vectors = np.linalg.eigh(x.T @ x / len(x))
        x = x @ vectors @ np.diag((values.clip(0) + whiten * values.mean()) ** -0.5) @ vectors.T
    x /= np.sqrt(np.square(x).mean())
    np.testing.assert_allclose(data.inputs, x, atol=2e-5)
    assert data.targets.tolist() == [float(c == 8) for c in raw.classes if c in (1, 7, 8)]


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
    raw = copy_of(mnist_root, tmp_path)
    MNIST(str(tmp_path), download=True)
    for archive in raw.glob("*.gz"):
        archive.unlink()
    expected = ready(MNISTData(mnist_root, part="test"))
    assert torch.equal(ready(MNISTData(tmp_path, part="test")).inputs, expected.inputs)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no MNIST in .*MNIST/raw: put the archives train-images"):
        MNISTData(tmp_path / "nowhere").setup()
    with pytest.raises(
        FileNotFoundError, match=r"no CIFAR-10 in .*nowhere: put cifar-10-python\.tar\.gz there, or its"
    ):
        CIFAR10Data(tmp_path / "nowhere").setup()


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def cifar_root(tmp_path, monkeypatch) -> Path:
    """A tree in CIFAR-10's format, 20 images a batch, which torchvision is told to take for the original."""
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def written(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return md5(folder / name)

    def batch(name):
        images = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        return [name, written(name, {"data": images, "labels": (rng.permutation(20) % 10).tolist()})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": written("batches.meta", {"label_names": CLASSES})})
    archive = tmp_path / "cifar" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    return tmp_path / "cifar"


def test_cifar10_from_its_folder_and_from_its_archive(cifar_root):
    data = ready(CIFAR10Data(cifar_root, groups=[["cat", "dog"], ["ship", 9]]))
    assert data.inputs.shape == (4 * 2 * 6, 3072)
    with (cifar_root / "cifar-10-batches-py" / "data_batch_1").open("rb") as file:
        first = pickle.load(file)  # noqa: S301
    label = next(c for c in first["labels"] if c in (3, 5, 8, 9))
    assert data.targets[0] == (label in (8, 9))
    source = data.source()
    assert source.names == tuple(CLASSES)
    assert (source.images[7].reshape(32, 32, 3)[..., 1] == first["data"][7].reshape(3, 32, 32)[1]).all()
    shutil.rmtree(cifar_root / "cifar-10-batches-py")
    assert torch.equal(ready(CIFAR10Data(cifar_root, groups=[["cat", "dog"], ["ship", 9]])).inputs, data.inputs)
    assert [p.name for p in cifar_root.iterdir()] == ["cifar-10-python.tar.gz"]  # the folder is only read


@pytest.mark.parametrize(("part", "count"), [("train", 100), ("test", 20), ("all", 120)])
def test_parts_of_cifar10(cifar_root, part, count):
    data = ready(CIFAR10Data(cifar_root, part))
    assert len(data.inputs) == count
    assert int(data.targets.sum()) == count // 2  # dog to truck


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_damaged_or_missing_batch_is_named(cifar_root, name):
    file = cifar_root / "cifar-10-batches-py" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match=rf"{name} is corrupt or truncated: its md5 is not"):
        CIFAR10Data(cifar_root).setup()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        CIFAR10Data(cifar_root).setup()


def test_a_damaged_archive_is_not_unpacked(cifar_root):
    shutil.rmtree(cifar_root / "cifar-10-batches-py")
    archive = cifar_root / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"cifar-10-python\.tar\.gz is corrupt or truncated"):
        CIFAR10Data(cifar_root).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "half"}, "part must be one of"),
        ({"labels": "words"}, "labels must be one of"),
        ({"groups": [[0, 1], [1, 2]]}, "share none"),
        ({"groups": [[0], []]}, "share none"),
        ({"groups": [[0], [1], [2]]}, "two lists"),
        ({"groups": [[0], [10]]}, "classes 0 to 9"),
        ({"groups": [["3"], [3]]}, "share none"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MNISTData(**options)


def test_unknown_classes_of_cifar10_are_named(cifar_root):
    with pytest.raises(ValueError, match=r"groups must not contain \['cow'\].*: name classes 0 to 9, or airplane"):
        CIFAR10Data(cifar_root, groups=[["cat"], ["cow"]]).setup()
