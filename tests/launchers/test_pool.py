"""Devices that are lent: never twice, never more than there are, and again when they are given back."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.launchers.jobs import devices
from lightning_mnn.launchers.jobs.devices import Devices, Request, visible_gpus

SIZES = st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=12)


@given(
    sizes=SIZES,
    n_jobs=st.none() | st.integers(1, 4),
    jobs_per_gpu=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_nothing_is_lent_twice_and_every_job_gets_its_turn(sizes, n_jobs, jobs_per_gpu, order):
    pool = Devices([f"GPU-{n}" for n in range(5)], cpu_slots=3, n_jobs=n_jobs, jobs_per_gpu=jobs_per_gpu)
    waiting = [pool.request(count, "gpu" if gpu else "cpu") for count, gpu in sizes]
    lent = []
    while waiting or lent:
        if waiting and (allocation := pool.allocate(waiting[0])) is not None:
            assert len(allocation.names) == waiting.pop(0).count
            lent.append(allocation)
        else:
            pool.release(lent.pop(order.randrange(len(lent))))  # fails where nothing is lent, and nothing can be
        assert n_jobs is None or len(lent) <= n_jobs
        for gpus, known in ((True, {f"GPU-{n}" for n in range(5)}), (False, {"0", "1", "2"})):
            names = [name for allocation in lent if allocation.request.gpus == gpus for name in allocation.names]
            assert max(Counter(names).values(), default=0) <= (jobs_per_gpu if gpus else 1)
            assert all(len(set(allocation.names)) == len(allocation.names) for allocation in lent)
            assert set(names) <= known


def test_jobs_share_the_gpus_evenly(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 8)
    for name in devices.THREADS:
        monkeypatch.delenv(name, raising=False)
    pool = Devices(["0", "1"], jobs_per_gpu=2)
    jobs = [pool.allocate(pool.request(1, "gpu")) for _ in range(5)]
    assert [job and job.names for job in jobs] == [("0",), ("1",), ("0",), ("1",), None]
    assert jobs[0].environment["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert jobs[0].environment["MKL_NUM_THREADS"] == "1"
    for job in (jobs[1], jobs[3], jobs[2]):
        pool.release(job)
    assert pool.allocate(pool.request(2, "gpu")).names == ("1", "0")
    assert pool.allocate(pool.request(2, "gpu")) is None
    assert pool.allocate(pool.request(1, "gpu")).names == ("1",)


@pytest.mark.parametrize(
    ("asked", "accelerator", "expected"),
    [
        (2, "gpu", Request(gpus=True, count=2, processes=2)),
        ("2", "cuda", Request(gpus=True, count=2, processes=2)),
        ("auto", "auto", Request(gpus=True, count=3, processes=3)),
        (-1, None, Request(gpus=True, count=3, processes=3)),
        ("auto", "cpu", Request(gpus=False, count=1, processes=1)),
        (None, "cpu", Request(gpus=False, count=1, processes=1)),
        (7, "cpu", Request(gpus=False, count=4, processes=7)),
    ],
)
def test_what_a_job_asks_for(asked, accelerator, expected):
    assert Devices(["0", "1", "2"], cpu_slots=4).request(asked, accelerator) == expected


@pytest.mark.parametrize("asked", [0, -2, True, False, 1.5, "two", [0, 1], "0,1", 4])
def test_what_no_job_can_ask_for(asked):
    with pytest.raises(ValueError, match=r"trainer\.devices"):
        Devices(["0", "1", "2"]).request(asked, "gpu")


def test_the_cores_are_shared_whatever_the_number_of_jobs(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 16)
    for name in devices.THREADS:
        monkeypatch.delenv(name, raising=False)

    def threads(n_jobs, processes):
        pool = Devices([], n_jobs=n_jobs)
        return pool.allocate(pool.request(processes, "cpu")).environment["OMP_NUM_THREADS"]

    assert [threads(n_jobs, 1) for n_jobs in (None, 1, 2, 4, 40)] == ["1", "16", "8", "4", "1"]
    assert [threads(n_jobs, 4) for n_jobs in (None, 1, 2, 40)] == ["1", "4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(1, 1) == "3"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose nvidia-smi, or without it whose torch, tells of so many GPUs."""

    def make(*, visible=None, nvidia_smi=None, torch=0):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        programs, modules = tmp_path / "bin", tmp_path / "modules" / "torch"
        programs.mkdir(exist_ok=True)
        modules.mkdir(exist_ok=True, parents=True)
        tool = programs / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + (f"printf '{nvidia_smi}'" if nvidia_smi is not None else "exit 9"))
        tool.chmod(0o755)
        (modules / "__init__.py").write_text(f"class cuda:\n    device_count = lambda: {torch}\n")
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setenv("PYTHONPATH", str(modules.parent))
        monkeypatch.setattr(devices.metadata, "version", lambda _: "2.14.1")

    return make


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("3", ["3"]),
        ("1, GPU-9", ["1", "GPU-9"]),
        ("0,-1,1", ["0"]),
        ("MIG-7,none,0", ["MIG-7"]),
        ("0,4,1", ["0"]),
    ],
)
def test_gpus_are_those_that_cuda_would_show(machine, visible, names):
    machine(visible=visible, nvidia_smi="0\\n1\\n2\\n3\\n")
    assert visible_gpus() == names


