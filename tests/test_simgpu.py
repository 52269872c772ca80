"""What runs on a simulated GPU, each part in a process of its own: there CUDA is replaced for good."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = os.environ.get("LIGHTNING_MNN_SIMCUDA")
PROJECT = Path(__file__).parents[1]
MINUTES = 15  # more than the simulator's compilation and the tests take on a busy machine


def reason():
    """Why there can be no simulated GPU here; empty where there can."""
    if not FOLDER:
        return "set LIGHTNING_MNN_SIMCUDA to the folder of the simulated GPU"
    missing = [tool for tool in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(tool) is None]
    if missing:
        return f"the simulated GPU is compiled by {' and '.join(missing)}, which is missing"
    return "" if torch.version.cuda else "a GPU can be simulated in a CUDA build of torch only"


pytestmark = [
    pytest.mark.simgpu,
    pytest.mark.slow,
    pytest.mark.xdist_group("simgpu"),
    pytest.mark.skipif(bool(reason()), reason=reason()),
]


@pytest.mark.parametrize("area", ["landscape", "training", "callbacks", "waits"])
def test_on_a_simulated_gpu(area):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PROJECT), FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SIMCUDA_BUILD": os.environ.get("SIMCUDA_BUILD", str(cache / "simcuda")),
        "OMP_NUM_THREADS": "1",
        "MAX_JOBS": "1",
    }
    for name in [name for name in environment if name.startswith("PYTEST_")]:  # of the process that tests
        del environment[name]
    options = ["-p", "tests.simgpu.plugin", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/simgpu/{area}.py", *options],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * MINUTES,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-20_000:]
