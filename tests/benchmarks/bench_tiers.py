"""What each tier of cost lets the callbacks take: a LeNet, torchvision's resnet18 and a SimCLR-like module, two epochs.

IMAGES (2048; of the resnet18 a quarter) of 32 × 32 pixels, in batches of 128, are trained on with the three callbacks
of each tier, and without callbacks. The share is what the callbacks took together, start and end included, of the time
without them; the ratio is the time of the whole training beside that. Each callback keeps to its own share, so together
they may take three times as much. On a processor the seconds are those of the processor, since others may use it too;
the callbacks' own limits go by the clock of the wall.
"""

import logging
import os
import tempfile

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import resnet18

from lightning_mnn.callbacks import ActivationPatternRecorder, AngularVolumeMonitor, LocalMinimumDetector
from tests.benchmarks.bench_vital_signs import BATCH, TIERS, Classifier, Timed, lenet, now


class Contrast(pl.LightningModule):
    """A small encoder and a head that are trained on the NT-Xent loss of two noisy views of each image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        convolutions = (nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.encoder = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 32))

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        first, second = batch
        z = nn.functional.normalize(self.head(self(torch.cat([first, second]))), dim=1)
        similar = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        pairs = torch.arange(len(z), device=z.device).roll(len(first))
        return nn.functional.cross_entropy(similar, pairs)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Views(Dataset):
    """Two views of each image, the same whenever they are read."""

    def __init__(self, images):
        self.images, self.noise = images, 0.3 * torch.randn(2, *images.shape)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + self.noise[0, index], self.images[index] + self.noise[1, index]


class Detector(Timed, LocalMinimumDetector):
    pass


class Recorder(Timed, ActivationPatternRecorder):
    pass


class Monitor(Timed, AngularVolumeMonitor):
    pass


def cases(images):
    few = max(BATCH, images // 4)
    yield "SimCLR-like", Contrast, Views(torch.randn(images, 3, 32, 32))
    yield "LeNet", lambda: Classifier(lenet), labelled(images)
    yield "resnet18", lambda: Classifier(lambda: resnet18(num_classes=10)), labelled(few)


def labelled(images):
    return TensorDataset(torch.randn(images, 3, 32, 32), torch.randint(10, (images,)))


def main():
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    chosen = os.environ.get("CASES", "SimCLR-like LeNet resnet18").split()
    for name, make, data in cases(int(os.environ.get("IMAGES", "2048"))):
        if name in chosen:
            fit(make, data, [], max_steps=3)  # kernels are loaded
            plain = fit(make, data, [])
            print(f"{name}: {len(data)} images, 2 epochs in {plain:.2f} s", flush=True)
            for tier in os.environ.get("TIERS", " ".join(TIERS)).split():
                measure(make, data, tier, plain)


def measure(make, data, tier, plain):
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [Detector(stop_training=False, tier=tier), Recorder(dirpath=folder, tier=tier), Monitor(tier=tier)]
        seconds = fit(make, data, callbacks)
    shares = ", ".join(f"{type(one).__name__} {100 * one.seconds / plain:.1f} %" for one in callbacks)
    print(f"  {tier}: {shares}; ratio {seconds / plain:.3f}", flush=True)
    for one in callbacks:
        print(f"    {type(one).__name__}: {one.cost}", flush=True)


def fit(make, data, callbacks, **options):
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2} | options,
    )
    module, loader = make(), DataLoader(data, batch_size=BATCH, shuffle=True)
    start = now()
    trainer.fit(module, loader)
    return now() - start


if __name__ == "__main__":
    main()
