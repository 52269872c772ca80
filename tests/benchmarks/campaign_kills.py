"""Sweeps that are killed at random moments and resumed, against the same sweeps unbroken.

``python -m tests.benchmarks.campaign_kills [--kills 30] [--seed 0]``: so many SIGKILLs, in turn at sweeps by
``device_pool``, ``batched`` and Optuna with a storage. A sweep may be killed more than once before it ends; then every
job must have run to its end, with the numbers of the unbroken sweep: bit for bit, but for ``batched``, where other
jobs share the products of a job and its last bits differ. It prints one line for each sweep.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COMMON = (
    *("data.num_samples=12", "data.input_dim=5", "model.hidden_dims=[6]", "trainer.max_epochs=300"),
    *("logger.mode=disabled", "trainer.accelerator=cpu", "callbacks.angular_volume_monitor.measure=[]"),
)
GRID = ("seed=range(4)", "optimizer.lr=0.01,0.003")
WAYS = {
    "device_pool": ("hydra/launcher=device_pool", "hydra.launcher.n_jobs=2", *GRID),
    "batched": ("hydra/launcher=batched", "hydra.launcher.n_jobs=2", "hydra.launcher.max_replicas=3", *GRID),
    "optuna": (
        *("hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=5"),
        *("hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=study"),
        *("optimizer.lr=interval(0.001,0.1)", "model.negative_slope=choice(0,0.2)", "report=false"),
    ),
}
COMPARED = ("kind", "reason_code", "zero_error", "steps", "epochs", "mse", "mce", "seed", "finished")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        seconds = {way: run(Path(folder, way), way) for way in WAYS}
        kills, wrong, sweeps = 0, 0, 0
        while kills < options.kills:
            way = list(WAYS)[sweeps % len(WAYS)]
            place, moments = Path(folder, f"{way}-{sweeps}"), []
            while len(moments) < 3 and kills < options.kills:
                moment = chance.uniform(0.05, 1) * seconds[way]
                if (ended := ends_before(place, way, moment, resume=bool(moments))) is not None:
                    seconds[way] = ended if not moments else seconds[way]  # the machine is faster now
                    break
                moments.append(round(moment, 1))
                kills += 1
            run(place, way, "resume=true")
            problems = differences(place, Path(folder, way), way)
            wrong += bool(problems)
            sweeps += 1
            print(f"{way:12} killed after {moments} s: {problems or 'as unbroken'}", flush=True)
    print(f"{kills} kills in {sweeps} sweeps, {wrong} of these ended otherwise than unbroken")
    return int(wrong > 0)


def start(place, way, *arguments):
    place.mkdir(exist_ok=True)
    with (place / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "lightning_mnn", "-m", *COMMON, *WAYS[way], "hydra.sweep.dir=sweep", *arguments],
            cwd=place, stdout=said, stderr=said, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def run(place, way, *arguments):
    """Run a sweep to its end: how long it took."""
    began = time.monotonic()
    if start(place, way, *arguments).wait():
        raise SystemExit(f"{way}: the sweep failed:\n" + (place / "said.txt").read_text()[-3000:])
    return time.monotonic() - began


def ends_before(place, way, moment, *, resume):
    """Kill the sweep's command after some seconds, unless it has ended: after how many. Its jobs end by themselves."""
    began = time.monotonic()
    process = start(place, way, *(["resume=true"] if resume and (place / "sweep").exists() else []))
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(3)
        return None
    return time.monotonic() - began


def differences(place, unbroken, way):
    """What differs from the unbroken sweep."""
    found, expected = results(place), results(unbroken)
    problems = [f"{len(found)} jobs instead of {len(expected)}"] if found.keys() != expected.keys() else []
    for job in found.keys() & expected.keys():
        problems += [
            f"{name} of {job}: {found[job].get(name)} instead of {expected[job].get(name)}"
            for name in COMPARED
            if not same(found[job].get(name), expected[job].get(name), exactly=way != "batched")
        ]
    if way == "optuna" and trials(place) != trials(unbroken):
        problems.append(f"trials {trials(place)} instead of {trials(unbroken)}")
    return problems


def results(place):
    """The summaries of a sweep's jobs, by their overrides."""
    found = {}
    for path in place.glob("sweep/*/summary.json"):
        overrides = (path.parent / ".hydra" / "overrides.yaml").read_text().splitlines()
        found[tuple(sorted({*overrides} - {"- resume=true"}))] = json.loads(path.read_text())
    return found


def same(one, other, *, exactly):
    if exactly or not isinstance(one, float) or not isinstance(other, float):
        return one == other
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-14)


def trials(place):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{place}/study.db")
    return [(trial.number, trial.state.name, trial.value, trial.params) for trial in study.get_trials()]


if __name__ == "__main__":
    sys.exit(main())
