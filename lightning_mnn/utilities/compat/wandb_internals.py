"""Private and undocumented parts of W&B and of wandb-workspaces."""

from __future__ import annotations

import os
import re
from typing import Any

from lightning_mnn.utilities.compat.missing import attribute

_SERVICE = "WANDB_SERVICE"

IMPORTED_WHEN_A_RUN_STARTS = ("wandb.sdk.launch",)  # by wandb.init, which takes a second for it


def local_step(run: Any) -> int:
    """W&B's next step, as this process counts it: ``Run._local_step``, before W&B 0.28 ``Run._step``.

    If neither exists, it is ``Run.step``, which may wait for W&B's service process.
    """
    if run.disabled:  # it does not count steps
        return 0
    for name in ("_local_step", "_step"):
        step = getattr(run, name, None)
        if isinstance(step, int):
            return step
    return int(run.step)


def forget_foreign_service() -> None:
    """Make W&B start a service for this process, unless it has one: ``WANDB_SERVICE`` contains the owner's process id.

    The service of another process may have the run of a killed process open, use other accounts, or have ended.
    """
    owner = re.match(r"\d+-(\d+)-", os.environ.get(_SERVICE, ""))
    if owner is None or int(owner[1]) != os.getpid():
        os.environ.pop(_SERVICE, None)


def tell_terminal_to(listener: Any) -> None:
    """Send W&B's messages to a listener instead of the terminal: ``wandb.termsetup``.

    Args:
        listener: an object with methods ``info``, ``warning`` and ``error`` that take a message.
    """
    import wandb  # noqa: PLC0415 (slow)

    attribute(wandb, "termsetup", "wandb")(wandb.Settings(silent=True), listener)


def workspace_content(workspace: Any) -> dict[str, Any]:
    """A workspace of wandb-workspaces in the form in which W&B stores it: ``Workspace._to_model``."""
    view = attribute(workspace, "_to_model", "wandb-workspaces")()
    content: dict[str, Any] = view.model_dump(mode="json", by_alias=True, exclude_none=True)
    return content
