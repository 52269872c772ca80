import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_mnn import MNN
from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.data import ImageData, LabelledImages, ResidentLoader, StreamedLoader, exact_shard
from lightning_mnn.data.images.samples import group_classes
from tests.children import side_by_side

NAMES = ("cow", "ant", "bee", "dog")
DIM = 20


def drawn(seed=0, count=83):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 4, count)
    images = rng.normal(120, 30, (count, DIM)) @ (np.eye(DIM) + 0.1 * rng.normal(size=(DIM, DIM)))
    return images.clip(0, 255).astype(np.uint8), classes


class MappedImages(ImageData):
    """Images of a file, and perhaps others as the test set."""

    input_dim = DIM

    def __init__(self, folder, *, tested=False, **options):
        super().__init__(cache=folder / "cache", **options)
        self.folder = folder
        self.tested = tested

    def test_source(self):
        return LabelledImages(*drawn(1, 31), NAMES) if self.tested else None

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


def unseen(data):
    inputs, targets = zip(*exact_shard(data.exact_test_loader()), strict=True)
    return torch.cat(inputs), torch.cat(targets)


@pytest.mark.parametrize("whiten", [None, 0.05])
@pytest.mark.parametrize("residency", ["memory", "stream", "written"])
def test_the_test_set_gets_the_map_of_training(tmp_path, whiten, residency):
    where = {"residency": "stream", "materialise": True} if residency == "written" else {"residency": residency}
    groups = [["cow"], ["ant", "bee"]]
    data = MappedImages(tmp_path, tested=True, whiten=whiten, groups=groups, batch_size=8, shuffle=False, **where)
    (train, _), (inputs, targets) = everything(data), unseen(data)
    raw, classes = drawn()
    raw = raw[classes < 3].astype(float)
    others, other_classes = drawn(1, 31)
    # The map is affine: it is found from the images and results of the training set.
    affine, *_ = np.linalg.lstsq(np.c_[raw, np.ones(len(raw))], train.double().numpy(), rcond=None)
    expected = np.c_[others[other_classes < 3], np.ones((other_classes < 3).sum())] @ affine
    np.testing.assert_allclose(inputs, expected, atol=1e-4)
    assert targets.tolist() == [float(c > 0) for c in other_classes if c < 3]
    batches = list(data.test_dataloader())
    assert torch.equal(torch.cat([x for x, _ in batches]), inputs)


@pytest.mark.parametrize("residency", ["memory", "stream"])
def test_held_out_images_and_subsets(tmp_path, residency):
    options = {"residency": residency, "batch_size": 8, "shuffle": False}
    whole = MappedImages(tmp_path, test_fraction=0.25, **options)
    part = MappedImages(tmp_path, test_fraction=0.25, num_samples=20, seed=3, label_noise=0.1, **options)
    raw, classes = drawn()
    ones = [float(NAMES[c] in ("cow", "dog")) for c in classes]
    samples, test = whole._samples()
    other, same_test = part._samples()
    assert (samples.count, test.count, other.count) == (62, 21, 20)
    assert sorted([*samples.chosen, *test.chosen]) == [*range(83)]
    assert test.chosen.tolist() == same_test.chosen.tolist()  # whatever the seed
    assert {*other.chosen} < {*samples.chosen}
    assert samples.chosen.tolist() == sorted(samples.chosen)
    assert torch.equal(other.read(0, 20), torch.from_numpy(raw[other.chosen]))
    x, y = everything(part)
    assert (x.mean(0).abs() < 1e-5).all()  # centred by the subset
    assert int((y != torch.tensor(ones)[other.chosen]).sum()) == 2
    assert unseen(part)[1].tolist() == [ones[i] for i in test.chosen]


