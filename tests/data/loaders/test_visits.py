"""How often training saw each sample: counted, and compared with what was seen."""

import shutil
from datetime import timedelta
from itertools import islice

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn import MNN
from lightning_mnn.callbacks import LastCheckpoint
from lightning_mnn.data import GaussianData, ResidentLoader, StreamedLoader
from lightning_mnn.data.loaders import visits
from lightning_mnn.data.loaders.rows import RowArray
from lightning_mnn.data.loaders.visits import Visits, packed, unpacked

SIZES = {"n": st.integers(1, 30), "batch": st.none() | st.integers(1, 35), "world": st.integers(1, 3)}


def loaders(kind, n, batch, world, **options):
    """One a process; a sample's target is its number."""
    for rank in range(world):
        options |= {"rank": rank, "world_size": world}
        if kind == "streamed":
            yield StreamedLoader(
                RowArray(np.zeros((n, 2), np.uint8)), torch.arange(n), batch, buffer_bytes=56, **options
            )
        else:
            yield ResidentLoader(torch.zeros(n, 2), torch.arange(n), batch, **options)


def seen_in(targets, n):
    """How often each sample is in a batch (B,), or (R, B)."""
    return (targets[..., None] == torch.arange(n)).sum(-2)


@given(**SIZES, kind=st.sampled_from(["resident", "streamed"]), shuffle=st.booleans(), reuse=st.booleans())
def test_the_count_is_of_what_was_handed_out_at_any_moment(n, batch, world, kind, shuffle, reuse):
    total = torch.zeros(n, dtype=torch.int64)
    for loader in loaders(kind, n, batch, world, shuffle=shuffle):
        seen = torch.zeros(n, dtype=torch.int64)
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            for _, targets in loader.batches(0, loader.num_steps, reuse=reuse):
                seen += seen_in(targets, n)
                if len(loader.visits._indices) % 3 == 0:  # at some moments, or it would always be counted at once
                    assert torch.equal(loader.visits.counts(), seen)
        assert torch.equal(loader.visits.counts(), seen)
        total += loader.visits.counts()
    assert total.tolist() == [3] * n


@given(**SIZES, replicas=st.integers(2, 3), limit=st.integers(1, 40))
def test_replicas_are_counted_each_in_its_own_order(n, batch, world, replicas, limit):
    total = torch.zeros(replicas, n, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visits, "_MIN_PENDING_INDICES", limit)  # counted in between
        for loader in loaders("resident", n, batch, world, seeds=list(range(replicas))):
            seen = torch.zeros(replicas, n, dtype=torch.int64)
            for epoch in range(2):
                loader.sampler.set_epoch(epoch)
                for _, targets in loader.batches(0, max(1, loader.num_steps - 1)):
                    seen += seen_in(targets, n)
            assert (loader.visits.counts() - seen).count_nonzero() == 0
            total += seen
    if loader.num_steps > 2:
        assert sorted(set(total.flatten().tolist())) in ([0, 1, 2], [0, 2], [1, 2])
    else:
        assert total.sum() == 2 * replicas * min(n, batch or n)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.booleans())
def test_counts_come_out_of_a_checkpoint_as_they_went_in(values, replicated):
    counts = torch.tensor(values, dtype=torch.int32)
    counts = torch.stack([counts, counts.flip(0)]) if replicated else counts
    state = packed(counts)
    assert ("more" in state) == (len(set(values)) > 1)
    assert torch.equal(unpacked(state).expand_as(counts), counts)
    again = Visits(len(values))
    again.add(slice(0, 1))
    again.go_on_from(unpacked(state))
    again.add(slice(0, len(values)))
    assert torch.equal(again.counts().expand_as(counts), counts + 1)


OPTIONS = {
    "bundled": ({"batch_size": 4}, {"max_epochs": 7}, [7, 7]),
    "whole epochs at a time": ({}, {"max_epochs": 1500}, [1500, 1500]),
    "batch by batch": ({"batch_size": 5}, {"max_epochs": 4, "gradient_clip_val": 1e9}, [4, 4]),
    "stopped within an epoch": ({"batch_size": 5}, {"max_epochs": -1, "max_steps": 7}, [2, 3]),
    "a part of each epoch": ({"batch_size": 4, "shuffle": False}, {"max_epochs": 3, "limit_train_batches": 2}, [0, 3]),
    "replicas": ({"batch_size": 5, "replicas": 3}, {"max_epochs": 3}, [3, 3]),
    "loaders made anew": ({"batch_size": 5}, {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}, [3, 3]),
}


def fit(make_trainer, data, ckpt_path=None, **options):
    replicas = data.replicas
    model = MNN(4, (3,), replicas=replicas, default_callbacks=False, optimizer={"name": "adam", "lr": 1e-3})
    make_trainer(**options).fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return list(data.visits())


