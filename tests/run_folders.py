"""What a run's folder holds, and whether two runs came to the same."""

import json

import numpy as np
import torch
import zarr

from lightning_mnn.callbacks import PatternStore


def rows_of(run):
    path = run / "metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def summary_of(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary.pop("finished")
    return summary, summary.pop("seconds")


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_same_run(run, unbroken):
    assert summary_of(run)[0] == summary_of(unbroken)[0]
    assert (run / "metrics.csv").read_bytes() == (unbroken / "metrics.csv").read_bytes()
    store, whole = (PatternStore(folder / "patterns.zarr") for folder in (run, unbroken))
    assert store.steps == whole.steps
    for step in store.steps:
        assert store.attributes(step) == whole.attributes(step)
        groups = [dict(zarr.open_group(s.path / f"step_{step:09d}", mode="r").arrays()) for s in (store, whole)]
        assert groups[0].keys() == groups[1].keys()
        assert all(np.array_equal(groups[0][name][...], groups[1][name][...]) for name in groups[0])
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, unbroken)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "logged_rows"):
        assert same(ends[0][key], ends[1][key]), key
    names = {path.name for path in run.rglob("*") if not {"wandb", ".hydra"} & {*path.relative_to(run).parts}}
    assert names == {path.name for path in unbroken.rglob("*") if not {"wandb", ".hydra"} & {*path.parts}}
