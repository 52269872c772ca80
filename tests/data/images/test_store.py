import json
import os
import shutil
import signal
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_mnn.data.images import store
from lightning_mnn.data.images.store import build_store, list_images, open_store
from lightning_mnn.utilities.files import locked
from tests.children import PATIENCE, processes, wait_for

pytestmark = pytest.mark.xdist_group("store")  # whose fixture takes seconds: for one process, not for each

BROKEN = b"\x89PNG\r\n\x1a\n and nothing more"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """500 photographs, 224 × 224, in ten folders."""
    data = os.environ.get("LIGHTNING_MNN_DATA")
    if data is None or not (Path(data) / "photos.tar").is_file():
        pytest.skip("set LIGHTNING_MNN_DATA to a folder that holds photos.tar")
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(Path(data) / "photos.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / "photos"


def make_tree(root, counts, side=8):
    """PNGs of noise, a different one each."""
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(root / name / f"{i:03}.png")
    return root


@pytest.fixture
def blocks_of_four(monkeypatch):
    monkeypatch.setattr(store, "_BLOCK", 4)


def contents(folder):
    """Names and bytes of a store's files, all but the empty lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def journal(folder):
    """The whole lines."""
    text = (folder / "journal.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def pixels(path, size):
    """The middle square of an image in size × size, by means over blocks of pixels."""
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB"), float)
    side = min(array.shape[:2])
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    square = array[top : top + side, left : left + side]
    return square.reshape(size, side // size, size, side // size, 3).mean((1, 3)).reshape(-1)


def test_rows_are_means_over_the_middle_square_in_the_order_of_classes_and_paths(tmp_path, blocks_of_four):
    root = make_tree(tmp_path / "tree", {"b": 5, "a": 2, "c d": 4}, side=24)
    wide = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)
    (root / "a" / "below" / "deep").mkdir(parents=True)
    Image.fromarray(wide).save(root / "a" / "below" / "deep" / "wide.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(root / "b" / "tall.png")
    made = build_store(root, tmp_path / "store", size=8)
    files = [p for name in ("a", "b", "c d") for p in sorted((root / name).rglob("*.png"), key=str)]
    assert made.names == ("a", "b", "c d")
    assert made.classes.tolist() == [0] * 3 + [1] * 6 + [2] * 4
    assert made.classes.dtype == np.int64
    assert isinstance(made.images, np.memmap)
    expected = np.stack([pixels(path, 8) for path in files])
    assert abs(made.images - expected).max() <= 1  # rounded twice, once a direction
    reopened = open_store(tmp_path / "store", verify=True)
    assert np.array_equal(reopened.images, made.images)
    assert set(contents(tmp_path / "store")) == {"images.bin", "classes.npy", "index.json"}


RED = (200, 100, 50)
GREY = (124, 124, 124)  # its luminance


def flat(mode):
    image = Image.new("RGB", (40, 30), RED)
    if mode == "I;16":
        return Image.fromarray(np.full((30, 40), 124 << 8, np.uint16))
    if mode == "P":
        return image.quantize(4)
    if mode == "P with transparency":
        image = image.convert("RGBA").quantize(4)
        image.info["transparency"] = bytes([128] * 4)
        return image
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name", "colour"),
    [
        ("RGB", "x.png", RED),
        ("RGB", "x.JPEG", RED),
        ("RGB", "x.jpg", RED),
        ("RGB", "x.bmp", RED),
        ("RGB", "x.Webp", RED),
        ("RGB", "x.ppm", RED),
        ("RGBA", "x.png", RED),
        ("P", "x.png", RED),
        ("P", "x.gif", RED),
        ("P with transparency", "x.png", RED),
        ("CMYK", "x.jpg", RED),
        ("L", "x.jpg", GREY),
        ("LA", "x.png", GREY),
        ("I;16", "x.png", GREY),
    ],
)
def test_colour_modes_and_formats(tmp_path, mode, name, colour):
    (tmp_path / "tree" / "a").mkdir(parents=True)
    flat(mode).save(tmp_path / "tree" / "a" / name)
    rgb = build_store(tmp_path / "tree", tmp_path / "rgb", size=4, workers=1).images.reshape(16, 3)
    assert abs(rgb.astype(int) - colour).max() <= 3
    grey = build_store(tmp_path / "tree", tmp_path / "grey", size=4, colour="grey", workers=1).images
    assert grey.shape == (1, 16)
    assert abs(grey.astype(int) - 124).max() <= 3


def test_what_is_an_image_and_what_is_not(tmp_path):
    root = make_tree(tmp_path / "tree", {"a": 2, "b": 1, ".hidden": 1, "empty": 0})
    elsewhere = make_tree(tmp_path / "elsewhere", {"linked": 3})
    (root / "a" / "README.txt").write_text("no image")
    (root / "a" / "._000.png").write_bytes(b"left by a file manager")
    (root / "a" / ".cache").mkdir()
    shutil.copy(root / "b" / "000.png", root / "a" / ".cache")
    shutil.copy(root / "b" / "000.png", root / "top.png")
    (root / "c").symlink_to(elsewhere / "linked")
    (root / "b" / "file.PNG").symlink_to(elsewhere / "linked" / "000.png")
    (root / "b" / "round").symlink_to(root / "b")
    expected = ["a/000.png", "a/001.png", "b/000.png", "b/file.PNG", "c/000.png", "c/001.png", "c/002.png"]
    assert list_images(root) == expected
    made = build_store(root, tmp_path / "store", size=2)
    assert made.names == ("a", "b", "c")
    assert build_store(root, tmp_path / "two", size=2, classes=["c", "a"]).names == ("a", "c")
    assert build_store(root, tmp_path / "two", size=2, classes=["a", "c"]).classes.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"colour": "hsv"}, "colour must be one of"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"classes": ["a", "nobody", "empty"]}, r"no images of the classes \['empty', 'nobody'\]"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, message):
    root = make_tree(tmp_path / "tree", {"a": 1, "empty": 0})
    with pytest.raises(ValueError, match=message):
        build_store(root, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_trees_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="root to a folder"):
        build_store(tmp_path / "nowhere", tmp_path / "store")
    (tmp_path / "tree" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images in"):
        build_store(tmp_path / "tree", tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="no finished store"):
        open_store(tmp_path / "store")


def test_folder_with_other_things_is_left_alone(tmp_path):
    root = make_tree(tmp_path / "tree", {"a": 1})
    with pytest.raises(FileExistsError, match=r"contains \['a'\] and no store"):
        build_store(root, root, size=2)
    assert not (root / "journal.jsonl").exists()


def test_full_disk_is_found_before_the_work(tmp_path):
    root = make_tree(tmp_path / "tree", {"a": 1})
    with pytest.raises(OSError, match="GB more"):
        build_store(root, tmp_path / "store", size=10**6)


def test_finished_store_of_other_options_or_another_tree_is_refused(tmp_path):
    root = make_tree(tmp_path / "tree", {"a": 2, "b": 2})
    build_store(root, tmp_path / "store", size=4)
    with pytest.raises(FileExistsError, match="size is 4, not 2; colour is 'rgb', not 'grey'"):
        build_store(root, tmp_path / "store", size=2, colour="grey")
    with pytest.raises(FileExistsError, match=r"names is \['a', 'b'\], not \['a'\]"):
        build_store(root, tmp_path / "store", size=4, classes=["a"])
    other = make_tree(tmp_path / "other", {"a": 1})
    with pytest.raises(FileExistsError, match=r"made from another tree: .*/tree, not .*/other: choose another folder"):
        build_store(other, tmp_path / "store", size=4)
    make_tree(tmp_path / "val", {"a": 2, "b": 2})
    with pytest.raises(FileExistsError, match=r"made from another tree: .*/tree, not .*/val: choose another folder"):
        build_store(tmp_path / "val", tmp_path / "store", size=4)
    assert len(build_store(tmp_path / "val" / ".." / "tree", tmp_path / "store", size=4).images) == 4
    shutil.rmtree(root / "b")
    with pytest.raises(FileExistsError, match=r"made from another tree: .*tree has no \['b'\]"):
        build_store(root, tmp_path / "store", size=4)
    shutil.rmtree(root)  # which is needed no more
    assert len(build_store(root, tmp_path / "store", size=4).images) == 4


def test_corrupt_images_are_all_named_and_the_others_not_read_again(tmp_path, blocks_of_four):
    root = make_tree(tmp_path / "tree", {"a": 10, "b": 10})
    whole = (root / "b" / "002.png").read_bytes()
    for name in ("a/001.png", "a/009.png", "b/002.png"):
        (root / name).write_bytes(BROKEN)
    (root / "b" / "007.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"4 of 20 .*a/001.png \(Unid.*a/009.png.*b/002.png.*b/007.png .*skip_corrupt=tr"):
        build_store(root, tmp_path / "store", size=4, workers=1)
    with pytest.raises(FileNotFoundError, match="no finished store"):
        open_store(tmp_path / "store")
    assert [line["block"] for line in journal(tmp_path / "store")[1:]] == [0, 1, 2, 3, 4]
    for name in ("a/001.png", "a/009.png"):  # one removed, one still broken, two repaired
        (root / name).unlink()
    (root / "a" / "009.png").write_bytes(BROKEN)
    for name in ("b/002.png", "b/007.png"):
        (root / name).write_bytes(whole)
    with pytest.raises(OSError, match=r"1 of 20 images .* cannot be read: a/009.png \([^,]*\): replace"):
        build_store(root, tmp_path / "store", size=4, workers=1)
    assert [line["block"] for line in journal(tmp_path / "store")[1:]] == [0, 1, 2, 3, 4, 0, 2, 3, 4]
    (root / "a" / "009.png").unlink()
    build_store(root, tmp_path / "store", size=4, workers=1)
    build_store(root, tmp_path / "fresh", size=4)
    assert open_store(tmp_path / "store", verify=True).images.shape == (18, 48)
    found, fresh = contents(tmp_path / "store"), contents(tmp_path / "fresh")
    assert found["images.bin"] == fresh["images.bin"]
    assert found["classes.npy"] == fresh["classes.npy"]


def test_corrupt_images_are_left_out_when_asked(tmp_path, blocks_of_four):
    root = make_tree(tmp_path / "tree", {"a": 10, "b": 10})
    broken = ["a/001.png", "a/009.png", "b/002.png"]
    good = make_tree(tmp_path / "good", {"a": 10, "b": 10})
    for name in broken:
        (root / name).write_bytes(BROKEN)
        (good / name).unlink()
    made = build_store(root, tmp_path / "store", size=4, skip_corrupt=True)
    expected = build_store(good, tmp_path / "expected", size=4)
    assert np.array_equal(made.images, expected.images)
    assert made.classes.tolist() == expected.classes.tolist() == [0] * 8 + [1] * 9
    assert (tmp_path / "store" / "skipped.txt").read_text().split() == broken
    assert set(contents(tmp_path / "store")) == {"images.bin", "classes.npy", "index.json", "skipped.txt"}
    open_store(tmp_path / "store", verify=True)
    with pytest.raises(OSError, match=r"made without 3 images .*store/skipped\.txt: allow that by skip"):
        build_store(root, tmp_path / "store", size=4)
    assert len(build_store(root, tmp_path / "store", size=4, skip_corrupt=True).images) == 17
    build_store(good, tmp_path / "expected", size=4, skip_corrupt=True)
    build_store(good, tmp_path / "expected", size=4)  # nothing was left out


def test_nothing_but_corrupt_images(tmp_path):
    root = make_tree(tmp_path / "tree", {"a": 1})
    (root / "a" / "000.png").write_bytes(BROKEN)
    with pytest.raises(OSError, match="none of the 1 images"):
        build_store(root, tmp_path / "store", size=4, skip_corrupt=True)


def test_plan_of_an_interrupted_build_is_kept_to(tmp_path):
    root = make_tree(tmp_path / "tree", {"a": 3})
    (root / "a" / "000.png").write_bytes(BROKEN)
    with pytest.raises(OSError, match="cannot be read"):
        build_store(root, tmp_path / "store", size=4)
    with pytest.raises(FileExistsError, match="size is 4, not 2: choose another folder or delete it"):
        build_store(root, tmp_path / "store", size=2)
    with pytest.raises(FileExistsError, match=r"root is '.*', not '.*'"):
        build_store(make_tree(tmp_path / "same", {"a": 3}), tmp_path / "store", size=4)
    make_tree(root, {"b": 1})
    with pytest.raises(FileExistsError, match=r"names is \['a'\], not \['a', 'b'\]; images is 3, not 4; listing is"):
        build_store(root, tmp_path / "store", size=4)


@pytest.fixture(scope="module")
def almost_done(tmp_path_factory):
    """A tree, its store, and a build of it that was stopped before the end."""
    folder = tmp_path_factory.mktemp("almost_done")
    root = make_tree(folder / "tree", {"a": 9, "b": 9})
    last = root / "b" / "008.png"
    whole = last.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_BLOCK", 4)
        build_store(root, folder / "expected", size=4)
        last.write_bytes(BROKEN)
        with pytest.raises(OSError, match="cannot be read"):
            build_store(root, folder / "stopped", size=4)
        last.write_bytes(whole)
        yield root, contents(folder / "expected"), contents(folder / "stopped")


@settings(max_examples=12)
@given(place=st.floats(0, 1), torn=st.binary(max_size=5))
def test_journal_cut_anywhere_gives_the_same_store(almost_done, tmp_path_factory, place, torn):
    root, expected, stopped = almost_done
    lines = stopped["journal.jsonl"]
    plan = lines.index(b"\n") + 1
    kept = lines[: plan + round(place * (len(lines) - plan))]
    folder = tmp_path_factory.mktemp("cut") / "store"
    folder.mkdir()
    done = {json.loads(line)["block"] for line in kept[: kept.rfind(b"\n") + 1].splitlines()[1:]}
    images = np.frombuffer(stopped["images.bin.tmp"], np.uint8).reshape(-1, 48).copy()
    for block in set(range(5)) - done:
        images[4 * block : 4 * block + 4] = 7  # what was not journalled may never have reached the disk
    (folder / "images.bin.tmp").write_bytes(images)
    (folder / "journal.jsonl").write_bytes(kept + torn.replace(b"\n", b""))
    build_store(root, folder, size=4)
    assert contents(folder) == expected


def test_interruptions_at_the_very_end(almost_done, tmp_path):
    root, expected, stopped = almost_done
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(stopped["journal.jsonl"])
    (folder / "images.bin").write_bytes(stopped["images.bin.tmp"])  # renamed, and no index yet
    assert build_store(root, folder, size=4).images.tobytes() == expected["images.bin"]
    (folder / "journal.jsonl").write_bytes(stopped["journal.jsonl"])  # the index is there, and things left over
    (folder / "images.bin.tmp").write_bytes(stopped["images.bin.tmp"])
    build_store(root, folder, size=4)
    assert contents(folder) == expected


def build_in_blocks_of_four(root, folder):
    store._BLOCK = 4
    build_store(root, folder, size=16, workers=2)


@pytest.mark.slow
def test_killed_build_goes_on(tmp_path, photographs, blocks_of_four):
    folder = tmp_path / "store"
    build = processes.Process(target=build_in_blocks_of_four, args=(photographs, folder))
    build.start()
    wait_for(lambda: (folder / "journal.jsonl").exists() and len(journal(folder)) >= 20, build)
    build.kill()
    build.join()
    assert build.exitcode == -signal.SIGKILL
    text = (folder / "journal.jsonl").read_bytes()
    assert 20 <= text.count(b"\n") < 126
    build_store(photographs, folder, size=16)
    build_store(photographs, tmp_path / "fresh", size=16, workers=1)
    assert contents(folder) == contents(tmp_path / "fresh")


def test_another_process_at_it_is_waited_for(tmp_path, capsys):
    root, folder = make_tree(tmp_path / "tree", {"a": 2}), tmp_path / "store"
    folder.mkdir()
    builder = threading.Thread(target=build_store, args=(root, folder), kwargs={"size": 4})
    with locked(folder / "lock"):
        builder.start()
        said = []
        wait_for(lambda: said.append(capsys.readouterr().err) or "another process is making the store" in "".join(said))
        assert set(contents(folder)) == set()
    builder.join(PATIENCE)
    assert len(open_store(folder, verify=True).images) == 2


def test_damage_is_found_and_named(tmp_path, blocks_of_four):
    root, folder = make_tree(tmp_path / "tree", {"a": 10}), tmp_path / "store"
    made = build_store(root, folder, size=4)
    images = bytearray((folder / "images.bin").read_bytes())
    images[5 * made.images.shape[1]] ^= 1
    (folder / "images.bin").write_bytes(images)
    for open_it in (open_store, lambda folder: build_store(root, folder, size=4)):
        with pytest.raises(OSError, match="block 1, images 4 to 7, has a wrong checksum: delete"):
            open_it(folder)
    (folder / "images.bin").write_bytes(images[:-1])
    with pytest.raises(OSError, match="has 479 bytes, not 480"):
        open_store(folder)
    classes = bytearray((folder / "classes.npy").read_bytes())
    classes[-1] ^= 1
    (folder / "images.bin").write_bytes(images)
    (folder / "classes.npy").write_bytes(classes)
    with pytest.raises(OSError, match=r"classes\.npy has a wrong checksum"):
        open_store(folder)


def test_of_a_large_store_all_blocks_are_read_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_BLOCK", 1)
    folder = tmp_path / "store"
    build_store(make_tree(tmp_path / "tree", {"a": 31}), folder, size=2)
    images = bytearray((folder / "images.bin").read_bytes())
    images[12] ^= 1
    (folder / "images.bin").write_bytes(images)
    open_store(folder)  # blocks 0, 2, 4, …
    with pytest.raises(OSError, match="block 1, images 1 to 1, has"):
        open_store(folder, verify=True)


def test_full_disks_and_forbidden_files_are_named_and_nothing_unfinished_is_left(tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*store/journal\.jsonl'"):
            build_store(make_tree(tmp_path / "tree", {"a": 1}), tmp_path / "store", size=2)
    assert set(contents(tmp_path / "store")) == set()


def test_the_digest_is_that_of_the_images(tmp_path):
    one, two = make_tree(tmp_path / "one", {"a": 3}), make_tree(tmp_path / "two", {"b": 3})
    first, second = (build_store(root, tmp_path / f"{root.name} store", size=2) for root in (one, two))
    assert first.digest == second.digest  # the same pixels elsewhere
    shutil.copy(one / "a" / "000.png", two / "b" / "001.png")
    assert build_store(two, tmp_path / "third", size=2).digest != first.digest


def test_real_photographs(tmp_path, photographs):
    made = build_store(photographs, tmp_path / "store", size=32)
    assert made.images.shape == (500, 32 * 32 * 3)
    assert np.bincount(made.classes).tolist() == [50] * 10
    assert made.names == tuple(sorted(path.name for path in photographs.iterdir()))
    files = [photographs / file for file in list_images(photographs)]
    expected = np.stack([pixels(path, 32) for path in files])
    assert abs(made.images - expected).mean(1).max() < 12  # a JPEG is decoded at half its size
    assert abs(made.images - expected).mean() < 4
    grey = (np.ptp(expected.reshape(500, -1, 3), axis=2) == 0).all(1)
    assert grey.any()
    pictures = made.images.reshape(500, -1, 3)[grey]
    assert (pictures == pictures[:, :, :1]).all()
