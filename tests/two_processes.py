"""Train on one or two processes and write what was found to a file (run by test_ddp)."""

import json
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch

from lightning_mnn import MNN
from lightning_mnn.callbacks import ActivationPatternRecorder, LastCheckpoint, LocalMinimumDetector, Schedule
from lightning_mnn.callbacks.evidence import certification
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape.regions import least_squares
from lightning_mnn.metrics import MeanClassificationError
from lightning_mnn.utilities.interruption import Interrupted, Pace, request

DETECTOR = {"polish": False, "max_distance": 10.0, "follow_descent": False}


class Reader(pl.Callback):
    """Iterates the training loader between the fetch of a batch and its step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        list(trainer.train_dataloader)


class Counter(pl.Callback):
    """Counts how often each sample is seen."""

    def __init__(self, num_samples):
        self.counts = torch.zeros(num_samples)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for x in batch[0].reshape(-1, batch[0].shape[-1]):
            self.counts += (trainer.datamodule.inputs.reshape(-1, x.shape[0])[: len(self.counts)] == x).all(1)

    def on_train_end(self, trainer, pl_module):
        self.counts = trainer.strategy.reduce(self.counts, reduce_op="sum")
        self.visits = trainer.datamodule.visits()  # collective
        metric = MeanClassificationError(0.0).to(pl_module.device)
        for x, y in trainer.train_dataloader:
            metric.update(pl_module(x), y)
        self.mce = float(metric.compute())  # collective


class CountedPace(Pace):
    """Counts how often the processes ask one another, and in how many seconds."""

    questions, first, last = 0, None, 0.0

    def proposal(self):
        self.questions += 1
        self.last = time.monotonic()
        self.first = self.first or self.last
        return super().proposal()


class Told(LastCheckpoint):
    """The last of the processes is told to stop after a step."""

    def __init__(self, dirpath, step):
        super().__init__(dirpath, timedelta(hours=1))
        self.step = step

        self._pace = CountedPace(self._pace.seconds)

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            request(signal.SIGTERM)


def stop(devices: int, step: int, out: Path) -> None:
    """Train until the last process is told to stop, and write where that was."""
    saver = Told(out.parent, step)
    trainer = pl.Trainer(
        max_epochs=1000,
        accelerator="cpu",
        devices=devices,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out.parent,
        callbacks=[saver],
    )
    try:
        trainer.fit(MNN(6, [9], default_callbacks=False), GaussianData(21, 6))
    except Interrupted:
        if trainer.is_global_zero:
            state = torch.load(saver.path, weights_only=True)
            visits = state["GaussianData"]["visits"]
            found = {"steps": trainer.global_step, "saved": state["global_step"], "visits": visits}
            pace = saver._pace
            out.write_text(json.dumps(found | {"questions": pace.questions, "seconds": pace.last - pace.first}))


def main(devices: int, options: dict, out: Path) -> None:
    if "stop" in options:
        stop(devices, options["stop"], out)
        return
    counter, recorder = (
        Counter(options["num_samples"]),
        ActivationPatternRecorder(Schedule(every=2), dirpath=out.parent),
    )
    if "split" in options:  # each process keeps its samples, and no Gram matrix is formed
        certification._MAX_GATHERED = 0
        least_squares.MAX_GRAM_ROWS = options["split"]
    given = {name: options.get(name, default) for name, default in DETECTOR.items()}
    detector = LocalMinimumDetector(Schedule(every=3), stop_training=False, **given)
    callbacks = [counter, recorder, detector, *([Reader()] if options.get("read") else [])]
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=out.parent,
        callbacks=callbacks,
        limit_val_batches=0,
    )
    replicas = options.get("replicas", 1)
    model = MNN(6, options.get("hidden_dims", [9]), replicas=replicas, optimizer={"name": "adam", "lr": 1e-2})
    sizes = {"batch_size": options.get("batch_size"), "num_test": options.get("num_test", 0)}
    trainer.fit(model, GaussianData(options["num_samples"], 6, replicas=replicas, **sizes))
    found = {"world_size": trainer.world_size, "counts": counter.counts.tolist(), "metric": counter.mce}
    found["visits"] = counter.visits
    found |= {"logged": {name: float(value) for name, value in trainer.callback_metrics.items()}}
    for callback in trainer.callbacks:
        if isinstance(callback, ScheduledCallback):
            found |= callback.summary()
    if trainer.is_global_zero:
        found["digests"] = [recorder.store.attributes(step)["digest"] for step in recorder.store.steps]
        found["weights"] = [w.flatten().tolist() for w in model.parameters()]
        out.write_text(json.dumps(found))
