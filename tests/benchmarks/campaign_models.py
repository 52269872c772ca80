"""A campaign for certify_model: planted points of many sizes, losses and depths, and a comparison with certify.

Run it as ``python -m tests.benchmarks.campaign_models [part …] [--count N] [--seconds S] [--seed S]``. Parts: minima,
kinks, violated, saddles, layers (two-layer points, compared with ``certify``), trained (24 networks of each size,
trained with Adam and polished), fits (without a penalty, more parameters than equations), digits and convolution
(MNIST, whose folder LIGHTNING_MNN_DATA names). It prints a line for each part, and for each size.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from lightning_mnn.landscape import (
    Kind,
    certify,
    certify_model,
    planted_kink_minimum,
    planted_minimum,
    planted_model_kink_minimum,
    planted_model_minimum,
    planted_model_saddle,
    planted_saddle,
    polish,
    polish_model,
)
from lightning_mnn.landscape.minima.models.model_certificate import classify_near, prepare
from lightning_mnn.utilities.validation import ArgumentError
from lightning_mnn.verdicts import ReasonCode
from tests.benchmarks.trained_models import digits, train_module, train_runs
from tests.landscape.minima.models.probing import lowest_nearby

TRAINED = [  # widths, N
    ((8, 6, 1), 60),
    ((5, 6, 5, 1), 60),
    ((5, 6, 5, 1), 30),
    ((10, 10, 10, 1), 40),
]
FITS = [((10, 10, 10, 1), 40), ((10, 10, 10, 3), 40)]
TRUE_KINDS = {
    "minima": Kind.DIFFERENTIABLE_MINIMUM,
    "kinks": Kind.KINK_MINIMUM,
    "saddles": Kind.SADDLE,
    "violated": Kind.NOT_STATIONARY,
}
SIZES = (1e-1, 1e-3, 1e-5, 1e-6, 1e-7)  # of probes: relative moves
LOSSES = ("squared_error", "cross_entropy", "logistic")
DECAYS = (0.0, 1e-4, 1e-2)
SLOPES = (0.0, 0.1, 0.2)


@dataclass(frozen=True)
class Case:
    """Sizes and objective of a planted problem."""

    widths: tuple[int, ...]
    samples: int
    loss: str
    decay: float
    slope: float
    kinks: int


def case_of(part, seed):
    """A random case of two to four layers, one to five outputs, 1 to 40 kinks; seeds cycle through the objectives."""
    random = np.random.default_rng(seed)
    loss = "squared_error" if part == "saddles" else LOSSES[seed % 3]
    layers = 2 + seed // 9 % 3
    outputs = int(random.integers(1 if loss != "cross_entropy" else 2, 6))
    hidden = random.integers(3, 8 if layers == 2 else 6, layers - 1)
    widths = (int(random.integers(3, 8)), *map(int, hidden), outputs)
    room = sum(unit * (before - 1) for before, unit in pairwise(widths[:-1]))  # a unit has fewer kinks than inputs
    most = min(4 if part == "saddles" else 40, room // 2)
    kinks = 0 if part == "minima" else round(most ** random.uniform(0, 1))
    numbers = sum((a + 1) * b for a, b in pairwise(widths)) + kinks
    samples = round(random.uniform(1.5, 3) * numbers / max(1, outputs - (loss == "cross_entropy"))) + 20
    return Case(widths, samples, loss, DECAYS[seed // 3 % 3], SLOPES[int(random.integers(3))], kinks)


def planted_of(part, seed):
    """A planted point of a part, or None where the sizes gave none."""
    case = case_of(part, seed)
    options = {"weight_decay": case.decay, "seed": seed}
    try:
        if part == "minima":
            return planted_model_minimum(case.samples, case.widths, case.slope, loss=case.loss, **options)
        if part == "saddles":
            return planted_model_saddle(case.samples, case.widths, case.slope, kinks=case.kinks, **options)
        violated = part == "violated"
        options |= {"kinks": case.kinks, "loss": case.loss, "violated": violated}
        return planted_model_kink_minimum(case.samples, case.widths, case.slope, **options)
    except ArgumentError:
        return None


def shifted(module, relative, seed):
    """The module with all parameters moved by a relative distance."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            move = torch.randn_like(p)
            p.add_(relative * move * p.norm() / move.norm())


