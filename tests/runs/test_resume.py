"""Runs that are killed and started again: real processes, ended by kill -9."""

import json
import shutil
import time
from datetime import timedelta

import numpy as np
import pytest
import torch

from lightning_mnn import MNN
from lightning_mnn.callbacks import LastCheckpoint
from lightning_mnn.data import GaussianData
from lightning_mnn.loggers.csv_logs import ResumableCSVLogger
from tests.children import command, start, wait_for
from tests.run_folders import assert_same_run, rows_of, summary_of
from tests.wandb_files import records_of

SMALL = (
    "data.num_samples=40", "data.input_dim=6", "model.hidden_dims=[8]", "seed=1", "trainer.log_every_n_steps=40",
    "callbacks.local_minimum_detector.stop_training=false", "callbacks.angular_volume_monitor.measure=[]",
    "callbacks.checkpoint.train_time_interval.minutes=0.001",
)  # fmt: skip
KINDS = {
    "whole_epochs_at_a_time": ("trainer.max_epochs=4000",),
    "checkpoints_within_epochs": ("trainer.max_epochs=300", "data.batch_size=9", "+trainer.gradient_clip_val=1e9"),
}


def kill_when(process, moment):
    """End the process by kill -9 as soon as something is so; it must not have ended by itself."""
    wait_for(moment, process)
    assert process.is_alive()
    process.kill()
    process.join()


def wandb_rows(run):
    """What an offline run holds, read by W&B's own reader: its ids, and its rows by W&B's step."""
    records = records_of(run, whole=False)
    names = {record["run"]["run_id"] for record in records if record["type"] == "run"}
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    own = ("_runtime", "_timestamp", "figure", "verdict")  # of the process, not of the run
    return names, {row["_step"]: {k: v for k, v in row.items() if not k.startswith(own)} for row in rows}


def started(folder):
    """The folder of the one run that has come to train there, or one that is not there."""
    (run,) = [path.parent for path in folder.glob("outputs/quickstart/*/plan.json")] or [folder / "none"]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment_it_ends_in_the_numbers_of_an_unbroken_run(kind, tmp_path):
    arguments = (*SMALL, *KINDS[kind])
    start_time = time.monotonic()
    command(tmp_path, *arguments, "hydra.run.dir=unbroken")
    life = time.monotonic() - start_time
    total = rows_of(tmp_path / "unbroken")
    again = (*arguments, "resume=true")  # which finds the folder

    kill_when(start(tmp_path, *again), lambda: rows_of(started(tmp_path)) > 3)
    run = started(tmp_path)
    last = run / "checkpoints" / "last.ckpt"
    kill_when(start(tmp_path, *again), lambda: last.exists() and rows_of(run) > total / 4)
    kept = torch.load(last, weights_only=True)
    assert 0 < kept["logged_rows"] < total - 1
    moments = np.random.default_rng(len(kind))
    for _ in range(2):  # from the first moment to the last
        process = start(tmp_path, *again)
        process.join(moments.uniform(0, life))
        process.kill()
        process.join()
    command(tmp_path, *again)
    assert run == started(tmp_path)
    assert_same_run(run, tmp_path / "unbroken")
    assert summary_of(run)[1] > kept["callbacks"]["FitTimer"]["time_elapsed"]["train"] > 0  # of several processes

    (_, whole), *_ = [wandb_rows(path) for path in (tmp_path / "unbroken" / "wandb").glob("offline-run-*")]
    found = [wandb_rows(path) for path in sorted((run / "wandb").glob("offline-run-*"))]
    assert len(set().union(*(names for names, _ in found))) == 1
    for _, rows in found:
        assert all(whole[step] == row for step, row in rows.items())
    assert any(rows == whole for _, rows in found)


def test_a_second_process_does_not_go_on_with_a_run_that_goes_on(tmp_path):
    arguments = (*SMALL, "trainer.max_epochs=1000000", "logger.mode=disabled", "hydra.run.dir=run", "resume=true")
    first = start(tmp_path, *arguments)
    wait_for(lambda: rows_of(tmp_path / "run"), first)
    assert "another process works in" in command(tmp_path, *arguments, expect=1)
    kill_when(first, lambda: True)


