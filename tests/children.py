"""Processes that the tests start: the command, and trainings in step with one another.

They are children of one process that has imported all there is to import, so that each starts in a tenth of a second.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only

_get_context = multiprocessing.get_context
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "lightning_mnn.tasks.train", "lightning_mnn.app", "lightning_mnn.callbacks.local_minimum_detector",
    "lightning_mnn.callbacks.activation_pattern_recorder", "lightning_mnn.callbacks.angular_volume_monitor", "wandb",
    "requests", "zarr", "matplotlib",
])  # fmt: skip


PATIENCE = 600  # seconds after which what is waited for counts as never coming: no measure of speed on a busy machine


def run_the_command(folder, arguments, environment=()):
    """Run ``lightning-mnn`` in a folder, and leave what it says in its out.txt and err.txt."""
    _speak_to(folder)
    os.environ |= dict(environment)
    sys.argv = ["lightning-mnn", *arguments]
    os.environ["COLUMNS"] = "200"  # of what is no terminal
    os.environ.pop("WANDB_SERVICE", None)  # of the process that tests: it would outlive a kill, and the run in it
    multiprocessing.get_context = _forking  # workers need not import anything again
    from lightning_mnn.app import main

    main()


def run_a_script(folder, script, arguments=(), environment=()):
    """Run another program in a folder as ``python script arguments``."""
    _speak_to(folder)
    os.environ |= dict(environment)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(folder))
    runpy.run_path(script, run_name="__main__")


def start(folder, *arguments, environment=()):
    process = processes.Process(target=run_the_command, args=(folder, arguments, environment))
    process.start()
    return process


def start_ranks(folder, count, *arguments, prepare=None):
    """The command in so many processes that are one training; in each a function may be called before."""
    started = [
        processes.Process(target=_run_a_rank, args=(folder, environment, prepare, arguments))
        for environment in _environments(count)
    ]
    for process in started:
        process.start()
    return started


def command(folder, *arguments, expect=0, environment=()):
    """What the command says."""
    for name in ("out", "err"):
        (folder / f"{name}.txt").unlink(missing_ok=True)
    process = start(folder, *arguments, environment=environment)
    process.join(PATIENCE)
    out, err = ((folder / f"{name}.txt").read_text() for name in ("out", "err"))
    assert process.exitcode == expect, out[-2000:] + err[-4000:]
    return out + err


def wait_for(moment, process=None):
    """What a function returns, as soon as that is true; the process that brings it about must not have ended before."""
    deadline = time.monotonic() + PATIENCE
    while not (found := moment()):
        assert process is None or process.is_alive(), "it ended before what was waited for"
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.01)
    return found


def all_ended(pids):
    """Whether none of the processes runs any more; one that has ended and is not yet reaped is a zombie."""
    states = (Path(f"/proc/{pid}/stat") for pid in pids)
    return not any(path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z" for path in states)


def side_by_side(folder, count, function, *arguments):
    """Call a function in so many processes at once, which Lightning takes for those of one training by DDP.

    As torchrun would start them: Lightning's own launcher starts one of them and imports everything again in it.
    """
    folders = [folder / f"rank_{rank}" for rank in range(count)]
    started = []
    for own, environment in zip(folders, _environments(count), strict=True):
        own.mkdir(parents=True)
        started.append(processes.Process(target=_take_part, args=(own, environment, function, arguments)))
        started[-1].start()
    running = {process.sentinel: process for process in started}
    while running and not any(process.exitcode for process in started):
        ended = wait(running, PATIENCE)
        if not ended:
            break
        for sentinel in ended:
            running.pop(sentinel).join()
    for process in running.values():  # which wait for one that failed
        process.kill()
        process.join()
    said = "\n".join((own / "err.txt").read_text()[-3000:] for own in folders if (own / "err.txt").exists())
    assert [process.exitcode for process in started] == [0] * count, said


def _environments(count):
    """The variables by which torchrun tells a process its place in a training; none for a lone process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"NODE_RANK": 0, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks] if count > 1 else [{}]


def _run_a_rank(folder, environment, prepare, arguments):
    _take_place(environment)
    if prepare is not None:
        prepare()
    run_the_command(folder, arguments)


def _forking(method=None):
    return _get_context("fork" if method == "spawn" else method)


def _take_part(folder, environment, function, arguments):
    _speak_to(folder)
    _take_place(environment)
    function(*arguments)


def _take_place(environment):
    os.environ |= environment
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # as at its import
    torch.set_num_threads(1)


def _speak_to(folder):
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
