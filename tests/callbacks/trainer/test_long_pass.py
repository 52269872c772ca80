"""What is said of long work on the training set."""

import io
import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn.callbacks.trainer import long_pass as module
from lightning_mnn.callbacks.trainer.long_pass import count_batch, end_of_training, long_pass
from lightning_mnn.utilities.interruption import safe_point


@pytest.fixture
def terminal(monkeypatch):
    """What is drawn on a terminal."""
    drawn = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=drawn, force_terminal=True, width=120))
    return drawn


A_BAR = SimpleNamespace()  # that the Trainer has


@pytest.fixture
def work(monkeypatch):
    """Goes through 40 batches, each of which takes so many seconds, and the first 100 s more."""

    def done(seconds, *, bar=A_BAR, drawn=False, **options):
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
        loader = iter if drawn else DataLoader(TensorDataset(torch.zeros(80)), batch_size=2)
        trainer = SimpleNamespace(
            train_dataloader=loader,
            num_training_batches=40,
            global_rank=0,
            world_size=1,
            is_global_zero=True,
            progress_bar_callback=bar,
        )
        clock.now += 100
        with long_pass(trainer, "the work", **options):
            for _ in range(40):
                clock.now += seconds
                count_batch()

    return done


@pytest.mark.parametrize("drawn", [False, True])
def test_long_work_is_announced_by_its_batches_after_the_first(work, caplog, terminal, drawn):
    with caplog.at_level(logging.INFO):
        work(2.0, drawn=drawn)
    assert caplog.messages == ["the work: about 80 s for 40 batches of the training set"]
    assert "the work" in terminal.getvalue()
    assert "40/40" in terminal.getvalue()


def test_several_passes_are_at_most_so_many(work, caplog, terminal):
    with caplog.at_level(logging.INFO):
        work(2.0, passes=100, at_most=True)
    assert caplog.messages == ["the work: at most about 2.2 h for 4000 batches of the training set"]


def test_short_work_says_nothing(work, caplog, terminal):
    with caplog.at_level(logging.INFO):
        work(0.1)
    assert caplog.messages == []
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("bar", [None, SimpleNamespace(progress=object())], ids=["none", "of rich"])
def test_there_is_no_bar_where_none_is_wanted_or_another_is_up(work, caplog, terminal, bar):
    with caplog.at_level(logging.INFO):
        work(2.0, bar=bar)
    assert len(caplog.messages) == 1
    assert terminal.getvalue() == ""


def test_nothing_is_counted_outside():
    count_batch()


@pytest.fixture
def end(monkeypatch):
    """Works at the end of training for some seconds, with a safe point after each; returns the Trainer."""

    def done(seconds, limit, *, bar=A_BAR, batches=False):
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
        loader = DataLoader(TensorDataset(torch.zeros(80)), batch_size=2)
        trainer = SimpleNamespace(
            train_dataloader=loader, global_rank=0, world_size=1, is_global_zero=True, progress_bar_callback=bar
        )
        inner = long_pass(trainer, "a pass") if batches else nullcontext()
        with end_of_training(trainer, "the end", limit), inner:
            for _ in range(seconds):
                clock.now += 1
                safe_point()
                if batches:
                    count_batch()
        safe_point()

    return done


@pytest.mark.parametrize(("limit", "rest"), [(30.0, ", of at most 30 s"), (math.inf, "")])
def test_long_work_at_the_end_is_announced_once_with_a_bar(end, caplog, terminal, limit, rest):
    with caplog.at_level(logging.INFO):
        end(20, limit)
    assert caplog.messages == [f"the end: at work for 5 s{rest}"]
    assert "the end" in terminal.getvalue()


def test_short_work_at_the_end_says_nothing(end, caplog, terminal):
    with caplog.at_level(logging.INFO):
        end(4, 30.0)
    assert (caplog.messages, terminal.getvalue()) == ([], "")


def test_there_is_one_bar_at_a_time(end, caplog, terminal):
    with caplog.at_level(logging.INFO):
        end(40, 60.0, batches=True)
    assert [message.partition(":")[0] for message in caplog.messages] == ["a pass"]
    assert "the end" not in terminal.getvalue()
