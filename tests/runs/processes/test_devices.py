"""Sweeps whose jobs would start the whole sweep again are refused."""

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from lightning_mnn.runs.processes import devices
from lightning_mnn.runs.processes.devices import check_devices, processes
from tests.children import command

POOL = "hydra_plugins.lightning_mnn.DevicePool"
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
DDP = "pytorch_lightning.strategies.DDPStrategy"


@pytest.fixture
def checked():
    """Whether a Trainer's arguments pass in a job of a launcher, and why not."""
    before = HydraConfig.instance().cfg

    def check(launcher, mode="MULTIRUN", **trainer):
        hydra = OmegaConf.create({"hydra": {"mode": mode, "launcher": {"_target_": launcher}}})
        from hydra.types import RunMode

        with open_dict(hydra):
            hydra.hydra.mode = RunMode[mode]
        HydraConfig.instance().cfg = hydra
        try:
            check_devices(OmegaConf.create(trainer))
        except ValueError as error:
            return str(error)
        return None

    yield check
    HydraConfig.instance().cfg = before


SEVERAL = [
    {"strategy": "ddp", "devices": 2},
    {"strategy": "ddp", "devices": 1},  # its variables would outlive it
    {"strategy": "ddp_find_unused_parameters_true", "devices": "auto"},
    {"strategy": "fsdp"},
    {"strategy": {"_target_": DDP}},
    {"devices": 2},
    {"devices": "2", "strategy": None},
    {"devices": "0,1", "accelerator": "gpu"},
    {"devices": [0, 3]},
    {"devices": 1, "num_nodes": 2},
]
ONE = [
    {},
    {"devices": 1},
    {"devices": "1"},
    {"devices": "3,"},
    {"devices": [3]},
    {"devices": -1, "accelerator": "cpu"},
    {"devices": "auto", "accelerator": "cpu"},
    {"strategy": "single_device", "devices": "auto"},
    {"strategy": {"_target_": "pytorch_lightning.strategies.SingleDeviceStrategy"}},
    {"devices": "many"},  # which the Trainer refuses
]


@pytest.mark.parametrize("trainer", SEVERAL, ids=str)
def test_several_processes_need_a_launcher_that_starts_jobs_one_by_one(trainer, checked):
    refused = checked(BASIC, **trainer)
    assert "add hydra/launcher=device_pool, or on a cluster hydra/launcher=slurm" in refused
    assert f"trainer.devices={trainer.get('devices', 'auto')}" in refused
    assert checked(BASIC, mode="RUN", **trainer) is None
    for launcher in devices._LAUNCHERS:
        assert checked(launcher, **trainer) is None


@pytest.mark.parametrize("trainer", ONE, ids=str)
def test_one_process_may_be_swept_by_any(trainer, checked):
    if trainer == {} and devices.CUDAAccelerator.is_available():
        pytest.skip("all devices may be several here")
    assert checked(BASIC, **trainer) is None


@pytest.mark.parametrize(
    "strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_fork_find_unused_parameters_false",
                 {"_target_": DDP, "start_method": "spawn"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", ["RUN", "MULTIRUN"])
def test_processes_that_are_lost_with_what_they_know_are_refused(strategy, mode, checked):
    assert "are lost when they end: set trainer.strategy=ddp" in checked(POOL, mode=mode, strategy=strategy, devices=2)


def test_the_command_refuses_before_any_work(tmp_path):
    assert processes() == 1
    said = command(tmp_path, "-m", "trainer=cpu_ddp", "seed=1", "hydra.sweep.dir=sweep", expect=1)
    assert "add hydra/launcher=device_pool" in said
    assert "verdict" not in said
    said = command(tmp_path, "trainer.strategy=ddp_spawn", "trainer.devices=2", "hydra.run.dir=run", expect=1)
    assert "set trainer.strategy=ddp" in said
    assert "Traceback" not in said
    assert not [*tmp_path.rglob("plan.json"), *tmp_path.rglob("checkpoints"), *tmp_path.rglob("metrics.csv")]
