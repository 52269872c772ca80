"""What certificates and polish cost, beside the training that they judge.

The detector's share is the time inside its own hooks over the rest of the fit, at its default schedule, where it pays
for the pass over the training set that the other callbacks share. Polish is compared with Adam on the same problem.
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

from lightning_mnn.callbacks import LocalMinimumDetector
from lightning_mnn.landscape import certify, polish
from lightning_mnn.tasks.train import train
from tests.benchmarks.bench_training import config_of


def main():
    run([])  # the first fit of a process is slower
    shares("quickstart", [])
    for digits in filter(None, [os.environ.get("LIGHTNING_MNN_DATA")]):
        shares("MNIST", ["experiment=mnist", f"data.root={digits}"], rounds=1)
    polish_ends_quickstart_early()
    for dim in (20, 40, 80):
        polish_against_adam(dim)
    table_1()


def run(overrides):
    """Seconds of a fit, its summary, and the seconds inside the detector's hooks."""
    inside = [0.0]

    def timed(hook):
        def wrapper(*args):
            start = time.perf_counter()
            hook(*args)
            inside[0] += time.perf_counter() - start

        return wrapper

    hooks = {name: getattr(LocalMinimumDetector, name) for name in ("act", "_certify_the_end")}
    for name, hook in hooks.items():
        setattr(LocalMinimumDetector, name, timed(hook))
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            train(config_of(overrides, folder))
            summary = json.loads((Path(folder) / "summary.json").read_text())
    finally:
        for name, hook in hooks.items():
            setattr(LocalMinimumDetector, name, hook)
    return summary["seconds"], summary, inside[0]


def shares(name, overrides, rounds=3):
    found = []
    for _ in range(rounds):
        seconds, summary, inside = run(overrides)
        found.append(inside / (seconds - inside))
        print(f"{name}: fit {seconds:.2f} s, {inside:.3f} s in the detector: {found[-1]:.1%}; {summary['reason'][:90]}")
    print(f"{name}: detector's share, median {sorted(found)[rounds // 2]:.1%}")


def polish_ends_quickstart_early():
    ratios = []
    for _ in range(3):
        plain, without, _ = run([])
        polished, summary, _ = run(["callbacks.local_minimum_detector.polish=true"])
        ratios.append(polished / plain)
        print(
            f"quickstart: {plain:.2f} s, MSE {without['mse']:.1e}; with polish {polished:.2f} s, "
            f"MSE {summary['mse']:.1e}, {summary['kind']}, zero_error {summary['zero_error']}, "
            f"distance {summary['distance']:.1e}"
        )
    print(f"quickstart with polish: {sorted(ratios)[1]:.2f} of the seconds without")


def polish_against_adam(dim):
    """From initial weights to MSE ≤ 1e-28: polish and Adam (lr 3e-3, exponential tail, fused, analytic gradients)."""
    generator = torch.Generator().manual_seed(dim)
    options = {"generator": generator, "dtype": torch.float64}
    n = dim * dim // 5
    x, y = torch.randn(n, dim, **options), torch.randint(0, 2, (n,), generator=generator).double()
    w, z = (torch.randn(shape, **options) * math.sqrt(2 / dim) for shape in ((dim, dim), (dim,)))
    start = time.perf_counter()
    polished = polish(w, z, x, y)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    steps, mse = adam(w.clone(), z.clone(), x, y)
    theirs = time.perf_counter() - start
    print(
        f"d = {dim}, N = {n}: polish {polished.steps} steps, {ours:.3f} s, MSE {polished.certificate.mse:.1e}; "
        f"Adam {steps} steps, {theirs:.2f} s, MSE {mse:.1e}: {theirs / ours:.0f} times as long"
    )


def adam(w, z, x, y, most=20_000, goal=1e-28):
    optimizer = torch.optim.Adam([w.requires_grad_(), z.requires_grad_()], lr=3e-3, fused=True)
    with torch.no_grad():
        for step in range(1, most + 1):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, 0.99 ** ((step - 1000) / 10))
            u = x @ w.T
            active = u > 0
            e = (active * u) @ z - y
            z.grad = 2 / len(y) * ((active * u).T @ e)
            w.grad = 2 / len(y) * z[:, None] * ((active * e[:, None]).T @ x)
            optimizer.step()
            if step % 100 == 0 and float(e @ e) / len(y) <= goal:
                break
    return step, float(e @ e) / len(y)


def table_1():
    """A certificate attempt at 70,000 × 784, width 89, from random weights and next to a linear model's minimum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70_000, 784, generator=generator)
    y = torch.randint(0, 2, (70_000,), generator=generator).float()
    w, z = (torch.randn(shape, generator=generator) for shape in ((89, 784), (89,)))
    start = time.perf_counter()
    found = certify(w * math.sqrt(2 / 784), z * math.sqrt(2 / 89), x, y)
    print(f"70,000 × 784, width 89: {time.perf_counter() - start:.1f} s: {found.kind}, {found.reason}")


if __name__ == "__main__":
    main()
