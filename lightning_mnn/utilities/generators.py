"""States of the generators that all of a program shares: torch's of each device, numpy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def shared_states() -> dict[str, Any]:
    """The states, as tensors and plain values that a checkpoint can hold; those of CUDA devices in their order.

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
    """Let the generators go on from states, as far as there are such devices here."""
    torch.set_rng_state(states["cpu"].cpu())
    np.random.set_state(states["numpy"])  # noqa: NPY002 (the one that a program shares)
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state.cpu(), device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"].cpu())


def _state_of_numpy() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (the one that a program shares)
    within = {key: part.tolist() if isinstance(part, np.ndarray) else part for key, part in state["state"].items()}
    return {**state, "state": within}
