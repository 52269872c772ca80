import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.loggers.media import log_scalars


@given(st.floats(1.01, 10), st.integers(1, 3000))
def test_logarithmic_times_are_the_rounded_up_powers(growth, limit):
    powers, k = set(), 0
    while (value := math.ceil(growth**k - 1e-9)) <= limit:
        powers.add(value)
        k += 1
    assert [n for n in range(limit + 1) if Schedule(growth=growth).due(n)] == sorted(powers)


@given(st.integers(1, 50), st.integers(0, 200))
def test_linear_times_are_the_multiples(every, count):
    assert Schedule(every=every).due(count) == (count in range(every, 201, every))


@given(st.floats(1.001, 10) | st.integers(1, 50), st.integers(0, 2000))
def test_the_next_time_is_the_first_after_the_present(step, done):
    schedule = Schedule(every=step) if isinstance(step, int) else Schedule(growth=step)
    wait = schedule.until_due(done)
    assert [schedule.due(done + k) for k in range(1, wait + 1)] == [False] * (wait - 1) + [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of"),
        ({"every": 2, "growth": 2.0}, "give one of"),
        ({"every": 0}, "every must be at least 1"),
        ({"growth": 1.0}, "growth must be a number, above 1"),
        ({"every": 2, "unit": "hour"}, "unit must be"),
    ],
)
def test_bad_schedules_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


def test_scalars_reach_every_logger_with_all_their_digits(make_trainer, tmp_path):
    from pytorch_lightning.loggers import CSVLogger

    trainer = make_trainer(logger=[CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")])
    log_scalars(trainer, {"x": 0.1, "y": torch.tensor([1, 2]), "z": None, "w": -math.inf})
    for logger in trainer.loggers:
        assert logger.experiment.metrics == [{"x": 0.1, "y": 1.5, "step": 0}]
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == {"x": 0.1, "y": 1.5}
