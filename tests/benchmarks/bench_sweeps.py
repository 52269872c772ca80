"""How many jobs a minute a sweep does: JOBS (20) runs of ten epochs, in each way to run them, ROUNDS (1) times in turn.

On a busy machine compare the seconds of the processor: those of all processes, except W&B's service. A job's overhead
is the time from the start of its process to the start of its training: cold, nearly all of it is spent on importing
torch and Lightning. OVERRIDES adds to the command line, such as callbacks.angular_volume_monitor=null.
"""

import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

POOL = ("hydra/launcher=device_pool", "hydra.launcher.n_jobs=2", "hydra.launcher.cpu_slots=2")
WAYS = {
    "device_pool, cold": (*POOL, "hydra.launcher.warm=false"),
    "device_pool, warm": (*POOL, "hydra.launcher.warm=true"),
    "one process, one after another": ("hydra/launcher=basic",),
    "batched": ("hydra/launcher=batched",),
}
COMMAND = (sys.executable, "-m", "lightning_mnn")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def main():
    jobs, rounds = (int(os.environ.get(name, default)) for name, default in (("JOBS", "20"), ("ROUNDS", "1")))
    seconds, processor, overheads = defaultdict(list), defaultdict(list), defaultdict(list)
    ways = {way: options for way, options in WAYS.items() if exists(way, options)}
    for _ in range(rounds):
        for way, options in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                before = used()
                seconds[way].append(sweep(jobs, options, folder))
                processor[way].append(used() - before)
                print(f"  {way:32} {seconds[way][-1]:6.1f} s, {processor[way][-1]:6.1f} s of the processor", flush=True)
                records = [json.loads(path.read_text()) for path in Path(folder).glob("sweep/*/job.json")]
            assert all(record["status"] == "finished" for record in records)
            overheads[way] += [took for record in records if (took := record["seconds_to_training"]) is not None]
    print(f"{jobs} jobs, {rounds} times")
    for way, found in seconds.items():
        print(
            f"  {way:32} {60 * jobs / statistics.median(found):6.1f} jobs a minute   {statistics.median(found):6.1f} s"
        )
        if overheads[way]:
            median, most = statistics.median(overheads[way]), max(overheads[way])
            print(f"  {'':32} from start to training {median:.2f} s, at most {most:.2f} s")
    for name, of in (("time", seconds), ("processor time", processor)):
        cold, warm = (statistics.median(of[f"device_pool, {way}"]) for way in ("cold", "warm"))
        print(f"warm: {cold / warm:.2f} times less {name} than cold")


def used():
    """Seconds of the processor that processes have used for which this one or its children have waited."""
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime


def exists(way, options):
    done = subprocess.run([*COMMAND, "--cfg", "hydra", options[0]], capture_output=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        print(f"{way}: left out, there is no {options[0]}")
    return done.returncode == 0


def sweep(jobs, options, folder):
    own = shlex.split(os.environ.get("OVERRIDES", ""))
    start = time.perf_counter()
    subprocess.run(
        [*COMMAND, "-m", *options, "hydra.sweep.dir=sweep", f"seed=range({jobs})", "trainer.max_epochs=10",
         "report=false", "figure=false", *own],
        cwd=folder, env=ENVIRONMENT, check=True, capture_output=True,
    )  # fmt: skip
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
