"""Work in parts: what an interruption leaves behind."""

import threading
import time
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children

import pytest

from lightning_mnn.tasks import parts as work
from lightning_mnn.tasks.parts import Part, finish_parts


def done(seconds):
    time.sleep(seconds)
    return {"done": True}


@pytest.mark.slow
def test_an_interrupted_pool_leaves_neither_worker_nor_thread(tmp_path, monkeypatch):
    """A thread that is left closes the pool's pipe while Python, which ends, writes to it."""

    @contextmanager
    def interrupted(total, already):
        def advance():
            raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(work, "_progress", interrupted)
    threads = set(threading.enumerate())
    parts = [Part("first", partial(done, 0)), *(Part(f"long_{k}", partial(done, 600)) for k in range(3))]
    with pytest.raises(KeyboardInterrupt):
        finish_parts(parts, tmp_path, processes=2)
    assert set(threading.enumerate()) <= threads
    assert not [child for child in active_children() if child.name.startswith("SpawnProcess")]
    assert [path.name for path in tmp_path.iterdir()] == ["first.json"]