def test_a_finished_run_is_told_again_and_another_is_refused(tmp_path):
    tiny = (
        *SMALL,
        "+rate=0.02",
        "optimizer.lr=${rate}",
        "trainer.max_epochs=3",
        "logger.mode=disabled",
        "hydra.run.dir=run",
    )
    command(tmp_path, *tiny, "resume=true")  # there is no folder yet
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and ".hydra" not in path.parts}
    said = command(
        tmp_path, *tiny, "resume=true", "threads=1", "callbacks.checkpoint.train_time_interval.minutes=9",
        "~logger.wandb",
    )  # fmt: skip
    assert "finished: there is nothing left to do" in said
    assert "3 epochs, 3 steps" in said
    for arguments, message in (
        ((), "already contains a run: choose another hydra.run.dir, or continue it by resume=true"),
        (
            ("resume=true", "seed=2", "data.labels=zero_one"),
            "data.labels is plus_minus, not zero_one; config.seed is 1",
        ),
        (
            ("resume=true", "callbacks.progress._target_=pytorch_lightning.callbacks.TQDMProgressBar"),
            "callbacks.progress._target_ is lightning_mnn.callbacks.RunProgress, not pytorch_lightning",
        ),
        (
            ("resume=true", "callbacks.checkpoint=null"),
            "callbacks.checkpoint._target_ is lightning_mnn.callbacks.LastCheckpoint, not None",
        ),
        (("resume=true", "ckpt_path=run/checkpoints/last.ckpt"), "error: ckpt_path=run/checkpoints/last.ckpt: "),
    ):
        said = command(tmp_path, *tiny, *arguments, expect=1)
        assert message in said
        assert "Traceback" not in said
    assert before == {path: path.read_bytes() for path in before}

    # Killed between its last two writes, it is finished all the same.
    last = run / "checkpoints" / "last.ckpt"
    last.rename(last.with_name("ended.ckpt"))
    command(tmp_path, *tiny, "resume=true")
    assert last.exists()
    # Killed before: all that there is of it is written again, but what is not its own stays.
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"finished": False}))
    last.unlink()
    (run / "note.txt").write_text("of the user")
    command(tmp_path, *tiny, "resume=true")
    assert summary_of(run)[0].items() <= summary.items()
    assert {path for path in before if path.suffix != ".log"} <= set(run.rglob("*"))
    assert (run / "note.txt").exists()
    assert not list(run.glob("patterns-v*"))

    (tmp_path / "run" / "plan.json").unlink()
    assert "contains a run without plan.json" in command(tmp_path, *tiny, "resume=true", expect=1)


def test_a_table_goes_on_after_the_rows_that_are_asked_for(tmp_path):
    first = ResumableCSVLogger(tmp_path)
    for step in range(4):
        first.log_metrics({"a": step / 3, **({"b": 1.0} if step == 2 else {})}, step)
    whole = first.path.read_bytes()
    assert whole.splitlines()[0] == b"a,b,step"
    first.path.write_bytes(whole[:-3])  # torn by a kill
    again = ResumableCSVLogger(tmp_path)
    with pytest.raises(FileExistsError, match="resume"):
        again.log_metrics({"a": 1.0}, 0)
    with pytest.raises(ValueError, match="should have 5 rows or more, and has 3"):
        ResumableCSVLogger(tmp_path).resume(5)
    again.resume(2)
    assert again.read() == [({"a": 0.0}, 0), ({"a": 1 / 3}, 1)]
    again.log_metrics({"a": torch.tensor(2 / 3, dtype=torch.float64), "b": 1.0}, 2)
    again.log_metrics({"a": 1.0}, 3)
    assert first.path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_table_of_which_nothing_is_kept_begins_anew(tmp_path):
    for names in ("a", "b"):  # columns of the table that goes, and of the one that comes
        first = ResumableCSVLogger(tmp_path / names)
        first.log_metrics({"a": 1.0}, 0)
        again = ResumableCSVLogger(tmp_path / names)
        again.resume(0)
        assert (again.rows, again.read(), again.path.exists()) == (0, [], False)
        again.log_metrics({names: 2.0}, 3)
        assert again.path.read_text() == f"{names},step\n2.0,3\n"
    ResumableCSVLogger(tmp_path / "nothing").resume(0)


def test_from_a_checkpoint_before_the_first_row_a_run_ends_in_the_table_of_an_unbroken_one(make_trainer, tmp_path):
    def fit(table, checkpoint=None, max_epochs=4):
        saver = LastCheckpoint(tmp_path / "checkpoints", timedelta(0))
        options = {"enable_checkpointing": True, "gradient_clip_val": 1e9, "log_every_n_steps": 8}
        trainer = make_trainer(callbacks=[saver], logger=table, max_epochs=max_epochs, **options)
        model = MNN(6, (4,), default_callbacks=False, optimizer={"name": "adam", "lr": 1e-3})
        trainer.fit(model, GaussianData(12, 6, batch_size=4), ckpt_path=checkpoint, weights_only=True)
        return saver.path

    early = fit(ResumableCSVLogger(tmp_path / "early"), max_epochs=2).rename(tmp_path / "early.ckpt")
    kept = torch.load(early, weights_only=True)
    assert (kept["global_step"], kept["logged_rows"]) == (6, 0)
    whole, at_once, later = (ResumableCSVLogger(tmp_path / name) for name in ("whole", "at_once", "later"))
    fit(whole)
    assert whole.rows
    shutil.copytree(whole.path.parent, later.path.parent)  # what was logged between the checkpoint and a kill
    for again in (at_once, later):
        again.resume(kept["logged_rows"])
        fit(again, early)
        assert again.path.read_bytes() == whole.path.read_bytes()
