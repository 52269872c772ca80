import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_mnn import MNN
from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.data import ImageData, LabelledImages, ResidentLoader, StreamedLoader, exact_shard
from lightning_mnn.data.images import group_classes

ROOT = Path(__file__).parents[2]
NAMES = ("cow", "ant", "bee", "dog")
DIM = 20


def drawn(seed=0, count=83):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 4, count)
    images = rng.normal(120, 30, (count, DIM)) @ (np.eye(DIM) + 0.1 * rng.normal(size=(DIM, DIM)))
    return images.clip(0, 255).astype(np.uint8), classes


class MappedImages(ImageData):
    """Images of a file."""

    input_dim = DIM

    def __init__(self, folder, **options):
        super().__init__(cache=folder / "cache", **options)
        self.folder = folder

    def source(self):
        images, classes = drawn()
        if not (self.folder / "images").exists():
            (self.folder / "images").write_bytes(images.tobytes())
        return LabelledImages(np.memmap(self.folder / "images", np.uint8, "r", shape=images.shape), classes, NAMES)


def everything(data):
    """What a callback sees."""
    inputs, targets = zip(*exact_shard(data.train_dataloader()), strict=True)
    return torch.cat(inputs), torch.cat(targets)


@pytest.mark.parametrize("whiten", [None, 0.05])
@pytest.mark.parametrize("groups", [None, [["cow"], [3, "ant"]]])
@pytest.mark.parametrize("storage", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("equal_norms", [False, True])
def test_every_residency_gives_the_same_numbers(tmp_path, whiten, groups, storage, equal_norms):
    options = {
        "whiten": whiten,
        "groups": groups,
        "storage": storage,
        "equal_norms": equal_norms,
        "batch_size": 7,
        "shuffle": False,
    }
    resident = MappedImages(tmp_path, residency="memory", **options)
    streamed = MappedImages(tmp_path, residency="stream", **options)
    written = MappedImages(tmp_path, residency="stream", materialise=True, **options)
    written.prepare_data()
    x, y = everything(resident)
    assert isinstance(resident.exact_loader, ResidentLoader)
    assert x.dtype == {None: torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[storage]
    for data in (streamed, written):
        inputs, targets = everything(data)
        assert isinstance(data.exact_loader, StreamedLoader)
        assert torch.equal(inputs, x)
        assert torch.equal(targets, y)
        for (some, _), (others, _) in zip(data.exact_loader, resident.exact_loader, strict=True):
            assert torch.equal(some, others)

    images, classes = drawn()
    zero, one = ((1, 2), (0, 3)) if groups is None else ((0,), (3, 1))
    chosen = np.isin(classes, zero + one)
    assert y.tolist() == [float(c in one) for c in classes[chosen]]
    expected = images[chosen] - images[chosen].mean(0)
    if whiten is not None:
        values, vectors = np.linalg.eigh(expected.T @ expected / len(expected))
        expected = expected @ vectors @ np.diag((values + whiten * values.mean()) ** -0.5) @ vectors.T
    expected /= np.sqrt(np.square(expected).mean(1 if equal_norms else None, keepdims=True))
    np.testing.assert_allclose(x.float(), expected, rtol=0, atol=1e-5 if storage is None else 0.02)


@pytest.mark.parametrize("storage", [None, "bfloat16"])
def test_training_and_certificates_are_the_same_whether_streamed_or_not(tmp_path, make_trainer, storage):
    found = []
    for residency in ("memory", "stream"):
        data = MappedImages(tmp_path, residency=residency, storage=storage, batch_size=10, shuffle=False)
        detector = LocalMinimumDetector(Schedule(every=2), max_distance=10.0)
        model = MNN(DIM, (5,), dtype="float32")
        make_trainer(max_epochs=4, callbacks=[detector]).fit(model, data)
        found.append((detector.summary(), [w.detach() for w in model.parameters()]))
    (summary, weights), (other, others) = found
    assert all(torch.equal(w, v) for w, v in zip(weights, others, strict=True))
    assert summary == other


def test_a_run_resumed_within_an_epoch_ends_where_an_unbroken_one_does(tmp_path, make_trainer):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=13, save_top_k=-1)  # an epoch has 9
    weights = []
    for ckpt_path in (None, tmp_path / "step=13.ckpt"):
        data = MappedImages(tmp_path, residency="stream", batch_size=10, buffer_bytes=25 * DIM)
        model = MNN(DIM, (5,), dtype="float32", default_callbacks=False)
        trainer = make_trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True)
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
        assert trainer.global_step == 27
        weights.append([w.detach() for w in model.parameters()])
    assert all(torch.equal(w, v) for w, v in zip(*weights, strict=True))


