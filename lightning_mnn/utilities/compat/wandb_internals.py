"""Private and undocumented parts of W&B and of wandb-workspaces."""

from __future__ import annotations

import os
import re
from typing import Any

from lightning_mnn.utilities.compat.missing import attribute

_SERVICE = "WANDB_SERVICE"


def local_step(run: Any) -> int:
    """W&B's step of what is logged next, as this process counts: ``Run._local_step``, before W&B 0.28 ``Run._step``.

    Where there is neither, ``Run.step``, which may wait for W&B's own process.
    """
    if run.disabled:  # which counts nothing
        return 0
    for name in ("_local_step", "_step"):
        step = getattr(run, name, None)
        if isinstance(step, int):
            return step
    return int(run.step)


def forget_foreign_service() -> None:
    """Let W&B start a service of this process's own, unless it has: the number of the process in ``WANDB_SERVICE``.

    Another process's may hold the run of one that was killed, know other accounts, or be gone.
    """
    owner = re.match(r"\d+-(\d+)-", os.environ.get(_SERVICE, ""))
    if owner is None or int(owner[1]) != os.getpid():
        os.environ.pop(_SERVICE, None)


def tell_terminal_to(listener: Any) -> None:
    """Let a listener hear, instead of the terminal, what W&B says: ``wandb.termsetup``.

    Args:
        listener: with methods ``info``, ``warning`` and ``error`` of a message.
    """
    import wandb  # noqa: PLC0415 (slow)

    attribute(wandb, "termsetup", "wandb")(wandb.Settings(silent=True), listener)


def workspace_content(workspace: Any) -> dict[str, Any]:
    """A workspace of wandb-workspaces as W&B keeps it: ``Workspace._to_model``."""
    view = attribute(workspace, "_to_model", "wandb-workspaces")()
    content: dict[str, Any] = view.model_dump(mode="json", by_alias=True, exclude_none=True)
    return content
