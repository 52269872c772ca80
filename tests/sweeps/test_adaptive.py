"""Sweeps by Optuna that are killed and resumed."""

import json
from pathlib import Path

import pytest

from tests import children

optuna = pytest.importorskip("optuna")
pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

STORAGE = "sqlite:///study.db"
SWEEP = (
    *("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=5"),
    *(f"hydra.sweeper.storage={STORAGE}", "optimizer.lr=interval(0.001,0.1)", "model.negative_slope=choice(0,0.2)"),
    *("data.num_samples=12", "data.input_dim=5", "model.hidden_dims=[6]", "trainer.max_epochs=40"),
    *("logger.mode=disabled", "report=false", "callbacks.angular_volume_monitor=null", "trainer.accelerator=cpu"),
)


def trials(name):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name=name, storage=STORAGE)
    return [(trial.number, trial.state.name, trial.value, trial.params) for trial in study.get_trials()]


def command(name, *arguments, expect=0):
    own = (f"hydra.sweeper.study_name={name}", f"hydra.sweep.dir={name}")
    return children.command(Path.cwd(), *SWEEP, *own, *arguments, expect=expect)


@pytest.mark.slow
def test_a_killed_sweep_ends_as_an_unbroken_one():
    own = ("hydra.sweeper.study_name=broken", "hydra.sweep.dir=broken")
    process = children.start(Path.cwd(), *SWEEP, *own)
    children.wait_for(lambda: Path("broken/2/.hydra/overrides.yaml").exists(), process)
    process.kill()
    process.join()
    seed = json.loads(Path("broken/sampler.json").read_text())["seed"]
    assert len(trials("broken")) < 5
    command("broken", "resume=true")
    command("whole", f"hydra.sweeper.sampler.seed={seed}")
    assert trials("broken") == trials("whole")
    assert [state for _, state, *_ in trials("broken")] == ["COMPLETE"] * 5
    said = command("broken", "resume=true")  # nothing is left
    assert trials("broken") == trials("whole")
    assert "Best value" in said


@pytest.mark.slow
def test_trials_of_another_sweep_are_left_alone():
    command("one", "hydra.sweeper.n_trials=1")
    before = trials("one")
    said = command("one", "hydra.sweep.dir=other", "resume=true", expect=1)
    assert "hydra.sweeper.study_name=one: trial 0 of this study is not a job in other" in said
    assert trials("one") == before
