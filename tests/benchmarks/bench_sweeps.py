"""What the device_pool launcher costs a job, and what a second job at once gains: JOBS (20) runs of ten epochs.

A job's overhead is the time from the start of its process to the start of its training, nearly all of it spent on
importing torch and Lightning.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main():
    jobs = int(os.environ.get("JOBS", "20"))
    seconds = {}
    for n_jobs in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            seconds[n_jobs] = sweep(jobs, n_jobs, folder)
            records = [json.loads(path.read_text()) for path in Path(folder).glob("sweep/*/job.json")]
        assert [record["status"] for record in records] == ["finished"] * jobs
        overheads = [record["seconds_to_training"] for record in records]
        print(f"n_jobs={n_jobs}: {jobs} jobs in {seconds[n_jobs]:.1f} s")
        print(f"  from start to training {statistics.median(overheads):.2f} s, at most {max(overheads):.2f} s")
    print(f"two at once: {seconds[1] / seconds[2]:.2f} times as fast")


def sweep(jobs, n_jobs, folder):
    command = [sys.executable, "-m", "lightning_mnn", "-m", "hydra/launcher=device_pool"]
    options = [f"hydra.launcher.n_jobs={n_jobs}", "hydra.launcher.cpu_slots=2", "hydra.sweep.dir=sweep"]
    start = time.perf_counter()
    subprocess.run(
        [*command, *options, f"seed=range({jobs})", "trainer.max_epochs=10", "report=false"],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