def test_auto_streams_what_does_not_fit(tmp_path, monkeypatch):
    data = MappedImages(tmp_path, batch_size=7)
    data.setup()
    assert data.inputs.shape == (83, DIM)
    monkeypatch.setattr("lightning_mnn.data.images._free_memory", lambda device: 2 * 83 * DIM * 4 - 1)
    data = MappedImages(tmp_path, batch_size=7)
    assert isinstance(data.train_dataloader(), StreamedLoader)
    assert data.inputs is None
    assert data.targets.shape == (83,)
    assert isinstance(MappedImages(tmp_path, batch_size=7, storage="float16").train_dataloader(), ResidentLoader)


def test_files_are_made_once_and_named_after_all_that_they_depend_on(tmp_path):
    def names(**options):
        data = MappedImages(tmp_path, residency="stream", batch_size=5, materialise=True, **options)
        data.prepare_data()
        data.setup()
        return {path.name for path in (tmp_path / "cache").glob("*") if path.suffix in (".rows", ".npz")}

    first = names()
    assert len(first) == 2
    assert names(labels="plus_minus", seed=3) == first
    assert len(names(storage="float16")) == 3  # another file from the same map
    assert len(names(whiten=0.1)) == 5
    assert len(names(groups=[["cow"], ["ant"]])) == 7
    written = {path: path.read_bytes() for path in (tmp_path / "cache").glob("*.rows")}
    (tmp_path / "images").touch()  # another file, for all that can be known
    assert len(names()) == 9
    assert all(path.read_bytes() == content for path, content in written.items())
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_read_map_is_the_one_that_was_found(tmp_path):
    for whiten in (None, 0.05):
        options = {"residency": "stream", "whiten": whiten, "batch_size": 5}
        found, read = (everything(MappedImages(tmp_path, **options)) for _ in range(2))
        assert torch.equal(found[0], read[0])


@given(st.permutations(range(5)), st.integers(1, 4))
def test_classes_may_be_named_or_counted(order, cut):
    names = ("e", "c", "a", "d", "b")
    groups = tuple(order[:cut]), tuple(order[cut:])
    named = tuple(tuple(names[c] for c in group) for group in groups)
    assert group_classes(named, names) == group_classes(groups, names) == tuple(tuple(sorted(g)) for g in groups)
    first, second = group_classes(None, names)
    assert {names[c] for c in first} == {"a", "b"}
    assert {names[c] for c in second} == {"c", "d", "e"}


class SameImages(MappedImages):
    def source(self):
        return LabelledImages(np.full((9, DIM), 7, np.uint8), np.arange(9) % 3, NAMES[:3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: MappedImages(f, labels="words"), "labels must be one of"),
        (lambda f: MappedImages(f, residency="disk"), "residency must be one of .* got 'disk'"),
        (lambda f: MappedImages(f, storage="int8"), "storage must be one of .* got 'int8'"),
        (lambda f: MappedImages(f, whiten=-0.1), "must not be negative"),
        (lambda f: MappedImages(f, buffer_bytes=0), "buffer_bytes must be at least 1"),
        (lambda f: MappedImages(f, groups=[["cow", 0], ["ant"]]).setup(), "share none"),
        (lambda f: MappedImages(f, groups=[["cow"], ["cat"]]).setup(), r"\(cow, ant, bee, dog\), got \['cat'\]"),
        (lambda f: MappedImages(f, residency="stream").setup(), "the 83 images are streamed, .* set a batch_size"),
        (lambda f: SameImages(f).setup(), "all 9 samples are the same"),
        (
            lambda f: MappedImages(f, residency="stream", batch_size=5, replicas=2).train_dataloader(),
            "2 replicas would have one each",
        ),
    ],
)
def test_bad_input_is_named(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_group_without_images_is_named(tmp_path):
    class TwoClasses(MappedImages):
        def source(self):
            return LabelledImages(np.eye(4, DIM, dtype=np.uint8), np.array([0, 0, 1, 1]), NAMES)

    with pytest.raises(ValueError, match="got 4 of label 0 and 0 of label 1"):
        TwoClasses(tmp_path, groups=[["cow", "ant"], ["bee"]]).setup()


@pytest.mark.slow
@pytest.mark.parametrize("materialise", [False, True], ids=["mapped as they come", "written"])
def test_two_processes_train_as_one(tmp_path, materialise):
    program = """
import sys, torch, pytorch_lightning as pl
from pathlib import Path
from lightning_mnn import MNN
from tests.data.test_images import DIM, MappedImages
folder, devices, materialise = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
torch.set_num_threads(1)
data = MappedImages(folder, residency="stream", whiten=0.1, materialise=materialise, batch_size=10,
                    buffer_bytes=25 * DIM, dtype="float64")
model = MNN(DIM, (5,), optimizer={"name": "sgd", "lr": 0.01}, default_callbacks=False)
trainer = pl.Trainer(max_epochs=3, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
                     logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder)
trainer.fit(model, data)
if trainer.is_global_zero:
    torch.save([w.detach() for w in model.parameters()], folder / "weights.pt")
"""
    weights = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        (folder / "program.py").write_text(program)
        MappedImages(folder).source()
        command = [sys.executable, folder / "program.py", folder, str(devices), str(materialise)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(torch.load(folder / "weights.pt", weights_only=True))
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
