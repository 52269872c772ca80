"""What training costs beside hand-written loops that take the same optimiser steps, and beside the machine's limit.

Ours is the command's own task: Lightning, all callbacks at their defaults (but that none stops the run), CSV and
offline W&B, seconds of the fit. A loop has resident tensors, index slices, autograd, Adam with one kernel for all
weights and the same schedule, and logs nothing; R replicas stand beside R loops, of which one is timed. Both are run in
turns, and ratios of neighbouring runs are reported: absolute times on shared machines are noisy.
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

from lightning_mnn.config.build import build
from lightning_mnn.model.optim import build_schedule
from lightning_mnn.tasks.train import train

ROUNDS = 3
REPLICAS = 30


def main():
    for dim, epochs in ((10, 2000), (20, 2000), (40, 2000), (80, 1000)):
        overrides = [
            f"replicas={REPLICAS}", f"data.num_samples={dim * dim // 5}", f"data.input_dim={dim}",
            f"model.hidden_dims=[{dim}]", f"trainer.max_epochs={epochs}", "trainer.log_every_n_steps=50",
        ]  # fmt: skip
        compare(f"{REPLICAS} replicas, d = {dim}", overrides)
    compare(
        "one network, N = 2000, d = 100, batch 200",
        [
            "data.num_samples=2000", "data.input_dim=100", "data.batch_size=200", "model.hidden_dims=[100]",
            "dtype=float32", "trainer.max_epochs=1000", "trainer.log_every_n_steps=50",
        ],
    )  # fmt: skip
    if digits := os.environ.get("LIGHTNING_MNN_DATA"):
        compare("MNIST, batch 1024", ["experiment=mnist", f"data.root={digits}", "trainer.max_epochs=200"])
    else:
        print("MNIST left out: set LIGHTNING_MNN_DATA to the folder that holds MNIST/raw")


def compare(name, overrides):
    overrides = [*overrides, "callbacks.local_minimum_detector.stop_training=false"]
    ratios, shares = [], []
    for _ in range(ROUNDS):
        limit = gemm_rate(overrides)
        before, (ours, products), after = loops_seconds(overrides), command_seconds(overrides), loops_seconds(overrides)
        loops = (before + after) / 2
        ratios.append(ours / loops)
        shares.append(products / ours / limit)
        print(
            f"{name}: loops {before:.2f} and {after:.2f} s, ours {ours:.2f} s, ratio {ours / loops:.3f} "
            f"({loops / ours:.1f} times less), {products / ours / 1e9:.1f} of {limit / 1e9:.0f} GFLOP/s"
        )
    ratio, share = sorted(ratios)[ROUNDS // 2], sorted(shares)[ROUNDS // 2]
    print(f"{name}: median ratio {ratio:.3f} ({1 / ratio:.1f} times less), {100 * share:.0f} % of the GEMM rate")


def config_of(overrides, run_dir):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return compose("config", ["trainer.accelerator=cpu", *overrides, f"run_dir={run_dir}"])


def command_seconds(overrides):
    """Seconds of the fit, and the operations of its matrix products."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(config_of(overrides, folder))
        summary = json.loads((Path(folder) / "summary.json").read_text())
    weights = summary["input_dim"] * summary["hidden_dims"][0]
    return summary["seconds"], 4 * summary["epochs"] * summary["num_samples"] * weights * summary["replicas"]


def loops_seconds(overrides):
    """Seconds of one loop, times the number of replicas."""
    cfg = config_of([*overrides, "data.replicas=1", "model.replicas=1"], "unused")
    data = build(cfg, "data")
    data.setup()
    model = build(cfg, "model", input_dim=data.input_dim)
    w, z = (p.detach().clone().requires_grad_() for p in (model.hidden_weights[0], model.output_weights))
    x, y, epochs = data.inputs, data.targets, cfg.trainer.max_epochs
    batch = data.batch_size or len(x)
    options = dict(cfg.optimizer)
    options.pop("name")
    optimizer = torch.optim.Adam([w, z], **options)
    schedule = build_schedule(optimizer, cfg.schedule, epochs * math.ceil(len(x) / batch))
    start = time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(batch) if batch < len(x) else [slice(None)]:
            loss = ((torch.relu(x[index] @ w.T) @ z - y[index]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return cfg.replicas * (time.perf_counter() - start)


def gemm_rate(overrides):
    """Operations a second of a large matrix product in the run's precision."""
    matrix = torch.randn(1500, 1500, dtype=getattr(torch, config_of(overrides, "unused").dtype))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * 1500**3 / best


if __name__ == "__main__":
    main()
