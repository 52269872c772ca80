"""Files that were cut, changed or are of another kind, and full disks: one line names the file, and nothing changes.

The commands run in this process, by the entry that the console script calls, but where they are to break off.
"""

import json
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mnn import MNN
from lightning_mnn.callbacks import PatternStore
from lightning_mnn.loggers.csv_logs import ResumableCSVLogger
from lightning_mnn.runs.checkpoints import read_checkpoint
from lightning_mnn.tasks.parts import Part, finish_parts
from lightning_mnn.utilities.files import DamagedFileError, read_csv, read_json, whole_file, write_json
from tests import children
from tests.bad_commands import refused_line

SMALL = ("data.num_samples=20", "data.input_dim=6", "model.hidden_dims=[8]", "trainer.accelerator=cpu", "seed=1")
TINY = (*SMALL, "trainer.max_epochs=3", "trainer.log_every_n_steps=1", "hydra.run.dir=run", "logger.mode=disabled")
RESUME = " ".join((*TINY, "resume=true"))
LAST = Path("run", "checkpoints", "last.ckpt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a run was trained, which says of itself that it is not finished."""
    folder = tmp_path_factory.mktemp("trained")
    children.command(folder, *TINY)
    summary = folder / "run" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"finished": False}))
    return folder / "run"


@pytest.fixture
def refused(trained, monkeypatch, capfd):
    """Runs a command beside a copy of that run in which a file is damaged; it is to be refused, and change nothing."""

    def run(command, damage=lambda: None):
        shutil.copytree(trained, "run")
        damage()
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        line = refused_line(command, monkeypatch, capfd)
        assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
        return line

    return run


def text(path, content):
    return lambda: Path(path).write_text(content)


def cut(path, share=0.5):
    def damage():
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: int(len(content) * share)])

    return damage


def replaced(path, old, new):
    def damage():
        content = Path(path).read_bytes()
        assert old in content
        Path(path).write_bytes(content.replace(old, new, 1))

    return damage


def flipped(path):
    """One bit in the middle, where the weights or the optimiser's state are."""

    def damage():
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(path).write_bytes(content)

    return damage


def saved(path, value):
    return lambda: torch.save(value, path)


def of_a_snapshot(content):
    def damage():
        store = PatternStore("run/patterns.zarr")
        (store.path / f"step_{store.steps[-1]:09d}" / "zarr.json").write_text(content)

    return damage


class Code:
    def __reduce__(self):
        return print, ("code of a checkpoint ran",)


RESUMED = [
    (text("run/plan.json", "{"), "run/plan.json is damaged (it is not JSON", "choose another hydra.run.dir"),
    (text("run/plan.json", "[]"), "run/plan.json is damaged (it is not a JSON object", "choose another hydra.run.dir"),
    (
        text("run/plan.json", '{"config": {}, "versions": {"lightning_mnn": "0.1.0"}, "wandb_id": null}'),
        "run was started by lightning_mnn 0.1.0, and this is",
        "resume it with that version, or choose another hydra.run.dir",
    ),
    (
        text("run/plan.json", '{"config": {}}'),
        "run/plan.json is damaged (it lacks versions, wandb_id",
        "choose another",
    ),
    (replaced("run/plan.json", b"seed", b"s\xffed"), "run/plan.json is damaged (it is not JSON", "choose another"),
    (text("run/summary.json", ""), "run/summary.json is damaged (it is not JSON", "delete it"),
    (cut("run/summary.json"), "run/summary.json is damaged (it is not JSON", "delete it"),
    (text("run/summary.json", "3"), "run/summary.json is damaged (it is not a JSON object", "delete it"),
    (text("run/metrics.csv", "step\n"), "run/metrics.csv is damaged (it should have", "start again"),
    (
        replaced("run/metrics.csv", b"\n0.", b"\nx."),
        "run/metrics.csv is damaged (it is not a table of numbers",
        "start again",
    ),
    (replaced("run/metrics.csv", b"\n0.", b"\n\xff."), "run/metrics.csv is damaged (it is not a table", "start again"),
    (text("run/patterns.zarr/zarr.json", "{"), "run/patterns.zarr/zarr.json is damaged", "delete the store"),
    (of_a_snapshot("{"), "zarr.json is damaged", "delete the store"),
    (cut(LAST), "run/checkpoints/last.ckpt is damaged (it is not a torch checkpoint, or", "delete it"),
    (text(LAST, ""), "run/checkpoints/last.ckpt is damaged (it is not a torch checkpoint, or", "delete it"),
    (text(LAST, "words"), "run/checkpoints/last.ckpt is damaged (it is not a torch checkpoint", "delete it"),
    (flipped(LAST), "run/checkpoints/last.ckpt is damaged (the checksum of", "delete it"),
    (
        saved(LAST, {"a": 1}),
        "run/checkpoints/last.ckpt is damaged (it is not a checkpoint of a Trainer: it lacks",
        "delete",
    ),
    (saved(LAST, Code()), "run/checkpoints/last.ckpt is damaged (it cannot be loaded as plain weights", "delete it"),
]


