"""The host application's data and model: points of two classes, and a small ReLU network that tells them apart."""

import os
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HOLD = "HOST_APPLICATION_HOLD"  # a folder; a job whose file is in it waits at the end of its second epoch


class Points(pl.LightningDataModule):
    """Two noisy half circles, for training, validation and test."""

    def __init__(self, size: int, noise: float, batch_size: int):
        super().__init__()
        self.size, self.noise, self.batch_size = size, noise, batch_size

    def setup(self, stage=None):
        draw = torch.Generator().manual_seed(0)
        angle = torch.pi * torch.rand(3 * self.size, generator=draw)
        label = torch.arange(3 * self.size) % 2
        side = 1.0 - 2.0 * label
        points = torch.stack([side * angle.cos() + label, side * angle.sin() + 0.5 * label], dim=1)
        points += self.noise * torch.randn(points.shape, generator=draw)
        parts = zip(points.split(self.size), label.split(self.size), strict=True)
        self.train, self.val, self.test = (TensorDataset(*part) for part in parts)

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, self.batch_size)


class Classifier(pl.LightningModule):
    """An MLP with one hidden layer on the cross-entropy."""

    def __init__(self, width: int, optimizer, held: str):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
        self.optimizer, self.held = optimizer, held

    def forward(self, x):
        return self.net(x)

    def step(self, batch, stage: str):
        points, label = batch
        logits = self(points)
        loss = nn.functional.cross_entropy(logits, label)
        epoch = {"on_epoch": True, "on_step": False}
        self.log(f"{stage}/loss", loss, **epoch)
        self.log(f"{stage}/acc", (logits.argmax(1) == label).float().mean(), **epoch)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test")

    def on_train_epoch_end(self):
        if HOLD in os.environ and self.current_epoch == 1:
            folder = Path(self.held)
            folder.joinpath("pid").write_text(str(os.getpid()))
            while Path(os.environ[HOLD], folder.name).exists():
                time.sleep(0.05)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())
