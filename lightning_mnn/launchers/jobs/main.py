"""The process of one job: run by this file's path, with the folder that contains the job's call.

Lightning starts DDP's other ranks with the same command and a LOCAL_RANK: they run the same job, but do not report its
result.
"""

from __future__ import annotations

import os
import sys

if sys.path and sys.path[0] == os.path.dirname(__file__):  # noqa: PTH120 (pathlib is yet to be imported)
    del sys.path[0]  # modules beside this script would hide the user's modules of the same name

import contextlib
import pickle
import shutil
import signal
import subprocess
import threading
import traceback
from pathlib import Path
from typing import IO, Any

# Files in a job's folder, beside progress.json.
CALL = "call.pickle"
RETURN = "return.pickle"  # of a job; in a batch, with its number
EXIT_CODE = "exit_code"  # of a forked job, whose server may be gone

_UNGUARDED = (
    "the program calls its main function when it is imported, and each job imports it: put the call under "
    'if __name__ == "__main__":'
)
_GRACE = 10  # seconds between SIGTERM and SIGKILL


def main() -> int:
    """Run the job in this new process; write its JobReturn beside its call, with an error as text."""
    folder = Path(sys.argv[1])
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    with (folder / CALL).open("rb") as file:  # written by the launcher a moment ago
        prepared = pickle.load(file)  # noqa: S301
        if leads:
            _watch(prepared["watched"], folder)
        sys.path = prepared["sys_path"]
        from lightning_mnn.utilities.compat import python_internals  # noqa: PLC0415 (it may be on that path)

        try:
            python_internals.prepare(prepared)
        except SystemExit:  # raised by Hydra, which sees the job's arguments instead of the program's
            raise RuntimeError(_UNGUARDED) from None
        call = _load_call(file)
    return _run_and_report(call, folder, leads=leads)


def run_forked(folder: Path, watched: int) -> int:
    """Run the job in this process, which was forked from one that has imported the program."""
    _watch(watched, folder)
    code = 1
    try:
        with (folder / CALL).open("rb") as file:
            pickle.load(file)  # noqa: S301 (what the other process has done)
            call = _load_call(file)
        code = _run_and_report(call, folder, leads=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        with contextlib.suppress(OSError):  # the launcher is gone, and the folder with it
            (folder / EXIT_CODE).write_text(str(code))
    return code


def _watch(watched: int, folder: Path) -> None:
    threading.Thread(target=_end_with_launcher, args=(watched, folder), daemon=True).start()


def _load_call(file: IO[bytes]) -> dict[str, Any]:
    sys.modules["__main__"].__spec__ = None  # Lightning reads it to decide that the command to run again is a script
    call: dict[str, Any] = pickle.load(file)  # noqa: S301 (written by the launcher a moment ago)
    return call


def _run_and_report(call: dict[str, Any], folder: Path, *, leads: bool) -> int:
    if call.get("plans"):
        return _run_batch(call, folder)
    from lightning_mnn.utilities.compat import hydra_internals  # noqa: PLC0415 (after the user's sys.path is in place)

    found = _run(call, leads=leads)
    failed = found.status.name == "FAILED"
    if failed:
        error = hydra_internals.result_of(found)
        for number in _signals_of_children():  # one of DDP's ranks; the error does not mention it
            error.add_note(f"a process that the job had started was ended by {number.name}")
        traceback.print_exception(error)
        words = [*getattr(error, "__notes__", []), f"{type(error).__name__}: {error}"]
        found.return_value = "; ".join(words)
    if leads:
        _write_return(folder, found)
    return int(failed)


def _run(call: dict[str, Any], *, leads: bool) -> Any:
    from hydra.core.utils import run_job, setup_globals  # noqa: PLC0415 (after the user's sys.path is in place)
    from omegaconf import open_dict, read_write  # noqa: PLC0415

    from lightning_mnn.utilities.compat.hydra_internals import set_singletons  # noqa: PLC0415

    set_singletons(call["singletons"])
    setup_globals()
    config = call["config"]
    if not leads:  # as Lightning does for single runs
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.output_subdir = None
            config.hydra.job.name = f"train_ddp_process_{os.environ['LOCAL_RANK']}"
    return run_job(
        hydra_context=call["hydra_context"],
        task_function=call["task_function"].resolve(),
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _run_batch(call: dict[str, Any], folder: Path) -> int:
    """Run several jobs in turns; write the JobReturn of each when it has ended."""
    from hydra.core.utils import setup_globals  # noqa: PLC0415 (after the user's sys.path is in place)

    from lightning_mnn.launchers.jobs.turns import run_jobs  # noqa: PLC0415
    from lightning_mnn.utilities.compat.hydra_internals import set_singletons  # noqa: PLC0415

    set_singletons(call["singletons"])
    setup_globals()
    arguments = {"hydra_context": call["hydra_context"], "task_function": call["task_function"].resolve()}
    report = lambda number, found: _write_return(folder, found, f"{RETURN}.{number}")  # noqa: E731
    options = {name: call[name] for name in ("max_replicas", "fail_fast")}
    number = run_jobs(call["plans"], arguments, report, **options)
    return 128 + number if number else 0


def _write_return(folder: Path, found: Any, name: str = RETURN) -> None:
    import cloudpickle  # noqa: PLC0415 (after the user's sys.path is in place)

    from lightning_mnn.utilities.files import write_bytes  # noqa: PLC0415

    try:
        content = cloudpickle.dumps(found)
    except Exception as error:  # noqa: BLE001 (pickling may raise anything)
        print(f"the job's return value cannot be passed to the sweeper, which gets None: {error}", file=sys.stderr)  # noqa: T201
        found.return_value = None
        content = cloudpickle.dumps(found)
    with contextlib.suppress(FileNotFoundError):  # the launcher is gone, and the folder with it
        write_bytes(folder / name, content, durable=False)


def _signals_of_children() -> list[signal.Signals]:
    """Signals that ended child processes of this one for which nothing has waited yet."""
    found = []
    with contextlib.suppress(ChildProcessError):  # there are no children
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if os.WIFSIGNALED(ended[1]):
                found.append(signal.Signals(os.WTERMSIG(ended[1])))
    return found


def _end_with_launcher(watched: int, folder: Path) -> None:
    """End the job's processes when the launcher is gone; it keeps the other end of a pipe open while it runs."""
    while os.read(watched, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    group = os.getpgid(0)  # includes this process, so another one must send the signals
    end = f"kill -s TERM -- -{group}; sleep {_GRACE}; kill -s KILL -- -{group}"
    subprocess.Popen(["/bin/sh", "-c", end], start_new_session=True)  # noqa: S603 (no user's text)


if __name__ == "__main__":
    sys.exit(main())
