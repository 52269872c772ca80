"""Spurious minima of Safran and Shamir (2018): a teacher of k orthonormal ReLU units, on N Gaussian samples.

``python -m tests.benchmarks.campaign_spurious [--units 6 7 8 9 10] [--runs 60] [--samples 20000]``. All output weights
are 1 and frozen. It prints, for each k, how many students ended above zero error, how many of these are certified
minima of the empirical loss, and their objective (half the mean squared error) beside the published population values.
"""

import argparse
import time
from collections import Counter

import torch

from lightning_mnn.landscape import certify, polish

# The smallest objective of the spurious minima, and their share in per cent.
PUBLISHED = {6: (0.0251, 0.3), 7: (0.0232, 5.5), 8: (0.0215, 12.6), 9: (0.0200, 21.8), 10: (0.0187, 34.6)}
_SPURIOUS = 1e-3  # objective above which a student is not the teacher


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, nargs="+", default=[6, 7, 8, 9, 10])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args()
    for units in options.units:
        began = time.process_time()
        study(units, options.runs, options.samples, options.steps)
        print(f"  {time.process_time() - began:.0f} s of the processor", flush=True)


def study(units, runs, samples, steps):
    """Train students of one size, certify those that are not the teacher, and print what was found."""
    stream = torch.Generator().manual_seed(units)
    inputs = torch.randn(samples, units, dtype=torch.float64, generator=stream)
    targets = inputs.relu().sum(1)  # the teacher's weights are the identity
    students = torch.randn(runs, units, units, dtype=torch.float64, generator=stream) / units**0.5
    few = samples // 5  # it is cheaper to find on few samples which students will be spurious
    students = trained(students, inputs[:few], targets[:few], steps)
    objectives = torch.stack([objective(weights, inputs, targets) for weights in students])
    spurious = trained(students[objectives > _SPURIOUS], inputs, targets, steps // 2, rate=1e-3)
    ones = torch.ones(units, dtype=torch.float64)
    kinds, values = Counter(), []
    for weights in spurious:
        found = certify(weights, ones, inputs, targets, max_distance=1e-2)
        if not found.is_minimum:
            polished = polish(weights, ones, inputs, targets)
            found = polished.certificate if polished.certificate.is_minimum else found
        kinds["zero error" if found.zero_error else str(found.kind)] += 1
        values += [] if found.zero_error else [found.mse / 2]
    low, share = PUBLISHED[units]
    percent = 100 * len(values) / runs
    print(f"k = {units}: {len(values)} of {runs} students spurious ({percent:.1f} %; published {share} %)")
    found = [round(value, 4) for value in sorted(values)]
    print(f"  {dict(kinds)}; objectives {found}; published from {low}", flush=True)


def objective(weights, inputs, targets):
    """Half the mean squared error."""
    return ((inputs @ weights.T).relu().sum(1) - targets).square().mean() / 2


def trained(weights, inputs, targets, steps, rate=0.03):
    """Students (R, k, k) after Adam on the whole training set."""
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-7)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in range(len(weights)):  # one at a time: activations stay in the cache
            objective(weights[part], inputs, targets).backward()
        optimizer.step()
        schedule.step()
    return weights.detach()


if __name__ == "__main__":
    main()
