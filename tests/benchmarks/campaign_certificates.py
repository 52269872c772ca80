"""A campaign against certificates: minima are attacked, and what is returned is compared with what was asked about.

``python -m tests.benchmarks.campaign_certificates --points 30000``, some 35 ms a point.
"""

import argparse
import collections
import time
import warnings

import numpy as np
import torch

from lightning_mnn.landscape import certify, polish
from tests.landscape.minima.attacks import FAMILIES, fall, loss

_ROUND = 50  # points of each family between two reports


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, where 1e15 meets 1e-300
    counts = {name: collections.Counter() for name in options.families}
    start, share = time.perf_counter(), -(-options.points // len(options.families))
    for first in range(0, share, _ROUND):
        for name in options.families:
            counts[name].update(campaign(name, range(first, min(first + _ROUND, share)), options.seed))
        total = sum(counts.values(), collections.Counter())
        print(f"{time.perf_counter() - start:6.0f} s:", told(total), flush=True)
    for name in options.families:
        print(f"{name:17}", told(counts[name]))


def told(counts):
    return ", ".join(
        f"{counts[key]} {key}"
        for key in ("points", "calls", "minima", "attacked", "false", "worse", "rising", "refused again")
    )


def campaign(name, points, seed):
    """Count what holds of each point: certified at once, every fourth also from afar, and after polish."""
    counts = collections.Counter()
    for k in points:
        rng = np.random.default_rng((seed, *name.encode(), k))
        case = FAMILIES[name](rng)
        counts["points"] += 1
        polished = polish(*case.tensors, case.slope, threshold=0.5, max_steps=40)
        counts["rising"] += bool((np.diff(polished.losses) > 0).any())
        answers = {
            "near": certify(*case.tensors, case.slope, threshold=0.5),
            "polished": polished.certificate,
        }
        if k % 4 == 0:
            answers["far"] = certify(*case.tensors, case.slope, threshold=0.5, max_distance=10.0)
        attacked = set()  # as one point is often the answer thrice
        for how, found in answers.items():
            counts["calls"] += 1
            counts["minima"] += found.is_minimum
            weights = (found.kind, found.hidden_weights.numpy().tobytes(), found.output_weights.numpy().tobytes())
            if weights not in attacked:
                attacked.add(weights)
                judge(case, found, rng, counts, (name, seed, k, how))
    return counts


def judge(case, found, rng, counts, which):
    """Attack one answer."""
    there = case.at(found)
    (before, slack), (after, _) = loss(case), loss(there)
    if not after <= before + slack:
        counts["worse"] += 1
        print("worse", *which, float(before), float(after), found.kind, found.reason)
    if not found.is_minimum:
        return
    counts["attacked"] += 1
    lower = fall(there, rng)
    if lower > 0:
        counts["false"] += 1
        print("false", *which, float(after), lower, found.kind, found.reason)
    again = certify(*there.tensors, there.slope, threshold=0.5)
    if not again.is_minimum:
        counts["refused again"] += 1
        print("refused again", *which, found.kind, found.reason, "|", again.reason)


if __name__ == "__main__":
    main()
