"""LastCheckpoint: the moments from which training goes on as if it had not been stopped."""

import random
import shutil
from datetime import timedelta

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import LastCheckpoint
from lightning_mnn.callbacks.trainer.stop_on_request import StopOnRequest
from lightning_mnn.data import GaussianData, TensorData
from lightning_mnn.utilities.interruption import Interrupted, request


class Ends(pl.Callback):
    """Notes the ends of epochs, and that of training."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append((trainer.current_epoch, trainer.global_step))

    def on_train_end(self, trainer, pl_module):
        self.seen.append((trainer.current_epoch, trainer.global_step, "end"))


class Copies(LastCheckpoint):
    """Keeps each checkpoint, by its step."""

    def _save_if_due(self, trainer, completed_epochs=None):
        super()._save_if_due(trainer, completed_epochs)
        if self.path.exists():
            shutil.copy(self.path, self.path.with_name(f"{trainer.global_step}.ckpt"))


class AfterStep(pl.Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action(trainer)


def fit(make_trainer, saver, *callbacks, ckpt_path=None, **options):
    ends = Ends()
    options = {"enable_checkpointing": True, "gradient_clip_val": 1e9} | options
    trainer = make_trainer(callbacks=[ends, *callbacks, saver], **options)
    model = MNN(6, (4,), default_callbacks=False, optimizer={"name": "adam", "lr": 1e-3})
    data = GaussianData(12, 6, batch_size=4, dtype="float64")
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    assert [path.name for path in saver.path.parent.glob("*.tmp")] == []
    return ends.seen, [weights.clone() for weights in model.parameters()]


def stop_training(trainer):
    trainer.should_stop = True


@pytest.mark.parametrize(
    "limit",
    [
        {"max_epochs": 4},
        {"max_steps": 12, "max_epochs": -1},
        {"max_steps": 11, "max_epochs": -1},
        {"max_epochs": 9, "stop": 10},
        {"max_epochs": 9, "stop": 4, "min_epochs": 4},
    ],
    ids=str,
)
def test_an_epochs_end_is_not_passed_over_and_not_met_twice(limit, make_trainer, tmp_path):
    """From any moment, and from the end of training, all that a whole run saw after that is seen once."""
    limit = dict(limit)
    stop = AfterStep(limit.pop("stop", None), stop_training)

    def trained(ckpt_path=None):
        return fit(make_trainer, Copies(tmp_path, timedelta(0)), stop, ckpt_path=ckpt_path, **limit)

    seen, weights = trained()
    steps = seen[-1][1]
    assert [end[1] for end in seen[:-1]] == [*range(3, steps, 3), steps]
    for step in {4, 5, 6, 9, steps}:  # within an epoch, at its end, and at the last one
        left, ended = trained(tmp_path / f"{step}.ckpt")
        assert all(map(torch.equal, weights, ended)), step
        assert left == [end for end in seen if end[1] > step or len(end) > 2], step


def test_a_checkpoint_of_the_end_goes_on_where_there_is_more_to_train(make_trainer, tmp_path):
    seen, weights = fit(make_trainer, LastCheckpoint(tmp_path / "whole"), max_epochs=4)
    saver = LastCheckpoint(tmp_path / "early")
    fit(make_trainer, saver, max_epochs=2)
    left, ended = fit(make_trainer, LastCheckpoint(tmp_path / "more"), max_epochs=4, ckpt_path=saver.path)
    assert left == seen[2:]
    assert all(map(torch.equal, weights, ended))


@pytest.mark.parametrize(("step", "options"), [(7, {}), (9, {}), (7, {"accumulate_grad_batches": 2}), (12, {})])
def test_on_request_it_saves_at_the_next_moment_and_ends_training(step, options, make_trainer, tmp_path):
    saver = LastCheckpoint(tmp_path)
    with pytest.raises(Interrupted) as stop:
        fit(make_trainer, saver, AfterStep(step, lambda _: request(2)), max_epochs=10, **options)
    assert stop.value.code == 130
    assert torch.load(saver.path, weights_only=True)["global_step"] == step


def test_without_a_checkpoint_a_request_ends_training_before_the_next_step(make_trainer):
    trainer = make_trainer(max_epochs=10, callbacks=[AfterStep(7, lambda _: request(15)), StopOnRequest()])
    with pytest.raises(Interrupted):
        trainer.fit(MNN(5, (4,), default_callbacks=False), GaussianData(12, 5, batch_size=4))
    assert trainer.global_step == 7


def test_a_negative_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must not be negative"):
        LastCheckpoint(tmp_path, timedelta(seconds=-1))


class Noisy(pl.LightningModule):
    """Draws from each generator that a program shares: dropout, and noise of numpy's and Python's."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        noise = np.random.random() + random.random()  # noqa: NPY002, S311 (as users draw)
        return (self.layers(batch[0])[:, 0] - batch[1] - noise).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("data", ["shuffled loader", "data module"])
def test_draws_go_on_where_they_were(data, make_trainer, tmp_path):
    """Also those of a DataLoader's order, from an epoch's end; of exact loaders also from within an epoch."""

    def trained(ckpt_path=None):
        pl.seed_everything(3, verbose=False)
        inputs, targets = torch.linspace(-1, 1, 72).reshape(12, 6), torch.arange(12.0)
        source = TensorData(inputs, targets, batch_size=4)
        if data == "shuffled loader":
            source = DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=True)
        module = Noisy()
        trainer = make_trainer(callbacks=[Copies(tmp_path, timedelta(0))], enable_checkpointing=True, max_epochs=4)
        torch.rand(5 if ckpt_path else 0)  # what a new process has drawn is of no matter
        trainer.fit(module, source, ckpt_path=ckpt_path, weights_only=True)
        return [weights.clone() for weights in module.parameters()], torch.rand(3)

    whole, drawn = trained()
    for step in (6,) if data == "shuffled loader" else (5, 6):
        weights, after = trained(tmp_path / f"{step}.ckpt")
        assert all(map(torch.equal, whole, weights)), step
        assert torch.equal(drawn, after), step
