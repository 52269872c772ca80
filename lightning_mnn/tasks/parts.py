"""Run work in parts: in worker processes, each part saved in a file and never done twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_mnn.runs import footprint
from lightning_mnn.utilities.files import differences, read_json, write_json
from lightning_mnn.utilities.resources import one_thread_each

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Part:
    """A piece of work: a picklable function without arguments that returns JSON-serialisable values, and a file name.

    Attributes:
        name: name of its file, without the suffix; unique among the parts of a run.
        work: the function.
    """

    name: str
    work: Callable[[], dict[str, Any]]


def initialise_folder(run_dir: Path, plan: Mapping[str, Any]) -> None:
    """Write `plan.json`, all that the results depend on; or check that the folder was started with the same plan.

    Raises:
        FileExistsError: the folder contains something else; the message names what differs.
    """
    path = run_dir / "plan.json"
    if path.exists():
        if found := differences(read_json(path, remedy="restore it, or choose another name or hydra.run.dir"), plan):
            raise FileExistsError(
                f"{run_dir} was started with a different configuration: {found}: choose another name or hydra.run.dir"
            )
    elif (run_dir / "summary.json").exists():
        raise FileExistsError(f"{run_dir} already contains a run: choose another hydra.run.dir")
    else:
        write_json(path, dict(plan))
    footprint.keep()


def finish_parts(parts: Sequence[Part], folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Do the parts that have no file in the folder yet, and read the results of all.

    The file of a part is written atomically when the part is done, so the work may be killed at any time and started
    again. Each worker uses one thread, whatever their number, so that no result depends on it. The workers end with
    this process, however it ends.

    Returns:
        For each part, by its name: what it returned, and the processor `seconds` that it used.

    Raises:
        ChildProcessError: a worker was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if not _file(folder, part).exists()]
    if missing:
        with one_thread_each(), _progress(len(parts), len(parts) - len(missing)) as advance:
            _run_workers(missing, folder, processes, advance)
    again = "delete it, and run the command again"
    return {part.name: read_json(_file(folder, part), needs=("seconds",), remedy=again) for part in parts}


def _file(folder: Path, part: Part) -> Path:
    return folder / f"{part.name}.json"


def _run_workers(parts: Sequence[Part], folder: Path, processes: int, advance: Callable[[], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    pool = ProcessPoolExecutor(min(processes, len(parts)), context, initializer=_initialise_worker)
    try:
        futures = {pool.submit(_timed, part.work): part for part in parts}
        for future in as_completed(futures):
            write_json(_file(folder, futures[future]), future.result())
            advance()
    except BaseException as error:
        for worker in multiprocessing.active_children():  # the pool would wait until they finish their parts
            worker.kill()  # not terminate(): a Trainer would first finish its batch
        pool.shutdown(cancel_futures=True)  # waits: the pool's thread must not close its pipe while Python ends
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError("a worker was killed, perhaps out of memory: run the command again") from error
        raise
    pool.shutdown()


def _initialise_worker() -> None:
    """Use one thread, ignore Ctrl-C, which the parent gets too, and end when the parent ends, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _timed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    start = time.process_time()
    return work() | {"seconds": time.process_time() - start}


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal, elsewhere a line per tenth of the work; yields a function to call after each part."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("parts"), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda: bar.advance(task)
        return
    start = time.monotonic()

    def advance() -> None:
        nonlocal done
        done += 1
        if 10 * done // total > 10 * (done - 1) // total:
            console.print(f"{done} of {total} parts, {time.monotonic() - start:.0f} s", highlight=False)

    yield advance
