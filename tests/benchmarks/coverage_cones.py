"""How often intervals of cones' measures cover the truth, and how far the estimates are off on average.

``python -m tests.benchmarks.coverage_cones --intervals 1000``: that many for each target, shared by cones of n = 5, 8
and 13 constraints with pairwise correlation ½, whose measure is 1/(n + 1).
"""

import argparse

import numpy as np
import torch
from scipy import stats

from lightning_mnn.landscape.volumes.cone import log_cone_measure
from tests.landscape.volumes.cones import equicorrelated

_DIMS = (5, 8, 13)
_ROUND = 20  # intervals of each cone between two reports


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--intervals", type=int, default=1000)
    parser.add_argument("--targets", type=float, nargs="*", default=[0.5, 0.1, 0.03])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {target: {dim: [] for dim in _DIMS} for target in options.targets}
    for first in range(0, -(-options.intervals // len(_DIMS)), _ROUND):
        for target, of_target in found.items():
            for dim, scores in of_target.items():
                scores += [score(dim, target, first + k) for k in range(_ROUND)]
            report(target, of_target)


def score(dim, target, seed):
    """Error over standard error, and whether this is above the target."""
    normals, point, truth = equicorrelated(dim)
    estimate = log_cone_measure(normals, point, target_standard_error=target, seed=seed)
    return (estimate.value - truth) / estimate.standard_error, estimate.standard_error > target


def report(target, of_target):
    """Coverage and bias of all cones and of each."""
    scores, above = np.concatenate([np.array(found) for found in of_target.values()]).T
    hits = int((np.abs(scores) <= 1.96).sum())
    low, high = stats.binomtest(hits, len(scores)).proportion_ci()
    each = (f"n = {dim}: {np.mean(np.abs(np.array(of)[:, 0]) <= 1.96):.1%}" for dim, of in of_target.items())
    print(f"target {target}: {hits} of {len(scores)} intervals cover, {hits / len(scores):.1%}", end=" ")
    print(f"({low:.1%} to {high:.1%}); {', '.join(each)};", end=" ")
    print(
        f"mean score {scores.mean():+.3f} ± {scores.std() / len(scores) ** 0.5:.3f}; {above.mean():.1%} above",
        flush=True,
    )


if __name__ == "__main__":
    main()
