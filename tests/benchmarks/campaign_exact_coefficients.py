"""A campaign that compares the counted learning coefficients of certified minima with long Metropolis chains.

Run it as ``python -m tests.benchmarks.campaign_exact_coefficients [--count N] [--seconds S] [--first K] [--every E]``.
Cases are planted minima of networks of two and three layers, with and without weight decay, differentiable or on 1 to
10 kinks. It prints a line for each, and how many of the chains' intervals of 95 % hold the counts.

The chains sample the true loss. What the certificate knows helps them in three ways, none of which changes λ: nβ is so
large that the flattest direction counts in full; minima flatter than ``MIN_CURVATURE``, or on a kink that grows by less
than ``MIN_GROWTH``, are left out, because float64 has no nβ for them; and the kinks of the second hidden layer, which
are curved, are straight in the coordinates of the chains.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from lightning_mnn.landscape import (
    certify_model,
    estimate_learning_coefficient,
    learning_coefficient,
    planted_model_kink_minimum,
    planted_model_minimum,
)
from lightning_mnn.utilities.validation import ArgumentError

FAMILIES = [  # widths, samples, kinks
    *(((2, 3, 1), 40, kinks) for kinks in range(4)),
    *(((2, 4, 1), 60, kinks) for kinks in range(5)),
    *(((3, 4, 1), 90, kinks) for kinks in range(7)),
    *(((3, 5, 1), 150, kinks) for kinks in range(7, 11)),
    *(((2, 2, 2, 1), 50, kinks) for kinks in range(4)),
    *(((2, 3, 2, 1), 80, kinks) for kinks in range(7)),
    *(((3, 4, 3, 1), 200, kinks) for kinks in range(7, 11)),
]
DECAYS = (0.0, 1e-2)
MIN_CURVATURE, MIN_GROWTH = 1e-4, 3e-4
CHAINS, MAX_TRIALS = 64, 3


@dataclass(frozen=True)
class Case:
    """A certified minimum: its loss at points (C, P), the point, λ, and the settings of its chains."""

    name: str
    loss: object
    point: torch.Tensor
    truth: float
    settings: dict


def case(number: int) -> Case | None:
    """One of all cases; None if there is no such minimum, or if it is left out."""
    (widths, samples, kinks), decay = FAMILIES[number % len(FAMILIES)], DECAYS[number // len(FAMILIES) % 2]
    options = {"weight_decay": decay, "seed": number}
    try:
        if kinks:
            planted = planted_model_kink_minimum(samples, widths, kinks=kinks, **options)
        else:
            planted = planted_model_minimum(samples, widths, **options)
        certificate = certify_model(planted.module, planted.inputs, planted.targets, weight_decay=decay)
        truth = learning_coefficient(certificate).value
    except ArgumentError:
        return None
    curvature = planted.tangential_eigenvalue
    if curvature < MIN_CURVATURE or (kinks and float(planted.growth.min()) < MIN_GROWTH):
        return None
    beta = min(1e14, max(1e10, (2e3 / curvature) ** 2))
    settings = {
        "inverse_temperature": beta,
        "localisation": math.sqrt(beta),  # orbits of symmetries are then straight over the width of the others
        "chains": CHAINS,
        "burn_in": 60 + 12 * kinks,
        "steps": 90 + 30 * kinks,
        "seed": number,
    }
    name = f"{number}: {'-'.join(map(str, widths))}, {kinks} kinks, weight decay {decay:g}"
    return Case(name, *straight_loss(planted), truth, settings)


def straight_loss(planted):
    """The objective at points (C, P) at once, in coordinates in which the kinks of all layers are straight.

    Kinks of a unit after a linear layer with the inputs h_k(θ') are h_k · (w, b) = 0, and h_k changes with the weights
    θ' before. With the rows h_k in H, and H* at the minimum, (w, b) = v − H⁺ (H − H*) v makes them H* v = 0. This is
    the identity at the minimum, and smooth with a smooth inverse near it, so λ is the same.
    """
    parts = list(planted.module.parameters())
    shapes, sizes = [part.shape for part in parts], [part.numel() for part in parts]
    kinks = {}
    for layer, sample, unit in planted.kinks:
        if layer:
            kinks.setdefault((layer, unit), []).append(sample)
    inputs_at_minimum, x = [], planted.inputs
    for step in planted.module:
        if isinstance(step, nn.Linear):
            inputs_at_minimum.append(x)
        x = step(x)

    def loss(points):
        weights = iter([part.reshape(-1, *shape) for part, shape in zip(points.split(sizes, 1), shapes, strict=True)])
        x, layer = planted.inputs.expand(len(points), -1, -1), 0
        for step in planted.module:
            if not isinstance(step, nn.Linear):
                x = step(x)
                continue
            weight, bias = next(weights), next(weights)
            curved = [(unit, samples) for (place, unit), samples in kinks.items() if place == layer]
            if not curved:
                x, layer = torch.baddbmm(bias[:, None], x, weight.mT), layer + 1
                continue
            rows = torch.cat([weight, bias[..., None]], 2)
            with_ones = torch.cat([x, torch.ones_like(x[..., :1])], 2)
            for unit, samples in curved:
                now, before = with_ones[:, samples], inputs_at_minimum[layer][samples]
                change = now - torch.cat([before, torch.ones_like(before[:, :1])], 1)
                moved = torch.linalg.solve(now @ now.mT, change @ rows[:, unit, :, None])
                straight = rows[:, unit] - (now.mT @ moved)[..., 0]
                rows = torch.cat([rows[:, :unit], straight[:, None], rows[:, unit + 1 :]], 1)
            x, layer = with_ones @ rows.mT, layer + 1
        found = (x - planted.targets.reshape(x.shape[1:])).square().sum(2).mean(1)
        return found + planted.weight_decay / 2 * points.square().sum(1) if planted.weight_decay else found

    return loss, torch.cat([part.detach().flatten() for part in parts])


def sampled(one: Case):
    """The estimate, with twice the moves as long as it is refused; and the number of trials."""
    for trial in range(MAX_TRIALS):
        more = {name: one.settings[name] << trial for name in ("steps", "burn_in")}
        found = estimate_learning_coefficient(one.loss, one.point, **one.settings | more)
        if found.is_reliable:
            break
    return found, trial + 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--first", type=int, default=0, help="first case")
    parser.add_argument("--every", type=int, default=1, help="take each such case from the first on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, number, done, tally, errors = time.monotonic(), options.first, 0, Counter(), []
    while done < options.count and time.monotonic() - began < options.seconds:
        one = case(number)
        number += options.every
        if one is None:
            continue
        done += 1
        found, trials = sampled(one)
        error = (found.mean - one.truth) / one.truth
        tally[f"trial {trials}"] += 1
        if found.is_reliable:
            held = abs(found.value - one.truth) <= 1.96 * found.standard_error
            tally["held" if held else "missed"] += 1
            errors.append(abs(error))
            verdict = f"± {found.standard_error:.4f} {'held' if held else 'MISSED'}"
        else:
            tally["refused"] += 1
            verdict = f"REFUSED {found.reason_code}"
        print(
            f"{one.name}: certified {one.truth:g}, found {found.mean:.4f} ({error:+.2%}) {verdict}, R-hat "
            f"{found.r_hat:.3f}, {found.gradient_evaluations} gradients, trial {trials}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    print(f"{dict(tally)}, largest error {max(errors, default=math.nan):.2%}", flush=True)


if __name__ == "__main__":
    main()
