"""Random generators that depend on a seed and a purpose, and on nothing else."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from lightning_mnn.validation import seed_number


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose: equal for equal arguments on any machine, independent between purposes.

    Weights and data drawn with one seed must not come from one stream, or the first weights would equal the first
    inputs. Replica r of a run with seed s uses seed s + r, so it equals the single run with that seed.

    Raises:
        ArgumentError: a seed that is no whole number, or negative.

    >>> a, b = generator(0, "inputs"), generator(0, "weights")
    >>> bool(torch.equal(torch.randn(3, generator=a), torch.randn(3, generator=b)))
    False
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in purpose]
    state = np.random.SeedSequence([seed_number("seed", seed), *words]).generate_state(2, dtype=np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
