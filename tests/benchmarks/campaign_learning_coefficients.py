"""A campaign for sampled learning coefficients: known truths, certified minima, and settings that must be refused.

Run it as ``python -m tests.benchmarks.campaign_learning_coefficients [part …] [--count N] [--seconds S]``. Parts:
regression (reduced-rank, true map 0), crossings (w1^a w2^b)², minima (of two-layer networks, whose coefficient is
certified), sgld (the same, by SGLD), broken (steps 100 times too large, chains too short). It prints a line for each.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from lightning_mnn.landscape import (
    certify,
    estimate_learning_coefficient,
    learning_coefficient,
    planted_kink_minimum,
    planted_minimum,
    polish,
)
from lightning_mnn.utilities.validation import ArgumentError
from tests.landscape.curvature.singular_losses import crossing, expected_crossing, reduced_rank

SIZES = [(5, 3, 5), (5, 4, 5), (4, 3, 8), (8, 3, 4), (3, 8, 4)]
POWERS = [((1, 2), 1e12, 4000), ((2, 2), 1e40, 12_000), ((3, 1), 1e12, 4000)]  # a and b, nβ, steps
NETWORKS = {"inverse_temperature": 1e11, "localisation": 1e6, "chains": 32, "steps": 600, "burn_in": 600}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["regression", "crossings", "minima", "sgld", "broken"])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        if part == "regression":
            regressions()
        elif part == "crossings":
            crossings()
        elif part in ("minima", "sgld"):
            minima(options.count, options.seconds, adjusted=part == "minima")
        else:
            broken(options.count, options.seconds)


def told(name, found, truth, seconds):
    error = found.mean / truth - 1
    print(f"{name}: truth {truth:g}, found {found.mean:.4f} ({error:+.1%})", end=" ")
    print(f"± {found.standard_error or float('nan'):.4f}, R-hat {found.r_hat:.3f}, {found.reason_code}", end=" ")
    print(f"in {seconds:.0f} s and {found.gradient_evaluations} gradients", flush=True)


def regressions():
    for sizes in SIZES:
        loss, point, truth = reduced_rank(*sizes)
        began = time.monotonic()
        found = estimate_learning_coefficient(
            loss, point, inverse_temperature=1e3, steps=8000, burn_in=600, leapfrog_steps=8
        )
        told(f"reduced-rank regression {sizes}", found, truth, time.monotonic() - began)


def crossings():
    for powers, beta, steps in POWERS:
        loss, point, truth = crossing(*powers)
        began = time.monotonic()
        found = estimate_learning_coefficient(
            loss, point, inverse_temperature=beta, chains=128, steps=steps, leapfrog_steps=1
        )
        told(f"normal crossing {powers}", found, truth, time.monotonic() - began)
        print(f"  the exact mean at nβ = 1e12 is {expected_crossing(*powers, 1e12):.4f}", flush=True)


def certified(seed):
    """The loss around a certified minimum, the minimum as a vector, and its coefficient; None where there is none."""
    num, dim, width = 12 + 2 * (seed % 3), 2 + seed % 2, 2 + seed // 2 % 2
    try:
        if seed % 3 == 0:
            found = planted_minimum(num, dim, width, seed=seed)
        elif seed % 3 == 1:
            found = planted_kink_minimum(num, dim, width, seed=seed)
        else:
            stream = torch.Generator().manual_seed(seed)
            x = torch.randn(num, dim, generator=stream, dtype=torch.float64)
            y = torch.randint(2, (num,), generator=stream).double()
            start = torch.randn(width, dim, generator=stream, dtype=torch.float64)
            end = polish(start, torch.randn(width, generator=stream, dtype=torch.float64), x, y).certificate
            return around(end, x, y)
        given = found.hidden_weights, found.output_weights, found.inputs, found.targets
        return around(certify(*given), found.inputs, found.targets)
    except (ValueError, ArgumentError):
        return None


def around(certificate, x, y):
    truth = learning_coefficient(certificate).value
    weights, z = certificate.hidden_weights, certificate.output_weights

    def loss(points):
        hidden, out = points[:, : weights.numel()].reshape(-1, *weights.shape), points[:, weights.numel() :]
        return (((hidden @ x.T).relu() * out[..., None]).sum(1) - y).square().mean(-1)

    return (loss, torch.cat([weights.flatten(), z]), truth) if truth else None


def each_minimum(count, seconds):
    began, seed = time.monotonic(), 0
    while count and time.monotonic() - began < seconds:
        found = certified(seed)
        if found is not None:
            count -= 1
            yield seed, *found
        seed += 1


def minima(count, seconds, *, adjusted):
    tally, worst = Counter(), 0.0
    for seed, loss, point, truth in each_minimum(count, seconds):
        found = estimate_learning_coefficient(loss, point, **NETWORKS, adjusted=adjusted, seed=seed)
        covered = found.is_reliable and abs(found.value - truth) <= 1.96 * found.standard_error
        tally["covered" if covered else "missed" if found.is_reliable else str(found.reason_code)] += 1
        if found.is_reliable:
            worst = max(worst, abs(found.value / truth - 1))
        if not covered:
            told(f"  minimum {seed}", found, truth, 0)
    print(f"minima, {'Metropolis' if adjusted else 'SGLD'}: {dict(tally)}, largest error {worst:.1%}", flush=True)


def broken(count, seconds):
    tallies = {"step 100 times too large": Counter(), "the same, SGLD": Counter(), "short chains": Counter()}
    for seed, loss, point, _ in each_minimum(count, seconds):
        good = estimate_learning_coefficient(loss, point, **NETWORKS | {"steps": 100}, seed=seed)
        sgld = {"adjusted": False, "preconditioned": False, "steps": 300, "burn_in": 300}
        settings = [
            NETWORKS | {"step_size": 100 * good.step_size},
            NETWORKS
            | sgld
            | {"step_size": 100 / (NETWORKS["inverse_temperature"] * largest_curvature(loss, point)) ** 0.5},
            NETWORKS | {"steps": 20, "burn_in": 5},
        ]
        for tally, setting in zip(tallies.values(), settings, strict=True):
            found = estimate_learning_coefficient(loss, point, **setting, seed=seed)
            tally["taken as reliable" if found.is_reliable else str(found.reason_code)] += 1
    for name, tally in tallies.items():
        print(f"{name}: {dict(tally)}", flush=True)


def largest_curvature(loss, point):
    hessian = torch.autograd.functional.hessian(lambda w: loss(w[None])[0], point)
    return float(torch.linalg.eigvalsh(hessian)[-1])


if __name__ == "__main__":
    main()
