"""Runs whose steps are computed together against the same runs alone."""

import pytest
import pytorch_lightning as pl
import torch

from lightning_mnn import MNN, Fit, fit_together
from lightning_mnn.data import GaussianData
from lightning_mnn.loggers import ResumableCSVLogger
from lightning_mnn.model.lockstep import lockstep, run_in_lockstep
from lightning_mnn.utilities.errors import DivergenceError

ADAM = {"name": "adam", "lr": 1e-2, "fused": True}


class Run:
    """A small run: network, data, Trainer and log; ``work`` trains, and keeps the error that ends it."""

    def __init__(self, folder, number, *, optimizer=ADAM, schedule="exponential_tail", batch_size=None, epochs=30):
        rate = optimizer["lr"] * [1, 0.3][number % 2]
        slope = [0, 0.1, -0.5][number % 3]
        options = {"optimizer": optimizer | {"lr": rate}, "schedule": {"name": schedule}, "default_callbacks": False}
        self.model = MNN(5, (6,), negative_slope=slope, seed=number, **options)
        self.data = GaussianData(num_samples=12, input_dim=5, seed=number, batch_size=batch_size, dtype="float64")
        self.log = ResumableCSVLogger(folder / str(number))
        self.trainer = pl.Trainer(
            max_epochs=epochs,
            logger=self.log,
            accelerator="cpu",
            log_every_n_steps=4,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.error = None

    def work(self):
        try:
            self.trainer.fit(self.model, self.data)
        except Exception as error:  # noqa: BLE001 (it is compared)
            self.error = error


def together_and_alone(tmp_path, runs=5, max_replicas=3, **options):
    alone = [Run(tmp_path / "alone", number, **options) for number in range(runs)]
    for run in alone:
        run.work()
    together = [Run(tmp_path / "together", number, **options) for number in range(runs)]
    run_in_lockstep([run.work for run in together], max_replicas=max_replicas)
    return zip(together, alone, strict=True)


def assert_same(run, expected):
    for one, other in zip(run.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    (rows, steps), (their_rows, their_steps) = (zip(*one.log.read(), strict=True) for one in (run, expected))
    assert steps == their_steps
    for row, other in zip(rows, their_rows, strict=True):
        assert row == pytest.approx(other, rel=1e-8, abs=1e-14)
    assert run.trainer.global_step == expected.trainer.global_step
    assert run.trainer.current_epoch == expected.trainer.current_epoch
    assert run.data.visits() == expected.data.visits()
    state, other = (one.trainer.optimizers[0].state_dict() for one in (run, expected))
    assert str(state["param_groups"]) == str(other["param_groups"])
    torch.testing.assert_close(state["state"], other["state"], rtol=1e-7, atol=1e-11)
    schedules = ([c.scheduler.state_dict() for c in one.trainer.lr_scheduler_configs] for one in (run, expected))
    assert next(schedules) == next(schedules)


@pytest.mark.parametrize(
    "name", ["adam", "adamw", "sgd", "nadam", "radam", "rmsprop", "adagrad", "adamax", "adadelta", "asgd", "rprop"]
)
def test_runs_in_lockstep_equal_lone_runs(tmp_path, name):
    options = {"momentum": 0.9} if name == "sgd" else {}
    for run, alone in together_and_alone(tmp_path, optimizer={"name": name, "lr": 1e-2, **options}):
        assert_same(run, alone)


@pytest.mark.parametrize("schedule", ["constant", "one_cycle", "CosineAnnealingLR", "OneCycleLR"])
def test_so_do_their_schedules_and_mini_batches(tmp_path, schedule):
    for run, alone in together_and_alone(tmp_path, schedule=schedule, batch_size=5):
        assert_same(run, alone)


def test_runs_at_different_epochs_need_not_wait_for_each_other(tmp_path):
    """Those of 7 and of 30 epochs have bundles of different lengths; the third starts when the first has ended."""
    runs = [Run(tmp_path / "together", number, epochs=epochs) for number, epochs in enumerate((7, 30, 11, 30))]
    run_in_lockstep([run.work for run in runs], max_replicas=2)
    for number, run in enumerate(runs):
        alone = Run(tmp_path / "alone", number, epochs=run.trainer.max_epochs)
        alone.work()
        assert_same(run, alone)


def test_a_run_that_diverges_leaves_the_others_as_they_are(tmp_path):
    runs = [Run(tmp_path, number) for number in range(3)]
    bad = Run(tmp_path, 9, optimizer={"name": "sgd", "lr": 1e200}, schedule="constant")
    run_in_lockstep([one.work for one in (runs[0], bad, *runs[1:])], max_replicas=4)
    assert isinstance(bad.error, DivergenceError)
    alone = Run(tmp_path / "alone", 9, optimizer={"name": "sgd", "lr": 1e200}, schedule="constant")
    alone.work()
    assert str(bad.error) == str(alone.error)
    assert (bad.trainer.global_step, bad.trainer.current_epoch) == (3, alone.trainer.current_epoch)
    for number, run in enumerate(runs):
        expected = Run(tmp_path / "alone", number)
        expected.work()
        assert_same(run, expected)


def test_each_run_sees_only_its_turns(tmp_path):
    turns = []
    runs = [Run(tmp_path, number, epochs=3) for number in range(2)]
    on_turn, after_turn = turns.append, (lambda number: turns.append(~number))
    run_in_lockstep([run.work for run in runs], max_replicas=2, on_turn=on_turn, after_turn=after_turn)
    assert len(turns) % 2 == 0
    assert all(turns[i + 1] == ~turns[i] for i in range(0, len(turns), 2))
    assert set(turns) == {0, 1, -1, -2}
    assert lockstep() is None


def test_no_run_starts_after_a_stop(tmp_path):
    started = []
    run_in_lockstep([lambda: started.append(1)] * 3, max_replicas=1, is_stopped=lambda: bool(started))
    assert started == [1]


def test_steps_that_other_code_watches_are_not_computed_together(tmp_path):
    run, alone = Run(tmp_path, 0), Run(tmp_path / "alone", 0)
    seen = []
    run.model.hidden_weights[0].register_hook(seen.append)
    run_in_lockstep([run.work], max_replicas=1)
    alone.work()
    assert len(seen) == 30
    assert_same(run, alone)


def test_fits_in_python(tmp_path):
    runs, alone = ([Run(tmp_path / name, number, epochs=8) for number in range(3)] for name in ("together", "alone"))
    bad = Run(tmp_path, 9, optimizer={"name": "sgd", "lr": 1e200}, schedule="constant", epochs=8)
    fits = [Fit(run.trainer, run.model, run.data) for run in (*runs, bad)]
    with pytest.raises(ExceptionGroup, match="1 of 4 fits have failed") as raised:
        fit_together(fits, max_replicas=2)
    assert isinstance(raised.value.exceptions[0], DivergenceError)
    assert raised.value.exceptions[0].__notes__ == ["in fit number 3"]
    for run, expected in zip(runs, alone, strict=True):
        expected.work()
        assert_same(run, expected)


def test_fits_share_nothing(tmp_path):
    one, other = Run(tmp_path, 0), Run(tmp_path, 1)
    with pytest.raises(ValueError, match="two fits share a trainer"):
        fit_together([Fit(one.trainer, one.model, one.data), Fit(one.trainer, other.model, other.data)])