def campaign(part, count, seconds, seed):
    kinds, codes, misses, began, done, unplanted = Counter(), Counter(), [], time.monotonic(), 0, 0
    probes, combinations = Counter(), Counter()
    for number in itertools.count(seed):
        if done >= count or time.monotonic() - began > seconds:
            break
        planted, case = planted_of(part, number), case_of(part, number)
        if planted is None:
            unplanted += 1
            continue
        done += 1
        combinations[case.loss, case.decay, len(case.widths) - 1] += 1
        if number % 2:
            shifted(planted.module, 1e-8, number)
        options = {"loss": planted.loss, "weight_decay": planted.weight_decay, "max_distance": 1e-6}
        found = certify_model(planted.module, planted.inputs, planted.targets, **options)
        kinds[str(found.kind)] += 1
        codes[str(found.reason_code)] += 1
        if found.kind is not TRUE_KINDS[part]:
            misses.append((number, str(found.reason_code)))
        if found.is_minimum:
            lowest_nearby(planted, found, seed=number, sizes=SIZES, tally=probes)
    print(part, "points", done, dict(kinds), dict(codes), "not planted", unplanted, "other kinds", misses)
    print("  probes", {f"{what} at {size:g}": n for (what, size), n in sorted(probes.items(), key=str)})
    print("  ", dict(combinations), flush=True)