@pytest.mark.parametrize(("damage", "message", "remedy"), RESUMED)
def test_a_run_does_not_go_on_from_a_damaged_file(damage, message, remedy, refused):
    line = refused(RESUME, damage)
    assert message in line
    assert remedy in line[line.index(message) :]


BEGUN = [
    ("ckpt_path=nowhere.ckpt", lambda: None, "ckpt_path=nowhere.ckpt: is not a file: give the path of a checkpoint"),
    ("ckpt_path=run", lambda: None, "ckpt_path=run: is a folder, not a file: give the path of a checkpoint"),
    (f"ckpt_path={LAST}", cut(LAST, 0.9), "run/checkpoints/last.ckpt is damaged (it is not a torch checkpoint, or"),
    (f"ckpt_path={LAST}", flipped(LAST), "run/checkpoints/last.ckpt is damaged (the checksum of"),
    ("ckpt_path=run/plan.json", lambda: None, "run/plan.json is damaged (it is not a torch checkpoint"),
    (
        "ckpt_path=a.npz",
        lambda: np.savez("a.npz", a=np.ones(3)),
        "a.npz is damaged (it cannot be loaded as plain weights",
    ),
    (
        "ckpt_path=a.pt",
        saved("a.pt", nn.Linear(2, 3).state_dict()),
        "a.pt is damaged (it is not a checkpoint of a Trainer",
    ),
    (
        f"ckpt_path={LAST} model.hidden_dims=[9]",
        lambda: None,
        f"ckpt_path={LAST}: belongs to another network: hidden_weights.0",
    ),
    (
        f"ckpt_path={LAST} replicas=2",
        lambda: None,
        f"ckpt_path={LAST}: belongs to another network: hidden_weights.0 is 8×6",
    ),
    (f"ckpt_path={LAST} optimizer=sgd", lambda: None, f"ckpt_path={LAST}: belongs to a run with optimizer=adam"),
]


@pytest.mark.parametrize(("command", "damage", "message"), BEGUN)
def test_a_run_does_not_begin_from_what_is_no_checkpoint_of_its_own(command, damage, message, refused):
    assert message in refused(f"{' '.join(SMALL)} {command}", damage)


def test_no_flipped_byte_of_a_checkpoint_changes_what_is_loaded(trained, tmp_path):
    """It is found, or it is where nothing is read."""
    content = (trained / "checkpoints" / "last.ckpt").read_bytes()
    whole = read_checkpoint(trained / "checkpoints" / "last.ckpt", "")
    found = 0
    for place in map(int, np.random.default_rng(0).integers(len(content), size=150)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "flipped.ckpt").write_bytes(damaged)
        try:
            loaded = read_checkpoint(tmp_path / "flipped.ckpt", "")
        except DamagedFileError:
            found += 1
        else:
            assert_equal(loaded, whole)
    assert found > 15


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list | tuple):
        for value, another in zip(one, other, strict=True):
            assert_equal(value, another)
    else:
        assert one == other or one != one  # noqa: PLR0124 (NaN)


REPORTED = [
    (text("run/metrics.csv", "step,a\n0,x\n"), "run/metrics.csv is damaged (line 2: could not convert string to float"),
    (replaced("run/metrics.csv", b"\n0.", b"\n\xff."), "run/metrics.csv is damaged (it is not a table"),
    (text("run/metrics.csv", "a,b\n1,2,3\n"), "run/metrics.csv is damaged (line 2 has a wrong number of fields"),
    (text("run/metrics.csv", "a,b\n1,2\n"), "run/metrics.csv is damaged (it lacks the column step"),
    (text("run/summary.json", "{"), "run/summary.json is damaged (it is not JSON"),
    (text("run/summary.json", "{}"), "run/summary.json is damaged (it lacks input_dim"),
]


@pytest.mark.parametrize(("damage", "message"), REPORTED)
def test_a_report_names_a_damaged_file(damage, message, refused):
    assert message in refused("task=report folder=run", damage)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is not JSON"),
        ('{"figure": "map", "sizes": []}', "it names no figure: 'map'"),
        ("{}", "it lacks figure"),
    ],
)
def test_a_report_of_a_scan_names_a_damaged_file(content, message, refused):
    def damage():
        Path("scan").mkdir()
        Path("scan/scan.csv").write_text("a\n1\n")
        Path("scan/summary.json").write_text(content)

    assert f"scan/summary.json is damaged ({message}" in refused("task=report folder=scan", damage)


@pytest.mark.parametrize("experiment", ["census", "figure_5_2"])
def test_an_experiment_does_not_go_on_in_a_folder_with_a_damaged_plan(experiment, refused):
    def damage():
        Path("it").mkdir()
        Path("it/plan.json").write_text('{"seed": ')

    line = refused(f"experiment={experiment} hydra.run.dir=it", damage)
    assert "it/plan.json is damaged (it is not JSON" in line
    assert "choose another name or hydra.run.dir" in line


