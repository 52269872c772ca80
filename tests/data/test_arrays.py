"""Data of the user's own: what is accepted, how labels are mapped, and what is refused in one line."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import csv, parquet

from lightning_mnn import MNN
from lightning_mnn.data import ArrayData, ArrayFileData, GaussianData
from lightning_mnn.utilities.validation import ArgumentError

X = np.arange(12.0).reshape(4, 3)
Y = np.array([1, -1, 1, -1])


def weights_after(data, make_trainer, replicas):
    model = MNN(4, (6,), replicas=replicas, optimizer={"name": "adam", "lr": 1e-2}, default_callbacks=False)
    make_trainer(max_epochs=7).fit(model, data)
    return list(model.parameters())


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("kind", ["tensors", "arrays", "file"])
def test_the_same_data_give_bit_identical_runs(make_trainer, tmp_path, capfd, replicas, batch_size, kind):
    options = {"replicas": replicas, "batch_size": batch_size, "seed": 3}
    gaussian = GaussianData(17, 4, num_test=6, **options)
    tensors = *gaussian.tensors(), *gaussian.test_tensors()
    if kind == "file":
        names = ("inputs", "targets", "test_inputs", "test_targets")
        np.savez(tmp_path / "a.npz", **dict(zip(names, (t.numpy() for t in tensors), strict=True)))
        same = ArrayFileData(tmp_path / "a.npz", **options, dtype="float64")
    else:
        same = ArrayData(*(tensors if kind == "tensors" else [t.numpy() for t in tensors]), **options)
    assert capfd.readouterr().err == ""  # the labels are kept
    expected, found = (weights_after(data, make_trainer, replicas) for data in (gaussian, same))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    (a, b) = (data.exact_test_loader() for data in (gaussian, same))
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.targets, b.targets)


@pytest.mark.parametrize(
    ("targets", "labels", "expected", "remark"),
    [
        ([0, 1, 1, 0], None, [0, 1, 1, 0], ""),
        ([True, False, True, True], None, [1, 0, 1, 1], ""),
        ([1.0, -1.0, 1.0, 1.0], None, [1, -1, 1, 1], ""),
        ([1.0, -1.0, 1.0, 1.0], "zero_one", [1, 0, 1, 1], "the labels -1.0 and 1.0 become 0 and 1\n"),
        ([3, 7, 7, 3], None, [-1, 1, 1, -1], "the labels 3 and 7 become -1 and 1\n"),
        ([3, 7, 7, 3], "real", [3, 7, 7, 3], ""),
        (["dog", "cat", "cat", "dog"], "zero_one", [1, 0, 0, 1], "the labels cat and dog become 0 and 1\n"),
        (np.array(["dog", "cat", "cat", "dog"], dtype=object), None, [1, -1, -1, 1], "cat and dog become -1 and 1\n"),
        ([b"b", b"a", b"a", b"a"], None, [1, -1, -1, -1], "the labels a and b become -1 and 1\n"),
        ([[0], [1], [1], [0]], None, [0, 1, 1, 0], ""),
        (torch.tensor([0, 1, 1, 0], dtype=torch.bfloat16), None, [0, 1, 1, 0], ""),
        ([0.5, 1.5, 2.5, 0.5], None, [0.5, 1.5, 2.5, 0.5], ""),
    ],
)
def test_labels_are_mapped_and_the_mapping_is_said(capfd, targets, labels, expected, remark):
    inputs, found = ArrayData(X, targets, labels=labels).tensors()
    assert inputs.tolist() == X.tolist()
    assert found.tolist() == expected
    said = capfd.readouterr().err
    assert remark in said
    assert said.count("\n") == bool(remark)


def test_labels_of_the_test_set_are_mapped_as_those_of_training(capfd):
    data = ArrayData(X, ["b", "a", "a", "b"], X[:2], ["b", "b"], labels="zero_one")
    assert data.test_tensors()[1].tolist() == [1, 1]


def test_replicas_have_data_of_their_own_or_share_them():
    own, labels = np.stack([X, -X]), np.stack([Y, -Y])
    for inputs, targets in ((own, labels), (X, labels), (own, Y), (X, Y)):
        data = ArrayData(inputs, targets, replicas=2)
        data.setup()
        loader = data.train_dataloader()
        assert data.input_dim == 3
        assert (loader.inputs.shape, loader.targets.shape) == (inputs.shape, targets.shape)
        assert loader.num_samples == 4
    assert ArrayData(own[:1], labels[:1]).tensors()[0].shape == (4, 3)


@pytest.mark.parametrize("replicas", [1, 2])
def test_subsets_and_held_out_samples_are_those_of_single_runs(replicas):
    inputs, targets = GaussianData(30, 4).tensors()
    options = {"num_samples": 12, "test_fraction": 0.2, "label_noise": 0.25}
    together = ArrayData(inputs, targets, replicas=replicas, seed=5, **options)
    together.setup()
    assert together.inputs.shape[-2:] == (12, 4)
    assert together.test_inputs.shape == (6, 4)  # shared by all replicas and seeds
    for r in range(replicas):
        alone = ArrayData(inputs, targets, seed=5 + r, **options)
        alone.setup()
        part = (together.inputs, together.targets) if replicas == 1 else (together.inputs[r], together.targets[r])
        assert torch.equal(part[0], alone.inputs)
        assert torch.equal(part[1], alone.targets)
        assert torch.equal(together.test_inputs, alone.test_inputs)
        origin = [int((inputs == row).all(1).nonzero()) for row in alone.inputs]
        assert len(set(origin)) == 12
        assert not {*origin} & {int((inputs == row).all(1).nonzero()) for row in alone.test_inputs}
        assert int((targets[origin] != alone.targets).sum()) == 3  # a quarter of the labels


BAD = np.where(np.eye(4, 3) > 0, np.nan, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], Y), r"inputs must have shape \(N, d0\), or \(R, N, d0\) with R = 1 replicas, got \(3,\)"),
        ((X.reshape(4, 3, 1), Y), r"inputs must have shape .*, got \(4, 3, 1\): flatten images, or set replicas"),
        ((X, Y[:3]), r"targets must have shape \(4,\), got \(3,\): give one target for each row of inputs"),
        ((X, np.ones((4, 2))), r"targets must have shape \(4,\), got \(4, 2\)"),
        ((X[:0], Y[:0]), r"inputs must have one or more samples and inputs, got \(0, 3\)"),
        ((X[:, :0], Y), r"inputs must have one or more samples and inputs, got \(4, 0\)"),
        ((BAD, Y), r"inputs must not contain NaN or infinity in float64, got nan: 3 values are so"),
        ((X, [1, -1, np.inf, 1]), r"targets must not contain NaN or infinity in float64, got inf: 1 values are so"),
        ((X, [1, 1, 1, 1]), r"targets must not all be equal, got 1: there is nothing to learn"),
        ((X, ["a", "b", "c", "a"]), r"targets must be two labels, and there are 3 different ones, got \['a', 'b', 'c'"),
        ((X.astype(str), Y), r"inputs must be numbers, got '<U32'"),
        (([[1, 2], [3]], [0, 1]), r"inputs must be an array of numbers or texts, got 'list'"),
        ((X, [None, 1, 2, "a"]), r"targets must be an array of numbers or texts, got 'list'"),
        ((X, Y, X), r"test_inputs needs test_targets, got \(4, 3\): give both, or neither"),
        ((X, Y, X[:, :2], Y), r"test_inputs must have 3 columns, as the inputs, got \(4, 2\)"),
        ((X, Y, X, [1, -1, 2, 1]), r"test_targets must be labels of the training set, -1 and 1, got 2"),
        ((X, Y, X, ["a", "b", "a", "a"]), r"test_targets must be labels of the training set, -1 and 1, got 'a'"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(capfd, arguments, message):
    with pytest.raises(ArgumentError, match=message) as error:
        ArrayData(*arguments)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # no remark on data that are refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "zero_one", "targets": [1, 2, 3, 4]}, "targets must be two labels, and there are 4 different ones"),
        ({"labels": "abc"}, "labels must be one of zero_one, plus_minus, real, null, got 'abc'"),
        ({"replicas": 2, "inputs": np.stack([X] * 3)}, r"with R = 2 replicas, got \(3, 4, 3\)"),
        ({"replicas": 2, "targets": np.stack([Y] * 3)}, r"targets must have shape \(4,\) or \(2, 4\), got \(3, 4\)"),
        ({"num_samples": 5}, "num_samples must be at most 4, the size of the training set, got 5"),
        ({"test_fraction": 0.1}, "test_fraction leaves an empty training or test set of the 4 samples, got 0.1"),
        ({"test_fraction": 0.5, "test_inputs": X, "test_targets": Y}, "test_fraction must be 0 with data that have a"),
        ({"label_noise": 2}, "label_noise must be a number, at least 0 and at most 1, got 2"),
        ({"dtype": "float32", "inputs": 1e300 * X}, "infinity in float32, got 1e[+]300"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        ArrayData(**{"inputs": X, "targets": Y} | options)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_have_a_column_of_targets(tmp_path, suffix):
    table = pa.table({"a": [0.5, 1.5, 2.5], "kind": ["x", "y", "x"], "b": [1, 2, 3]})
    path = tmp_path / f"t{suffix}"
    csv.write_csv(table, path) if suffix == ".csv" else parquet.write_table(table, path)
    inputs, targets = ArrayFileData(path, target="kind").tensors()
    assert inputs.tolist() == [[0.5, 1.0], [1.5, 2.0], [2.5, 3.0]]
    assert targets.tolist() == [-1, 1, -1]


def saved(path, content):
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, str):
        path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "target", "message"),
    [
        ("a.npz", None, None, "file is not a file, got"),
        ("a.txt", "1 2", None, r"file must be a file .npz, .csv, .parquet, got .*a.txt"),
        ("a.npz", "abc", None, r"file cannot be read \(.*\), got .*: save it again by numpy.savez"),
        ("a.npz", {"x": X}, None, "file lacks inputs and targets, it has x, got .*: an .npz file has inputs and"),
        ("a.npz", {"inputs": X, "y": Y}, None, "file lacks targets, it has inputs, y, got"),
        ("a.npz", {"inputs": X, "targets": Y}, "y", "target has no meaning for an .npz file, got 'y'"),
        ("a.npz", {"inputs": X, "targets": np.array([None] * 4)}, None, "file cannot be read .*allow_pickle"),
        ("a.npz", {"inputs": BAD, "targets": Y}, None, "file inputs must not contain NaN .*, got nan, got .*a.npz"),
        ("a.csv", "a,b\n1,2\n", None, "target must name the column of the targets, got None: it has a, b"),
        ("a.csv", "a,b\n1,2\n", "c", "target is no column of .*a.csv, got 'c': it has a, b"),
        ("a.csv", "a,b\n1\n", "b", r"file cannot be read \(.*\), got .*: check that it is a .csv"),
        ("a.csv", "a,b\n1,2\n,3\n", "b", "file has 1 missing values in the column a, got"),
        ("a.csv", "a,b\nu,2\nv,3\n", "b", "file has inputs that are not numbers in the columns a, got"),
        ("a.csv", "b\n2\n", "b", "file must have columns of different names, and one or more of inputs"),
        ("a.csv", "", "b", r"file cannot be read \(.*\)"),
        ("a.parquet", "abc", "b", r"file cannot be read \(.*\), got .*: check that it is a .parquet"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, target, message):
    path = saved(tmp_path / name, content)
    with pytest.raises(ArgumentError, match=message) as error:
        ArrayFileData(path, target)
    assert "\n" not in str(error.value)