def test_replicas_of_shared_images_have_labels_of_their_own(tmp_path, make_trainer):
    options = {"batch_size": 9, "residency": "memory", "label_noise": 0.2}

    def trained(replicas, seed):
        model = MNN(DIM, (5,), replicas=replicas, seed=seed, dtype="float64", default_callbacks=False)
        detector = LocalMinimumDetector(Schedule(every=2), stop_training=False)
        trainer = make_trainer(max_epochs=4, callbacks=[detector])
        trainer.fit(model, MappedImages(tmp_path, replicas=replicas, seed=seed, dtype="float64", **options))
        return model, detector.summary()["mse"]

    (together, errors), (alone, error) = trained(3, 4), trained(1, 6)
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a[2], b, rtol=1e-10, atol=1e-10)
    assert errors[2] == pytest.approx(error, rel=1e-9)


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
        data = MappedImages(tmp_path, residency="stream", batch_size=10, buffer_bytes=100 * DIM)
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
    monkeypatch.setattr("lightning_mnn.data.images.image_data.free_memory", lambda device: 2 * 83 * DIM * 4 - 1)
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
    assert len(names(equal_norms=True)) == 8  # from the first map
    assert len(names(storage="float16", dtype="float64")) == 9  # rounded from other numbers
    written = {path: path.read_bytes() for path in (tmp_path / "cache").glob("*.rows")}
    (tmp_path / "images").touch()  # another file, for all that can be known
    assert len(names()) == 11
    assert all(path.read_bytes() == content for path, content in written.items())
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_read_map_is_the_one_that_was_found(tmp_path):
    for whiten in (None, 0.05):
        options = {"residency": "stream", "whiten": whiten, "batch_size": 5}
        found, read = (everything(MappedImages(tmp_path, **options)) for _ in range(2))
        assert torch.equal(found[0], read[0])


def test_the_map_is_read_from_its_file(tmp_path):
    options = {"residency": "stream", "whiten": 0.05, "batch_size": 5}
    inputs, _ = everything(MappedImages(tmp_path, **options))
    (path,) = (tmp_path / "cache").glob("*.npz")
    with np.load(path) as file:
        kept = dict(file)
    np.savez(path, **kept | {"scale": 2 * kept["scale"]})
    assert torch.equal(everything(MappedImages(tmp_path, **options))[0], 2 * inputs)


@pytest.mark.parametrize("left", [0, 1, 0.5, 0.99])
def test_a_damaged_map_is_found_anew(tmp_path, left):
    options = {"residency": "stream", "whiten": 0.05, "batch_size": 5}
    inputs, _ = everything(MappedImages(tmp_path, **options))
    (path,) = (tmp_path / "cache").glob("*.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))] if left < 1 else whole.replace(b"NUMPY", b"OTHER"))
    with pytest.warns(UserWarning, match=r"\.npz is damaged, so the map of the inputs is computed again"):
        found, _ = everything(MappedImages(tmp_path, **options))
    assert torch.equal(found, inputs)
    assert len(path.read_bytes()) == len(whole)
    assert torch.equal(everything(MappedImages(tmp_path, **options))[0], inputs)  # without a warning


def test_a_run_goes_on_if_the_map_cannot_be_kept(tmp_path, monkeypatch):
    inputs, _ = everything(MappedImages(tmp_path, residency="memory"))
    (tmp_path / "cache").write_text("a file where the folder should be")
    options = {"residency": "stream", "batch_size": 5}
    with pytest.warns(UserWarning, match=r"is not saved.*/cache'.*set cache \(data\.cache\)"):
        assert torch.equal(everything(MappedImages(tmp_path, **options))[0], inputs)
    (tmp_path / "cache").unlink()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match=r"is not saved.*No space left on device: '.*cache/map-.*npz'"):
        everything(MappedImages(tmp_path, **options))
    assert list((tmp_path / "cache").iterdir()) == []
    with (
        pytest.warns(UserWarning, match="is not saved"),
        pytest.raises(OSError, match=r"No space left on device: '.*cache/inputs-.*part'"),
    ):
        MappedImages(tmp_path, materialise=True, **options).prepare_data()


