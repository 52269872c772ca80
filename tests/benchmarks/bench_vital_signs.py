"""What vital signs and gradient statistics cost, tier by tier: a LeNet and torchvision's resnet18 on 32 × 32 images.

STEPS (default: 600 of the LeNet, 60 of the resnet18; ten times as many on a GPU) in batches of 128 are timed with each
callback and without. The share is what a callback took, start and end included, of the time without it; the ratio is
the time of the whole training beside that. On a processor the seconds are those of the processor, since others may use
it too; the callbacks' own limits go by the clock of the wall.
"""

import logging
import os
import tempfile
import time

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_mnn.callbacks import ActivationPatternRecorder, GradientStatistics

BATCH = 128
TIERS = ("light", "standard", "full")


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


MODELS = {"LeNet": (lenet, 600), "resnet18": (lambda: resnet18(num_classes=10), 60)}


class Classifier(pl.LightningModule):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.model = make()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Timed:
    """Sums the seconds of all that a callback does."""

    seconds, times = 0.0, 0

    def timed(self, work, *args):
        start = now()
        work(*args)
        self.seconds += now() - start

    def on_train_start(self, *args):
        self.timed(super().on_train_start, *args)

    def on_before_optimizer_step(self, *args):
        self.timed(super().on_before_optimizer_step, *args)

    def on_train_batch_end(self, *args):
        self.timed(super().on_train_batch_end, *args)

    def on_train_epoch_end(self, *args):
        self.timed(super().on_train_epoch_end, *args)

    def on_train_end(self, *args):
        self.timed(super().on_train_end, *args)

    def act(self, *args):
        super().act(*args)
        self.times += 1


class Recorder(Timed, ActivationPatternRecorder):
    pass


class Statistics(Timed, GradientStatistics):
    pass


def main():
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name, (make, usual) in MODELS.items():
        steps = int(os.environ.get("STEPS", usual * (10 if torch.cuda.is_available() else 1)))
        data = TensorDataset(torch.randn(8192, 3, 32, 32), torch.randint(10, (8192,)))
        fit(make, data, [], 10)  # kernels are loaded
        plain = fit(make, data, [], steps)
        print(f"{name}: {steps} steps, {1e3 * plain / steps:.1f} ms each")
        for tier in TIERS:
            with tempfile.TemporaryDirectory() as folder:
                for callback in (
                    Recorder(tier=tier, dirpath=folder),
                    Statistics(tier=tier, noise_scale=tier == "full"),
                ):
                    seconds = fit(make, data, [callback], steps)
                    share, each = callback.seconds / plain, callback.seconds / max(callback.times, 1)
                    print(
                        f"  {type(callback).__name__}, {tier}: {callback.times} times, {100 * share:.2f} %, "
                        f"{each:.3f} s each time; ratio {seconds / plain:.3f}"
                    )
                    if callback.cost.share is not None:
                        print(f"    {callback.cost}")


def fit(make, data, callbacks, steps):
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, loader = Classifier(make), DataLoader(data, batch_size=BATCH, shuffle=True)
    start = now()
    trainer.fit(module, loader)
    return now() - start


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
