"""Configs composed the fast way against Hydra's."""

import random
from functools import partial

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

import lightning_mnn.app  # noqa: F401 (registers the resolvers)
from lightning_mnn.config.job_configs import JobConfigs

CHOICES = {
    "seed": ["0", "7"],
    "optimizer.lr": ["0.01", "1e-3"],
    "optimizer.betas": ["[0.9,0.99]", "[0.5,0.9]"],
    "model.negative_slope": ["0", "0.25"],
    "model.hidden_dims": ["[20]", "[8,3]"],
    "data.seed": ["3", "4"],
    "name": ["abc", "'1'", "true"],
    "threads": ["null", "2"],
    "data": ["gaussian", "gaussian_teacher"],
    "optimizer": ["adam", "sgd"],
    "+trainer.min_epochs": ["1", "2"],
    "callbacks.progress": ["null", "{_target_: builtins.dict}"],
    "hydra.job.name": ["x", "y"],
}


@pytest.fixture
def loader(compose_context):
    return GlobalHydra.instance().config_loader()


@pytest.fixture
def compose_context():
    from hydra import initialize_config_module

    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        yield


def test_configs_are_those_of_hydra(loader):
    draw = random.Random(0)  # noqa: S311 (no secret)
    master = loader.load_configuration("config", ["hydra.sweep.dir=out"], run_mode=RunMode.MULTIRUN)
    configs = JobConfigs(partial(loader.load_sweep_config, master))
    chosen = draw.sample(sorted(CHOICES), 5)
    for number in range(14):
        if number % 4 == 0:
            chosen = draw.sample(sorted(CHOICES), 5)
        overrides = [f"{key}={draw.choice(CHOICES[key])}" for key in chosen]
        expected = loader.load_sweep_config(master, overrides)
        assert OmegaConf.to_container(configs.of(overrides)) == OmegaConf.to_container(expected), overrides


def test_jobs_that_differ_by_values_are_composed_once(loader, monkeypatch):
    master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
    composed = []
    original = type(loader).load_sweep_config
    monkeypatch.setattr(
        type(loader), "load_sweep_config", lambda self, *arguments: composed.append(1) or original(self, *arguments)
    )
    configs = JobConfigs(partial(loader.load_sweep_config, master))
    for seed in range(5):
        assert configs.of([f"seed={seed}", "optimizer.lr=0.5"]).seed == seed
    assert len(composed) == 1


def test_a_wrong_key_is_told_as_by_hydra(loader):
    master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
    with pytest.raises(Exception, match="Could not override 'sed'"):
        JobConfigs(partial(loader.load_sweep_config, master)).of(["sed=1"])
    configs = JobConfigs(partial(loader.load_sweep_config, master))
    configs.of(["seed=1"])
    with pytest.raises(Exception, match="Error merging override seed=abc"):
        configs.of(["seed=abc"])
