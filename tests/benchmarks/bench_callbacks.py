"""What the callbacks cost in somebody else's model: torchvision's resnet18 on random images of 32 × 32 pixels.

The detector's checks and the monitor's measurement come first, on 1,024 images. The recorder runs with its default
schedule and probe. IMAGES (16384) sets the length of its epoch, of which there are two, in batches of 128; before that,
64 steps without it are timed. It trains on a GPU where there is one; elsewhere the seconds are those of the processor,
since others may use it too.
"""

import os
import statistics
import tempfile
import time

import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    LocalMinimumDetector,
    Schedule,
    SecondOrderSettings,
)

BATCH = 128
STEPS = 64
SOME = 1024  # images
PRODUCTS = 6


def main():
    detector_and_monitor()
    recorder()


def detector_and_monitor():
    """Seconds of a check, a Hessian–vector product and a measurement beside an epoch of the same images."""
    data = TensorDataset(torch.randn(SOME, 3, 32, 32), torch.randint(10, (SOME,)))
    epoch = statistics.median(fit(data, [], max_epochs=3)[1].epochs)
    look = seconds_of(data, TimedDetector(Schedule(every=1)))
    options = {"patience": 1, "stop_training": False}
    hessian = SecondOrderSettings(max_products=PRODUCTS, gradient_tolerance=1e6)  # so that it goes on to the Hessian
    both = seconds_of(data, TimedDetector(Schedule(every=1), **options, second_order=hessian))
    product = (both - look) / PRODUCTS
    print(f"{SOME} images: an epoch {epoch:.1f} s")
    print(f"  detector: a check {look / epoch:.2f} epochs, a Hessian-vector product {product / epoch:.2f} epochs")
    print(f"  monitor: a measurement, whatever the number of images, {seconds_of(data, TimedMonitor()):.1f} s")


def seconds_of(data, callback):
    """Of the last time that a callback acts in two epochs."""
    fit(data, [callback], max_epochs=2)
    return callback.seconds


def recorder():
    num = int(os.environ.get("IMAGES", "16384"))
    data = TensorDataset(torch.randn(num, 3, 32, 32), torch.randint(10, (num,)))
    plain = fit(data, [], max_steps=STEPS)[1]
    with tempfile.TemporaryDirectory() as folder:
        recorder = Timed(dirpath=folder)
        trainer, watched = fit(data, [recorder], max_epochs=2)
    epoch, each = statistics.median(watched.epochs), statistics.median(recorder.seconds)
    print(f"{num} images: an epoch {epoch:.1f} s, recorder at {len(recorder.seconds) + 1} times")
    print(f"  a snapshot of {recorder.samples} samples {each:.2f} s: {100 * each / epoch:.1f} % of an epoch")
    print(f"  at CIFAR-10's 50,000 images that would be {100 * each / epoch * num / 50_000:.1f} %")
    print(f"  finding the layers, once, {recorder.prepared:.2f} s")
    for epochs in (10, 100):
        times = 2 + sum(recorder.schedule.due(n) for n in range(1, epochs))
        share = (times * each + recorder.prepared) / (epochs * epoch)
        print(f"  of a run of {epochs} epochs with {times} snapshots {100 * share:.2f} %")
    mebibyte = 2**20
    print(f"  held {recorder.held / mebibyte:.1f} MiB of a budget of {recorder.memory_budget / mebibyte:.0f} MiB")
    print(f"  a snapshot's tensors, one batch's activations among them: at most {recorder.beyond / mebibyte:.1f} MiB")
    ratio = statistics.median(watched.steps) / statistics.median(plain.steps)
    print(f"  a step between snapshots {statistics.median(watched.steps) * 1e3:.1f} ms, {ratio:.3f} of one without it")
    print(f"  {sum(len(part._forward_hooks) for part in trainer.lightning_module.modules())} hooks left")


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = resnet18(num_classes=10)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(pl.Callback):
    """Seconds of each step and epoch, that of the other callbacks left out."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.begin = self.last = now()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(now() - self.last)
        self.last = now()

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(now() - self.begin)


class TimedDetector(LocalMinimumDetector):
    def act(self, trainer, pl_module):
        start = now()
        super().act(trainer, pl_module)
        self.seconds = now() - start


class TimedMonitor(AngularVolumeMonitor):
    def on_train_end(self, trainer, pl_module):
        start = now()
        super().on_train_end(trainer, pl_module)
        self.seconds = now() - start


class Timed(ActivationPatternRecorder):
    """Seconds of each snapshot, and what it holds."""

    seconds, beyond, held, samples, prepared = (), 0, 0, 0, 0.0

    def prepare(self, trainer, pl_module):
        start = now()
        super().prepare(trainer, pl_module)
        self.prepared = now() - start

    def act(self, trainer, pl_module):
        if not self.samples:  # the first, which is not timed
            self.beyond = peak_of(lambda: super(Timed, self).act(trainer, pl_module))
        else:
            start = now()
            super().act(trainer, pl_module)
            self.seconds = (*self.seconds, now() - start)
        kept = {p.bits.data_ptr(): p.bits for snapshot in (self._first, self._last) for p in snapshot.values()}
        new = sum(p.bits.nbytes for p in self._last.values())
        self.held = sum(bits.nbytes for bits in kept.values()) + new  # the two that stay, and the one that came
        self.samples = next(iter(self._last.values())).bits.shape[-2]


def fit(data, callbacks, **options):
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=BATCH, shuffle=True))
    return trainer, clock


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_of(work):
    """Bytes of tensors above those before, at their most."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


if __name__ == "__main__":
    main()