def test_a_damaged_part_is_named(tmp_path):
    parts = [Part("a", dict), Part("b", dict)]
    finish_parts(parts, tmp_path, processes=1)
    (tmp_path / "a.json").write_text("")
    with pytest.raises(DamagedFileError, match=r"a\.json is damaged .*: delete it, and run the command again"):
        finish_parts(parts, tmp_path, processes=1)


def archives(*names):
    def damage():
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(b"no archive")

    return damage


MNIST = [
    f"data/MNIST/raw/{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
DATA = [
    (
        "data=mnist data.root=data",
        archives(*MNIST),
        "train-images-idx3-ubyte.gz is corrupt or truncated: its md5 is not",
    ),
    ("data=mnist data.root=data", archives(*MNIST[:3]), "no MNIST in"),
    (
        "data=cifar10 data.root=data",
        archives("data/cifar-10-python.tar.gz"),
        "cifar-10-python.tar.gz is corrupt or truncat",
    ),
    (
        "data=cifar10 data.root=data",
        archives("data/cifar-10-batches-py/data_batch_1"),
        "data_batch_1 is corrupt or trunca",
    ),
]


@pytest.mark.parametrize(("command", "damage", "message"), DATA)
def test_data_that_are_no_data_are_named(command, damage, message, monkeypatch, capfd):
    damage()
    line = refused_line(command, monkeypatch, capfd)
    assert message in line
    assert not list(Path().glob("outputs"))


def test_images_that_are_no_images_are_named_after_all_were_read(tmp_path):
    archives("data/cat/1.png", "data/dog/1.png")()
    said = children.command(tmp_path, "data=image_folder", "data.root=data", "data.cache=cache", expect=1)
    line = said.splitlines()[-1]
    assert line.startswith("error: 2 of 2 images in ")
    assert "cat/1.png" in line
    assert "replace or remove them" in line
    assert not Path("outputs").exists()


def test_what_is_in_the_way_of_outputs_is_named(monkeypatch, capfd):
    Path("outputs").write_text("")
    line = refused_line(" ".join(SMALL), monkeypatch, capfd)
    assert "outputs" in line
    assert "Not a directory" in line or "File exists" in line
    assert Path("outputs").read_text() == ""


def test_a_table_whose_last_line_was_not_written_to_its_end_is_one_without_it(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,")
    assert read_csv(tmp_path / "a.csv") == [{"a": "1", "b": "2"}]
    (tmp_path / "a.csv").write_bytes(b"a,b\r\n1,2\r\n")
    assert read_csv(tmp_path / "a.csv") == [{"a": "1", "b": "2"}]


def test_a_logger_does_not_go_on_with_less_than_it_had(tmp_path):
    logger = ResumableCSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    again = ResumableCSVLogger(tmp_path)
    with pytest.raises(DamagedFileError, match=r"metrics\.csv is damaged \(it should have 2 rows or more, and has 1\)"):
        again.resume(2)
    assert logger.path.read_text() == "a,step\n1.0,0\n"


def test_of_a_file_that_cannot_be_written_nothing_is_left(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})

    def fail():
        with whole_file(tmp_path / "a.json") as unfinished:
            unfinished.write_text("half of")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left .*a\.json") as raised:
        fail()
    assert raised.value.filename == str(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"a": 1}


def limited(folder, arguments):
    """The command, in whose process no file can grow beyond 300 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    children.run_the_command(folder, arguments)


def test_a_full_disk_leaves_no_half_of_a_checkpoint(tmp_path):
    arguments = ("data.num_samples=20", "data.input_dim=100", "model.hidden_dims=[200]", "trainer.max_epochs=20",
                 "callbacks.checkpoint.train_time_interval.minutes=0", "callbacks.activation_pattern_recorder=null",
                 "trainer.accelerator=cpu", "logger.mode=disabled", "hydra.run.dir=run")  # fmt: skip
    process = children.processes.Process(target=limited, args=(tmp_path, arguments))
    process.start()
    process.join(children.PATIENCE)
    err = (tmp_path / "err.txt").read_text()
    assert process.exitcode == 1
    assert err.splitlines() == [
        "error: run/checkpoints/last.ckpt: File too large: allow larger files (ulimit -f), or choose another folder"
    ]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_full_file_system_leaves_the_checkpoint_before(tmp_path):
    full, mount, umount = tmp_path / "full", shutil.which("mount"), shutil.which("umount")
    full.mkdir()
    small = [mount, "-t", "tmpfs", "-o", "size=64k", "none", full]
    if not (mount and umount) or subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("needs Linux, and the right to mount a file system")

    def save(value):
        with whole_file(full / "last.ckpt") as unfinished:
            torch.save(value, unfinished)

    try:
        save(MNN(2, (2,)).state_dict())
        before = (full / "last.ckpt").read_bytes()
        with pytest.raises((OSError, RuntimeError)):
            save(torch.zeros(100_000))
        assert [path.name for path in full.iterdir()] == ["last.ckpt"]
        assert (full / "last.ckpt").read_bytes() == before
    finally:
        subprocess.run([umount, full], check=True)
