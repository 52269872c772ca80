"""Devices that are lent: never twice, never more than there are, and again when they are given back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.jobs import devices
from lightning_mnn.jobs.devices import Devices, Request, visible_gpus

SIZES = st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=12)


@given(sizes=SIZES, n_jobs=st.none() | st.integers(1, 4), order=st.randoms(use_true_random=False))
def test_nothing_is_lent_twice_and_every_job_gets_its_turn(sizes, n_jobs, order):
    pool = Devices([f"g{n}" for n in range(5)], cpu_slots=3, n_jobs=n_jobs)
    waiting = [pool.request(count, "gpu" if gpu else "cpu") for count, gpu in sizes]
    lent = []
    while waiting or lent:
        if waiting and (loan := pool.lend(waiting[0])) is not None:
            assert len(loan.names) == waiting.pop(0).count
            lent.append(loan)
        else:
            pool.take_back(lent.pop(order.randrange(len(lent))))  # fails where nothing is lent, and nothing can be
        assert n_jobs is None or len(lent) <= n_jobs
        for gpus, known in ((True, {f"g{n}" for n in range(5)}), (False, {"0", "1", "2"})):
            names = [name for loan in lent if loan.request.gpus == gpus for name in loan.names]
            assert len(set(names)) == len(names)
            assert set(names) <= known


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
        return pool.lend(pool.request(processes, "cpu")).environment["OMP_NUM_THREADS"]

    assert [threads(n_jobs, 1) for n_jobs in (None, 1, 2, 4, 40)] == ["1", "16", "8", "4", "1"]
    assert [threads(n_jobs, 4) for n_jobs in (None, 1, 2, 40)] == ["1", "4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(1, 1) == "3"


def test_gpus_are_those_that_are_visible(monkeypatch):
    for chosen, names in (("", []), ("-1", []), ("3", ["3"]), ("1, GPU-9", ["1", "GPU-9"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_gpus() == names
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "")
    assert visible_gpus() == []


@pytest.mark.parametrize("options", [{"n_jobs": 0}, {"cpu_slots": 0}, {"gpus": [1, "1"]}])
def test_a_pool_that_cannot_be(options):
    with pytest.raises(ValueError, match=f"hydra.launcher.{next(iter(options))} must"):
        Devices(**({"gpus": []} | options))
