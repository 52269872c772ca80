"""What importing a program does to a process: what is renewed in forked jobs, and what forbids to fork them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mnn.launchers.warm import blas
from lightning_mnn.launchers.warm.imports import Imports, is_native

# Imports a module, forks two jobs, and prints what they and the module find.
FORKS = """
import importlib, json, os, sys
from lightning_mnn.launchers.warm.imports import import_all

sys.path.insert(0, "")
imports = import_all(lambda: importlib.import_module("program"), ["wandb_like", "not_there"])
found = {"problem": imports.problem, "jobs": []}
for number in range(2) if imports.problem is None else ():
    read, write = os.pipe()
    if os.fork() == 0:
        imports.make_own(imports.environment | {"JOB": str(number)})
        os.write(write, json.dumps(sys.modules["program"].job()).encode())
        sys.exit()
    os.close(write)
    with open(read) as pipe:
        found["jobs"].append(json.load(pipe))
    os.wait()
print(json.dumps(found))
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def found_of(program, environment=(), others=""):
    Path("program.py").write_text(program)
    Path("wandb_like.py").write_text(others)
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT | dict(environment))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


USED_CUDA = """
import sys, types
cuda = types.SimpleNamespace(is_initialized=lambda: True)
sys.modules["torch"] = types.SimpleNamespace(initial_seed=lambda: 0, cuda=cuda)
"""


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "threads"),
        ("import os; os.fork() or os._exit(0)", "starts processes"),
        ("import os; os.chdir('/')", "the current folder"),
        ("import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN)", "a signal handler"),
        ("file = open('log.txt', 'w')", "log.txt open"),
        ("import socket; server = socket.create_server(('127.0.0.1', 0))", "socket.* open"),
        ("import tempfile; folder = tempfile.mkdtemp()", "a temporary folder"),
        ("raise KeyError('lost')", "raises KeyError: 'lost'"),
        ("import sys; sys.exit(2)", "calls its main function"),
        (USED_CUDA, "initialises CUDA"),
    ],
)
def test_a_program_with_effects_beyond_its_memory_is_not_forked(program, words):
    assert re.search(words, found_of(program)["problem"])


def test_a_module_that_only_jobs_need_must_not_seed():
    assert "seeds random numbers" in found_of("", others="import random; random.seed(3)")["problem"]


RANDOM = """
import random, tempfile, numpy, torch
SEED
mine = numpy.random.default_rng()
folder = tempfile.TemporaryDirectory("kept")
with tempfile.TemporaryDirectory() as gone:
    pass

def job():
    import os
    return {
        "numbers": [random.random(), float(numpy.random.rand()), float(torch.rand(1)), float(mine.random())],
        "folders": [folder.name, gone],
        "exists": [os.path.exists(folder.name), os.path.exists(gone)],
    }
"""


def test_jobs_share_neither_random_numbers_nor_temporary_folders():
    one, other = found_of(RANDOM.replace("SEED", ""))["jobs"]
    assert not set(one["numbers"]) & set(other["numbers"])
    assert one["folders"][0] != other["folders"][0]
    assert one["folders"][0].endswith("kept")
    assert one["exists"] == other["exists"] == [True, False]
    assert not any(Path(job["folders"][0]).exists() for job in (one, other))


def test_a_program_that_seeds_has_the_same_numbers_in_each_job_as_without_forks():
    seeded = RANDOM.replace("SEED", "random.seed(5); numpy.random.seed(5); torch.manual_seed(5)")
    one, other = (job["numbers"] for job in found_of(seeded)["jobs"])
    print_numbers = "import json, program; print(json.dumps(program.job()['numbers']))"
    cold = subprocess.run([sys.executable, "-c", print_numbers], capture_output=True, check=True, env=ENVIRONMENT)
    assert one[:3] == other[:3] == json.loads(cold.stdout)[:3]
    assert one[3] != other[3]


def test_a_job_has_its_own_environment_and_what_the_program_sets():
    program = """
import os
os.environ["SET"] = "by import"
os.environ.pop("REMOVED", None)
def job():
    said = os.popen("echo $JOB $SET $REMOVED $KEPT").read()
    return [os.environ["JOB"], os.environ["SET"], os.environ.get("REMOVED"), said]
"""
    jobs = found_of(program, {"REMOVED": "x", "KEPT": "y"})["jobs"]
    assert jobs == [[n, "by import", None, f"{n} by import y\n"] for n in "01"]


THREADS = """
import numpy, scipy.linalg
from lightning_mnn.launchers.warm import blas

def job():
    return blas.threads()
"""


@pytest.mark.parametrize("number", ["1", "2", "7"])
def test_openblas_has_as_many_threads_as_without_a_fork(number):
    environment = {"OPENBLAS_NUM_THREADS": number}
    one, other = found_of(THREADS, environment)["jobs"]
    command = [sys.executable, "-c", "import program; print(program.job())"]
    cold = subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT | environment)
    assert one == other == json.loads(cold.stdout)


def test_openblas_that_cannot_be_told_its_threads_is_not_forked(monkeypatch):
    monkeypatch.setattr(blas, "_libraries", lambda: [object()])
    monkeypatch.setattr(blas, "cores", lambda: 4)
    assert blas.problem("1") is None
    assert "OpenBLAS" in blas.problem("2")
    assert "OpenBLAS" in blas.problem(None)


@pytest.mark.parametrize(
    ("environment", "later", "word"),
    [
        ({}, {}, None),
        ({"CUDA_VISIBLE_DEVICES": "1"}, {}, None),
        ({"READ": "b"}, {}, "READ"),
        ({"SET": "other"}, {}, "SET"),
        ({"OMP_NUM_THREADS": "2"}, {}, "OMP_NUM_THREADS"),
        ({"OPENBLAS_NUM_THREADS": "2"}, {}, None),
        ({}, {"OMP_NUM_THREADS": 2}, "OMP_NUM_THREADS"),
        ({}, {"PYTHONHASHSEED": "0"}, "PYTHONHASHSEED"),
        ({}, {"READ": "a"}, None),
    ],
)
def test_a_variable_that_was_read_before_it_had_the_jobs_value(environment, later, word):
    before = {"READ": "a", "SET": "old", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    imports = Imports(environment=before, reads={"READ"}, changed={"SET": "new"})
    reason = imports.reason_against(before | environment, later)
    assert reason is None if word is None else f"the variable {word} " in reason


def test_names_that_libraries_read():
    assert is_native("OMP_NUM_THREADS")
    assert is_native("PYTHONHASHSEED")
    assert not is_native("CUDA_VISIBLE_DEVICES")
