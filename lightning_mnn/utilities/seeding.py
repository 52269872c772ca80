"""Random generators that depend only on a seed and a purpose; states of the global generators."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import torch

from lightning_mnn.utilities.validation import seed_number


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose: equal for equal arguments on any machine, independent between purposes.

    Weights and data drawn with one seed must not come from one stream, or the first weights would equal the first
    inputs. Replica r of a run with seed s uses seed s + r, so it equals the single run with that seed.

    Raises:
        ArgumentError: the seed is not a whole number, or it is negative.

    >>> a, b = generator(0, "inputs"), generator(0, "weights")
    >>> bool(torch.equal(torch.randn(3, generator=a), torch.randn(3, generator=b)))
    False
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in purpose]
    state = np.random.SeedSequence([seed_number("seed", seed), *words]).generate_state(2, dtype=np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def shared_states() -> dict[str, Any]:
    """The states of the global random generators of torch, NumPy and Python, as values that a checkpoint can contain.

    The states of the CUDA devices are a list in the order of the devices.

    >>> before = shared_states()
    >>> drawn = torch.rand(3), random.random()
    >>> set_shared_states(before)
    >>> torch.equal(torch.rand(3), drawn[0]), random.random() == drawn[1]
    (True, True)
    """
    states = {"cpu": torch.get_rng_state(), "numpy": _state_of_numpy(), "python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_shared_states(states: dict[str, Any]) -> None:
    """Restore the states of the global random generators; states of devices that this machine lacks are ignored."""
    torch.set_rng_state(states["cpu"].cpu())
    np.random.set_state(states["numpy"])  # noqa: NPY002 (the global generator is meant)
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state.cpu(), device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"].cpu())


def _state_of_numpy() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator is meant)
    inner = {key: part.tolist() if isinstance(part, np.ndarray) else part for key, part in state["state"].items()}
    return {**state, "state": inner}
