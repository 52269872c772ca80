"""Plugin of pytest: a simulated GPU takes the place of CUDA where there is none (``python -m pytest -p …``)."""

import importlib
import os
import warnings

import pytest
import torch

DEVICES = int(os.environ.get("SIMCUDA_DEVICES", "1"))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:GPU available but not used")  # as what is to be compared
    if torch.cuda.is_available():  # a real one: the tests are the same, but those that count waits
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's helper, about what it did not find
        importlib.import_module("simcuda").install(devices=DEVICES)


@pytest.fixture(autouse=True)
def _no_races():
    """Nothing is written to pinned memory from which a copy may be under way."""
    simcuda = importlib.import_module("simcuda")
    before = len(simcuda.races())
    yield
    assert simcuda.races()[before:] == []