@pytest.mark.parametrize("kind", OPTIONS)
def test_training_sees_each_sample_as_often_as_it_should(kind, make_trainer):
    data, options, expected = OPTIONS[kind]
    data = GaussianData(12, 4, **data)
    assert data.visits() is None
    assert fit(make_trainer, data, **options) == expected
    whole = expected[0] == expected[1]
    assert set(data.state_dict()["visits"]) == {"samples", "fewest", *(() if whole else ("more",))}


@pytest.mark.parametrize("replicas", [1, 2])
def test_steps_that_are_repeated_after_a_kill_count_once(replicas, make_trainer, tmp_path):
    class Copies(LastCheckpoint):
        def _save_if_due(self, trainer, completed_epochs=None):
            super()._save_if_due(trainer, completed_epochs)
            if self.path.exists():
                shutil.copy(self.path, tmp_path / f"{trainer.global_step}.ckpt")

    def options(max_epochs):
        savers = [Copies(tmp_path / "checkpoints", timedelta(0))]
        return {"max_epochs": max_epochs, "callbacks": savers, "enable_checkpointing": True, "gradient_clip_val": 1e9}

    def data():
        return GaussianData(12, 4, batch_size=5, replicas=replicas)

    assert fit(make_trainer, data(), **options(4)) == [4, 4]
    for step in (4, 6, 8):  # within the second epoch, at its end, within the third
        kept = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["GaussianData"]["visits"]
        assert int(unpacked(kept).sum()) == (1 if step == 6 else replicas) * (12 * (step // 3) + 5 * (step % 3))
        assert fit(make_trainer, data(), tmp_path / f"{step}.ckpt", **options(4)) == [4, 4]
    # Of other data nothing has been seen yet.
    other = GaussianData(13, 4, batch_size=5, replicas=replicas)
    assert fit(make_trainer, other, tmp_path / "6.ckpt", **options(4)) == [2, 2]


class Reader(pl.Callback):
    """Iterates the training loader, whole or in part, at each moment that it is given."""

    def __init__(self, *hooks):
        for hook in hooks:
            setattr(self, hook, self._read)

    def _read(self, trainer, *_):
        for taken in (1, None):
            for batch in islice(trainer.train_dataloader, taken):
                list(batch)  # its tensors, or its batches
        if trainer.datamodule is not None:
            list(trainer.datamodule.train_dataloader())


EVERYWHERE = ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_end")


@pytest.mark.parametrize("kind", ["resident", "streamed", "bundled"])
def test_who_else_reads_the_loader_changes_nothing(kind, make_trainer, tmp_path):
    class Streamed(GaussianData):
        def loader(self, device, **options):
            rows = RowArray(self.inputs.numpy())
            return StreamedLoader(rows, self.targets, buffer_bytes=56, **options)

    class Copies(LastCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 5:
                trainer.save_checkpoint(self.path.with_name("5.ckpt"))

    def fit(*hooks, ckpt_path=None):
        data = (Streamed if kind == "streamed" else GaussianData)(12, 4, batch_size=5)
        folder = tmp_path / str(len(hooks))
        callbacks = [Reader(*hooks), LastCheckpoint(folder) if kind == "bundled" else Copies(folder)]
        options = {} if kind == "bundled" else {"gradient_clip_val": 1e9}
        model = MNN(4, (3,), default_callbacks=False, optimizer={"name": "adam", "lr": 1e-2})
        trainer = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True, **options)
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return data, [weights.detach().clone() for weights in model.parameters()]

    hooks = ("on_train_start", "on_train_epoch_end") if kind == "bundled" else EVERYWHERE
    alone, weights = fit()
    for ckpt_path in (None,) if kind == "bundled" else (None, tmp_path / "5" / "5.ckpt"):
        read, others = fit(*hooks, ckpt_path=ckpt_path)
        assert list(read.visits()) == [4, 4]
        assert read.state_dict() == alone.state_dict()
        assert all(map(torch.equal, weights, others)), ckpt_path
    if kind != "bundled":
        one, other = (torch.load(tmp_path / f / "5.ckpt", weights_only=True) for f in ("0", "5"))
        for key in ("GaussianData", "Streamed"):
            assert str(one.get(key)) == str(other.get(key))
        assert str(one["loops"]) == str(other["loops"])


def test_a_loader_without_its_data_module_knows_training_too(make_trainer):
    loader = ResidentLoader(torch.zeros(12, 4), torch.ones(12), 5)
    model = MNN(4, (3,), default_callbacks=False, regression=True)
    make_trainer(max_epochs=2, callbacks=[Reader(*EVERYWHERE)], gradient_clip_val=1e9).fit(model, loader)
    assert loader.visits.counts().tolist() == [2] * 12
    assert loader.size_of_batch == 2


def test_of_epochs_that_are_broken_off_not_all_orders_are_kept_in_memory():
    loader = ResidentLoader(torch.zeros(1000, 1), torch.zeros(1000), 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visits, "_MIN_PENDING_INDICES", 3000)
        for epoch in range(50):
            loader.sampler.set_epoch(epoch)
            next(iter(loader))
            kept = {index.untyped_storage().data_ptr() for index in loader.visits._indices}
            assert len(kept) <= 3
    assert loader.visits.counts().sum() == 500
