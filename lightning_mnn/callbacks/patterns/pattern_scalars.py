"""The values that are logged of the patterns at one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape.pattern import count_flips, distinct_patterns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from lightning_mnn.landscape.kinks.layers import KinkLayer
    from lightning_mnn.landscape.pattern import PackedPattern


def pattern_scalars(
    here: Mapping[str, PackedPattern],
    now: Mapping[str, PackedPattern],
    last: Mapping[str, PackedPattern],
    first: Mapping[str, PackedPattern],
    layers: Mapping[str, KinkLayer],
    visited: Sequence[int],
) -> dict[str, Tensor | float | None]:
    """Flips, distinct patterns and inactive units, in total and by layer, by logged name.

    Args:
        here: the patterns at this step, on the module's device.
        now: the same, on the CPU.
        last: those of the last snapshot, on the module's device.
        first: those of the first one, on the module's device.
        layers: the layers.
        visited: number of distinct patterns so far, of each replica.
    """
    flips, from_start = (
        dict(zip(here, count_flips([(here[name], before[name]) for name in here]), strict=True))
        for before in (last, first)
    )
    pairs = {name: p.width * p.bits.shape[-2] for name, p in now.items()}
    activity = {
        name: pattern.activity(pieces)
        for name, pattern in now.items()
        if (pieces := layers[name].active_pieces) is not None
    }
    scalars: dict[str, Tensor | float | None] = {
        "pattern/flips": _total(flips.values()),
        "pattern/flips_from_start": _total(from_start.values()),
        "pattern/hamming_from_start": _total(from_start.values()).to(torch.float64) / sum(pairs.values()),
        "pattern/regions_visited": torch.tensor(visited),
        "pattern/distinct": distinct_patterns(list(now.values())),
    }
    if activity:
        scalars |= {
            "pattern/never_active_units": _total(a.never_active for a in activity.values()),
            "pattern/always_active_units": _total(a.always_active for a in activity.values()),
            "pattern/dead_fraction": _total(a.never_active for a in activity.values()).to(torch.float64)
            / sum(now[name].width for name in activity),
            "pattern/unactivated_samples": _any_layer(a.unactivated for a in activity.values()).sum(-1),
        }
    for name, pattern in now.items():
        of_layer = {
            "flips": flips[name],
            "flips_from_start": from_start[name],
            "hamming_from_start": from_start[name].to(torch.float64) / pairs[name],
            "distinct": distinct_patterns([pattern]),
        }
        if name in activity:
            of_layer["never_active_units"] = activity[name].never_active
            of_layer["always_active_units"] = activity[name].always_active
            of_layer["dead_fraction"] = activity[name].never_active.to(torch.float64) / pattern.width
        scalars |= {f"pattern/{name}/{quantity}": value for quantity, value in of_layer.items()}
    return scalars


def _total(counts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(counts)).sum(0)


def _any_layer(flags: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(flags)).any(0)
