"""What training costs beside a hand-written loop that takes the same optimiser steps.

Ours is the command's own task: Lightning, all callbacks at their defaults, CSV and offline W&B, seconds of the fit. The
loop has resident tensors, index slices, Adam with one kernel for all weights and the same schedule, and logs nothing.
Both are run in turns, and ratios of neighbouring runs are reported: absolute times on shared machines are noisy.
"""

import contextlib
import io
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_module

from lightning_mnn.optim import build_schedule
from lightning_mnn.tasks.train import _build, train

ROUNDS = 3


def main():
    digits = os.environ.get("LIGHTNING_MNN_DATA")
    cases = {
        "N = 2000, d = 100, batch 200": [
            "data.num_samples=2000", "data.input_dim=100", "data.batch_size=200", "model.hidden_dims=[100]",
            "dtype=float32", "trainer.max_epochs=1000", "trainer.log_every_n_steps=50",
        ],
    }  # fmt: skip
    if digits:
        cases["MNIST, batch 1024"] = ["experiment=mnist", f"data.root={digits}", "trainer.max_epochs=100"]
    else:
        print("MNIST left out: set LIGHTNING_MNN_DATA to the folder that holds MNIST/raw")
    for name, overrides in cases.items():
        ratios = []
        for _ in range(ROUNDS):
            plain_before, ours, plain_after = (
                loop_seconds(overrides),
                command_seconds(overrides),
                loop_seconds(overrides),
            )
            ratios.append(ours / ((plain_before + plain_after) / 2))
            print(f"{name}: loop {plain_before:.2f} and {plain_after:.2f} s, ours {ours:.2f} s, ratio {ratios[-1]:.2f}")
        print(f"{name}: median ratio {sorted(ratios)[ROUNDS // 2]:.2f}")


def config_of(overrides, run_dir):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return compose("config", ["trainer.accelerator=cpu", *overrides, f"run_dir={run_dir}"])


def command_seconds(overrides):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cfg = config_of(overrides, folder)
        train(cfg)
        return json.loads((Path(folder) / "summary.json").read_text())["seconds"]


def loop_seconds(overrides):
    cfg = config_of(overrides, "unused")
    data = _build(cfg.data)
    data.setup()
    model = _build(cfg.model, input_dim=data.input_dim)
    w, z = (p.detach().clone().requires_grad_() for p in (model.hidden_weights[0], model.output_weights))
    x, y, batch, epochs = data.inputs, data.targets, data.batch_size, cfg.trainer.max_epochs
    options = dict(cfg.optimizer)
    options.pop("name")
    optimizer = torch.optim.Adam([w, z], **options)
    schedule = build_schedule(optimizer, cfg.schedule, epochs * math.ceil(len(x) / batch))
    start = time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(batch):
            loss = ((torch.relu(x[index] @ w.T) @ z - y[index]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
