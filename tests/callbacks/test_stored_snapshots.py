"""What a checkpoint holds of the recorded patterns, and what a resumed run makes of it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import zarr
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_mnn import MNN
from lightning_mnn.callbacks import ActivationPatternRecorder, PatternStore, Schedule
from lightning_mnn.callbacks.pattern_store import LostSnapshotError, StoredSnapshot, digest_of
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import ActivationPattern
from tests.children import side_by_side

REPLICAS = 2
EPOCHS = 6


class Watcher(pl.Callback):
    """Keeps what was logged of the patterns at the end of each epoch, after the recorder has acted."""

    def __init__(self):
        self.logged = {}

    def on_train_epoch_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics.items()
        self.logged[trainer.current_epoch + 1] = {k: v.tolist() for k, v in metrics if k.startswith("pattern/")}


def train(make_trainer, folder, *, resume=None, epochs=EPOCHS, recorders=None, saves="saved", **options):
    """The recorders, and what was logged; there is a checkpoint of each epoch."""
    recorders = recorders or [ActivationPatternRecorder(Schedule(every=1), dirpath=folder)]
    watcher, saver = Watcher(), ModelCheckpoint(saves, filename="{epoch}", save_top_k=-1)
    callbacks = [*recorders, watcher, saver]
    trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True, **options)
    model = MNN(5, (9, 4), replicas=REPLICAS, optimizer={"name": "adam", "lr": 0.05})
    trainer.fit(model, GaussianData(30, 5, replicas=REPLICAS), ckpt_path=resume, weights_only=True)
    return recorders, watcher.logged


def after(epochs):
    """The checkpoint of so many epochs."""
    return Path("saved", f"epoch={epochs - 1}.ckpt")


def without_freeze(found):
    """All but what is known at the end alone, and needs the snapshots of all steps."""
    return {key: value for key, value in found.items() if "freeze_step" not in key}


def state_in(path):
    """The recorder's state in a checkpoint."""
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    return next(state for key, state in callbacks.items() if "ActivationPatternRecorder" in key)


def change_state(path, **changes):
    checkpoint = torch.load(path, weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if "ActivationPatternRecorder" in key]
    checkpoint["callbacks"][key] |= changes
    torch.save(checkpoint, path)


def assert_continued(recorders, logged, whole):
    """The numbers after the resumed epoch are those of the unbroken run."""
    (recorder,), (unbroken,) = recorders, whole[0]
    assert logged
    for epoch, values in logged.items():
        assert values == whole[1][epoch], epoch
    assert recorder.summary() == unbroken.summary()
    assert len(recorder.summary()["regions_visited"]) == REPLICAS
    for step in recorder.store.steps:
        assert recorder.store.attributes(step) == unbroken.store.attributes(step)


def test_a_checkpoint_names_snapshots_instead_of_holding_them(make_trainer, tmp_path):
    (recorder,), _ = train(make_trainer, tmp_path / "run", epochs=3)
    state = state_in(after(3))
    assert (state["first"], state["last"]) == ({}, {})
    assert {key: named["step"] for key, named in state["stored"].items()} == {"first": 0, "last": 3}
    assert {named["path"] for named in state["stored"].values()} == {str(recorder.store.path)}
    for key in ("first", "last"):
        patterns = StoredSnapshot(**state["stored"][key]).read()
        assert list(patterns) == ["layer_1", "layer_2"]
        assert all(torch.equal(p.bits, getattr(recorder, f"_{key}")[name].bits) for name, p in patterns.items())


def moved():
    shutil.move("run", "moved")
    return "moved"


def copied():
    """Beside the run of which it is a copy, and which goes on."""
    shutil.copytree("run", "copy")
    return "copy"


