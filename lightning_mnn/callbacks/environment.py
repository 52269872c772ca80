"""Entry point: an environment variable adds the callbacks to every Trainer, without a change of code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytorch_lightning as pl

VARIABLE = "LIGHTNING_MNN_CALLBACKS"
NAMES = ("detector", "recorder", "monitor")


def factory() -> list[pl.Callback]:
    """Callbacks that Lightning adds to each new Trainer: none, unless ``LIGHTNING_MNN_CALLBACKS`` names some.

    Raises:
        ValueError: the variable contains an unknown name.
    """
    names = asked_for(os.environ.get(VARIABLE, ""))
    if not names:
        return []
    from lightning_mnn.callbacks.added import AddedCallbacks  # noqa: PLC0415 (all Trainers call this function)

    return [AddedCallbacks(names)]


def asked_for(value: str) -> tuple[str, ...]:
    """Names of the callbacks that a value of the variable requests: "1" for all, "0" or nothing for none, or a list.

    Raises:
        ValueError: a name is unknown.

    >>> asked_for("1"), asked_for("monitor, recorder"), asked_for("0")
    (('detector', 'recorder', 'monitor'), ('recorder', 'monitor'), ())
    """
    words = {word.strip().lower() for word in value.split(",")} - {"", "0"}
    names = set(NAMES) if "1" in words else words
    unknown = sorted(words - {"1", *NAMES})
    if unknown:
        raise ValueError(
            f"{VARIABLE} must be 1, 0 or a list of {', '.join(NAMES)} with commas between them, got {value!r}: "
            f"there is no {', '.join(unknown)}"
        )
    return tuple(name for name in NAMES if name in names)