def test_without_the_variable_nvidia_smi_tells_and_else_torch(machine):
    machine(nvidia_smi="0\\n1\\n", torch=3)
    assert visible_gpus() == ["0", "1"]
    machine(nvidia_smi="No devices were found\\n", torch=3)
    assert visible_gpus() == []
    machine(torch=3)
    assert visible_gpus() == ["0", "1", "2"]
    machine(torch="1 / 0")
    assert visible_gpus() == []


def test_a_gpu_that_is_named_twice_is_the_fault_of_the_variable(machine):
    machine(visible="0,0")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=0,0 names a GPU twice"):
        Devices().request(1, "gpu")
    assert not Devices().request(1, "cpu").gpus


def test_chosen_gpus_stay_within_those_that_are_visible(machine):
    machine(visible="2,3")
    assert Devices([3]).request("auto", "auto") == Request(gpus=True, count=1, processes=1)
    with pytest.raises(ValueError, match=r"gpus=\[0,3\] must be among .*CUDA_VISIBLE_DEVICES=2,3 .*0 is not"):
        Devices([0, 3])
    assert not Devices([]).request(1, "auto").gpus


def test_jobs_on_the_cpu_see_no_gpu(machine):
    machine(torch=2)
    pool = Devices([], cpu_slots=2)
    loans = [pool.allocate(pool.request(1, "auto")) for _ in range(2)]
    assert [(str(allocation), allocation.environment["CUDA_VISIBLE_DEVICES"]) for allocation in loans] == [
        ("CPU 0", ""),
        ("CPU 1", ""),
    ]
    both = Devices(cpu_slots=1)
    assert both.allocate(both.request(1, "cpu")).environment["CUDA_VISIBLE_DEVICES"] == ""
    assert both.allocate(both.request(2, "auto")).environment["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    ("gpus", "visible", "remedy"),
    [
        ([], None, r"name some by hydra\.launcher\.gpus"),
        (None, "NoDevFiles", "CUDA_VISIBLE_DEVICES=NoDevFiles shows none, name some there"),
        (None, None, "check the driver"),
    ],
)
def test_a_gpu_where_there_is_none_is_refused_with_a_remedy(machine, gpus, visible, remedy):
    machine(visible=visible)
    with pytest.raises(ValueError, match=f"trainer.accelerator=gpu asks for a GPU.*{remedy}.*accelerator=cpu"):
        Devices(gpus).request(1, "gpu")


@pytest.mark.parametrize("options", [{"n_jobs": 0}, {"cpu_slots": 0}, {"gpus": [1, "1"]}, {"gpus": [-1]}])
def test_a_pool_that_cannot_be(options):
    with pytest.raises(ValueError, match=f"hydra.launcher.{next(iter(options))}.* must"):
        Devices(**({"gpus": []} | options))
