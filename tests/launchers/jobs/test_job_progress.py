"""What the launcher learns of a training that is not its own."""

import json
import time

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.data import GaussianData
from lightning_mnn.launchers.jobs.progress import VARIABLE
from lightning_mnn.launchers.jobs.records import read_record


class Foreign(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.losses.append(float(loss.detach()))
        self.log("my_loss", loss, on_epoch=True)
        self.log("accuracy", 0.5)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def names(trainer):
    return [type(callback).__name__ for callback in trainer.callbacks]


def test_a_trainer_of_any_application_notes_how_far_it_is(make_trainer, tmp_path, monkeypatch):
    assert "JobProgress" not in names(make_trainer())
    path = tmp_path / "progress.json"
    monkeypatch.setenv(VARIABLE, str(path))
    assert read_record(path) == {}
    before = time.time()
    trainer = make_trainer(max_epochs=3)
    assert "JobProgress" in names(trainer)
    model = Foreign()
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=2))
    note = json.loads(path.read_text())
    assert (note["epochs"], note["max_epochs"]) == (3, 3)
    known = [*model.losses, sum(model.losses[-2:]) / 2]  # of the batches, and of the last epoch
    assert any(note["loss"] == pytest.approx(loss) for loss in known)
    assert before <= note["started"] <= time.time()


def test_it_does_not_change_how_a_network_is_trained(make_trainer, tmp_path, monkeypatch):
    def weights():
        model = MNN(6, (5,), default_callbacks=False)
        trainer = make_trainer(max_epochs=400, log_every_n_steps=50)
        trainer.fit(model, GaussianData(12, 6, batch_size=5))
        return [w.clone() for w in model.parameters()], trainer

    alone, _ = weights()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "progress.json"))
    watched, trainer = weights()
    assert "JobProgress" in names(trainer)
    assert all(map(torch.equal, alone, watched))
    assert trainer.fit_loop.epoch_loop.batch_idx == 0  # a bundle an epoch: three batches otherwise
    assert read_record(tmp_path / "progress.json")["epochs"] == 400


def test_training_goes_on_where_progress_cannot_be_noted(make_trainer, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "progress.json"))
    monkeypatch.setattr("lightning_mnn.launchers.jobs.progress.computed_metrics", lambda trainer: trainer.no_such_part)
    trainer = make_trainer(max_epochs=2)
    model = Foreign()
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=2))
    assert len(model.losses) == trainer.global_step == 4
    (said,) = [record.message for record in caplog.records if "progress" in record.message]
    assert "no_such_part" in said
