"""The launcher's side of a server: what it waits for, and what it says where there is none."""

import os
import sys
import time
from pathlib import Path

import pytest

from lightning_mnn.launchers.warm import client
from lightning_mnn.launchers.warm.client import WarmServers


@pytest.fixture
def servers():
    """Servers of a program that starts a thread when it is imported."""
    Path("program_with_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
    )
    prepared = {"sys_path": [str(Path.cwd()), *sys.path]}
    made = WarmServers(prepared, ["program_with_a_thread"], [], "main.py", "no:run")
    yield made
    made.close()


def test_a_server_that_has_ended_does_not_keep_the_launcher_busy(servers, caplog):
    caplog.set_level("INFO")
    servers.prepare(dict(os.environ))
    servers.prepare(dict(os.environ))
    assert [record.message for record in caplog.records] == [
        "jobs start cold, each with its own imports: importing the program starts threads (Thread-1 (sleep))"
    ]
    for _ in range(2):
        servers.wait(0.3)  # until it has noticed the end
    before = time.monotonic()
    servers.wait(0.3)
    assert time.monotonic() - before > 0.25


def test_other_systems_have_no_servers(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(client.sys, "platform", "darwin")
    servers = WarmServers({}, [], [], "main.py", "no:run")
    servers.prepare({})
    assert "jobs start cold, each with its own imports: only on Linux" in caplog.text
