"""When the patterns and the weights of a training settle.

Shapes: ``...`` leading axes (replicas), T recorded steps.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.pattern import count_packed
from lightning_mnn.utilities.transfer import to_host

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from lightning_mnn.landscape.pattern import PackedPattern


def freeze_step(snapshots: Iterable[tuple[int, Mapping[str, PackedPattern]]]) -> Tensor:
    """First recorded step after which fewer than 1 % of all (sample, unit) pairs of all layers still change.

    A pair changes after a step if it is on different pieces in two later snapshots, or in that step's and a later one.
    So a pair that changes often counts once. At the last snapshot no pair changes any more.

    Args:
        snapshots: steps and patterns by layer, the last first; read only as far back as needed. Two of them and one
            array of their size are in memory.

    Returns:
        int64 (...), on the CPU.

    Raises:
        ValueError: there are no snapshots, or they are of different layers, units or samples.

    >>> from lightning_mnn.landscape import ActivationPattern
    >>> pattern = lambda *on: {"1": ActivationPattern(torch.tensor([on])).pack()}
    >>> int(freeze_step([(30, pattern(True, True)), (20, pattern(True, True)), (10, pattern(True, False))]))
    20
    """
    found: Tensor | None = None
    changing: dict[str, Tensor] = {}
    later: Mapping[str, PackedPattern] = {}
    for step, patterns in snapshots:
        if found is None:
            changing = {name: torch.zeros_like(pattern.bits) for name, pattern in patterns.items()}
            found = torch.full(next(iter(patterns.values())).lead, step)
            later = patterns
            continue
        if patterns.keys() != later.keys() or not all(p.is_comparable(later[n]) for n, p in patterns.items()):
            raise ValueError(f"the snapshot of step {step} has other layers, units or samples than a later one")
        for name, pattern in patterns.items():
            changing[name] |= pattern.bits ^ later[name].bits.to(pattern.bits.device)
        still = _share(changing, patterns) < tolerances.MAX_CHANGING_SHARE
        if not still.any():
            break
        found, later = torch.where(still, step, found), patterns
    if found is None:
        raise ValueError("snapshots must not be empty: give the patterns of one recorded step or more")
    return found


def _share(changing: Mapping[str, Tensor], patterns: Mapping[str, PackedPattern]) -> Tensor:
    """The share of pairs that change, of all layers together, (...)."""
    on_host = zip(changing, to_host(list(changing.values())), strict=True)
    counts = [count_packed(bits, patterns[name].num_pieces) for name, bits in on_host]
    pairs = sum(pattern.width * pattern.bits.shape[-2] for pattern in patterns.values())
    return reduce(operator.add, counts).to(torch.float64) / pairs


def weights_freeze_step(steps: Tensor, lengths: Tensor) -> Tensor:
    """First recorded step after which the weights move less than 1 % of their path through the recorded steps.

    Args:
        steps: the recorded steps, int64 (T,).
        lengths: lengths of the moves between successive steps, ‖θ_{t+1} − θ_t‖, (..., T − 1).

    Returns:
        int64 (...); the first step, if the weights never moved.

    >>> weights_freeze_step(torch.tensor([0, 10, 20, 30]), torch.tensor([5.0, 5.0, 0.01]))
    tensor(20)
    """
    rest = torch.cat([lengths, torch.zeros_like(lengths[..., :1]) if lengths.shape[-1] else lengths.new_zeros(1)], -1)
    rest = rest.flip(-1).cumsum(-1).flip(-1)
    settled = rest < tolerances.MAX_CHANGING_SHARE * rest[..., :1]
    first = torch.where(settled.any(-1), settled.to(torch.int64).argmax(-1), 0)
    return steps.to(first.device)[first]
