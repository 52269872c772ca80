"""Entry point: an environment variable adds the callbacks to every Trainer, without a change of code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytorch_lightning as pl

VARIABLE = "LIGHTNING_MNN_CALLBACKS"
NAMES = ("detector", "recorder", "monitor")
TIERS = ("light", "standard", "full")


def factory() -> list[pl.Callback]:
    """Callbacks that Lightning adds to each new Trainer: none, unless ``LIGHTNING_MNN_CALLBACKS`` names some.

    Raises:
        ValueError: the variable contains an unknown name.
    """
    names, tier = asked_for(os.environ.get(VARIABLE, ""))
    if not names:
        return []
    from lightning_mnn.callbacks.added import AddedCallbacks  # noqa: PLC0415 (all Trainers call this function)

    return [AddedCallbacks(names, tier)]


def asked_for(value: str) -> tuple[tuple[str, ...], str]:
    """The callbacks that a value of the variable requests, and their tier of cost.

    "1" requests all, "0" or nothing none, a list those that it names. One of its words may be a tier; alone, it
    requests all.

    Raises:
        ValueError: a name is unknown, or there are several tiers.

    >>> asked_for("1"), asked_for("monitor, recorder"), asked_for("0")
    ((('detector', 'recorder', 'monitor'), 'full'), (('recorder', 'monitor'), 'full'), ((), 'full'))
    >>> asked_for("light"), asked_for("detector,standard")
    ((('detector', 'recorder', 'monitor'), 'light'), (('detector',), 'standard'))
    """
    words = {word.strip().lower() for word in value.split(",")} - {"", "0"}
    unknown, tiers, names = sorted(words - {"1", *NAMES, *TIERS}), words & set(TIERS), words & set(NAMES)
    if unknown or len(tiers) > 1:
        problem = f"there is no {', '.join(unknown)}" if unknown else "there can be one tier"
        raise ValueError(
            f"{VARIABLE} must be 1, 0 or a list of {', '.join(NAMES)} with commas between them, and a tier "
            f"({', '.join(TIERS)}), got {value!r}: {problem}"
        )
    everything = "1" in words or (tiers and not names)
    return tuple(name for name in NAMES if name in names or everything), next(iter(tiers), "full")
