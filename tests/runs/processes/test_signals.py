"""Signals to real processes of a run: what each of them ends in, and that the run goes on as if it had had none."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
import torch

from lightning_mnn.runs.processes.signals import interruptible
from lightning_mnn.utilities.interruption import Interrupted
from tests import pauses
from tests.children import PATIENCE, all_ended, start_ranks, wait_for
from tests.run_folders import assert_same_run, rows_of

RUN = (
    "data.num_samples=40", "data.input_dim=6", "model.hidden_dims=[8]", "seed=1", "trainer.log_every_n_steps=20",
    "callbacks.local_minimum_detector.polish=true", "callbacks.local_minimum_detector.stop_training=false",
    "logger.mode=disabled", "resume=true",
)  # fmt: skip
SHORT = (
    *RUN, "data.batch_size=13", "trainer.max_epochs=30", "callbacks.local_minimum_detector.schedule.every=10",
    "callbacks.angular_volume_monitor.measure=[end]",
)  # fmt: skip
ALL = "all"
CHAINS = {  # by the number of processes: where the run is, the signal, the process that gets it
    1: [(pauses.in_training, SIGTERM, 0), (pauses.in_certificate, SIGINT, 0), (pauses.in_volume, SIGTERM, 0)],
    2: [
        (pauses.in_training, SIGINT, 1),
        (pauses.in_certificate_on_shards, SIGTERM, 1),
        (pauses.in_certificate_on_shards, SIGKILL, 1),
        (pauses.in_volume_on_shards, SIGTERM, ALL),
    ],
    4: [(pauses.in_training, SIGTERM, 2), (pauses.in_certificate, SIGINT, 3), (pauses.in_certificate, SIGKILL, 0)],
}  # fmt: skip


def ranks_of(count):
    return () if count == 1 else ("trainer=cpu_ddp", f"trainer.devices={count}")


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def ended(processes):
    """Their exit codes."""
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def finish(folder, name, count, prepare):
    processes = start_ranks(folder, count, *SHORT, *ranks_of(count), f"hydra.run.dir={name}", prepare=prepare)
    assert ended(processes) == [0] * count, (folder / "err.txt").read_text()[-3000:]
    return folder / name


def send(processes, number, target):
    """Send a signal to a process or to all."""
    for rank, process in enumerate(processes):
        if target in (ALL, rank):
            os.kill(process.pid, number)


@pytest.mark.slow
@pytest.mark.parametrize("count", CHAINS)
def test_a_run_that_gets_signals_ends_at_a_step_and_goes_on_as_if_it_had_got_none(count, tmp_path):
    prepare = pauses.on_shards if count == 2 else None
    unbroken = finish(tmp_path, "unbroken", count, prepare)
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    for pause, number, target in CHAINS[count]:
        (tmp_path / "paused").unlink(missing_ok=True)
        (tmp_path / "err.txt").unlink(missing_ok=True)
        processes = start_ranks(tmp_path, count, *SHORT, *ranks_of(count), "hydra.run.dir=run", prepare=pause)
        wait_for((tmp_path / "paused").exists, processes[0])
        began = time.monotonic()
        send(processes, number, target)
        codes = ended(processes)
        said = (tmp_path / "err.txt").read_text()
        print(f"{count} processes, {pause.__name__}, {number.name} to {target}: {time.monotonic() - began:.1f} s")
        if number is SIGKILL:
            assert codes == [-SIGKILL if rank == target else 1 for rank in range(count)], said
            assert f"process {target} of the run is gone" in said
        else:
            assert codes == [128 + number] * count, said
            assert "Traceback" not in said
        if target == 0 and number is SIGKILL:
            assert not (run / "summary.json").exists()
            continue
        summary = summary_of(run)
        lost = f" by the loss of process {target}" if number is SIGKILL else ""
        assert not summary["finished"]
        assert summary["reason_code"] == ("process_lost" if lost else "interrupted")
        assert summary["reason"] == f"interrupted after {summary['steps']} steps{lost}"
        step = torch.load(last, weights_only=True)["global_step"]
        assert step == summary["steps"] if not lost else step <= summary["steps"]
        assert step >= pauses.STEP
    assert_same_run(finish(tmp_path, "run", count, prepare), unbroken)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("count", "target"), [(1, 0), (2, 0)])
def test_where_no_step_comes_the_run_ends_all_the_same(count, target, tmp_path):
    arguments = (*SHORT, *ranks_of(count), "hydra.run.dir=run")
    processes = start_ranks(tmp_path, count, *arguments, prepare=pauses.for_ever)
    wait_for((tmp_path / "paused").exists, processes[0])
    send(processes, SIGTERM, target)
    assert ended(processes) == [128 + SIGTERM] * count
    assert summary_of(tmp_path / "run")["reason"] == "interrupted after 0 steps"
    assert "resume=true continues from the beginning" in (tmp_path / "err.txt").read_text()


def test_a_second_signal_ends_all_processes_at_once(tmp_path):
    arguments = (*SHORT, *ranks_of(2), "hydra.run.dir=run")
    processes = start_ranks(tmp_path, 2, *arguments, prepare=pauses.for_ever)
    wait_for((tmp_path / "paused").exists, processes[0])
    send(processes, SIGINT, 1)
    wait_for(lambda: "SIGINT: the run ends at its next step" in (tmp_path / "err.txt").read_text(), processes[0])
    send(processes, SIGINT, 1)
    assert ended(processes) == [128 + SIGINT] * 2
    assert not (tmp_path / "run" / "summary.json").exists()  # no time for it


def pids_of(folder, variable=None):
    """The other processes that work in a folder; those with a variable in their environment."""
    found = []
    for path in {*Path("/proc").glob("[0-9]*")} - {Path("/proc", str(os.getpid()))}:
        with suppress(OSError):
            here = (path / "cwd").resolve() == folder and (
                variable is None or variable in (path / "environ").read_bytes().split(b"\0")
            )
            if here and not all_ended([path.name]):
                found.append(int(path.name))
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("launched")
def test_processes_that_lightning_starts_end_with_one_another(tmp_path):
    """The command as a user gives it, which starts its second process itself."""
    arguments = [*RUN, *ranks_of(2), "trainer.max_epochs=800", "callbacks.angular_volume_monitor.measure=[]"]
    run = tmp_path / "run"

    def launch():
        with (tmp_path / "said.txt").open("w") as said:
            command = [sys.executable, "-m", "lightning_mnn", *arguments, "hydra.run.dir=run"]
            own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
            return subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said, env=own)

    def cut(number, rank, moment):
        first = launch()
        deadline = time.monotonic() + PATIENCE
        while not moment():
            assert first.poll() is None, (tmp_path / "said.txt").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        (second,) = pids_of(tmp_path, b"LOCAL_RANK=1")
        os.kill((first.pid, second)[rank], number)
        code = first.wait(PATIENCE)
        wait_for(lambda: not pids_of(tmp_path))
        return code, (tmp_path / "said.txt").read_text()

    assert cut(SIGKILL, 0, lambda: pids_of(tmp_path, b"LOCAL_RANK=1"))[0] == -SIGKILL  # before they are connected
    code, said = cut(SIGTERM, 0, lambda: rows_of(run) > 3)
    assert code == 128 + SIGTERM
    assert "Traceback" not in said
    step = summary_of(run)["steps"]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step > 0
    rows = rows_of(run)
    code, said = cut(SIGKILL, 1, lambda: rows_of(run) > rows + 1)
    assert code == 1
    assert "process 1 of the run is gone" in said
    rows = rows_of(run)  # of which those after the checkpoint are written anew
    code, said = cut(SIGKILL, 0, lambda: rows_of(run) > rows + 1)
    assert code == -SIGKILL
    assert "process 0 of the run is gone" in said


def test_a_job_of_slurm_that_is_told_to_go_saves_and_is_requeued(tmp_path, monkeypatch):
    """The command that requeues is SLURM's; what it is given is all that is looked at here."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    (process,) = start_ranks(tmp_path, 1, *SHORT, "hydra.run.dir=run", prepare=pauses.in_job_of_slurm)
    wait_for((tmp_path / "paused").exists, process)
    os.kill(process.pid, signal.SIGUSR1)
    assert ended([process]) == [0]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == summary_of(tmp_path / "run")["steps"] >= pauses.STEP