FOLDERS = {  # of the resumed run: its name, and the steps of its store at the end
    "same": (lambda: "run", range(EPOCHS + 1)),
    "moved": (moved, range(EPOCHS + 1)),
    "copied": (copied, range(EPOCHS + 1)),
    "another_version": (lambda: "version_1", range(4, EPOCHS + 1)),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_resumed_run_gives_the_numbers_of_an_unbroken_one(kind, make_trainer, tmp_path):
    """From a checkpoint that is older than the last snapshots of the store."""
    whole = train(make_trainer, tmp_path / "whole", saves="others")
    train(make_trainer, tmp_path / "run", epochs=5)
    find, steps = FOLDERS[kind]
    folder = tmp_path / find()
    recorders, logged = train(make_trainer, folder, resume=after(3))
    assert_continued(recorders, logged, whole)
    assert recorders[0].store.path == folder / "patterns.zarr"
    assert recorders[0].store.steps == list(steps)


def test_a_run_is_resumed_again_from_several_stores(make_trainer, tmp_path):
    """The first snapshot is in the store of the first version, the last in that of the second."""
    whole = train(make_trainer, tmp_path / "whole", saves="others")
    train(make_trainer, tmp_path / "version_0", epochs=2)
    train(make_trainer, tmp_path / "version_1", epochs=4, resume=after(2))
    paths = {key: Path(named["path"]).parent.name for key, named in state_in(after(4))["stored"].items()}
    assert paths == {"first": "version_0", "last": "version_1"}
    assert_continued(*train(make_trainer, tmp_path / "version_2", resume=after(4)), whole)


@pytest.mark.parametrize("first_writes", [True, False])
def test_without_a_store_the_bits_are_in_the_checkpoint(first_writes, make_trainer, tmp_path):
    """Also where a store is there before or after the resumption alone; checkpoints of before are such."""
    whole = train(make_trainer, tmp_path / "whole", saves="others")
    folders = [tmp_path / "run", None] if first_writes else [None, tmp_path / "run"]
    train(make_trainer, folders[0], epochs=3)
    (recorder,), logged = train(make_trainer, folders[1], resume=after(3))
    assert {epoch: without_freeze(values) for epoch, values in whole[1].items() if epoch > 3} == logged
    assert without_freeze(recorder.summary()) == without_freeze(whole[0][0].summary())
    state = state_in(after(EPOCHS))
    held = "last" if first_writes else "first"
    assert state[held].keys() == {"layer_1", "layer_2"}
    assert state["stored"].keys() == {"first", "last"} - {held}


def test_a_checkpoint_of_before_goes_on_with_its_store(make_trainer, tmp_path):
    whole = train(make_trainer, tmp_path / "whole", saves="others")
    (recorder,), _ = train(make_trainer, tmp_path / "run", epochs=3)
    bits = {key: {n: vars(p) for n, p in getattr(recorder, f"_{key}").items()} for key in ("first", "last")}
    change_state(after(3), stored={}, **bits)
    recorders, logged = train(make_trainer, tmp_path / "run", resume=after(3))
    assert_continued(recorders, logged, whole)
    assert recorders[0].store.steps == list(range(EPOCHS + 1))


def gone(store):
    shutil.rmtree(store)


def without_the_step(store):
    shutil.rmtree(store / "step_000000003")


def cut(store):
    (store / "step_000000003" / "layer_1" / "zarr.json").write_text("{")


def without_bits(store):  # for which zarr gives zeros
    (store / "step_000000000" / "layer_1" / "c.0.0.0").unlink()


def without_a_layer(store):
    shutil.rmtree(store / "step_000000003" / "layer_2")


LOST = [
    (gone, r"run/patterns\.zarr does not exist"),
    (without_the_step, r"patterns\.zarr has no step 3; it has \[0, 1, 2\]"),
    (cut, r"run/patterns\.zarr/step_000000003/zarr\.json is damaged"),
    (without_bits, r"step 0 of run/patterns\.zarr contains other patterns"),
    (without_a_layer, r"step 3 of run/patterns\.zarr contains other patterns"),
]


@pytest.mark.parametrize(("damage", "why"), LOST)
def test_where_the_store_is_lost_one_warning_says_so_and_training_goes_on(damage, why, make_trainer, tmp_path):
    _, whole = train(make_trainer, tmp_path / "whole", saves="others")
    train(make_trainer, tmp_path / "run", epochs=3)
    damage(tmp_path / "run" / "patterns.zarr")
    with pytest.warns(UserWarning, match=why) as caught:
        (recorder,), logged = train(make_trainer, tmp_path / "run", resume=after(3))
    (told,) = [str(w.message) for w in caught if "Activation patterns" in str(w.message)]
    assert "flips are counted from here" in told
    assert "restore the store and resume from the checkpoint again" in told
    assert recorder.failure is None
    assert recorder.store.path.name == ("patterns.zarr" if damage is gone else "patterns-v1.zarr")
    assert recorder.store.steps == [3, 4, 5, 6]
    assert logged[4]["pattern/flips"] == whole[4]["pattern/flips"] == logged[4]["pattern/flips_from_start"]
    assert state_in(after(EPOCHS))["stored"]["first"]["step"] == 3


def test_a_state_that_was_loaded_is_saved_as_it_was(make_trainer, tmp_path):
    """As where a run is resumed that has nothing left to train."""
    (recorder,), _ = train(make_trainer, tmp_path / "run", epochs=3)
    loaded = ActivationPatternRecorder(Schedule(every=1))
    loaded.load_state_dict(state_in(after(3)))
    states = loaded.state_dict(), recorder.state_dict()
    assert torch.equal(*(state["history"].pop("weights") for state in states))
    assert states[0] == states[1]
    assert without_freeze(loaded.summary()) == without_freeze(recorder.summary())


def test_recorders_that_are_resumed_elsewhere_do_not_share_a_store(make_trainer, tmp_path):
    def two(folder):
        return [ActivationPatternRecorder(Schedule(every=1), probe=n, dirpath=folder) for n in (5, 7)]

    whole, _ = train(make_trainer, None, recorders=two(tmp_path / "whole"), saves="others")
    train(make_trainer, None, epochs=2, recorders=two(tmp_path / "version_0"))
    train(make_trainer, None, epochs=4, recorders=two(tmp_path / "version_1"), resume=after(2))
    resumed, _ = train(make_trainer, None, recorders=two(tmp_path / "version_1"), resume=after(4))
    assert [one.store.path.name for one in resumed] == ["patterns.zarr", "patterns-v1.zarr"]
    assert [one.summary() for one in resumed] == [one.summary() for one in whole]
    assert [one.store.steps for one in resumed] == [[3, 4, 5, 6]] * 2


def test_a_layer_is_two_files_in_a_folder(tmp_path):
    patterns = {f"layer_{i}": ActivationPattern(torch.rand(6, 9 + i) > 0.5).pack() for i in range(17)}
    store = PatternStore(tmp_path / "patterns.zarr")
    store.write(1, 1, patterns, digest_of(patterns))
    snapshot = store.path / "step_000000001"
    assert len([snapshot, *snapshot.rglob("*")]) == 2 + 3 * 17  # 87 with the bits in folders of their own
    assert {path.name for path in (snapshot / "layer_3").iterdir()} == {"zarr.json", "c.0.0"}
    array = zarr.open(store.path, mode="r")["step_000000001"]["layer_3"]
    assert torch.equal(torch.from_numpy(array[...]), patterns["layer_3"].bits)
    assert array.attrs.asdict() == {"width": 12, "num_pieces": 2, "layer": "layer_3"}


def test_stores_with_bits_in_folders_are_read(tmp_path):
    """As they were written before; and such a snapshot may be the one that a checkpoint names."""
    patterns = {f"layer_{i}": ActivationPattern(torch.rand(6, 9) > 0.5).pack() for i in (2, 10)}
    path, digest = tmp_path / "patterns.zarr", digest_of(patterns)
    attributes = {"step": 1, "epoch": 1, "digest": digest}
    group = zarr.open_group(path, mode="a").create_group("step_000000001", attributes=attributes)
    for name, pattern in patterns.items():
        units = {"width": pattern.width, "num_pieces": pattern.num_pieces, "layer": name}
        group.create_array(name, data=pattern.bits.numpy(), chunks=pattern.bits.shape, attributes=units)
    assert (path / "step_000000001" / "layer_2" / "c" / "0" / "0").is_file()
    named = StoredSnapshot(str(path), 1, list(patterns), digest)
    assert list(named.read()) == ["layer_2", "layer_10"]
    assert all(torch.equal(p.bits, patterns[name].bits) for name, p in named.read().items())
    with pytest.raises(LostSnapshotError, match="contains other patterns"):
        StoredSnapshot(**asdict(named) | {"layers": ["layer_10", "layer_2"]}).read()


@pytest.mark.slow
def test_processes_go_on_from_what_the_first_one_reads(tmp_path):
    side_by_side(tmp_path / "ranks", 2, resume_in_processes, tmp_path)
    for found in [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]:
        assert found["resumed"] == found["whole"]
        assert found["bits"] == 0
        assert found["flips"] == found["flips_from_start"]


def resume_in_processes(folder):
    """In each process: an unbroken run, one that is resumed, and one that is resumed without its store."""

    def trainer(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", default_root_dir=folder, **quiet, **options)

    _, whole = train(trainer, folder / "whole", saves=folder / "others")
    (recorder,), _ = train(trainer, folder / "run", epochs=3, saves=folder / "saved")
    checkpoint = folder / "saved" / "epoch=2.ckpt"
    bits = recorder.state_dict()["first"] | recorder.state_dict()["last"]  # on every process
    _, resumed = train(trainer, folder / "version_1", resume=checkpoint, saves=folder / "more")
    found = {"whole": {epoch: whole[epoch] for epoch in resumed}, "resumed": resumed, "bits": len(bits)}
    rank = torch.distributed.get_rank()
    if rank == 0:
        gone(folder / "run" / "patterns.zarr")
    torch.distributed.barrier()
    _, lost = train(trainer, folder / "run", resume=checkpoint, saves=folder / "last")
    found |= {key: lost[4][f"pattern/{key}"] for key in ("flips", "flips_from_start")}
    (folder / f"{rank}.json").write_text(json.dumps(found))
