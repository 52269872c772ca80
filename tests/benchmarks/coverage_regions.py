"""How often intervals of regions' log-volumes cover the truth, with few units and few samples.

``python -m tests.benchmarks.coverage_regions --seeds 100``. The truth is the sum of long samples of all units.
"""

import argparse
import math
import time

import numpy as np
import torch
from scipy import stats

from lightning_mnn.landscape import ActivationPattern, Region, log_cone_measure, region_log_volume
from tests.benchmarks.bench_volumes import trained


def random_region(num, dim, width, seed):
    rng = torch.Generator().manual_seed(seed)
    inputs, weights = (torch.randn(n, dim, generator=rng, dtype=torch.float64) for n in (num, width))
    return Region(inputs, ActivationPattern.from_preactivations(inputs @ weights.T)), weights


def region_with_near_duplicates(seed):
    rng = torch.Generator().manual_seed(seed)
    inputs, weights = (torch.randn(n, 8, generator=rng, dtype=torch.float64) for n in (40, 16))
    inputs = torch.cat([inputs, inputs[:20] + 1e-3 * torch.randn(20, 8, generator=rng, dtype=torch.float64)])
    return Region(inputs, ActivationPattern.from_preactivations(inputs @ weights.T)), weights


REGIONS = {  # a region, the options, and the target for the truth of a unit
    "trained, N = 320, d = 40, 40 units": (lambda: trained(320, 40), {}, 0.02),
    "the same, 8 units sampled": (lambda: trained(320, 40), {"target_standard_error": 0.5, "num_units": 8}, 0.02),
    "random, N = 100, d = 10, 30 units, 6 sampled": (
        lambda: random_region(100, 10, 30, 0),
        {"target_standard_error": 0.5, "num_units": 6},
        None,
    ),
    "near-duplicates, N = 60, d = 8, 16 units": (lambda: region_with_near_duplicates(0), {}, None),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    for name, (build, options, target) in REGIONS.items():
        region, weights = build()
        truth, truth_error = long_sample(region, weights, target)
        start = time.process_time()
        found = [region_log_volume(region, weights, seed=seed, **options) for seed in range(seeds)]
        seconds = (time.process_time() - start) / seeds
        values, errors = (np.array([getattr(part, key) for part in found]) for key in ("value", "standard_error"))
        hits = int((np.abs(values - truth) <= 1.96 * errors).sum())
        low, high = stats.binomtest(hits, seeds).proportion_ci()
        print(f"{name}: {truth:.2f} ± {truth_error:.2f}, {hits} of {seeds} cover ({low:.1%} to {high:.1%});", end=" ")
        print(f"off by {values.mean() - truth:+.2f} ± {values.std() / math.sqrt(seeds):.2f},", end=" ")
        print(f"spread {values.std():.2f}, standard errors {errors.mean():.2f}; {seconds:.2f} s each", flush=True)


def long_sample(region, weights, target):
    """Sum of all units' log measures, and its standard error: with no target, cone by cone, independently of EP."""
    if target is not None:
        found = region_log_volume(
            region, weights, target_standard_error=target, num_units=len(weights), max_samples=2**22, seed=10**6
        )
        return found.value, found.standard_error
    normals = (region.inputs @ weights.T).sign().T[:, :, None] * region.inputs
    found = log_cone_measure(normals, weights, target_standard_error=0.02)
    return float(found.value.sum()), float(found.standard_error.norm())


if __name__ == "__main__":
    main()
