import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image

from lightning_mnn import MNN
from lightning_mnn.data.images.image_folder import ImageFolderData
from lightning_mnn.data.loaders.streaming import BUFFER_BYTES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIGHTNING_MNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path) -> Path:
    random = np.random.default_rng(0)
    for name in ("ant", "bee", "cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (12, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(("colour", "channels"), [("rgb", 3), ("grey", 1)])
def test_images_in_two_halves_of_the_classes(tree, colour, channels):
    data = ImageFolderData(tree, 4, colour, batch_size=8, dtype="float64")
    data.prepare_data()
    data.setup("fit")
    assert data.inputs.shape == (16, data.input_dim) == (16, 16 * channels)
    assert data.targets.tolist() == [0.0] * 8 + [1.0] * 8
    raw = torch.from_numpy(data.source().images.astype(float))
    centred = raw - raw.mean(0)
    torch.testing.assert_close(data.inputs, centred / centred.square().mean().sqrt())


def test_groups_and_classes(tree):
    data = ImageFolderData(tree, 4, groups=[["dog"], ["ant", "cat"]], labels="plus_minus")
    data.setup()
    assert data.targets.tolist() == [1.0] * 8 + [-1.0] * 4  # in the order of the store
    some = ImageFolderData(tree, 4, classes=["dog", "bee"])
    some.setup()
    assert some.source().names == ("bee", "dog")
    assert len(some.inputs) == 8


def test_a_second_folder_is_the_test_set(tree, tmp_path):
    other = tmp_path / "others"
    for name, number in (("dog", 1), ("ant", 2)):  # not all classes
        (other / name).mkdir(parents=True)
        shutil.copy(tree / name / f"{number}.png", other / name)
    data = ImageFolderData(tree, 4, groups=[["dog"], ["ant", "cat"]], test_root=other)
    data.prepare_data()
    data.setup()
    assert data.test_targets.tolist() == [1.0, 0.0]  # in the order of the store
    stored = [row for name, number in (("ant", 2), ("dog", 1)) for row in data.inputs[stored_as(data, name)][[number]]]
    assert torch.equal(data.test_inputs, torch.stack(stored))
    (other / "eel").mkdir()
    shutil.copy(tree / "dog" / "1.png", other / "eel")
    with pytest.raises(ValueError, match=r"test_root has classes that .*pictures lacks: \['eel'\]"):
        ImageFolderData(tree, 4, test_root=other, store=tmp_path / "a").prepare_data()


def stored_as(data, name):
    """Which training images are of a class."""
    source = data.source()
    classes = source.classes[data._samples()[0].chosen]
    return torch.from_numpy(classes == source.names.index(name))


def test_a_store_is_made_once(tree, cache):
    data = ImageFolderData(tree, 4)
    assert data.store.parent == cache
    assert data.store.name.startswith("pictures-")
    data.prepare_data()
    images = np.array(data.source().images)
    made = (data.store / "images.bin").stat()
    shutil.rmtree(tree)
    tree.mkdir()
    for name in ("ant", "bee", "cat", "dog"):
        (tree / name).mkdir()
    again = ImageFolderData(tree, 4, workers=1)
    again.prepare_data()
    assert np.array_equal(again.source().images, images)
    assert (data.store / "images.bin").stat() == made


def test_a_store_for_each_root_size_colour_and_choice_of_classes(tree, tmp_path):
    options = [{}, {"size": 8}, {"colour": "grey"}, {"classes": ["ant"]}, {"classes": ["ant", "bee"]}]
    stores = [ImageFolderData(tree, **option).store for option in options]
    stores += [ImageFolderData(tree / "ant").store, ImageFolderData(tree, cache=tmp_path / "other").store]
    assert len(set(stores)) == len(stores)
    assert ImageFolderData(tree, classes=["bee", "ant"]).store == stores[4]
    assert ImageFolderData(os.path.relpath(tree)).store == stores[0]
    assert ImageFolderData(tree, store="mine").store == Path("mine").resolve()


def test_bad_arguments_are_named(tree):
    with pytest.raises(ValueError, match="size must be at least 1"):
        ImageFolderData(tree, 0)
    with pytest.raises(ValueError, match="colour must be one of"):
        ImageFolderData(tree, colour="red")
    with pytest.raises(FileNotFoundError, match="root to a folder"):
        ImageFolderData(tree / "nowhere").prepare_data()


def test_classes_and_groups_that_are_numbers_are_names(tmp_path):
    for number in range(12):
        (tmp_path / "tree" / str(number)).mkdir(parents=True)
        Image.new("L", (4, 4), 20 * number).save(tmp_path / "tree" / str(number) / "1.png")
    data = ImageFolderData(tmp_path / "tree", 2, "grey", groups=[[2], [3, 10]])
    data.setup()
    x = data.inputs[:, 0]
    assert data.targets.tolist() == [1.0, 0.0, 1.0]  # in the order 10, 2, 3
    torch.testing.assert_close((x[0] - x[1]) / (x[2] - x[1]), torch.tensor(8.0))
    assert ImageFolderData(tmp_path / "tree", 2, classes=[2, 3]).source().names == ("2", "3")
    for classes in ("2", 2):
        with pytest.raises(ValueError, match=r"classes must be a list of names, or null, got '?2"):
            ImageFolderData(tmp_path / "tree", 2, classes=classes)


def test_a_store_of_another_tree_or_without_some_images_is_refused(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "val")
    (tree / "bee" / "2.png").write_bytes(b"no image")
    ImageFolderData(tree, 4, store=tmp_path / "store", skip_corrupt=True).prepare_data()
    with pytest.raises(FileExistsError, match=r"made from another tree: .*pictures, not .*val"):
        ImageFolderData(tmp_path / "val", 4, store=tmp_path / "store").prepare_data()
    with pytest.raises(OSError, match="made without 1 images"):
        ImageFolderData(tree, 4, store=tmp_path / "store").prepare_data()


def test_corrupt_images(tree):
    (tree / "bee" / "2.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"1 of 16 images .*bee/2\.png"):
        ImageFolderData(tree, 4).prepare_data()
    data = ImageFolderData(tree, 4, skip_corrupt=True)
    data.prepare_data()
    data.setup()
    assert len(data.inputs) == 15


def test_training(tree, make_trainer):
    data = ImageFolderData(tree, 4, batch_size=8)
    make_trainer(max_epochs=2).fit(MNN(data.input_dim, hidden_dims=(5,)), datamodule=data)


@pytest.mark.parametrize("option", ["mnist", "cifar10", "image_folder", "imagenet64"])
def test_all_images_may_be_streamed_by_config(option, tmp_path):
    asked = ["data.materialise=true", f"data.cache={tmp_path}", "data.buffer_bytes=1000", "data.residency=stream"]
    with initialize_config_module("lightning_mnn.conf", version_base=None):
        plain = instantiate(compose("config", [f"data={option}", f"data.root={tmp_path}"]).data)
        data = instantiate(compose("config", [f"data={option}", f"data.root={tmp_path}", *asked]).data)
    assert (data.materialise, data.cache, data.buffer_bytes, data.residency) == (True, tmp_path, 1000, "stream")
    assert plain.buffer_bytes == BUFFER_BYTES


@pytest.mark.parametrize(("option", "input_dim"), [("image_folder", 3072), ("imagenet64", 12288)])
def test_configs(tree, option, input_dim):
    with initialize_config_module("lightning_mnn.conf", version_base=None):
        config = compose("config", [f"data={option}", f"data.root={tree}", "data.skip_corrupt=true"])
    data = instantiate(config.data)
    assert isinstance(data, ImageFolderData)
    assert data.input_dim == input_dim
    assert data.skip_corrupt
    assert data.source().images.shape == (16, input_dim)