def test_written_inputs_come_in_the_order_of_mapped_ones(tmp_path):
    options = {"residency": "stream", "batch_size": 10, "buffer_bytes": 100 * DIM, "storage": "float16"}
    mapped, written = (MappedImages(tmp_path, materialise=m, **options).train_dataloader() for m in (False, True))
    assert not torch.equal(torch.cat([x for x, _ in mapped]), everything(MappedImages(tmp_path, **options))[0])
    for (some, _), (others, _) in zip(mapped, written, strict=True):
        assert torch.equal(some, others)


def test_a_run_is_resumed_with_the_residency_that_it_began_with(tmp_path, make_trainer, monkeypatch):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=13, save_top_k=-1)

    def fit(ckpt_path=None, **options):
        model = MNN(DIM, (5,), dtype="float32", default_callbacks=False)
        trainer = make_trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True)
        data = MappedImages(tmp_path, batch_size=10, **options)
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
        return [w.detach() for w in model.parameters()]

    weights, saved = fit(), tmp_path / "step=13.ckpt"
    monkeypatch.setattr("lightning_mnn.data.images.image_data.free_memory", lambda device: 0.0)
    with pytest.raises(ValueError, match=r"residency was memory, and is now stream: set data\.residency=memory"):
        fit(saved)
    assert all(torch.equal(w, v) for w, v in zip(weights, fit(saved, residency="memory"), strict=True))
    fit()
    monkeypatch.setattr("lightning_mnn.data.images.image_data.free_memory", lambda device: 1e9)
    latest = max(tmp_path.glob("step=13*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    with pytest.raises(ValueError, match=r"residency was stream, and is now memory: set data\.residency=stream"):
        fit(latest)


class OtherImages(MappedImages):
    """As many of the same classes, one pixel of which is another."""

    def source(self):
        images, classes = drawn()
        images[40, 3] ^= 1
        return LabelledImages(images, classes, NAMES)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"groups": [["cow"], ["ant"]]}, "samples was 83, and is"),
        ({"groups": [["cow"], ["ant", "bee", "dog"]]}, "samples of label 0 and 1 was .*: resume it on the data that"),
        ({"groups": [["cow", "dog"], ["ant", "bee"]]}, "samples of label 0 and 1 was|digest of the images was"),
        ({"labels": "plus_minus"}, "labels was zero_one, and is now plus_minus: set data.labels=zero_one"),
        ({"whiten": 0.1}, "whiten was None, and is now 0.1: set data.whiten=null"),
        ({"equal_norms": True}, "equal_norms was False, and is now True: set data.equal_norms=false"),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["setup first", "setup last"])
def test_a_run_is_not_resumed_on_other_data(tmp_path, other, message, late):
    first = MappedImages(tmp_path)
    first.train_dataloader()
    state = first.state_dict()
    resumed = MappedImages(tmp_path, **other)
    if late:
        resumed.load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            resumed.setup()
    else:
        resumed.setup()
        with pytest.raises(ValueError, match=message):
            resumed.load_state_dict(state)


