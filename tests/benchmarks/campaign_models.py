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
    polish_model,
)
from lightning_mnn.landscape.minima.models.model_certificate import classify_near, prepare
from lightning_mnn.utilities.validation import ArgumentError
from tests.benchmarks.trained_models import digits, train_module, train_runs
from tests.landscape.minima.models.probing import lowest_nearby

TRAINED = [  # widths, N
    ((8, 6, 1), 60),
    ((5, 6, 5, 1), 60),
    ((5, 6, 5, 1), 30),
    ((10, 10, 10, 1), 40),
]
FITS = [((10, 10, 10, 1), 40), ((10, 10, 10, 3), 40)]
CASES = [  # widths, N, weight decay, negative slope, loss
    ((4, 4, 2), 60, 0.0, 0.0, "squared_error"),
    ((4, 4, 2), 60, 1e-3, 0.1, "squared_error"),
    ((4, 5, 1), 80, 1e-3, 0.0, "squared_error"),
    ((5, 4, 3, 2), 80, 0.0, 0.1, "squared_error"),
    ((5, 4, 3, 2), 100, 1e-3, 0.1, "squared_error"),
    ((5, 4, 3, 1), 120, 1e-3, 0.0, "squared_error"),
    ((4, 3, 3, 3, 2), 100, 1e-3, 0.2, "squared_error"),
    ((4, 4, 2), 80, 1e-4, 0.1, "logistic"),
    ((4, 4, 3), 80, 0.0, 0.1, "cross_entropy"),
    ((4, 3, 3, 2), 100, 0.0, 0.2, "logistic"),
]


def planted_of(part, seed):
    """A planted point of a part, or None where the sizes gave none."""
    widths, n, decay, slope, loss = CASES[seed % len(CASES)]
    try:
        if part == "minima":
            return planted_model_minimum(n, widths, slope, loss=loss, weight_decay=decay, seed=seed)
        if part == "saddles":
            return planted_model_saddle(n, widths, slope, kinks=seed // len(CASES) % 3, weight_decay=decay, seed=seed)
        return planted_model_kink_minimum(
            n,
            widths,
            slope,
            kinks=1 + seed // len(CASES) % 4,
            loss=loss,
            weight_decay=decay,
            violated=part == "violated",
            seed=seed,
        )
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
    kinds, codes, lower, began, done, unplanted = Counter(), Counter(), 0, time.monotonic(), 0, 0
    for number in itertools.count(seed):
        if done >= count or time.monotonic() - began > seconds:
            break
        planted = planted_of(part, number)
        if planted is None:
            unplanted += 1
            continue
        done += 1
        if number % 2:
            shifted(planted.module, 1e-8, number)
        options = {"loss": planted.loss, "weight_decay": planted.weight_decay, "max_distance": 1e-6}
        found = certify_model(planted.module, planted.inputs, planted.targets, **options)
        kinds[str(found.kind)] += 1
        codes[str(found.reason_code)] += 1
        if found.is_minimum:
            lower += lowest_nearby(planted, found, seed=number) < -1
    print(part, "points", done, dict(kinds), dict(codes), "lower loss found at", lower, "not planted", unplanted)


def two_layers(count, seconds, seed):
    """Two-layer points: the general classification must never contradict ``certify``."""
    pairs, contradictions, began, done = Counter(), 0, time.monotonic(), 0
    draws = (planted_minimum, planted_kink_minimum, planted_saddle, planted_kink_minimum)
    for number in itertools.count(seed):
        if done >= count or time.monotonic() - began > seconds:
            break
        draw = draws[number % 4]
        options = {"violated": True} if number % 4 == 3 else {}
        slope = (0.0, 0.1)[number // 4 % 2]
        try:
            planted = draw(30, 3, 3 + number % 2, slope, seed=number, **options)
        except ValueError:
            continue
        done += 1
        w, z = planted.hidden_weights, planted.output_weights
        exact = certify(w, z, planted.inputs, planted.targets, slope, threshold=0.0)
        d1, d0 = w.shape
        module = nn.Sequential(
            nn.Linear(d0, d1, bias=False), nn.LeakyReLU(slope), nn.Linear(d1, 1, bias=False)
        ).double()
        with torch.no_grad():
            module[0].weight.copy_(w)
            module[2].weight.copy_(z[None])
        model, vector = prepare(
            module, planted.inputs, planted.targets, loss="squared_error", weight_decay=0.0, frozen=()
        )
        general = classify_near(model, vector, 1e-2)
        pairs[str(exact.kind), str(general.kind)] += 1
        contradictions += exact.kind.is_minimum and general.kind is Kind.SADDLE
        contradictions += exact.kind is Kind.SADDLE and general.kind.is_minimum
    print("layers points", done, dict(pairs), "contradictions", contradictions)


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
