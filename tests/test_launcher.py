"""The device_pool launcher: Hydra's own tests of launchers, and real sweeps of real applications."""

import json

import pytest
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite


@pytest.mark.parametrize(("launcher_name", "overrides"), [("device_pool", [])])
class TestDevicePool(LauncherTestSuite):
    """Hydra's tests of any launcher."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("device_pool", ["hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2"])],
)
class TestDevicePoolInBatches(BatchedSweeperTestSuite):
    """Hydra's tests of launchers under a sweeper that launches several times."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({"defaults": [{"override hydra/launcher": "device_pool"}]}, ["-m"])],
)
class TestDevicePoolIntegration(IntegrationTestSuite):
    """Hydra's tests of launchers with applications that are scripts."""