def test_other_images_are_told_and_moved_ones_are_not(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    first = MappedImages(tmp_path / "here", residency="stream", batch_size=5)
    first.setup()
    moved = MappedImages(tmp_path / "there", residency="stream", batch_size=5, seed=1)
    moved.setup()
    moved.load_state_dict(first.state_dict())
    moved.load_state_dict({"next_batch": 3})  # of a checkpoint that knows nothing of its data
    ordered = [MappedImages(tmp_path / "here", residency=r, batch_size=5, shuffle=False) for r in ("memory", "stream")]
    for data in ordered:
        data.setup()
    ordered[1].load_state_dict(ordered[0].state_dict())  # the batches are the same
    small = MappedImages(tmp_path / "here", residency="stream", batch_size=5, buffer_bytes=100)
    small.setup()
    with pytest.raises(ValueError, match=r"buffer_bytes was 1073741824, and is now 100: set data\.buffer_bytes="):
        small.load_state_dict(first.state_dict())

    class SameArray(OtherImages):
        def source(self):
            return LabelledImages(*drawn(), NAMES)

    state = SameArray(tmp_path).state_dict()
    assert state == {"data": {}}
    known, other = SameArray(tmp_path), OtherImages(tmp_path)
    for data in (known, other):
        data.setup()
    with pytest.raises(ValueError, match="digest of the images was"):
        other.load_state_dict(known.state_dict())


@given(st.permutations(range(12)), st.integers(1, 11))
def test_a_number_is_the_name_that_reads_so(order, cut):
    names = tuple(sorted(str(number) for number in range(12)))  # 0, 1, 10, 11, 2, …
    groups = tuple(order[:cut]), tuple(order[cut:])
    found = group_classes(groups, names)
    assert [{int(names[index]) for index in group} for group in found] == [set(group) for group in groups]


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
        (lambda f: MappedImages(f, whiten=-0.1), "must be a finite number that is not negative"),
        (lambda f: MappedImages(f, whiten=float("inf")), "whiten must be a finite number .* got inf"),
        (lambda f: MappedImages(f, groups=5), "groups must be two lists of classes .*, got 5"),
        (lambda f: MappedImages(f, groups="[cow,ant]"), r"groups must be two lists of .*, got '\[cow,ant\]'"),
        (lambda f: MappedImages(f, groups=["cow", "ant"]), r"groups must be two lists .*, got \['cow', 'ant'\]"),
        (lambda f: MappedImages(f, groups=[["cow"], 3]), r"groups must be two lists .*, got \[\['cow'\], 3\]"),
        (lambda f: MappedImages(f, groups=[["cow"], [["ant"]]]), "groups must be two lists of classes"),
        (lambda f: MappedImages(f, buffer_bytes=0), "buffer_bytes must be at least 1"),
        (lambda f: MappedImages(f, groups=[["cow", 0], ["ant"]]).setup(), "share none"),
        (
            lambda f: MappedImages(f, groups=[["cow"], ["cat"]]).setup(),
            r"must not contain \[.cat.\], .*cow, ant, bee, dog",
        ),
        (lambda f: MappedImages(f, residency="stream").setup(), "the 83 images are streamed, .* set a batch_size"),
        (lambda f: SameImages(f).setup(), "all 9 samples are the same"),
        (
            lambda f: MappedImages(f, residency="stream", batch_size=5, replicas=2).train_dataloader(),
            "2 replicas would each have their own",
        ),
        (lambda f: MappedImages(f, num_samples=84).setup(), "num_samples must be at most 83"),
        (lambda f: MappedImages(f, num_samples=5, replicas=2), "num_samples needs replicas=1: each replica would"),
        (lambda f: MappedImages(f, test_fraction=1), "test_fraction must be a number, at least 0 and below 1"),
        (lambda f: MappedImages(f, test_fraction=0.5, tested=True).setup(), "test_fraction must be 0 with data that"),
        (
            lambda f: MappedImages(f, residency="stream", batch_size=5, replicas=2, label_noise=0.1).setup(),
            "streamed images have one list of labels, but label_noise",
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


def train(devices, folder, materialise):
    data = MappedImages(
        folder,
        residency="stream",
        whiten=0.1,
        materialise=materialise,
        batch_size=10,
        buffer_bytes=100 * DIM,
        dtype="float64",
        tested=True,
    )
    model = MNN(DIM, (5,), optimizer={"name": "sgd", "lr": 0.01}, default_callbacks=False)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(model, data)
    assert trainer.world_size == devices
    if trainer.is_global_zero:
        torch.save([w.detach() for w in model.parameters()], folder / "weights.pt")
    (found,) = trainer.test(model, data, verbose=False)
    whole = MappedImages(folder, whiten=0.1, dtype="float64", residency="memory", tested=True)
    whole.setup()
    errors = model(whole.test_inputs) - whole.test_targets
    assert found["test/mse"] == pytest.approx(float(errors.square().mean()), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("materialise", [False, True], ids=["mapped as they come", "written"])
def test_two_processes_train_as_one(tmp_path, materialise):
    weights = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        MappedImages(folder).source()
        side_by_side(folder, devices, train, devices, folder, materialise)
        weights.append(torch.load(folder / "weights.pt", weights_only=True))
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
