"""A campaign for certify_model: planted points of many sizes, losses and depths, and a comparison with certify.

Run it as ``python -m tests.benchmarks.campaign_models [part …] [--count N] [--seconds S] [--seed S]``. Parts: minima,
kinks, violated, saddles, layers (two-layer points, compared with ``certify``). It prints one line for each part.
"""

from __future__ import annotations

import argparse
import itertools
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
)
from lightning_mnn.landscape.minima.models.model_certificate import classify_near, prepare
from lightning_mnn.utilities.validation import ArgumentError
from tests.landscape.minima.models.probing import lowest_nearby

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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["minima", "kinks", "violated", "saddles", "layers"])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for part in options.parts:
        if part == "layers":
            two_layers(options.count, options.seconds, options.seed)
        else:
            campaign(part, options.count, options.seconds, options.seed)


if __name__ == "__main__":
    main()