def test_a_signal_before_training_is_an_exception_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (SIGTERM, SIGINT)]

    def run():
        with interruptible():
            os.kill(os.getpid(), SIGTERM)
            time.sleep(PATIENCE)  # which the signal ends

    with pytest.raises(Interrupted) as stop:
        run()
    assert stop.value.code == 128 + SIGTERM
    assert [signal.getsignal(number) for number in (SIGTERM, SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_run_that_is_finished_all_the_same_says_that_there_was_a_signal():
    def run():
        with interruptible() as signals:
            signals.on_train_start(None, None)
            os.kill(os.getpid(), SIGTERM)
            wait_for(lambda: signals.watch.number)
            assert signals.end_training() is None
            ended.append(signals)

    ended = []
    with pytest.raises(Interrupted):
        run()
    assert len(ended) == 1


def test_workers_of_a_data_loader_have_signals_of_their_own():
    """Such as the SIGTERM by which torch ends them."""
    with interruptible() as signals:
        signals.on_train_start(None, None)
        dataset = torch.utils.data.TensorDataset(torch.arange(6.0))
        loader = torch.utils.data.DataLoader(dataset, num_workers=1, worker_init_fn=end_itself)
        with pytest.raises(RuntimeError, match=r"Terminated|exited unexpectedly"):
            list(loader)
        assert signals.watch.number == 0


def end_itself(_):
    os.kill(os.getpid(), SIGTERM)
    time.sleep(PATIENCE)
