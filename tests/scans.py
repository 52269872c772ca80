"""Scans as their task writes them, made up."""

import json

from lightning_mnn.tasks.scan import Size, size_summary
from lightning_mnn.utilities.files import write_csv

KINDS = ("differentiable_minimum", "kink_minimum", "saddle", "not_stationary", None)


def write_scan(folder, figure, *, dims=(10, 20, 30), layers=(1, 2), ratios=(0.5, 1.0, 2.0), replicas=6):
    """Write ``scan.csv`` and ``summary.json``; every measure is a known function of size and replica."""
    table, sizes = [], []
    for depth in layers:
        for width in dims:
            for ratio in ratios:
                size = Size(int(ratio * Size(1, width, depth).parameters), width, depth)
                rows = [
                    size.columns
                    | {
                        "replica": r, "seed": r, "mce": max(0.0, 0.1 * ratio - 0.1) * (1 + 0.1 * r),
                        "mse": 0.0 if r == 0 else 10.0 ** (-31 + 3 * r) * width,
                        "min_preactivation": 10.0 ** -(r + 1) / width, "kind": KINDS[r % len(KINDS)],
                    }
                    for r in range(replicas)
                ]  # fmt: skip
                table += rows
                sizes.append(size_summary(size, rows, 1.0))
    write_csv(folder / "scan.csv", table)
    summary = {
        "figure": figure, "replicas": replicas, "dtype": "float64", "optimizer": {"name": "adam", "lr": 0.01},
        "scan": {"labels": "plus_minus", "negative_slope": 0.0, "max_epochs": 2000}, "sizes": sizes,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return table, sizes