def trained_weights(w, z, x, y, slope, steps=300):
    """Weights after a short training with Adam."""
    w, z = w.clone().requires_grad_(), z.clone().requires_grad_()
    optimizer = torch.optim.Adam([w, z], 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (nn.functional.leaky_relu(x @ w.T, slope) @ z - y).square().mean().backward()
        optimizer.step()
    return w.detach(), z.detach()


def two_layer_point(number):
    """W, z, X, y and the slope of a point of one of eight sorts, or None where the sizes gave none."""
    sort, slope, width = number % 8, (0.0, 0.1, -1.0)[number // 8 % 3], 3 + number // 24 % 3
    draws = (planted_minimum, planted_kink_minimum, planted_saddle, planted_kink_minimum)
    try:
        if sort < 4:
            options = {"violated": True} if sort == 3 else {}
            planted = draws[sort](30, 3, width, slope, seed=number, **options)
            return planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets, slope
        if sort == 4:
            planted = planted_model_minimum(60, (4, width, 1), slope, bias=False, seed=number)
            first, last = planted.module[0].weight.detach(), planted.module[2].weight.detach()
            return first, last[0], planted.inputs, planted.targets[:, 0], slope
    except ValueError:
        return None
    random = torch.Generator().manual_seed(number)
    x, w = (torch.randn(rows, 3, generator=random, dtype=torch.float64) for rows in (30, width))
    y, z = (torch.randn(size, generator=random, dtype=torch.float64) for size in (30, width))
    if sort == 5:  # polished only
        return (*polished_weights(w, z, x, y, slope), x, y, slope)
    if sort == 6:  # trained and polished
        return (*polished_weights(*trained_weights(w, z, x, y, slope), x, y, slope), x, y, slope)
    x, w, z = x.round(), w.round(), z.round()  # many zeros, and kinks that are exact
    w, z = polished_weights(w, z, x, y, slope)
    z[0] = 0.0
    return w, z, x, y, slope


def polished_weights(w, z, x, y, slope):
    found = polish(w, z, x, y, slope, threshold=0.0).certificate
    return found.hidden_weights, found.output_weights.clone()


def two_layers(count, seconds, seed):
    """Two-layer points: the general classification must never contradict ``certify`` at the same point."""
    pairs, contradictions, minima, decided, began, done = Counter(), [], Counter(), Counter(), time.monotonic(), 0
    undecided = Counter()
    for number in itertools.count(seed):
        if done >= count or time.monotonic() - began > seconds:
            break
        point = two_layer_point(number)
        if point is None:
            continue
        done += 1
        w, z, x, y, slope = point
        exact = certify(w, z, x, y, slope, threshold=0.0)
        d1, d0 = w.shape
        module = nn.Sequential(nn.Linear(d0, d1, bias=False), nn.LeakyReLU(slope), nn.Linear(d1, 1, bias=False))
        module.double()
        with torch.no_grad():
            module[0].weight.copy_(w)
            module[2].weight.copy_(z[None])
        model, vector = prepare(module, x, y, loss="squared_error", weight_decay=0.0, frozen=())
        general = classify_near(model, vector, 1e-2)
        pairs[str(exact.kind), str(general.kind)] += 1
        if exact.kind.is_minimum:
            minima[number % 8, slope] += 1
            decided[number % 8, slope] += general.kind.is_minimum
            if not general.kind.is_minimum:
                undecided[str(general.because.code)] += 1
        falls = exact.kind is Kind.SADDLE or exact.reason_code is ReasonCode.GROWTH_NEGATIVE
        near = float((general.vector - vector).norm()) <= 1e-6 * float(vector.norm())
        if near and ((exact.kind.is_minimum and general.direction is not None) or (falls and general.kind.is_minimum)):
            contradictions.append((number, str(exact.kind), str(general.kind)))
    print("layers points", done, dict(pairs), "contradictions", contradictions)
    print("  minima decided by both", sum(decided.values()), "of", sum(minima.values()), "else", dict(undecided))
    print("  by sort and slope", {key: (decided[key], n) for key, n in sorted(minima.items())}, flush=True)


def polished(name, runs, decay, loss="squared_error", seconds=600.0):
    """Polish trained networks, and tell how they end."""
    codes, costs, began, distances = Counter(), [], time.monotonic(), []
    for module, x, y in runs:
        if time.monotonic() - began > seconds:
            break
        start = time.process_time()
        found = polish_model(module, x, y, loss=loss, weight_decay=decay).certificate
        costs.append(time.process_time() - start)
        distances.append(found.distance)
        codes[f"{found.kind}: {found.reason_code}"] += 1
    certified = sum(n for code, n in codes.items() if "minimum" in code)
    print(
        f"{name}: {certified} of {len(costs)} certified, {dict(codes)}, median {sorted(costs)[len(costs) // 2]:.1f} s, "
        f"distance at most {max(distances):.1e}",
        flush=True,
    )


def trained(options):
    for (widths, n), decay in itertools.product(TRAINED, (2e-3, 2e-2)):
        runs = train_runs(widths, n, decay, runs=min(24, options.count), seed=options.seed)
        polished(f"trained {widths}, N = {n}, wd = {decay}", runs, decay, seconds=options.seconds)


def fits(options):
    for widths, n in FITS:
        runs = train_runs(widths, n, 0.0, runs=min(24, options.count), seed=options.seed, last_rate=1e-4)
        polished(f"fits {widths}, N = {n}", runs, 0.0, seconds=options.seconds)


def of_digits(options):
    runs = min(24, options.count)
    x, y = digits(os.environ["LIGHTNING_MNN_DATA"], 60, 10, runs)
    for decay in (2e-3, 2e-2):
        found = train_runs((100, 6, 10), 60, decay, data=(x.flatten(2), y), runs=runs, seed=options.seed)
        polished(f"digits (100, 6, 10), wd = {decay}", found, decay, "cross_entropy", options.seconds)


def convolution(options):
    """Two convolutions and max-pooling on 100 digits, some 1,000 parameters: zero squared error, and a penalty."""
    x, y = digits(os.environ["LIGHTNING_MNN_DATA"], 100, 10, 1)
    x, y = x[0], nn.functional.one_hot(y[0], 10).double()
    for decay in (0.0, 2e-3):
        torch.manual_seed(options.seed)
        layers = [nn.Conv2d(1, 6, 3), nn.LeakyReLU(0.1), nn.Conv2d(6, 10, 3), nn.LeakyReLU(0.1), nn.MaxPool2d(2)]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(90, 10)).double()
        train_module(net, x, y, decay)
        start = time.process_time()
        found = certify_model(net, x, y, weight_decay=decay, max_distance=0.1)
        print(
            f"convolution, {sum(p.numel() for p in net.parameters())} parameters, wd = {decay}: {found.kind}, "
            f"{found.reason_code}, zero error {found.zero_error}, radius {found.radius}, "
            f"{time.process_time() - start:.1f} s",
            flush=True,
        )


MORE = {"trained": trained, "fits": fits, "digits": of_digits, "convolution": convolution}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["minima", "kinks", "violated", "saddles", "layers"])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for part in options.parts:
        if part in MORE:
            MORE[part](options)
        elif part == "layers":
            two_layers(options.count, options.seconds, options.seed)
        else:
            campaign(part, options.count, options.seconds, options.seed)


if __name__ == "__main__":
    main()
